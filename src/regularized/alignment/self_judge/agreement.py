"""How well scores agree with true grades: Pearson's r as in the paper, ranks, and pairs of answers to one question."""

import warnings

import torch
from torch import Tensor

__all__ = ["pairwise_accuracy", "pearson", "spearman"]


def pearson(scores: Tensor, grades: Tensor) -> Tensor:
    """Pearson's correlation of scores and true grades.

    Args:
        scores: (n,).
        grades: (n,).

    Returns:
        Scalar in [-1, 1], float64.

    Raises:
        ValueError: shapes differ, or there are fewer than two.

    Warns:
        UserWarning: one of them is constant: the correlation is not defined, and the result NaN.

    Examples:
        >>> round(float(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0]))), 4)
        0.9707
    """
    x, y = _both(scores, grades)
    x, y = x - x.mean(), y - y.mean()
    norms = x.norm() * y.norm()
    if float(norms) == 0.0:
        warnings.warn("scores or grades are all equal: their correlation is not defined", stacklevel=2)
        return torch.full_like(norms, torch.nan)
    r: Tensor = torch.dot(x / x.norm(), y / y.norm()).clamp(-1.0, 1.0)
    return r


def spearman(scores: Tensor, grades: Tensor) -> Tensor:
    """Spearman's correlation: Pearson's of the ranks, where equal values share the mean of theirs.

    Args:
        scores: (n,).
        grades: (n,).

    Returns:
        Scalar in [-1, 1], float64.

    Examples:
        >>> round(float(spearman(torch.tensor([1.0, 2.0, 50.0]), torch.tensor([0.0, 3.0, 9.0]))), 4)
        1.0
    """
    x, y = _both(scores, grades)
    return pearson(_ranks(x), _ranks(y))


def pairwise_accuracy(scores: Tensor, grades: Tensor) -> Tensor:
    """Share of the pairs of answers to one question, of different true grade, that the scores order right.

    What a judge for best-of-n needs: absolute levels of different questions do not matter. Equal scores count a half.

    Args:
        scores: (Q, n) of n answers to each question.
        grades: (Q, n).

    Returns:
        Scalar in [0, 1], float64; a half is chance. NaN where no pair differs.

    Examples:
        >>> pairwise_accuracy(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[0.0, 3.0, 9.0]]))
        tensor(0.8333, dtype=torch.float64)
    """
    if scores.shape != grades.shape or scores.ndim != 2:
        raise ValueError(f"both must be (Q, n), got {tuple(scores.shape)} and {tuple(grades.shape)}")
    s, g = ((t.double().unsqueeze(2) - t.double().unsqueeze(1)).sign() for t in (scores, grades))
    differ = g > 0  # each pair once
    return ((s[differ] + 1.0) / 2.0).mean()


def _both(scores: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    if scores.shape != grades.shape or scores.ndim != 1 or len(scores) < 2:
        raise ValueError(
            f"scores and grades must be (n,), two or more; got {tuple(scores.shape)} and {tuple(grades.shape)}"
        )
    return scores.double(), grades.double()


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1, equal values share the mean of theirs."""
    _, group, sizes = x.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    ranks: Tensor = last.double() - (sizes.double() - 1.0) / 2.0
    return ranks[group]
