"""Generalised Gaussian priors: BackSlash, initialisation, DeepShape, RF8, and files that are as small as they say."""

from regularized.compression.generalized_gaussian.distribution import (
    GeneralizedGaussian,
    WeightMoments,
    moment_ratio,
    weight_moments,
)
from regularized.compression.generalized_gaussian.files import CompressedSize, load_compressed, save_compressed
from regularized.compression.generalized_gaussian.golomb import golomb_decode, golomb_encode, golomb_lengths
from regularized.compression.generalized_gaussian.initialization import generalized_gaussian_, initialize_
from regularized.compression.generalized_gaussian.penalty import rate, shrink_
from regularized.compression.generalized_gaussian.quantization import quantize
from regularized.compression.generalized_gaussian.report import CodeLength, code_length, layer_shapes
from regularized.compression.generalized_gaussian.reshaping import Reshaped, deepshape_, reshape_histogram
from regularized.compression.generalized_gaussian.rf8 import PackedRF8, rf8
from regularized.compression.generalized_gaussian.shrinking import Shrinker
from regularized.compression.generalized_gaussian.term import BackSlash, DecoupledBackSlash

__all__ = [
    "BackSlash",
    "CodeLength",
    "CompressedSize",
    "DecoupledBackSlash",
    "GeneralizedGaussian",
    "PackedRF8",
    "Reshaped",
    "Shrinker",
    "WeightMoments",
    "code_length",
    "deepshape_",
    "generalized_gaussian_",
    "golomb_decode",
    "golomb_encode",
    "golomb_lengths",
    "initialize_",
    "layer_shapes",
    "load_compressed",
    "moment_ratio",
    "quantize",
    "rate",
    "reshape_histogram",
    "rf8",
    "save_compressed",
    "shrink_",
    "weight_moments",
]
