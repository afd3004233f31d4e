"""OVOR (Huang, Chen and Hsu, ICLR 2024, arXiv 2402.04129): energies of real features, and of outliers that are made.

==============  =============================================================  =======================================
paper           meaning                                                        here
==============  =============================================================  =======================================
h               feature in front of the head (n, d), of the frozen network     ``features``
z               logits (B, C) over the classes of the *present* task alone     ``id_logits``, ``ood_logits``
s(z)            energy, - logsumexp(z): low where a class claims the input     :func:`energy`
tau_id          real features shall have an energy below it                    ``tau_id``
tau_ood         outliers shall have one above it                               ``tau_ood``
rho             Huber loss with delta 1, or a square                           ``huber``
lambda          weight of the regulariser beside cross-entropy                 ``weight``
K               which neighbour measures how lonely a point is                 ``k``, see ``neighbours``
v               outlier, h_b + sigma eps                                       ``outliers``, see ``outliers``
P, P_k, P_v     prompt (L, d) of a layer: its keys, its values                 ``prompt``, see ``layer``
==============  =============================================================  =======================================

The two halves of the paper need nothing of each other: *OnePrompt* (``layer``, ``model``) is a frozen vision
transformer with one set of prompts for all tasks; *virtual outlier regularisation* (``loss``, ``neighbours``,
``outliers``, ``head``) is a second phase for any head on frozen features, on which :func:`outlier_loss` is added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["energy", "energy_gap", "outlier_loss", "task_cross_entropy"]


def energy(logits: Tensor) -> Tensor:
    """s(z) = - logsumexp(z): (B,) energies of logits (B, C).

    Args:
        logits: (B, C), the columns of the task; one that is masked with minus infinity takes no part.

    Examples:
        >>> energy(torch.tensor([[2.0]])).tolist(), round(energy(torch.zeros(1, 4)).item(), 4)
        ([-2.0], -1.3863)
    """
    return -torch.logsumexp(logits, dim=-1)


def outlier_loss(
    id_logits: Tensor, ood_logits: Tensor, *, tau_id: float | Tensor, tau_ood: float | Tensor, huber: bool = True
) -> Tensor:
    """Pushes energies of real features below ``tau_id``, and those of outliers above ``tau_ood``; without its weight.

    ``mean rho(relu(s(z_id) - tau_id)) + mean rho(relu(tau_ood - s(z_ood)))``: 0, with no gradient, where all are where
    they belong.

    Args:
        id_logits: (B, C) of real features, over the classes of the task.
        ood_logits: (M, C) of outliers, over the same.
        tau_id: upper threshold of real features.
        tau_ood: lower threshold of outliers, above ``tau_id``.
        huber: rho is ``u^2 / 2`` up to 1 and ``u - 1/2`` beyond (default, the paper); False: ``u^2``.

    Returns:
        A scalar.

    Raises:
        ValueError: there is no outlier or no feature, or the numbers of classes differ.

    Examples:
        >>> one = torch.tensor([[10.0]])  # of one class: the energy is -10
        >>> outlier_loss(one, -one, tau_id=-15.0, tau_ood=-3.0).item()  # 5 too high, and 13 above its threshold
        4.5
    """
    if not (len(id_logits) and len(ood_logits)) or id_logits.shape[1] != ood_logits.shape[1]:
        raise ValueError(
            f"logits must be (B, C) of real features and (M, C) of outliers, over the same classes and neither empty; "
            f"got {tuple(id_logits.shape)} and {tuple(ood_logits.shape)}"
        )
    above, below = F.relu(energy(id_logits) - tau_id), F.relu(tau_ood - energy(ood_logits))
    return _rho(above, huber).mean() + _rho(below, huber).mean()


def _rho(u: Tensor, huber: bool) -> Tensor:
    return F.huber_loss(u, torch.zeros_like(u), reduction="none") if huber else u.square()


def energy_gap(id_logits: Tensor, ood_logits: Tensor) -> Tensor:
    """By how much the mean energy of outliers is above that of real features: a scalar, to be watched.

    Args:
        id_logits: (B, C) of real features, over the classes of the task.
        ood_logits: (M, C) of outliers.

    Examples:
        >>> energy_gap(torch.tensor([[5.0], [7.0]]), torch.tensor([[1.0]])).item()
        5.0
    """
    return energy(ood_logits).mean() - energy(id_logits).mean()


def task_cross_entropy(logits: Tensor, targets: Tensor, columns: Sequence[int] | Tensor) -> Tensor:
    """Cross-entropy over the columns of the present task alone: no other column takes part or gets a gradient.

    Args:
        logits: (B, all classes).
        targets: (B,) positions among ``columns``.
        columns: (C,) labels of the task's classes.

    Returns:
        (B,) losses.

    Examples:
        >>> z = torch.tensor([[9.0, 0.0, 0.0]])
        >>> round(task_cross_entropy(z, torch.tensor([1]), [1, 2]).item(), 4)
        0.6931
    """
    return F.cross_entropy(logits[:, torch.as_tensor(columns, device=logits.device)], targets, reduction="none")
