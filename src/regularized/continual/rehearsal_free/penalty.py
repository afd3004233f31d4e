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
which have it. It stands in :mod:`regularized.mechanisms.anchors`, and its gradient, which needs no graph.
"""

from torch import Tensor

__all__ = ["path_importance"]


def path_importance(path: Tensor, change: Tensor, *, xi: float = 0.1) -> Tensor:
    """Synaptic intelligence (Zenke et al. 2017): a weight's share in the fall of the loss, over its squared change.

    Args:
        path: minus the sum over steps of gradient times change of the weight.
        change: of the weight over the whole task.
        xi: damping > 0; default 0.1 (Zenke et al.).

    Returns:
        Importance >= 0, of the shape of ``path``; a weight on which the loss rose counts 0.

    Examples:
        >>> import torch
        >>> path_importance(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]), xi=1.0).tolist()
        [1.0, 0.0]
    """
    return path.clamp_min(0.0) / (change.square() + xi)
