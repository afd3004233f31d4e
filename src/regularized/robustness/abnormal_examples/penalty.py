"""Abnormal adversarial examples (AAER): what one-step adversarial training breaks down by, counted and penalised.

An attack should raise the loss. On an *abnormal* example the loss is lower after the one step than before it: the
network bends within the radius, so that the step misses. Few at first, they multiply when one-step training breaks down
(catastrophic overfitting: accuracy under many steps falls to 0, under one step it rises). AAER penalises how far the
outputs of abnormal examples move in the step, beyond what those of normal examples do.

    Lin, Yu, Liu, "Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization", NeurIPS 2023,
    arXiv 2404.08154. Official code: github.com/tmllab/2023_NeurIPS_AAER at 5ad2591 (MIT).

=============  =======================  ==============================================================================
paper          here                     meaning
=============  =======================  ==============================================================================
z0, z1         ``logits_before/after``  (B, K) outputs at the start of the attack, and after its step
l0, l1         ``losses_before/after``  (B,) losses there
A              ``abnormal``             (B,) where l0 > l1; ties are normal
n              ``number``               abnormal examples in the batch, over all processes
dCE            ``loss_fall``            mean of l0 - l1 over A
V_A, V_N       ``abnormal_change`` ...  mean of ``||z0 - z1||^2`` over A, and over the others
lambda1        ``weight``               of the whole, >= 0
lambda2        ``loss_weight``          of dCE, >= 0
lambda3        ``output_weight``        of V_A - V_N where it is positive, >= 0
=============  =======================  ==============================================================================

``lambda1 * n/B * (lambda2 * dCE + lambda3 * max(V_A - V_N, 0))``, and nothing where n is 0 or B.

Paper and code differ: the paper optimises the number, dCE and the outputs; in the code the number is an integer and dCE
is detached, so only the outputs of abnormal examples carry a gradient, and lambda2 moves nothing but the printed loss.
We follow the code, since the published numbers come from it; ``loss_gradient=True`` differentiates dCE, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regularized.mechanisms.distributed import sum_over_processes
from regularized.mechanisms.ranges import at_least

__all__ = ["LOSS_WEIGHT", "OUTPUT_WEIGHT", "Variation", "abnormal_penalty", "variation"]

# Shapes: B samples of a batch, K classes.

LOSS_WEIGHT = at_least(0.0, "lambda2")
OUTPUT_WEIGHT = at_least(0.0, "lambda3", remedy="0 switches the regulariser off")


class Variation(NamedTuple):
    """What the step of the attack did to a batch; everything without graph, over all processes but ``abnormal``.

    Attributes:
        abnormal: (B,) which examples of this process are abnormal.
        number: n, how many of all processes; a whole number as a scalar of the losses' type.
        size: B of all processes, in the same way.
        loss_fall: dCE, 0 where there is none.
        abnormal_change: V_A, 0 where there is none.
        normal_change: V_N, 0 where there is none.
    """

    abnormal: Tensor
    number: Tensor
    size: Tensor
    loss_fall: Tensor
    abnormal_change: Tensor
    normal_change: Tensor

    @property
    def mixed(self) -> Tensor:
        """Whether there are abnormal and normal examples; only then is anything penalised."""
        return (self.number > 0) & (self.number < self.size)


def variation(logits_before: Tensor, losses_before: Tensor, logits_after: Tensor, losses_after: Tensor) -> Variation:
    """Which examples are abnormal, and what changed on them and on the others.

    The share ``number / size`` warns: it rises before accuracy under many steps falls.

    Args:
        logits_before: (B, K) at the start of the attack.
        losses_before: (B,) there.
        logits_after: (B, K) after the step.
        losses_after: (B,) there.

    Raises:
        ValueError: losses that are not one a sample, or logits of different shapes.

    Examples:
        >>> before, after = torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> seen = variation(before, torch.tensor([1.0, 1.0]), after, torch.tensor([0.5, 1.5]))
        >>> seen.abnormal.tolist(), float(seen.loss_fall), float(seen.abnormal_change), float(seen.normal_change)
        ([True, False], 0.5, 1.0, 4.0)
    """
    _check(logits_before, losses_before, logits_after, losses_after)
    with torch.no_grad():
        abnormal = losses_before > losses_after
        mask = abnormal.to(losses_after.dtype)
        moved = _squares(logits_before, logits_after)
        sums = torch.stack(
            [
                mask.sum(),
                torch.ones_like(mask).sum(),
                (mask * (losses_before - losses_after)).sum(),
                (mask * moved).sum(),
                ((1.0 - mask) * moved).sum(),
            ]
        )
        count, size, fall, of_abnormal, of_normal = sum_over_processes([sums])[0].unbind()
        n, rest = count.clamp(min=1.0), (size - count).clamp(min=1.0)
        return Variation(abnormal, count, size, fall / n, of_abnormal / n, of_normal / rest)


def abnormal_penalty(
    logits_before: Tensor,
    losses_before: Tensor,
    logits_after: Tensor,
    losses_after: Tensor,
    seen: Variation,
    *,
    loss_weight: float,
    output_weight: float,
    loss_gradient: bool = False,
) -> Tensor:
    """This process's share of B times the regulariser without lambda1; the host waits for nothing.

    Over all processes the shares sum to ``n * (lambda2 * dCE + lambda3 * max(V_A - V_N, 0))``, and their gradients to
    its gradient: what couples the samples of a batch (V_N, and whether there is anything to penalise) is constant.

    Args:
        logits_before: (B, K) at the start of the attack; constant.
        losses_before: (B,) there.
        logits_after: (B, K) after the step; the gradient goes through them.
        losses_after: (B,) there.
        seen: from :func:`variation`.
        loss_weight: lambda2.
        output_weight: lambda3.
        loss_gradient: differentiate dCE, too, through both losses where they have a graph; default False (the code).

    Returns:
        Scalar.

    Examples:
        >>> before, after = torch.zeros(2, 3), torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> losses = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.5])
        >>> seen = variation(before, losses[0], after, losses[1])
        >>> abnormal_penalty(before, losses[0], after, losses[1], seen, loss_weight=2.0, output_weight=0.1)
        tensor(1.5000)
    """
    mask = seen.abnormal.to(losses_after.dtype)
    mixed = seen.mixed.to(losses_after.dtype)
    active = mixed * (seen.abnormal_change > seen.normal_change)
    moved = mask * (_squares(logits_before, logits_after) - seen.normal_change)
    fall = mask * (losses_before - losses_after)
    if not loss_gradient:
        fall = fall.detach()
    return output_weight * (active * moved.sum()) + loss_weight * (mixed * fall.sum())


def _squares(logits_before: Tensor, logits_after: Tensor) -> Tensor:
    dtype = torch.promote_types(logits_after.dtype, torch.float32)
    return (logits_after.to(dtype) - logits_before.detach().to(dtype)).square().sum(dim=1)


def _check(logits_before: Tensor, losses_before: Tensor, logits_after: Tensor, losses_after: Tensor) -> None:
    if logits_before.shape != logits_after.shape or logits_after.ndim != 2:
        raise ValueError(
            f"logits before and after the attack must both be (B, K), got {tuple(logits_before.shape)} and "
            f"{tuple(logits_after.shape)}"
        )
    for when, losses in (("before", losses_before), ("after", losses_after)):
        if losses.shape != logits_after.shape[:1]:
            raise ValueError(
                f"losses_{when} must have one value a sample, shape ({len(logits_after)},), got {tuple(losses.shape)}; "
                "compute the loss with reduction='none'"
            )
