"""CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models."""

from regularized.compression.cast.deployment import Deployed, to_semi_structured
from regularized.compression.cast.files import load_sparse, pack_sparse, save_sparse, unpack_sparse
from regularized.compression.cast.layer import ScaledLinear, fold_scales, scale_weights
from regularized.compression.cast.loss import Distilled, distillation_loss
from regularized.compression.cast.optimizer import SparseAdamW, decay_budget
from regularized.compression.cast.pattern import follows_pattern, semi_structured_mask
from regularized.compression.cast.term import CAST

__all__ = [
    "CAST",
    "Deployed",
    "Distilled",
    "ScaledLinear",
    "SparseAdamW",
    "decay_budget",
    "distillation_loss",
    "fold_scales",
    "follows_pattern",
    "load_sparse",
    "pack_sparse",
    "save_sparse",
    "scale_weights",
    "semi_structured_mask",
    "to_semi_structured",
    "unpack_sparse",
]
