"""Weights that are held where they were: ``sum_j F_j (theta_j - theta*_j)^2``, and its gradient without a graph.

With F = 1 it is L2 towards the anchors, with Fisher information elastic weight consolidation. There is no 1/2 in it:
who wants one halves the coefficient, which is exact. The gradient costs two or three reads of the weights, whatever the
batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_anchor_gradient", "anchor_penalty", "gradients_of"]


def anchor_penalty(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor] | None
) -> Tensor:
    """The penalty, without its coefficient; differentiable in the weights.

    Args:
        weights: at present.
        anchors: of the same shapes.
        importances: of the same shapes, >= 0; None is 1 for all, which is L2.

    Returns:
        Scalar; 0 where there are no weights.

    Examples:
        >>> w, a = [torch.tensor([1.0, 2.0])], [torch.zeros(2)]
        >>> anchor_penalty(w, a, None).item(), anchor_penalty(w, a, [torch.tensor([1.0, 0.0])]).item()
        (5.0, 1.0)
    """
    if not weights:
        return torch.zeros(())
    squares = [(w - a.to(w)).square() for w, a in zip(weights, anchors, strict=True)]
    if importances is not None:
        squares = [square * f.to(square) for square, f in zip(squares, importances, strict=True)]
    return torch.stack([square.sum() for square in squares]).sum()


@torch.no_grad()
def add_anchor_gradient(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor] | None,
    *,
    strength: float,
) -> None:
    """Add the gradient of ``strength`` times the penalty to ``.grad``; a weight without one gets one.

    Args:
        weights: parameters.
        anchors: of the same shapes.
        importances: of the same shapes; None is 1 for all.
        strength: lambda.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> add_anchor_gradient([w], [torch.tensor([1.0])], None, strength=0.5)
        >>> w.grad.item()
        2.0
    """
    if not weights:
        return
    offsets = torch._foreach_sub(list(weights), [a.to(w) for w, a in zip(weights, anchors, strict=True)])
    if importances is not None:
        torch._foreach_mul_(offsets, [f.to(w) for w, f in zip(weights, importances, strict=True)])
    torch._foreach_add_(gradients_of(weights), offsets, alpha=2.0 * strength)


def gradients_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """The ``.grad`` of each of them, to be added to; a weight without one gets zeros.

    Args:
        weights: parameters.

    Examples:
        >>> gradients_of([torch.nn.Parameter(torch.ones(2))])
        [tensor([0., 0.])]
    """
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
    return [w.grad for w in weights if w.grad is not None]
