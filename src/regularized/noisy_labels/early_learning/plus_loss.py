"""The loss of one network of ELR+: mixed labels, and a history that the other network's average feeds.

:mod:`regularized.noisy_labels.early_learning.procedure` has the symbols.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.mixup import Mix, one_hot
from regularized.mechanisms.sample_history import check_index
from regularized.noisy_labels.early_learning.penalty import PredictionHistory, check_eps, early_learning_penalty

__all__ = ["EarlyLearningPlusLoss", "early_learning_plus_loss"]

# Shapes: B samples of a batch, N samples of the training set, C classes.


def early_learning_plus_loss(
    logits: Tensor, targets: Tensor, history: Tensor, *, strength: float, eps: float = 1e-4, refine_labels: bool = False
) -> Tensor:
    """Cross-entropy with mixed labels plus the regulariser with mixed history; mean over the batch.

    Args:
        logits: (B, C) of the mixed inputs.
        targets: (B, C) mixed one-hot labels, rows sum to 1.
        history: (B, C) rows q of the history, mixed like the inputs; constant.
        strength: coefficient of the regulariser.
        eps: probabilities are clamped to [eps, 1 - eps] in the regulariser.
        refine_labels: multiply the targets by q and renormalise, which favours the labels that the history believes.

    Returns:
        Scalar, often negative.

    Examples:
        >>> logits, targets = torch.zeros(1, 2), torch.tensor([[0.8, 0.2]])
        >>> early_learning_plus_loss(logits, targets, torch.tensor([[0.5, 0.5]]), strength=1.0)  # log 2 + log 1/2
        tensor(0.)
    """
    # float32 at least: in half precision 1 - <q, p> rounds to 0 and its logarithm to -inf.
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if refine_labels:
        targets = targets * history
        # A history that has underflowed to 0 at the label leaves a row without a target, not nan.
        targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(torch.finfo(targets.dtype).tiny)
    cross_entropy = -(targets * log_p).sum(dim=1).mean()
    if strength == 0.0:
        return cross_entropy
    p = log_p.exp().clamp(eps, 1.0 - eps)
    return cross_entropy.add(early_learning_penalty(p, history).mean(), alpha=strength)


class EarlyLearningPlusLoss(PredictionHistory):
    """The loss of one network of ELR+, with the history that the other network's average feeds.

    Use it in a loop of your own; :class:`EarlyLearningPlus` is the whole procedure.

    Args:
        num_samples: N, length of the training set that ``index`` counts in.
        num_classes: C.
        momentum: share of the old average that stays, in [0, 1]; default 0.7 (CIFAR-10 with symmetric noise).
        eps: probabilities are clamped to [eps, 1 - eps] in the regulariser; default 1e-4 (official code).
        refine_labels: multiply the mixed labels by the history; default False (the code does it for CIFAR-100 alone).

    Raises:
        ValueError: a setting is outside its range; at the call: a shape is wrong, labels are soft, or no index.
        IndexError: an index outside [0, N) (checked while the index is on the CPU).

    Examples:
        >>> criterion = EarlyLearningPlusLoss(num_samples=8, num_classes=3)
        >>> index, mix = torch.tensor([3, 5]), Mix(0.8, torch.tensor([1, 0]))
        >>> loss = criterion(
        ...     torch.zeros(2, 3, requires_grad=True),
        ...     torch.tensor([0, 2]),
        ...     index,
        ...     teacher_logits=torch.zeros(2, 3),
        ...     mix=mix,
        ...     strength=3.0,
        ... )
        >>> round(loss.item(), 4)
        0.7825
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        momentum: float = 0.7,
        eps: float = 1e-4,
        refine_labels: bool = False,
    ) -> None:
        super().__init__(num_samples, num_classes, momentum=momentum)
        check_eps(eps, num_classes)
        self.eps = eps
        self.refine_labels = refine_labels

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        teacher_logits: Tensor,
        mix: Mix,
        strength: float,
    ) -> Tensor:
        """Update the history with the teacher's view, mix it, and return the mean loss.

        Args:
            logits: (B, C) of this network for the mixed inputs.
            labels: (B,) class labels before mixing.
            index: (B,) position of each sample in the training set.
            teacher_logits: (B, C) of the other network's average for the inputs *before* mixing.
            mix: how the inputs were mixed.
            strength: coefficient of the regulariser in this step, >= 0.

        Returns:
            Scalar.

        Raises:
            ValueError: a shape is wrong, labels are soft, or there is no index.
            IndexError: an index outside [0, N).
        """
        self.check_logits(logits)
        self.check_logits(teacher_logits)
        if labels.is_floating_point() or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"EarlyLearningPlusLoss needs class labels of shape ({len(logits)},), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; give the labels before mixing, `mix` says how they are mixed"
            )
        check_index(index, self.num_samples, owner="EarlyLearningPlusLoss", batch_size=len(logits))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        teacher = F.softmax(teacher_logits.detach(), dim=1, dtype=dtype)
        history = mix(self.update(index, teacher).to(dtype))
        targets = mix(one_hot(labels, self.num_classes, dtype))
        return early_learning_plus_loss(
            logits, targets, history, strength=strength, eps=self.eps, refine_labels=self.refine_labels
        )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, eps={self.eps}, refine_labels={self.refine_labels}"
