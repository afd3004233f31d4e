"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models."""

from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa, merge_sorsa
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty, orthonormal_gradient, orthonormal_penalty
from regularized.fine_tuning.sorsa.report import spectral_drift
from regularized.fine_tuning.sorsa.term import Sorsa

__all__ = [
    "OrthonormalPenalty",
    "Sorsa",
    "SorsaLinear",
    "inject_sorsa",
    "merge_sorsa",
    "orthonormal_gradient",
    "orthonormal_penalty",
    "spectral_drift",
]
