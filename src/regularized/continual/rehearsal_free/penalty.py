"""Weights that stay near where they were: plain (L2), by Fisher information (EWC), by path integral (SI).

==========  ======================================================  ===========================
paper       meaning                                                 here
==========  ======================================================  ===========================
theta       weights that are penalised                              ``weights``
theta*      their values at the end of the last task                ``anchors``
F           importance of each weight; 1 for L2                     ``importances``
lambda      coefficient                                             ``weight`` of the term
==========  ======================================================  ===========================

The penalty is ``sum_j F_j (theta_j - theta*_j)^2``, without the usual 1/2: lambda here is half of that of formulas
which have it. Its gradient needs no graph, so :func:`add_anchor_gradient` adds it to ``.grad``: two or three reads of
the weights, whatever the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_anchor_gradient", "anchor_penalty", "path_importance"]


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
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
    grads = [w.grad for w in weights if w.grad is not None]
    offsets = torch._foreach_sub(list(weights), [a.to(w) for w, a in zip(weights, anchors, strict=True)])
    if importances is not None:
        torch._foreach_mul_(offsets, [f.to(w) for w, f in zip(weights, importances, strict=True)])
    torch._foreach_add_(grads, offsets, alpha=2.0 * strength)


def path_importance(path: Tensor, change: Tensor, *, xi: float = 0.1) -> Tensor:
    """Synaptic intelligence (Zenke et al. 2017): a weight's share in the fall of the loss, over its squared change.

    Args:
        path: minus the sum over steps of gradient times change of the weight.
        change: of the weight over the whole task.
        xi: damping > 0; default 0.1 (Zenke et al.).

    Returns:
        Importance >= 0, of the shape of ``path``; a weight on which the loss rose counts 0.

    Examples:
        >>> path_importance(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]), xi=1.0).tolist()
        [1.0, 0.0]
    """
    return path.clamp_min(0.0) / (change.square() + xi)
