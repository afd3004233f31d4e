"""CAST's loss: what the dense start of the training would say, beside what the text says.

:mod:`regularized.compression.cast.optimizer` has the paper and its symbols. ``L = eta KL(P_teacher || P_student) +
(1 - eta) CE``, over tokens, of the logits alone, at temperature 1 (its equation 13 has none).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, positive, share

__all__ = ["Distilled", "distillation_loss"]

# Shapes: V classes or tokens of the vocabulary; any dimensions before it, (B,) or (B, L).


class Distilled(NamedTuple):
    """The loss and its two parts.

    Attributes:
        loss: ``eta kl + (1 - eta) ce``; only this one is to be differentiated.
        kl: divergence of the student from the teacher, detached; 0 where ``eta`` is.
        ce: cross-entropy with the labels, detached; 0 where ``eta`` is 1.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor


@allowed(eta=share("the teacher's share", "the paper uses 1/3"), temperature=positive())
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Distilled:
    """Cross-entropy with the labels and divergence from a teacher, in shares of ``1 - eta`` and ``eta``.

    Args:
        logits: (..., V) of the student.
        teacher_logits: the same of the teacher, without gradient; -inf is a probability of zero. None with ``eta=0``.
        labels: (...) int64.
        eta: in [0, 1]; default 1/3 (paper, LLaMA). 0 is the cross-entropy bit for bit, and 1 needs no labels but those
            that say which tokens count.
        temperature: both distributions are softened by it, and the divergence is multiplied by its square; default 1,
            as the paper's equation has none. (The authors' earlier AST takes 2.)
        ignore_index: tokens with this label do not count, in either part; default -100, as in torch.
        reduction: ``"mean"`` over the tokens that count (default), or ``"sum"``.

    Raises:
        ValueError: ``eta`` outside [0, 1], shapes that do not fit, or no teacher though it has a share.

    Examples:
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([1, 3])
        >>> distillation_loss(logits, logits, labels, eta=0.5)
        Distilled(loss=tensor(0.6931), kl=tensor(0.), ce=tensor(1.3863))
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])}, as the logits say; got {tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, labels = logits.flatten(0, -2).to(dtype), labels.flatten()
    nothing = torch.zeros((), device=logits.device)
    if eta == 0.0:
        ce = F.cross_entropy(student, labels, ignore_index=ignore_index, reduction=reduction)
        return Distilled(ce, nothing, ce.detach())
    if teacher_logits is None or teacher_logits.shape != logits.shape:
        there = None if teacher_logits is None else tuple(teacher_logits.shape)
        raise ValueError(
            f"the teacher's logits must have the student's shape {tuple(logits.shape)}, got {there}; eta=0 needs none"
        )
    log_p = F.log_softmax(student, dim=-1)
    teacher = teacher_logits.detach().flatten(0, -2).to(dtype)
    counts = labels != ignore_index
    kl = _divergence(
        log_p if temperature == 1.0 else F.log_softmax(student / temperature, dim=-1), teacher / temperature
    )
    kl = (kl * counts).sum() * temperature**2
    if reduction == "mean":
        kl = kl / counts.sum().clamp(min=1)
    if eta == 1.0:
        return Distilled(kl, kl.detach(), nothing)
    ce = F.nll_loss(log_p, labels, ignore_index=ignore_index, reduction=reduction)
    return Distilled(eta * kl + (1.0 - eta) * ce, kl.detach(), ce.detach())


def _divergence(log_p: Tensor, teacher: Tensor) -> Tensor:
    """``KL(softmax(teacher) || p)`` of each row; where the teacher's probability is zero, 0 log 0 is 0."""
    log_q = F.log_softmax(teacher, dim=-1)
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)
