"""Comparison between Supervised and Unsupervised Learning in Deep Unfolded Sparse Signal Recovery."""

from regularized.scientific.deep_unfolding.layer import (
    Unfolded,
    UnfoldedIHT,
    UnfoldedISTA,
    hard_threshold,
    soft_threshold,
)
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining
from regularized.scientific.deep_unfolding.term import RecoveryObjective

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
