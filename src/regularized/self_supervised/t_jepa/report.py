"""Has the representation collapsed? A small loss does not tell: the constant is predicted best of all."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count

__all__ = ["CollapseReport", "CollapseWarning", "collapse_report", "warn_of_collapse"]

COLLAPSED = 1e-3
"""Variance over rows below which embeddings count as collapsed; entries behind LayerNorm are of order 1."""


class CollapseWarning(UserWarning):
    """Representations hardly differ from row to row."""


@dataclass(frozen=True, slots=True)
class CollapseReport:
    """How much embeddings differ from row to row.

    Args:
        variance: over rows, mean over all entries.
        distance: mean Euclidean distance of two rows.
        divergence: mean Kullback-Leibler divergence of the histograms of the values of two rows, in nats.
        rank: effective rank, the exponential of the entropy of the spectrum; 1 where rows lie on a line.
    """

    variance: float
    distance: float
    divergence: float
    rank: float

    @property
    def collapsed(self) -> bool:
        """Whether the variance is below 1e-3."""
        return self.variance < COLLAPSED


@torch.no_grad()
@allowed(bins=count(2))
def collapse_report(embeddings: Tensor, *, bins: int = 20, generator: torch.Generator | None = None) -> CollapseReport:
    """Look at embeddings of some rows; a thousand are plenty.

    The official code compares two random rows with a kernel density; we take all rows in random pairs, and histograms.

    Args:
        embeddings: (N, ...), at least 2 rows.
        bins: of the histograms; default 20.
        generator: pairs the rows, on the CPU; default a new one of seed 0.

    Returns:
        The four numbers.

    Raises:
        ValueError: fewer than 2 rows, or entries that are not finite.

    Examples:
        >>> collapse_report(torch.ones(10, 3, 4)).collapsed
        True
    """
    flat = embeddings.flatten(1).double()
    if len(flat) < 2 or not bool(flat.isfinite().all()):
        raise ValueError(f"needs 2 rows or more of finite numbers, got {tuple(embeddings.shape)}")
    order = torch.randperm(len(flat), generator=generator or torch.Generator().manual_seed(0)).to(flat.device)
    partner = flat[order.roll(1)][order.argsort()]  # a cycle through all rows: nobody is paired with itself
    low, high = flat.min(), flat.max()
    cells = ((flat - low) / (high - low).clamp_min(1e-12) * bins).long().clamp_(max=bins - 1)
    counts = flat.new_zeros(len(flat), bins).scatter_add_(1, cells, torch.ones_like(flat)) + 1e-3
    shares = counts / counts.sum(dim=1, keepdim=True)
    others = shares[order.roll(1)][order.argsort()]
    spectrum = torch.linalg.svdvals(flat - flat.mean(dim=0))
    spectrum = spectrum / spectrum.sum().clamp_min(1e-300)
    entropy = -torch.special.xlogy(spectrum, spectrum).sum()
    return CollapseReport(
        variance=float(flat.var(dim=0, correction=0).mean()),
        distance=float((flat - partner).norm(dim=1).mean()),
        divergence=float((shares * (shares / others).log()).sum(dim=1).mean()),
        rank=float(entropy.exp()),
    )


def warn_of_collapse(report: CollapseReport) -> None:
    """Say so where a report finds a collapse.

    Warns:
        CollapseWarning: the variance is below 1e-3.
    """
    if report.collapsed:
        warnings.warn(
            f"embeddings have collapsed: their variance over rows is {report.variance:.2g}, less than {COLLAPSED:g} "
            "where entries are of order 1. A small loss means nothing then. Use a regularisation token "
            "(reg_tokens=1), a higher momentum, a lower learning rate, or more target columns",
            CollapseWarning,
            stacklevel=3,
        )
