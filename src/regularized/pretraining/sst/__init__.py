"""Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks."""

from regularized.pretraining.sst.layer import SpectralLinear, spectral_linear
from regularized.pretraining.sst.lorentz import LorentzLinear, lorentz_centroid, lorentz_lift, lorentz_product
from regularized.pretraining.sst.sampling import draw_directions, sampling_probabilities
from regularized.pretraining.sst.term import SST

__all__ = [
    "SST",
    "LorentzLinear",
    "SpectralLinear",
    "draw_directions",
    "lorentz_centroid",
    "lorentz_lift",
    "lorentz_product",
    "sampling_probabilities",
    "spectral_linear",
]
