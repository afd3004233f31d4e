"""Privileged distillation beside cross-entropy, for any classifier whose inputs are richer in training than in use.

:mod:`regularized.alignment.self_judge.loss` has the paper and its symbols.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from regularized.alignment.self_judge.loss import ALPHA, ALPHA_KD, view_divergence
from regularized.mechanisms.ranges import allowed
from regularized.training.progress import Coefficient
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["PrivilegedView"]


class PrivilegedView(Term):
    """Teach a classifier to do without inputs that exist in training only, by what it says when it has them.

    The batch holds all inputs: that is the teacher's view, and ``CrossEntropy`` beside this term is its loss. ``hide``
    takes away what will be missing in use; this term is the rest of the paper's loss, ``alpha CE(z2) + alpha_kd KL``.
    It costs a second forward and backward pass. Dropout masks of the views are independent; batch normalisation counts
    both views.

    Args:
        hide: inputs of the batch to those that are there in use: zeros in a column, the sequence without a section.
            A function at the top of a module, where several processes train.
        alpha: of the cross-entropy without these inputs, >= 0; default 0.3 (official code).
        alpha_kd: of the divergence, >= 0; default 2 (official code).
        weight: coefficient of the term; default 1. 0 is plain training on all inputs.

    Raises:
        ValueError: a coefficient is out of range; at a step: logits are not (B, C) with labels (B,).

    Examples:
        >>> import torch
        >>> from regularized.training import Batch, CrossEntropy, Progress
        >>> def without_last_column(x):
        ...     return torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], dim=1)
        >>> batch = Batch.of((torch.randn(8, 4), torch.arange(8) % 3))
        >>> step = Step(torch.nn.Linear(4, 3), batch, Progress(0, 1))
        >>> loss = (CrossEntropy()(step) + PrivilegedView(without_last_column)(step)) / 8
    """

    sharding = "forward"

    @allowed(alpha=ALPHA, alpha_kd=ALPHA_KD)
    def __init__(
        self,
        hide: Callable[[Any], Any],
        *,
        alpha: float = 0.3,
        alpha_kd: float = 2.0,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.hide = hide
        self.alpha = alpha
        self.alpha_kd = alpha_kd

    def forward(self, step: Step) -> Tensor:
        """Sum over the batch."""
        z1, labels = step.logits, step.targets
        if z1.ndim != 2 or labels.shape != z1.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"PrivilegedView needs logits (B, C) with class labels (B,), got {tuple(z1.shape)} and "
                f"{tuple(labels.shape)}; for sequences there is Judge"
            )
        output = step.forward(self.hide(step.inputs))
        z2: Tensor = output if isinstance(output, Tensor) else output.logits
        divergence = view_divergence(z1, z2).sum()
        return self.alpha * F.cross_entropy(z2.to(divergence.dtype), labels, reduction="sum") + (
            self.alpha_kd * divergence
        )
