"""Policy Gradient-Driven Noise Mask."""

from regularized.overfitting.noise_mask.layer import BetaMaskPolicy, NoiseMask, gaussian_blur
from regularized.overfitting.noise_mask.loss import beta_log_density, noise_mask_objective
from regularized.overfitting.noise_mask.procedure import NoiseMaskPretraining

__all__ = [
    "BetaMaskPolicy",
    "NoiseMask",
    "NoiseMaskPretraining",
    "beta_log_density",
    "gaussian_blur",
    "noise_mask_objective",
]
