"""Whether a classifier's confidence can be believed: calibration error, risk over coverage, temperature.

For evaluation, not for the training step: rows are checked, which reads the device. All results are fractions of 1;
papers often print the calibration error in per cent, and the area under the risk-coverage curve times 1000.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import Interval, allowed

__all__ = [
    "Reliability",
    "area_under_risk_coverage",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "reliability",
]

# Shapes: M samples, C classes, K bins.

Bins: TypeAlias = int | Sequence[float]


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram: samples sorted into bins by the confidence of their predicted class.

    Args:
        lower: (K,) lower bounds of the bins, not included.
        upper: (K,) upper bounds, included.
        count: (K,) samples in each bin.
        confidence: (K,) their mean confidence; 0 where empty.
        accuracy: (K,) share of them that is predicted rightly; 0 where empty.
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_calibration_error(self) -> Tensor:
        """Mean distance of accuracy and confidence over the samples; scalar in [0, 1]."""
        return (self.accuracy - self.confidence).abs().mul(self.count).sum() / self.count.sum()

    @property
    def overconfidence(self) -> Tensor:
        """Mean confidence less accuracy; scalar in [-1, 1]. Positive: the model promises more than it holds."""
        return (self.confidence - self.accuracy).mul(self.count).sum() / self.count.sum()


def reliability(probabilities: Tensor, labels: Tensor, *, bins: Bins = 10) -> Reliability:
    """Confidence and accuracy in bins of confidence.

    Args:
        probabilities: (M, C) rows that sum to 1.
        labels: (M,) int64 class labels.
        bins: number of equal bins of (0, 1], open on the left and closed on the right; default 10, as in the
            literature. Or their upper bounds, rising, the last one at least 1.

    Raises:
        ValueError: a shape is wrong, rows are not probabilities, or the bounds do not rise to 1.

    Examples:
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
        >>> reliability(p, torch.tensor([0, 1, 0]), bins=2).accuracy
        tensor([0.0000, 0.6667])
    """
    confidence, right = _confidence(probabilities, labels)
    upper = _upper_bounds(bins, confidence)
    # The first bound that is not below the confidence: (lower, upper].
    place = torch.searchsorted(upper, confidence).clamp_(max=len(upper) - 1)
    count, sums, hits = (
        torch.zeros_like(upper).index_add_(0, place, values)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    each = count.clamp(min=1)
    return Reliability(torch.cat([upper.new_zeros(1), upper[:-1]]), upper, count, sums / each, hits / each)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: Bins = 10) -> Tensor:
    """Mean distance between confidence and accuracy, over bins of confidence (ECE).

    An estimate that depends on the bins, and is biased upwards for few samples: compare models on the same test set.

    Args:
        probabilities: (M, C) rows that sum to 1.
        labels: (M,) int64 class labels.
        bins: as in :func:`reliability`; default 10 equal ones.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: as :func:`reliability`.

    Examples:
        >>> p = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
        >>> expected_calibration_error(p, torch.tensor([0, 0, 0, 1]))
        tensor(0.)
        >>> expected_calibration_error(p, torch.tensor([0, 0, 0, 0]))
        tensor(0.2500)
    """
    return reliability(probabilities, labels, bins=bins).expected_calibration_error


def area_under_risk_coverage(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean error rate over all coverages: of the most confident 1, 2, ... M samples (AURC).

    It tells whether confidence sorts wrong predictions to the end; a model that knows *which* of its predictions are
    wrong has a small one, whatever its calibration. Among equal confidences the order is random and the mean over all
    orders is taken, so the order of the samples does not matter.

    Args:
        probabilities: (M, C) rows that sum to 1.
        labels: (M,) int64 class labels.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: as :func:`reliability`.

    Examples:
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> area_under_risk_coverage(p, torch.tensor([0, 1, 1]))  # mean of 0, 0 and 1/3
        tensor(0.1111)
    """
    confidence, right = _confidence(probabilities, labels)
    order = torch.argsort(confidence, descending=True)
    _, group, size = torch.unique_consecutive(confidence[order], return_inverse=True, return_counts=True)
    wrong: Tensor = 1.0 - right[order]
    mean_wrong = torch.zeros(len(size), dtype=wrong.dtype, device=wrong.device).index_add_(0, group, wrong) / size
    errors = mean_wrong[group].cumsum(0)
    covered = torch.arange(1, len(errors) + 1, device=errors.device)
    area: Tensor = (errors / covered).mean()
    return area


def excess_area_under_risk_coverage(probabilities: Tensor, labels: Tensor) -> Tensor:
    """AURC less that of the best order with the same number of errors, all of them last (E-AURC).

    Args:
        probabilities: (M, C) rows that sum to 1.
        labels: (M,) int64 class labels.

    Returns:
        Scalar in [0, 1]; 0 when every wrong prediction is less confident than every right one.

    Raises:
        ValueError: as :func:`reliability`.

    Examples:
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> excess_area_under_risk_coverage(p, torch.tensor([0, 1, 1]))
        tensor(0.)
    """
    total = len(labels)
    _, right = _confidence(probabilities, labels)
    wrong = (1.0 - right).sum()
    covered = torch.arange(1, total + 1, device=right.device, dtype=right.dtype)
    best: Tensor = ((covered - (total - wrong)).clamp(min=0.0) / covered).mean()
    return area_under_risk_coverage(probabilities, labels) - best


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean ``-log p`` of the true class, in nats; infinite where a true class has probability 0.

    From logits, ``torch.nn.functional.cross_entropy`` is more exact.

    Args:
        probabilities: (M, C) rows that sum to 1.
        labels: (M,) int64 class labels.

    Returns:
        Scalar, 0 at best.

    Raises:
        ValueError: as :func:`reliability`.

    Examples:
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor(0.6931)
    """
    _check(probabilities, labels)
    return F.nll_loss(probabilities.log(), labels)


@torch.no_grad()
@allowed(limit=Interval(1.0, math.inf, "()", words="above 1"))
def fit_temperature(logits: Tensor, labels: Tensor, *, limit: float = 1000.0) -> Tensor:
    """The temperature T that makes ``softmax(logits / T)`` most likely: calibration after training, by one number.

    The baseline for every method that promises calibration (Guo et al. 2017, arXiv 1706.04599). Fit it on validation
    data; it changes no prediction. The likelihood is concave in 1 / T, so bisection on its slope finds the optimum.

    Args:
        logits: (M, C).
        labels: (M,) class labels, integers in [0, C).
        limit: T is sought in [1 / limit, limit]; default 1000. The lower end is returned when every label has the
            largest logit, the upper one when the logits say nothing, or the opposite.

    Returns:
        Scalar T > 0.

    Raises:
        ValueError: a shape is wrong, a logit is not finite, a label is no class, or ``limit`` is not above 1.

    Examples:
        >>> logits = torch.tensor([[4.0, 0.0]]).repeat(4, 1)  # 98 % sure, right in 3 of 4
        >>> temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> (logits / temperature).softmax(dim=1)[0, 0]
        tensor(0.7500)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"need logits (M, C) and labels (M,) with M > 0, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    _check_labels(labels, logits.shape[1])
    z = logits.to(torch.float64)
    if not bool(z.isfinite().all()):
        raise ValueError(
            f"{int((~z.isfinite()).any(dim=1).sum())} of {len(z)} rows of logits are not finite: no temperature fits "
            "them. Leave these samples out, or look where the model diverged"
        )
    over = z - z.gather(1, labels.long()[:, None])  # logits above that of the true class
    low, high = (z.new_tensor(float(v)).log() for v in (1.0 / limit, limit))  # of log 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        # Slope of the negative log-likelihood in 1 / T: the expected logit less the true one, rising with 1 / T. Where
        # every label has the largest logit it is 0 by rounding alone, and the search goes on to the end.
        slope = ((z * middle.exp()).softmax(dim=1) * over).sum()
        low, high = torch.where(slope <= 0, middle, low), torch.where(slope <= 0, high, middle)
    return (-(low + high) / 2).exp().to(logits.dtype)


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"need probabilities (M, C) and labels (M,) with M > 0, got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or not probabilities.is_floating_point():
        raise ValueError(
            f"need floating-point probabilities and integer labels, got {probabilities.dtype} and {labels.dtype}"
        )
    # Half precision sums to 1 only roughly.
    slack = 1e-3 if probabilities.dtype in (torch.float32, torch.float64) else 2e-2
    if not bool(((probabilities.sum(dim=1) - 1).abs() <= slack).all()) or bool((probabilities < 0).any()):
        raise ValueError("rows of probabilities must be in [0, 1] and sum to 1; of logits take .softmax(dim=1) first")


def _check_labels(labels: Tensor, classes: int) -> None:
    low, high = (int(label) for label in torch.aminmax(labels))
    if labels.is_floating_point() or low < 0 or high >= classes:
        raise ValueError(
            f"labels must be integers in [0, {classes}), got {labels.dtype} from {low} to {high}; leave out samples "
            "that have no label (-100)"
        )


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) probability of the predicted class, and 1 where it is the label; float32 at least."""
    _check(probabilities, labels)
    confidence, predicted = probabilities.detach().max(dim=1)
    confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32))
    return confidence, (predicted == labels).to(confidence.dtype)


def _upper_bounds(bins: Bins, like: Tensor) -> Tensor:
    if isinstance(bins, int):
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        bins = [k / bins for k in range(1, bins + 1)]
    rises = all(a < b for a, b in zip((0.0, *bins), bins))
    if not rises or not bins or bins[-1] < 1.0 - 1e-6:
        raise ValueError(f"the upper bounds of the bins must rise from above 0 to 1, got {list(bins)}")
    return torch.tensor(bins, dtype=like.dtype, device=like.device)
