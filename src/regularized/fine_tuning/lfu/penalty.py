"""The penalty of Learning from the Undesirable: how far hidden states, or outputs, are moved by a step.

Paper and code differ: the paper sums over the width d of the states, but its lambda = 5 goes with the code's mean.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice

__all__ = ["hidden_state_consistency", "logit_consistency"]

# Shapes: B samples, T positions, d width of the hidden states, C classes or tokens.

Reduction: TypeAlias = Literal["mean", "sum"]
REDUCTION = Choice("mean", "sum", meaning="over the width d")


def difference(clean: Tensor, moved: Tensor, mask: Tensor | None) -> Tensor:
    """``h' - sg[h]`` at valid positions, 0 elsewhere; in float32 at least."""
    dtype = torch.promote_types(moved.dtype, torch.float32)
    away = moved.to(dtype) - clean.to(dtype)
    if mask is not None:  # not a product: what stands at padded positions may be anything, also nan
        away = torch.where(mask.view(*mask.shape, *[1] * (away.ndim - mask.ndim)), away, 0.0)
    return away


def hidden_state_consistency(
    clean: Sequence[Tensor] | Tensor,
    moved: Sequence[Tensor] | Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared distance of hidden states, averaged over valid positions and layers (the paper's consistency loss).

    Args:
        clean: hidden states (B, T, d), or (B, d), of each layer before the step; no gradient flows into them.
        moved: the same after it.
        mask: (B, T), or (B,), True where a position counts; default all. Without any valid one the result is 0.
        reduction: over d: ``"mean"`` (official code; lambda = 5), ``"sum"`` (the paper's formula; lambda = 5 / d).

    Returns:
        Scalar, in float32 at least.

    Raises:
        ValueError: numbers of layers or shapes differ, the mask does not fit, or an unknown ``reduction``.

    Examples:
        >>> hidden_state_consistency(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([[True, False]]))
        tensor(1.)
    """
    before, after = ([states] if isinstance(states, Tensor) else list(states) for states in (clean, moved))
    REDUCTION("reduction", reduction)
    if len(before) != len(after) or not before:
        raise ValueError(f"need the same layers before and after the step, got {len(before)} and {len(after)}")
    total: Tensor | float = 0.0
    for h, other in zip(before, after, strict=True):
        check_states(h, other, mask)
        distance = difference(h.detach(), other, mask).square().sum()
        count = positions(h, mask)
        total = total + distance / (at_least_one(count) * (h.shape[-1] if reduction == "mean" else 1))
    assert isinstance(total, Tensor)
    return total / len(before)


def logit_consistency(clean: Tensor, moved: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over valid positions of KL(clean || moved): the paper's ablation on outputs instead of hidden states.

    Args:
        clean: (B, T, C) logits before the step, or (B, C); no gradient flows into them.
        moved: the same after it.
        mask: (B, T), or (B,), True where a position counts; default all.

    Returns:
        Scalar, in float32 at least.

    Raises:
        ValueError: shapes differ, or the mask does not fit.

    Examples:
        >>> logit_consistency(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        tensor(0.)
    """
    check_states(clean, moved, mask)
    dtype = torch.promote_types(moved.dtype, torch.float32)
    p, q = (F.log_softmax(logits.to(dtype), dim=-1) for logits in (clean.detach(), moved))
    divergence = (p.exp() * (p - q)).sum(-1)
    if mask is not None:
        divergence = torch.where(mask, divergence, 0.0)
    mean: Tensor = divergence.sum() / at_least_one(positions(clean, mask))
    return mean


def check_states(clean: Tensor, moved: Tensor, mask: Tensor | None) -> None:
    if clean.shape != moved.shape:
        raise ValueError(
            f"hidden states before and after the step must be of the same batch, got shapes {tuple(clean.shape)} and "
            f"{tuple(moved.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != clean.shape[: mask.ndim]):
        raise ValueError(
            f"mask must be boolean of shape {tuple(clean.shape[:-1])}, one value a position; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )


def positions(hidden: Tensor, mask: Tensor | None) -> int | Tensor:
    """How many vectors of width d count."""
    if mask is None:
        return hidden.numel() // hidden.shape[-1]
    return mask.sum() * math.prod(hidden.shape[mask.ndim : -1])


def at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
