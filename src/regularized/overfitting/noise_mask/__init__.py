"""Policy Gradient-Driven Noise Mask."""

from regularized.overfitting.noise_mask.procedure import (
    BetaMaskPolicy,
    NoiseMask,
    NoiseMaskPretraining,
    beta_log_density,
    gaussian_blur,
    noise_mask_objective,
)

__all__ = [
    "BetaMaskPolicy",
    "NoiseMask",
    "NoiseMaskPretraining",
    "beta_log_density",
    "gaussian_blur",
    "noise_mask_objective",
]
