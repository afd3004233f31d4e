"""CREAM: preferences that a model gave itself, learned no harder than its rankings agree.

In each round a model samples answers, ranks them by its own implicit reward, and trains on the best against the worst
with DPO. The answers are ranked once more by the model of the round before. How far both rankings agree, in [0, 1], is
the soft label of the pair: full agreement is plain DPO, none at all pulls the margin to 0, less than half turns the
pair round.

    Wang, He, Liang, Zhang, Bansal, Wei, Zhang, Yao, "CREAM: Consistency Regularized Self-Rewarding Language Models",
    ICLR 2025, arXiv 2410.12735. Official code: github.com/Raibows/CREAM at de1d04b (no licence: read only).

==================  ====================  ==========================================================================
paper               here                  meaning
==================  ====================  ==========================================================================
M_0, theta_0        ``base``              the model before everything
M_t, theta_t        ``policy``            the model that round t begins with and trains into M_{t+1}; M_1 is fine-tuned
M_{t-1}             ``previous``          the model that the round before began with
log pi(y|x)         ``log_probs``         summed over the tokens of the response y
r_i, r'_i           ``now``, ``before``   rewards of response i: log pi_t(y_i|x) - log pi_0(y_i|x), and of M_{t-1}
J, K                                      ranks by r, and by r'
tau                                       Kendall's coefficient of both, in [-1, 1]
C                   ``consistency``       (tau + 1) / 2, of all prompts together or of each
y+, y-              ``chosen, rejected``  the responses with the largest and the smallest r
beta                ``beta``              inverse price of a nat of divergence from the reference; 0.1
d                   ``margin``            beta [(log pi - log ref)(y+) - (log pi - log ref)(y-)]
==================  ====================  ==========================================================================

The loss of a pair is ``C softplus(-d) + (1 - C) softplus(d)``, its slope in d is ``sigmoid(d) - C``: the best margin is
``logit(C)``, and only C = 1 has none. It is DPO with label smoothing ``1 - C``, but C is measured, in each round anew.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, positive

__all__ = ["ConsistencyDPOLoss", "check_consistency", "consistency_dpo_loss", "preference_margin"]

Reduction: TypeAlias = Literal["mean", "none"]

# Shapes: B pairs of a batch.


def preference_margin(
    log_probs_chosen: Tensor,
    log_probs_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """d: how much further than the reference the model prefers the chosen response, times beta.

    Args:
        log_probs_chosen: (B,) log-probabilities of the chosen responses, summed over their tokens.
        log_probs_rejected: (B,) of the rejected ones.
        reference_chosen: (B,) of the chosen ones under the reference; no gradient reaches it.
        reference_rejected: (B,) of the rejected ones under the reference.
        beta: default 0.1 (the authors' code).

    Returns:
        (B,).

    Examples:
        >>> preference_margin(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-2.0]))
        tensor([0.2000])
    """
    shapes = [tuple(t.shape) for t in (log_probs_chosen, log_probs_rejected, reference_chosen, reference_rejected)]
    if len(set(shapes)) != 1:
        raise ValueError(f"log-probabilities of model and reference must be of one shape (B,), got {shapes}")
    chosen = log_probs_chosen - reference_chosen.detach()
    rejected = log_probs_rejected - reference_rejected.detach()
    return beta * (chosen - rejected)


def consistency_dpo_loss(margin: Tensor, consistency: Tensor | float, *, reduction: Reduction = "mean") -> Tensor:
    """``C softplus(-d) + (1 - C) softplus(d)``.

    Args:
        margin: (B,) d, see :func:`preference_margin`.
        consistency: C in [0, 1], one for all or (B,) for each; no gradient reaches it. 1 is DPO, 0 is DPO with the
            responses exchanged, and the number 1.0 leaves out the second term.
        reduction: ``"mean"`` over the pairs (default), or ``"none"``.

    Returns:
        A scalar, or (B,).

    Raises:
        ValueError: the consistency is outside [0, 1] or not a number (looked at while it is on the CPU).

    Examples:
        Without a preference the loss is ln 2, whatever the consistency is:

        >>> consistency_dpo_loss(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]), reduction="none")
        tensor([0.6931, 0.6931, 0.6931])
        >>> consistency_dpo_loss(torch.tensor([2.0]), 1.0)
        tensor(0.1269)
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    check_consistency(consistency)
    if isinstance(consistency, Tensor):
        consistency = consistency.detach().to(margin)
        losses = consistency * F.softplus(-margin) + (1.0 - consistency) * F.softplus(margin)
    elif consistency == 1.0:
        losses = F.softplus(-margin)
    else:
        losses = consistency * F.softplus(-margin) + (1.0 - consistency) * F.softplus(margin)
    return losses.mean() if reduction == "mean" else losses


class ConsistencyDPOLoss(nn.Module):
    """DPO with a soft label for each pair: how far two rankings of the responses agree.

    It costs what DPO costs: a forward and a backward pass of both responses, where the log-probabilities of the
    reference were kept.

    Args:
        beta: default 0.1 (the authors' code).

    Raises:
        ValueError: beta is not positive; at the call: shapes that differ, or a consistency outside [0, 1].

    Examples:
        >>> loss = ConsistencyDPOLoss()
        >>> pi_chosen = torch.tensor([-5.0, -6.0], requires_grad=True)
        >>> pi_rejected, reference = torch.tensor([-7.0, -7.0]), torch.tensor([-6.0, -6.0])
        >>> loss(pi_chosen, pi_rejected, reference, reference, consistency=torch.tensor([0.9, 0.9])).backward()
        >>> pi_chosen.grad
        tensor([-0.0175, -0.0188])
    """

    @allowed(beta=positive("the inverse price of divergence from the reference"))
    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        log_probs_chosen: Tensor,
        log_probs_rejected: Tensor,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        *,
        consistency: Tensor | float,
    ) -> Tensor:
        """Mean loss of the pairs.

        Args:
            log_probs_chosen: (B,) sums over the tokens, not means.
            log_probs_rejected: (B,).
            reference_chosen: (B,).
            reference_rejected: (B,).
            consistency: C in [0, 1], one for all or (B,).

        Returns:
            Scalar.
        """
        margin = preference_margin(
            log_probs_chosen, log_probs_rejected, reference_chosen, reference_rejected, beta=self.beta
        )
        return consistency_dpo_loss(margin, consistency)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"beta={self.beta}"


def check_consistency(consistency: Tensor | float, *, what: str = "pair") -> None:
    """Refuse what is no agreement in [0, 1]. On an accelerator nothing is looked at: the host would wait.

    Args:
        consistency: a number or a tensor.
        what: what the rows of the tensor are, for the message.

    Raises:
        ValueError: a value is outside [0, 1] or not a number; the first is named.

    Examples:
        >>> check_consistency(torch.tensor([0.9, -0.2]))
        Traceback (most recent call last):
        ...
        ValueError: consistency must be in [0, 1], got -0.2 for pair 1; a coefficient tau in [-1, 1] becomes one by \
(tau + 1) / 2
    """
    if isinstance(consistency, Tensor):
        if consistency.device.type != "cpu" or torch.compiler.is_compiling():
            return
        wrong = ~((consistency >= 0.0) & (consistency <= 1.0))  # also where it is no number
        if not bool(wrong.any()):
            return
        place = int(wrong.flatten().nonzero()[0])
        value, where = float(consistency.flatten()[place]), f" for {what} {place}"
    elif 0.0 <= consistency <= 1.0:
        return
    else:
        value, where = consistency, ""
    remedy = (
        "rewards that are all alike, or not finite, have no ranking: leave such a prompt out"
        if value != value
        else "a coefficient tau in [-1, 1] becomes one by (tau + 1) / 2"
    )
    raise ValueError(f"consistency must be in [0, 1], got {value:g}{where}; {remedy}")
