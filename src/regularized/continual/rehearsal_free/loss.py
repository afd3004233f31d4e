"""A Closer Look at Rehearsal-Free Continual Learning (Smith et al. 2022, arXiv 2203.17269): the losses.

==========  ======================================================  ===========================
paper       meaning                                                 here
==========  ======================================================  ===========================
z           logits (B, C) of all classes seen, old ones first       ``logits``
z'          logits (B, C_old) of the model before this task         ``teacher``
y           labels, positions among the C classes                   ``targets``
s           sigmoid
T           temperature of softmax distillation                     ``temperature``
f, f'       features in front of the head, now and before           ``features``, ``previous``
==========  ======================================================  ===========================

The paper's base is :func:`sigmoid_loss` with a teacher: the sigmoids of old classes aim at what the previous model said
of the same image, those of new classes at the label. No old image is kept, and no further coefficient is needed.

The paper's own code is not public; where text and the group's related code (AlwaysBeDreaming-DFCIL) could differ, the
code is followed: the binary cross-entropies of all classes are *summed*, so the loss grows with the number of classes,
and softmax distillation has no factor T^2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "feature_distillation", "local_cross_entropy", "sigmoid_loss"]


def sigmoid_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each class, summed over classes; old classes aim at the previous model's sigmoids.

    Args:
        logits: (B, C), old classes first.
        targets: (B,) int64 positions among the C classes.
        teacher: (B, C_old) logits of the previous model; None for plain targets, as on the first task.

    Returns:
        (B,) losses.

    Raises:
        ValueError: the teacher has no row for each sample, or more classes than there are.

    Examples:
        >>> z = torch.zeros(1, 3)
        >>> round(sigmoid_loss(z, torch.tensor([2])).item(), 4)  # three classes at probability 1/2
        2.0794
    """
    wanted = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if teacher is not None:
        _check_teacher(logits, teacher)
        wanted = torch.cat([teacher.detach().sigmoid().to(logits.dtype), wanted[:, teacher.shape[1] :]], dim=1)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1)


def distillation(logits: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Cross-entropy of the previous model's softmax over old classes with the present one's, both at temperature T.

    Args:
        logits: (B, C), old classes first.
        teacher: (B, C_old) logits of the previous model.
        temperature: T > 0; default 2 (the group's code).

    Returns:
        (B,) losses, without a factor T^2.

    Examples:
        >>> z = torch.tensor([[1.0, -1.0, 5.0]])
        >>> p = (z[:, :2] / 2).softmax(1)
        >>> torch.allclose(distillation(z, z[:, :2]), -(p * p.log()).sum(1))  # at its least: the entropy
        True
    """
    _check_teacher(logits, teacher)
    log_p = F.log_softmax(logits[:, : teacher.shape[1]] / temperature, dim=1)
    return -((teacher.detach() / temperature).softmax(dim=1) * log_p).sum(dim=1)


def local_cross_entropy(logits: Tensor, targets: Tensor, num_old: int) -> Tensor:
    """Cross-entropy over the classes of the present task alone: old logits take no part and get no gradient.

    Args:
        logits: (B, C), old classes first.
        targets: (B,) int64 positions among the C classes, none of them old.
        num_old: C_old.

    Returns:
        (B,) losses.

    Examples:
        >>> z = torch.tensor([[9.0, 0.0, 0.0]])
        >>> round(local_cross_entropy(z, torch.tensor([1]), 1).item(), 4)
        0.6931
    """
    return F.cross_entropy(logits[:, num_old:], targets - num_old, reduction="none")


def feature_distillation(features: Tensor, previous: Tensor) -> Tensor:
    """Squared distance of the features from the previous model's.

    Args:
        features: (B, ...), now.
        previous: the same shape, of the model before this task.

    Returns:
        (B,) sums over the features.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> feature_distillation(torch.ones(2, 3), torch.zeros(2, 3)).tolist()
        [3.0, 3.0]
    """
    if features.shape != previous.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and those of the previous model {tuple(previous.shape)} must have one "
            "shape: is the tapped layer in front of the head, whose size grows?"
        )
    return (features - previous.detach()).square().flatten(1).sum(dim=1)


def _check_teacher(logits: Tensor, teacher: Tensor) -> None:
    if len(teacher) != len(logits) or teacher.shape[1] > logits.shape[1]:
        raise ValueError(
            f"the previous model's logits {tuple(teacher.shape)} must have a row for each of the {len(logits)} samples "
            f"and no more than the {logits.shape[1]} classes that there are now, old ones first"
        )
