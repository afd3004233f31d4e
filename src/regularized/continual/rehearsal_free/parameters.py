"""Which parameters are trained, and which are held: all, attention's query, key and value, norms, or by a pattern.

The head is held only if asked for: its rows for new classes have no past to be held at.
"""

import re
import warnings
from typing import TypeAlias

from torch import nn

__all__ = ["Which", "head_of", "select_parameters", "train_only"]

Which: TypeAlias = str
"""``"all"``, ``"qkv"``, ``"norms"``, or a regular expression that is searched in the dotted names."""

# timm (qkv), transformers (query ...; q_proj ...), torch (in_proj_weight).
_QKV = r"(^|\.)(qkv|q_proj|k_proj|v_proj|query|key|value)\.|(^|\.)in_proj_(weight|bias)$"
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def head_of(model: nn.Module) -> str:
    """Name of the last module with parameters of its own, which in classifiers is the head.

    Raises:
        ValueError: the model has no parameters.

    Examples:
        >>> head_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(-1)))
        '2'
    """
    last: str | None = None
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            last = name
    if last is None:
        raise ValueError(f"{type(model).__name__} has no parameters")
    return last


def select_parameters(
    model: nn.Module, which: Which = "all", *, head: str | None = None, with_head: bool = False
) -> list[str]:
    """Names of trainable parameters, by default without those of the head.

    Args:
        model: searched through.
        which: see :data:`Which`; default ``"all"``.
        head: dotted name of the head; default :func:`head_of`.
        with_head: take those of the head, too, where they are selected; default False.

    Raises:
        ValueError: nothing is selected; or there is no module of the head's name.

    Warns:
        UserWarning: a pattern matches the head's parameters, which are left out.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> select_parameters(model, "qkv")
        ['self_attn.in_proj_weight', 'self_attn.in_proj_bias']
    """
    head = head_of(model) if head is None else head
    if head not in dict(model.named_modules()):
        raise ValueError(f"head {head!r} is no submodule; there are {sorted(n for n, _ in model.named_modules())[:20]}")
    matched = [name for name, p in model.named_parameters() if p.requires_grad and _matches(model, name, which)]
    chosen = [name for name in matched if with_head or not _inside(name, head)]
    if not chosen:
        names = [name for name, p in model.named_parameters() if p.requires_grad and not _inside(name, head)]
        raise ValueError(
            f"{which!r} selects no trainable parameter outside the head {head!r}; give 'all', 'qkv', 'norms' or a "
            f"regular expression that is found in names such as {names[:6]}"
        )
    if which not in ("all", "qkv", "norms") and len(chosen) < len(matched):
        warnings.warn(
            f"{which!r} also matches parameters of the head {head!r}; they are left out: new classes have no past",
            stacklevel=2,
        )
    return chosen


def train_only(model: nn.Module, which: Which, *, head: str | None = None) -> list[str]:
    """Freeze all parameters but those selected and the head's. Build the optimizer afterwards.

    Args:
        model: changed in place.
        which: see :data:`Which`.
        head: dotted name of the head; default :func:`head_of`.

    Returns:
        Names of what is trained, the head included.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> train_only(model, "norms")
        ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    head = head_of(model) if head is None else head
    kept = {*select_parameters(model, which, head=head), *(n for n, _ in model.named_parameters() if _inside(n, head))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return [name for name, _ in model.named_parameters() if name in kept]


def _inside(name: str, module: str) -> bool:
    return module == "" or name.startswith(f"{module}.")


def _matches(model: nn.Module, name: str, which: Which) -> bool:
    if which == "all":
        return True
    if which == "norms":
        return isinstance(model.get_submodule(name.rpartition(".")[0]), _NORMS)
    return re.search(_QKV if which == "qkv" else which, name) is not None
