"""HESTIA: A Hessian-Guided Differentiable Quantization-Aware Training Framework for Extremely Low-Bit LLMs."""

from regularized.compression.hestia.files import load_packed, save_packed
from regularized.compression.hestia.layer import (
    AnnealedWeight,
    Annealer,
    anneal_weights,
    annealed_weights,
    freeze_weights,
    latent_weights,
    soft_evaluation,
)
from regularized.compression.hestia.packed import (
    PackedLinear,
    pack_codes,
    pack_weights,
    size_in_bytes,
    unpack_codes,
    unpack_weights,
)
from regularized.compression.hestia.quantizer import (
    anneal,
    from_codes,
    group_scales,
    levels_of,
    optimal_temperature,
    quantize_weight,
    soft_levels,
    to_codes,
)
from regularized.compression.hestia.schedule import Annealing, sensitivities, temperature_factors
from regularized.compression.hestia.term import Hestia
from regularized.compression.hestia.traces import TraceEstimate, hessian_traces, hutchpp

__all__ = [
    "AnnealedWeight",
    "Annealer",
    "Annealing",
    "Hestia",
    "PackedLinear",
    "TraceEstimate",
    "anneal",
    "anneal_weights",
    "annealed_weights",
    "freeze_weights",
    "from_codes",
    "group_scales",
    "hessian_traces",
    "hutchpp",
    "latent_weights",
    "levels_of",
    "load_packed",
    "optimal_temperature",
    "pack_codes",
    "pack_weights",
    "quantize_weight",
    "save_packed",
    "sensitivities",
    "size_in_bytes",
    "soft_evaluation",
    "soft_levels",
    "temperature_factors",
    "to_codes",
    "unpack_codes",
    "unpack_weights",
]
