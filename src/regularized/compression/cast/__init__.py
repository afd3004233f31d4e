"""CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models."""

from regularized.compression.cast.layer import ScaledLinear, fold_scales, scale_weights
from regularized.compression.cast.loss import Distilled, distillation_loss
from regularized.compression.cast.optimizer import SparseAdamW, decay_budget
from regularized.compression.cast.pattern import follows_pattern, semi_structured_mask
from regularized.compression.cast.term import CAST

__all__ = [
    "CAST",
    "Distilled",
    "ScaledLinear",
    "SparseAdamW",
    "decay_budget",
    "distillation_loss",
    "fold_scales",
    "follows_pattern",
    "scale_weights",
    "semi_structured_mask",
]
