"""How a held-out utility changes with the mixing weight, one step of gradient descent ahead.

After the step ``theta' = theta - eta ((1 - mu) g_RL + mu g_SFT)`` the utility U(theta') changes with mu at the rate

    dU/dmu = <grad U(theta'), d theta'/d mu> = -eta <grad U, g_SFT - g_RL> = eta <grad L_val, g_SFT - g_RL>

with ``L_val = -U``: mu should rise where imitation goes down the held-out loss more steeply than reward does. It is of
first order and needs no Hessian. The authors' code returns minus this and *adds* it to mu, which climbs the held-out
loss. At its step sizes, eta 1e-6 and eta_mu 1e-4, neither sign moves anything; the cosine of the two vectors does,
whatever their lengths.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed

__all__ = ["Grads", "Normalize", "ahead", "meta_gradient"]

Grads: TypeAlias = Sequence[Tensor | None]
"""Gradients of each parameter; None where a loss does not reach it."""

Normalize: TypeAlias = Literal["none", "cosine"]
NORMALIZE = Choice("none", "cosine")


@allowed(normalize=NORMALIZE)
def meta_gradient(
    val_grads: Grads, sft_grads: Grads, rl_grads: Grads, *, lr: float = 1.0, normalize: Normalize = "none"
) -> Tensor:
    """g_mu: the rate at which a held-out utility rises with the share of the first of two losses.

    Args:
        val_grads: of the held-out *loss* (minus the utility), at theta' or, approximately, at theta.
        sft_grads: of the loss that mu multiplies.
        rl_grads: of the loss that 1 - mu multiplies.
        lr: eta of the step; not used with ``"cosine"``.
        normalize: ``"none"`` (default; paper): ``eta <g_val, g_sft - g_rl>``; ``"cosine"``: the cosine of the angle
            between these two, in [-1, 1], 0 where one of them vanishes.

    Returns:
        Scalar in float64, on the device.

    Raises:
        ValueError: there are not as many gradients of each loss.

    Examples:
        >>> val, sft, rl = [torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 4.0])], [None]
        >>> meta_gradient(val, sft, rl, lr=0.1).item()  # imitation helps
        0.30000000000000004
        >>> meta_gradient(val, rl, sft, normalize="cosine").item()  # so here mu should fall
        -0.6
    """
    if not len(val_grads) == len(sft_grads) == len(rl_grads):
        raise ValueError(
            f"there are {len(val_grads)}, {len(sft_grads)} and {len(rl_grads)} gradients; give one for each parameter, "
            "None where a loss does not reach it"
        )
    differences = [_difference(sft, rl) for sft, rl in zip(sft_grads, rl_grads, strict=True)]
    like = next((g for grads in (val_grads, sft_grads, rl_grads) for g in grads if g is not None), torch.zeros(()))
    dot = _dot(val_grads, differences, like)
    if normalize == "none":
        return lr * dot
    length = (_dot(val_grads, val_grads, like) * _dot(differences, differences, like)).sqrt()
    return torch.where(length > 0.0, dot / length, torch.zeros_like(dot))


def _difference(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None:
        return None if second is None else -second
    return first if second is None else first - second


def _dot(first: Grads, second: Grads, like: Tensor) -> Tensor:
    """Inner product over all parameters: in float32 where there are fewer digits, and summed in float64."""
    parts = [
        torch.dot(a.flatten().to(_wide(a)), b.flatten().to(_wide(a))).double()
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=like.device)


def _wide(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)


@contextmanager
def ahead(params: Sequence[Tensor], grads: Grads, *, lr: float) -> Iterator[None]:
    """Inside, the parameters stand where one step of gradient descent would take them; behind it, where they stood.

    Args:
        params: parameters; they are put back to the last bit.
        grads: of the step.
        lr: eta.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with ahead([w], [torch.tensor([2.0])], lr=0.25):
        ...     w.item()
        0.5
        >>> w.item()
        1.0
    """
    pairs = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    moved, by = [p for p, _ in pairs], [g for _, g in pairs]
    kept = [p.detach().clone() for p in moved]
    with torch.no_grad():
        torch._foreach_add_(moved, by, alpha=-lr)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, kept)
