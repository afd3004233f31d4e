"""What a score is for: to answer or decline, to choose among answers, to choose instruction data."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, between, check_fields, count, finite

__all__ = ["SelectiveGate", "best_of_n", "select_instructions"]


@dataclass(frozen=True, slots=True)
class SelectiveGate:
    """Answer where the score is at least a threshold, and decline elsewhere.

    Args:
        threshold: least score that is answered.
        coverage: share of the calibration set that it answers; None where it was not calibrated.
        quality: mean quality of what it answers there; None where that is not known.

    Raises:
        ValueError: the threshold is not finite.

    Warns:
        UserWarning: the threshold is outside 0 ... 9, so that all or nothing is answered.

    Examples:
        >>> scores, quality = torch.tensor([8.0, 2.0, 6.0, 4.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> gate = SelectiveGate.calibrate(scores, quality, coverage=0.5)
        >>> gate.threshold, gate.quality, gate(torch.tensor([5.0, 7.0]))
        (6.0, 1.0, tensor([False,  True]))
    """

    threshold: float
    coverage: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, threshold=finite("a score", remedy="calibrate finds one"))
        if not 0.0 <= self.threshold <= 9.0:
            everything = self.threshold < 0.0
            warnings.warn(
                f"the threshold {self.threshold:g} is outside the scores 0 to 9: the gate answers "
                f"{'everything, coverage 1' if everything else 'nothing, coverage 0'}",
                stacklevel=3,
            )

    def __call__(self, scores: Tensor) -> Tensor:
        """Which to answer, a boolean for each score."""
        return scores >= self.threshold

    @classmethod
    @allowed(
        coverage=between(0.0, 1.0, "(]", "the share that is to be answered").or_none("a gate by quality"),
    )
    def calibrate(
        cls,
        scores: Tensor,
        quality: Tensor | None = None,
        *,
        coverage: float | None = None,
        least_quality: float | None = None,
    ) -> "SelectiveGate":
        """Choose the threshold on a calibration set, by how much is to be answered or by how good it is to be.

        Args:
            scores: (n,) of the calibration set.
            quality: (n,) true quality, in any unit; needed for ``least_quality``, otherwise reported.
            coverage: answer at least this share, in (0, 1]: the largest threshold that does.
            least_quality: answer as much as possible with this mean quality.

        Returns:
            The gate, with its coverage and quality on the calibration set.

        Raises:
            ValueError: not exactly one of the two aims; scores are empty or not finite; shapes differ; no threshold
                reaches ``least_quality``.
        """
        if (coverage is None) == (least_quality is None):
            raise ValueError(f"give coverage or least_quality, one of them; got {coverage=}, {least_quality=}")
        if scores.ndim != 1 or not len(scores) or not bool(scores.isfinite().all()):
            raise ValueError(f"scores must be (n,), finite and at least one; got shape {tuple(scores.shape)}")
        if quality is not None and quality.shape != scores.shape:
            raise ValueError(f"each score needs a quality, got {tuple(scores.shape)} and {tuple(quality.shape)}")
        ordered, order = scores.sort(descending=True, stable=True)
        if coverage is not None:
            # Rounding must not ask for one answer more: 0.07 * 100 is 7.000000000000001.
            last = max(-int(-(coverage * len(scores) - 1e-9) // 1), 1) - 1
        else:
            if quality is None or least_quality is None:
                raise ValueError("least_quality needs the quality of the calibration set")
            means = quality[order].double().cumsum(0) / torch.arange(1, len(scores) + 1)
            # Equal scores are answered together: a threshold can only lie behind the last of them.
            ends = torch.cat([ordered[1:] < ordered[:-1], torch.ones(1, dtype=torch.bool)])
            good = ((means >= least_quality) & ends).nonzero()
            if not len(good):
                raise ValueError(
                    f"no threshold reaches the mean quality {least_quality:g}: the best reaches "
                    f"{float(means[ends].max()):g}; ask for less, or train a better judge"
                )
            last = int(good[-1])
        threshold = float(ordered[last])
        answered = scores >= threshold
        reached = None if quality is None else float(quality[answered].double().mean())
        return cls(threshold, float(answered.double().mean()), reached)


def best_of_n(scores: Tensor) -> Tensor:
    """The answer with the largest score of each question; the first of equals.

    Args:
        scores: (Q, n) of n answers to each of Q questions; -inf where there is none.

    Returns:
        (Q,) int64.

    Raises:
        ValueError: another shape, a NaN, or a question without an answer.

    Examples:
        >>> best_of_n(torch.tensor([[3.0, 7.5, 7.5], [9.0, 1.0, 2.0]]))
        tensor([1, 0])
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be (Q, n) with at least one answer each, got {tuple(scores.shape)}")
    best = scores.amax(dim=1, keepdim=True)
    if not bool((best > -torch.inf).all()):  # NaN compares false, too, and amax passes it on
        raise ValueError("a question has no answer, or a score that is NaN; leave it out")
    # argmax promises nothing about equals.
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return places.masked_fill(scores < best, scores.shape[1]).amin(dim=1)


@allowed(keep=count(1, "how many of each group"))
def select_instructions(scores: Tensor, *, keep: int, groups: Sequence[object] | None = None) -> Tensor:
    """Instruction data to train on: the samples whose answers score best, of each group.

    Args:
        scores: (n,) of the answers in the data.
        keep: how many; of each group, where there are some.
        groups: a category for each sample, so that easy kinds do not push the others out; default one group.

    Returns:
        (m,) int64, rows in their order in the data. A group that has fewer than ``keep`` is taken whole. Of equal
        scores the earlier is taken.

    Raises:
        ValueError: scores are not (n,) and finite, or there is not one group for each.

    Examples:
        >>> select_instructions(torch.tensor([3.0, 9.0, 8.0, 1.0]), keep=1, groups=["sum", "sum", "code", "code"])
        tensor([1, 2])
    """
    if scores.ndim != 1 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be (n,) and finite, got shape {tuple(scores.shape)}")
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"each sample needs a group, got {len(scores)} scores and {len(groups)} groups")
    taken: dict[object, int] = {}
    rows = []
    for row in scores.sort(descending=True, stable=True).indices.tolist():
        group = None if groups is None else groups[row]
        if taken.setdefault(group, 0) < keep:
            taken[group] += 1
            rows.append(row)
    return torch.tensor(sorted(rows), dtype=torch.int64)
