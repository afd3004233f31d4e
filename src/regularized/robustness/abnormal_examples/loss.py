"""The loss of one-step adversarial training with AAER, for any loop.

:mod:`regularized.robustness.abnormal_examples.penalty` has the paper and its symbols.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least
from regularized.robustness.abnormal_examples.penalty import (
    LOSS_WEIGHT,
    OUTPUT_WEIGHT,
    Variation,
    abnormal_penalty,
    variation,
)

__all__ = ["AbnormalExamplesLoss"]


class AbnormalExamplesLoss(nn.Module):
    """Cross-entropy on attacked inputs, plus the regulariser: the loss of one-step adversarial training.

    ``mean_b l1_b + weight * n/B * (loss_weight * dCE + output_weight * max(V_A - V_N, 0))``. What was there before the
    attack (``logits_before``) is constant, even if it has a graph. Costs two reductions over (B, K).

    ``output_weight`` must be tuned: it is in squared units of the logits, grows with the radius, and too much of it
    collapses the network to a constant. For long trainings the authors' code suggests to let ``weight`` rise over the
    first 20 epochs.

    Args:
        weight: lambda1 >= 0; default 1 (official code).
        loss_weight: lambda2 >= 0; default 2.5 (CIFAR-10, RS-FGSM, 8/255). Moves no weight unless ``loss_gradient``.
        output_weight: lambda3 >= 0; default 1.5 (the same). The authors' others are on the technique's page.
        loss_gradient: differentiate dCE, too, as the paper's text reads; default False (official code). The attack then
            needs ``keep_graph=True``, and with ``weight * loss_weight`` above 1 the loss of abnormal examples is
            *raised*.

    Attributes:
        seen: :class:`Variation` of the last call, None before; its share ``number / size`` is the early warning.

    Raises:
        ValueError: a weight below 0; at the call: losses that are not one a sample, or logits of different shapes.

    Examples:
        >>> from regularized.robustness.attacks import OneStep, Threat
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> x, y = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
        >>> attack, criterion = OneStep.rs_fgsm(Threat(8 / 255)), AbnormalExamplesLoss()
        >>> found = attack(model, x, y)
        >>> criterion(found.logits, found.losses, model(found.inputs), y).backward()
        >>> criterion.seen.number.item()  # a linear model of two classes has none, of ten hardly any
        0.0
    """

    @allowed(weight=at_least(0.0, "lambda1"), loss_weight=LOSS_WEIGHT, output_weight=OUTPUT_WEIGHT)
    def __init__(
        self,
        *,
        weight: float = 1.0,
        loss_weight: float = 2.5,
        output_weight: float = 1.5,
        loss_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.loss_weight = loss_weight
        self.output_weight = output_weight
        self.loss_gradient = loss_gradient
        self.seen: Variation | None = None

    def forward(self, logits_before: Tensor, losses_before: Tensor, logits_after: Tensor, labels: Tensor) -> Tensor:
        """Loss of the batch.

        Args:
            logits_before: (B, K) at the start of the attack.
            losses_before: (B,) cross-entropies there.
            logits_after: (B, K) of the attacked inputs.
            labels: (B,) class labels, integers.

        Returns:
            Scalar.
        """
        wide = torch.promote_types(logits_after.dtype, torch.float32)
        log_p = F.log_softmax(logits_after, dim=1, dtype=wide)
        losses_after = F.nll_loss(log_p, labels, reduction="none")
        seen = self.seen = variation(logits_before, losses_before, logits_after, losses_after)
        penalty = abnormal_penalty(
            logits_before,
            losses_before,
            logits_after,
            losses_after,
            seen,
            loss_weight=self.loss_weight,
            output_weight=self.output_weight,
            loss_gradient=self.loss_gradient,
        )
        return F.nll_loss(log_p, labels) + self.weight / len(labels) * penalty

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"weight={self.weight}, loss_weight={self.loss_weight}, output_weight={self.output_weight}, "
            f"loss_gradient={self.loss_gradient}"
        )
