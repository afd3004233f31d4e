"""Nested dropout after the training: a plain, smaller model, without the channels behind the chosen width.

:mod:`regularized.noisy_labels.nested_dropout.layer` has the paper, its symbols, and the layers.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from regularized.mechanisms.surgery import NoEffectWarning
from regularized.noisy_labels.nested_dropout.layer import NestedDropout, NestedLinear, find_nested, nested_layers

__all__ = ["FirstChannels", "cut_to_width"]

# What acts on each channel alone and makes 0 of 0: a channel can as well be missing there.
_PER_CHANNEL = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Hardswish, nn.Dropout, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten),
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (
    *_BATCH_NORMS,
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FirstChannels(nn.Module):
    """``x[:, :width]`` on axis ``dim``: what is left of nested dropout where no layer can be made narrower.

    Examples:
        >>> import torch
        >>> FirstChannels(2, dim=-1)(torch.arange(4.0)[None])
        tensor([[0., 1.]])
    """

    def __init__(self, width: int, *, dim: int = 1) -> None:
        super().__init__()
        self.width = width
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, ...) to (B, width, ...)."""
        return x.narrow(self.dim, 0, self.width)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{self.width}, dim={self.dim}"


def cut_to_width(
    model: nn.Module, *, layer: str | None = None, width: int | None = None, classifier: str | None = None
) -> nn.Module:
    """A smaller plain copy of a model, without what lies behind the chosen width; outputs in ``eval()`` mode stay.

    The classifier loses its columns. In an ``nn.Sequential`` the layer that makes the features (linear or convolution,
    with batch normalisation, pooling and elementwise functions behind it) loses its rows too, and nothing is left of
    the nested layer. Elsewhere a slice ``x[:, :k]`` takes its place.

    Args:
        model: left as it is.
        layer: name of the nested layer where there are several.
        width: what to cut to; default: the layer's ``keep``.
        classifier: name of the ``nn.Linear`` that reads a :class:`NestedDropout`; needed where it does not follow in
            the same ``nn.Sequential``.

    Returns:
        The copy. Its outputs are equal up to rounding: the products are sums over fewer columns.

    Raises:
        ValueError: no width was chosen, or the classifier is not found.

    Warns:
        NoEffectWarning: a normalisation stands between nested layer and classifier. It reads all channels, so nothing
            was cut.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), NestedLinear(32, 3, sigma=4.0))
        >>> model[2].nested.keep = 5
        >>> cut_to_width(model)
        Sequential(
          (0): Linear(in_features=6, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=3, bias=False)
        )
    """
    name, nested = find_nested(model, layer)
    chosen = nested.keep if width is None else nested.checked(width)
    if chosen is None:
        raise ValueError(
            f"no width was chosen for {name or 'the model'!r}: call select_width(model, validation_data) first, or "
            "give width=..."
        )
    small = copy.deepcopy(model)
    if isinstance(small, NestedLinear):
        return nn.Sequential(FirstChannels(chosen, dim=-1), first_columns(small, chosen)).train(model.training)
    cut_in_place(small, name, chosen, classifier)
    return small


def cut_in_place(model: nn.Module, name: str, width: int, classifier: str | None) -> None:
    """The work of :func:`cut_to_width`, in the model itself."""
    owner = model.get_submodule(name)
    nested = nested_layers(model)[name]
    chain = _chain(model, name)
    position = next((i for i, (key, _) in enumerate(chain) if key == name), 0)
    if not isinstance(owner, NestedLinear):
        reader = _reader(chain[position + 1 :], name) if classifier is None else classifier
        if reader is None:
            return
        linear = model.get_submodule(reader)
        if type(linear) is not nn.Linear or linear.in_features != nested.features:
            raise ValueError(
                f"{reader!r} is no nn.Linear that reads the {nested.features} channels of {name!r}: {linear}"
            )
        model.set_submodule(reader, first_columns(linear, width))
    produced = _cut_producer(model, chain[:position], width, nested, flat=isinstance(owner, NestedLinear))
    new: nn.Module = nn.Identity() if produced else FirstChannels(width, dim=nested.dim)
    if isinstance(owner, NestedLinear):
        narrow = first_columns(owner, width)
        new = narrow if produced else nn.Sequential(new, narrow)
    model.set_submodule(name, new.train(owner.training))


def first_columns(linear: nn.Linear, width: int) -> nn.Linear:
    """A plain linear layer with the first columns of another one."""
    new = nn.Linear(width, linear.out_features, bias=linear.bias is not None, device="meta")
    new.weight = nn.Parameter(linear.weight.detach()[:, :width].clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
    return new.train(linear.training)


def _chain(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The leaves, in the order of the computation, of the largest stack of ``nn.Sequential`` around ``name``."""
    parts = name.split(".")
    root: str | None = None
    for depth in reversed(range(len(parts))):
        key = ".".join(parts[:depth])
        if type(model.get_submodule(key)) is not nn.Sequential:
            break
        root = key

    def leaves(key: str) -> Iterator[tuple[str, nn.Module]]:
        module = model.get_submodule(key)
        if type(module) is not nn.Sequential:
            yield key, module
            return
        for child, _ in module.named_children():
            yield from leaves(f"{key}.{child}".lstrip("."))

    return [] if root is None else list(leaves(root))


def _reader(behind: Sequence[tuple[str, nn.Module]], name: str) -> str | None:
    """The linear layer that reads the nested one; None, with a warning, where a normalisation comes first."""
    for key, module in behind:
        if isinstance(module, _NORMS):
            warnings.warn(
                f"{key!r}, a {type(module).__name__}, stands between nested dropout {name!r} and the classifier and "
                "reads all channels, so nothing was cut. Put the normalisation in front of the nested layer",
                NoEffectWarning,
                stacklevel=4,
            )
            return None
        if isinstance(module, nn.Linear):
            return key
        if not isinstance(module, _PER_CHANNEL):
            break
    raise ValueError(
        f"the classifier that reads the nested dropout {name!r} does not follow in the same nn.Sequential; name it: "
        "classifier=..."
    )


def _cut_producer(
    model: nn.Module, before: Sequence[tuple[str, nn.Module]], width: int, nested: NestedDropout, *, flat: bool
) -> bool:
    """Take the rows behind ``width`` out of the layer that makes the features; False, nothing touched, without one."""
    norms: list[nn.Module] = []
    for _, module in reversed(before):
        shared = sum(other is module for _, other in model.named_modules(remove_duplicate=False)) > 1
        if shared and next(module.parameters(), None) is not None:
            return False
        if isinstance(module, nn.Flatten):
            flat = False  # D channels after flattening D channels: one position each, as the check of D below ensures
        elif isinstance(module, _BATCH_NORMS) and module.num_features == nested.features:
            norms.append(module)
        elif type(module) is nn.Linear or (isinstance(module, _CONVOLUTIONS) and not flat):
            attribute = "out_features" if isinstance(module, nn.Linear) else "out_channels"
            if getattr(module, attribute) != nested.features or getattr(module, "groups", 1) != 1:
                return False
            setattr(module, attribute, width)
            for norm in norms:
                norm.num_features = width  # type: ignore[assignment]
            for part in (module, *norms):
                _keep_rows(part, width)
            return True
        elif not isinstance(module, _PER_CHANNEL):
            return False
    return False


def _keep_rows(module: nn.Module, width: int) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, key, nn.Parameter(parameter.detach()[:width].clone(), parameter.requires_grad))
    for key, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim:
            setattr(module, key, buffer[:width].clone())
