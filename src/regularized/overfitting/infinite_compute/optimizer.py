"""What is set inside a run: decoupled decay of weight matrices alone, and a rate that rises, then falls to zero."""

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regularized.mechanisms.ranges import allowed, at_least, between, share
from regularized.training.progress import Progress, Schedule

__all__ = ["check_decay", "decay_groups", "warmup_then_cosine"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_KINDS = ("norm", "embedding", "bias")
# Their weight_decay is added to the gradient, unless a group says otherwise. Adafactor and Muon decouple it, as AdamW.
_COUPLED = (
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


@allowed(weight_decay=at_least(0.0))
def decay_groups(model: nn.Module, weight_decay: float, *, skip: Collection[str] = _KINDS) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: what decays, and what does not.

    Args:
        model: its trainable parameters are grouped; one that two modules share counts as the first one's.
        weight_decay: of the first group, >= 0; the paper's best are 0.4 to 3.2 on 0.2 to 0.8 billion tokens.
        skip: kinds that do not decay: ``"norm"``, ``"embedding"``, ``"bias"``; default all three, as in the paper. The
            output head decays.

    Returns:
        Two groups, ``{"params", "weight_decay"}``; a group without parameters is left out.

    Raises:
        ValueError: an unknown kind, a decay below zero, or nothing to train.

    Warns:
        UserWarning: the decay reaches norms or embeddings, which are named.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
        >>> [(len(group["params"]), group["weight_decay"]) for group in decay_groups(model, 1.6)]
        [(1, 1.6), (4, 0.0)]
    """
    if unknown := sorted(set(skip) - set(_KINDS)):
        raise ValueError(f"skip names kinds of parameters, {', '.join(map(repr, _KINDS))}; got {unknown}")
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    reached: list[str] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            kind = _kind(module, name)
            if kind in skip:
                spared.append(parameter)
                continue
            decayed.append(parameter)
            if kind in ("norm", "embedding"):
                reached.append(f"{path}.{name}" if path else name)
    if not seen:
        raise ValueError(f"{type(model).__name__} has no parameter that needs a gradient, so nothing is trained")
    if reached and weight_decay > 0:
        warnings.warn(
            f"the decay of {weight_decay:g} reaches norms or embeddings: {', '.join(reached[:6])}"
            f"{f' and {len(reached) - 6} more' if len(reached) > 6 else ''}; the paper's skips them, "
            'skip=("norm", "embedding", "bias")',
            stacklevel=2,
        )
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _kind(module: nn.Module, name: str) -> str:
    if isinstance(module, _NORMS) or "norm" in type(module).__name__.lower():
        return "norm"  # by name, too: language models bring norms of their own
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    return "bias" if name == "bias" or name.endswith("_bias") or name.startswith("bias_") else "weight"


def check_decay(optimizer: torch.optim.Optimizer) -> None:
    """Refuse decay that is not this paper's: coupled with the gradient, or past zero in one step.

    Args:
        optimizer: any.

    Raises:
        ValueError: it adds ``weight_decay`` to the gradient (Adam, SGD, ...), or ``lr * weight_decay >= 1``.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> check_decay(torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=3.2))
        >>> check_decay(torch.optim.Adam(layer.parameters(), lr=3e-3, weight_decay=3.2))
        Traceback (most recent call last):
        ...
        ValueError: Adam adds weight_decay=3.2 to the gradient, which is not what is meant here; use torch.optim.AdamW
    """
    for group in optimizer.param_groups:
        decay, rate = float(group.get("weight_decay", 0.0)), float(group["lr"])
        if decay <= 0:
            continue
        if isinstance(optimizer, _COUPLED) and not group.get("decoupled_weight_decay", False):
            raise ValueError(
                f"{type(optimizer).__name__} adds weight_decay={decay:g} to the gradient, which is not what is "
                "meant here; use torch.optim.AdamW"
            )
        if rate * decay >= 1:
            raise ValueError(
                f"lr * weight_decay must be below 1, got {rate:g} * {decay:g}: one step would shrink weights past "
                "zero; lower one of them"
            )


@dataclass(frozen=True, slots=True)
class _WarmupThenCosine:
    share: float
    floor: float

    def __call__(self, progress: Progress) -> float:
        done = progress.fraction
        if done < self.share:
            return done / self.share
        behind = (done - self.share) / (1 - self.share)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * behind)) / 2


@allowed(share=between(0.0, 1.0, "[)"), floor=share())
def warmup_then_cosine(share: float = 0.01, floor: float = 0.0) -> Schedule:
    """The rate's factor: from 0 on a line for a share of the steps, then half a cosine from 1 to ``floor``.

    The cosine begins where the line ends; :func:`~regularized.training.progress.warmup` multiplies the two instead.

    Args:
        share: of all steps, in [0, 1); default 0.01, the paper's. 0 begins at the full rate.
        floor: in [0, 1]; default 0, the paper's, and part of the recipe: decay is multiplied by the rate.

    Examples:
        >>> rate = warmup_then_cosine(0.1)
        >>> [round(rate(Progress(step, 20)), 4) for step in (0, 1, 2, 11)]
        [0.0, 0.5, 1.0, 0.5]
    """
    return _WarmupThenCosine(share, floor)
