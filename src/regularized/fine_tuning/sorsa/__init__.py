"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models."""

from regularized.fine_tuning.sorsa.penalty import (
    OrthonormalPenalty,
    Sorsa,
    SorsaLinear,
    inject_sorsa,
    merge_sorsa,
    orthonormal_gradient,
    orthonormal_penalty,
    spectral_drift,
)

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
