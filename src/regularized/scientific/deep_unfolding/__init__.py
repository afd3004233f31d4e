"""Comparison between Supervised and Unsupervised Learning in Deep Unfolded Sparse Signal Recovery."""

from regularized.scientific.deep_unfolding.layer import (
    RecoveryObjective,
    SparseObjective,
    Unfolded,
    UnfoldedIHT,
    UnfoldedISTA,
    hard_threshold,
    soft_threshold,
)
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining

__all__ = [
    "BernoulliGaussian",
    "IncrementalTraining",
    "RecoveryObjective",
    "SparseObjective",
    "Unfolded",
    "UnfoldedIHT",
    "UnfoldedISTA",
    "hard_threshold",
    "soft_threshold",
]
