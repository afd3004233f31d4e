"""Nested dropout after and around the training: which width to keep, how to cut down to it, and the term for the loop.

:mod:`regularized.noisy_labels.nested_dropout.layer` has the paper, its symbols, and the layers.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.surgery import NoEffectWarning
from regularized.mechanisms.two_networks import evaluating
from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    check_distribution,
    nest_classifier,
    nested_layers,
)
from regularized.training.data import as_source
from regularized.training.step import Batch, Step, call_model
from regularized.training.terms import Term

__all__ = ["FirstChannels", "NestedWidth", "best_width", "cut_to_width", "select_width", "width_accuracies"]

# Shapes: B samples of a batch, D channels of the features, C classes.

_BLOCK = 2**22  # numbers that the outputs of several widths may take at once, 16 MB in float32


@torch.no_grad()
def width_accuracies(models: nn.Module | Sequence[nn.Module], data: Any, *, layer: str | None = None) -> Tensor:
    """Accuracy of every width 1 ... D on validation data; for several models that of their mean output.

    Where the nested layer feeds a linear classifier whose output is the model's, the outputs of all widths are a
    running sum over channels: one pass over the data, plus B x D x C additions a batch. Anywhere else every width takes
    passes of its own.

    Args:
        models: one model, or several with nested layers of the same D.
        data: batches (x, y), see :func:`~regularized.training.data.as_source`; y class labels (B,). With several
            processes give every process all of it.
        layer: name of the nested layer (or of the ``NestedLinear``) where a model has several; the others evaluate at
            their ``keep``.

    Returns:
        (D,) float64 shares in [0, 1], on the CPU; entry j belongs to width j + 1.

    Raises:
        ValueError: no nested layer, several and none was named, models of different D, or batches without labels.

    Examples:
        >>> model = NestedLinear(2, 2, sigma=1.0)
        >>> model.weight.data = torch.tensor([[1.0, -5.0], [-1.0, 5.0]])
        >>> x = torch.tensor([[1.0, 0.1], [-1.0, -1.0]])  # the second channel spoils the second sample
        >>> width_accuracies(model, [(x, torch.tensor([0, 1]))])
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    networks = _as_tuple(models)
    probes = [_Probe(network, layer) for network in networks]
    sizes = {probe.nested.features for probe in probes}
    if len(sizes) != 1:
        raise ValueError(f"the models have nested layers of different sizes, {sorted(sizes)}: no width is common")
    (features,) = sizes
    device = next(networks[0].parameters()).device
    correct = torch.zeros(features, dtype=torch.int64, device=device)
    count = 0
    with evaluating(*networks):
        for raw in as_source(data, seed=0).batches(0):
            batch = Batch.of(raw).map(lambda t: t.to(device, non_blocking=True))
            labels = batch.targets
            if labels is None or labels.is_floating_point() or labels.ndim != 1:
                raise ValueError("choosing a width needs class labels: batches (x, y) with integer y of shape (B,)")
            at = 0
            for outputs in _outputs_of_all_widths(probes, batch.inputs, features):
                hits = (outputs.argmax(dim=-1) == labels[:, None]).sum(dim=0)
                correct[at : at + len(hits)] += hits
                at += len(hits)
            count += len(labels)
    return correct.double().cpu() / count


def best_width(accuracies: Tensor, *, penalty: float = 1e-5) -> tuple[int, float]:
    """The width k with the largest ``accuracy(k) - penalty (k - 1)``; of equals the smallest.

    Args:
        accuracies: (D,) shares in [0, 1], see :func:`width_accuracies`.
        penalty: what another channel must gain, >= 0; default 1e-5 (official code), which decides near-ties only.

    Returns:
        The width, 1 ... D, and its penalised accuracy.

    Raises:
        ValueError: ``accuracies`` has another form, or ``penalty`` is negative.

    Examples:
        >>> best_width(torch.tensor([0.5, 0.75, 0.75]), penalty=0.0)
        (2, 0.75)
    """
    if accuracies.ndim != 1 or len(accuracies) == 0:
        raise ValueError(f"accuracies must have shape (D,), one for each width; got {tuple(accuracies.shape)}")
    if penalty < 0:
        raise ValueError(f"penalty must be >= 0, got {penalty}")
    values: list[float] = [accuracy - penalty * j for j, accuracy in enumerate(accuracies.tolist())]
    best = max(range(len(values)), key=values.__getitem__)  # the first of equals
    return best + 1, values[best]


def select_width(
    models: nn.Module | Sequence[nn.Module], data: Any, *, layer: str | None = None, penalty: float = 1e-5
) -> tuple[int, float]:
    """Choose the width on validation data and set it as ``keep`` of the nested layer of every model.

    It is a choice *on these data*, and its accuracy is optimistic: report that on others. A few labels that were
    checked by hand are enough for it.

    Args:
        models: one model, or several that predict together (their mean output decides).
        data: batches (x, y) of validation data, see :func:`width_accuracies`.
        layer: name of the nested layer where there are several.
        penalty: see :func:`best_width`.

    Returns:
        The width, and the accuracy in [0, 1] at it.

    Raises:
        ValueError: see :func:`width_accuracies` and :func:`best_width`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), NestedLinear(8, 3, sigma=2.0))
        >>> width, accuracy = select_width(model, [(torch.randn(20, 4), torch.randint(3, (20,)))])
        >>> model[2].nested.keep == width
        True
    """
    accuracies = width_accuracies(models, data, layer=layer)
    width, _ = best_width(accuracies, penalty=penalty)
    for network in _as_tuple(models):
        _find(network, layer)[1].keep = width
    return width, float(accuracies[width - 1])


def _as_tuple(models: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    return (models,) if isinstance(models, nn.Module) else tuple(models)


def _find(model: nn.Module, layer: str | None) -> tuple[str, NestedDropout]:
    """Name and nested layer; the name is that of the ``NestedLinear`` where it belongs to one."""
    layers = nested_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nested dropout; put NestedDropout or NestedLinear into it, or use "
            "nest_classifier(model, name, sigma=...)"
        )
    if layer is None and len(layers) > 1:
        raise ValueError(f"the model has several nested layers, {list(layers)}: name one, layer=...")
    name = next(iter(layers)) if layer is None else layer
    if name not in layers:
        raise ValueError(f"the model has no nested layer {name!r}; it has {list(layers)}")
    return name, layers[name]


class _Probe:
    """Runs a model once and catches the features in front of the nested layer and the classifier behind it."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self.model = model
        self.name, self.nested = _find(model, layer)
        self.owner = model.get_submodule(self.name)

    def run(self, inputs: Any) -> tuple[Tensor, nn.Linear | None]:
        """Features (B, D), and the linear classifier that makes the model's output of them, where there is one."""
        features: Tensor | None = None
        passed: Tensor | None = None
        classifier: nn.Linear | None = None
        output: Tensor | None = None

        def catch(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            nonlocal features, passed, classifier, output
            features = args[0]
            if isinstance(module, NestedLinear):
                classifier, output = module, out
                return None
            passed = args[0].view_as(args[0])  # an object of its own: whoever gets it reads the nested layer
            return passed

        def follow(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            nonlocal classifier, output
            if isinstance(module, nn.Linear) and passed is not None and args and args[0] is passed:
                classifier, output = module, out

        handles = [self.owner.register_forward_hook(catch)]
        if not isinstance(self.owner, NestedLinear):
            readers = [module for module in self.model.modules() if type(module) is nn.Linear]
            handles += [reader.register_forward_hook(follow) for reader in readers]
        try:
            result = self.at_width(inputs, self.nested.features)
        finally:
            for handle in handles:
                handle.remove()
        if features is None:
            raise ValueError(f"the nested layer {self.name!r} was not reached by the forward pass")
        return features, classifier if result is output and features.ndim == 2 else None

    def at_width(self, inputs: Any, width: int) -> Tensor:
        """The model's output at one width."""
        before, self.nested.keep = self.nested.keep, width
        try:
            result = call_model(self.model, inputs)
        finally:
            self.nested.keep = before
        output: Tensor = getattr(result, "logits", result)
        return output


def _outputs_of_all_widths(probes: Sequence[_Probe], inputs: Any, features: int) -> Iterator[Tensor]:
    """Outputs (B, widths, C), summed over the models, for successive ranges of widths that fit into memory."""
    caught = [probe.run(inputs) for probe in probes]
    heads = [(h, classifier) for h, classifier in caught if classifier is not None]
    if len(heads) < len(probes):
        for width in range(1, features + 1):
            yield torch.stack([probe.at_width(inputs, width) for probe in probes]).sum(dim=0)[:, None]
        return
    h, classifier = heads[0]
    block = max(1, _BLOCK // max(1, len(h) * classifier.out_features))
    sums = [h.new_zeros(len(h), 1, c.out_features) if c.bias is None else c.bias[None, None] for h, c in heads]
    for start in range(0, features, block):
        part = slice(start, start + block)
        # The outputs at width k are the bias and the sum over j <= k of h_j W_j.
        running = [
            (h[:, part, None] * c.weight.T[None, part]).cumsum(dim=1).add_(before)
            for before, (h, c) in zip(sums, heads, strict=True)
        ]
        sums = [each[:, -1:].clone() for each in running]
        for other in running[1:]:
            running[0] += other
        yield running[0]


# -- cutting ------------------------------------------------------------------------------------------

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
    name, nested = _find(model, layer)
    chosen = nested.keep if width is None else nested.checked(width)
    if chosen is None:
        raise ValueError(
            f"no width was chosen for {name or 'the model'!r}: call select_width(model, validation_data) first, or "
            "give width=..."
        )
    small = copy.deepcopy(model)
    if isinstance(small, NestedLinear):
        return nn.Sequential(FirstChannels(chosen, dim=-1), _first_columns(small, chosen)).train(model.training)
    _cut(small, name, chosen, classifier)
    return small


def _cut(model: nn.Module, name: str, width: int, classifier: str | None) -> None:
    """Cut in place."""
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
        model.set_submodule(reader, _first_columns(linear, width))
    produced = _cut_producer(model, chain[:position], width, nested, flat=isinstance(owner, NestedLinear))
    new: nn.Module = nn.Identity() if produced else FirstChannels(width, dim=nested.dim)
    if isinstance(owner, NestedLinear):
        narrow = _first_columns(owner, width)
        new = narrow if produced else nn.Sequential(new, narrow)
    model.set_submodule(name, new.train(owner.training))


def _first_columns(linear: nn.Linear, width: int) -> nn.Linear:
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


# -- the term ----------------------------------------------------------------------------------------


class NestedWidth(Term):
    """Nested dropout in the loop: one random width an optimizer step, for all its micro-batches and processes.

    It replaces the named linear classifiers by :class:`NestedLinear` with the same parameters, adds nothing to the
    loss, and draws from a generator of its own, which checkpoints restore. With several layers a fair die decides at
    each step which of them is cut, and the others pass everything (the paper's way with the two hidden layers of
    VGG-19). Choose the width in the trainer's ``evaluate``; ``trainer.merge()`` cuts the model down to it.

    Args:
        layers: name or names of the linear layers whose inputs are cut.
        sigma: scale of the widths in channels, > 0, see :class:`NestedDropout`.
        mu: the most likely width; default 0 (official code).
        seed: of the widths; default 0.

    Raises:
        ValueError: a setting is outside its range; at the start of training: no such linear layer.

    Examples:
        >>> from functools import partial
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))
        >>> data = TensorData(torch.randn(20, 4), torch.randint(3, (20,)), batch_size=10)
        >>> trainer = Trainer(
        ...     model,
        ...     terms={"task": CrossEntropy(), "widths": NestedWidth("2", sigma=5.0)},
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     evaluate=lambda model: dict(zip(("width", "accuracy"), select_width(model, data))),
        ... )
        >>> history = trainer.fit(data, epochs=2)
        >>> trainer.merge()[2].in_features == history[-1]["width"]
        True
    """

    contributes = False

    def __init__(self, layers: str | Sequence[str], *, sigma: float, mu: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers:
            raise ValueError("layers must name at least one linear layer of the model")
        check_distribution(sigma, mu)
        self.sigma = sigma
        self.mu = mu
        self.generator = torch.Generator().manual_seed(seed)
        self._nested: tuple[NestedDropout, ...] = ()
        self._due = True

    def attach(self, model: nn.Module) -> None:
        """Put the nested layers in; a second time does nothing."""
        self._nested = tuple(
            nest_classifier(model, name, sigma=self.sigma, mu=self.mu, generator=self.generator).nested
            for name in self.layers
        )

    def transform(self, batch: Batch) -> Batch:
        """Before the first micro-batch of an optimizer step: draw its width. The batch stays as it is."""
        if self._due and self.training:
            self._due = False
            count = len(self._nested)
            cut = int(torch.randint(count, (), generator=self.generator, device="cpu")) if count > 1 else 0
            for number, layer in enumerate(self._nested):
                layer.hold(layer.draw() if number == cut else layer.features)
        return batch

    def after_step(self, step: Step) -> None:
        """The width of this step is used up."""
        self.reset()

    def reset(self) -> None:
        """Let go of the width that is held, and draw for the next step, as at the start."""
        self._due = True
        for layer in self._nested:
            layer.hold(None)

    def merge(self, model: nn.Module) -> None:
        """Leave plain linear layers in place: cut to their ``keep``, of full width where none was chosen."""
        for name in self.layers:
            old = model.get_submodule(name)
            if isinstance(old, NestedLinear):
                if old.nested.keep in (None, old.in_features):
                    model.set_submodule(name, _first_columns(old, old.in_features))
                else:
                    _cut(model, name, old.nested.keep, None)
        self._nested = ()
