"""SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation."""

from regularized.fine_tuning.sara.adapter import SparseAdapter, combine_adapters
from regularized.fine_tuning.sara.entries import SparseEntries
from regularized.fine_tuning.sara.penalty import polar_factor
from regularized.fine_tuning.sara.selection import magnitude_threshold
from regularized.fine_tuning.sara.term import SaRA, suggested_learning_rate

__all__ = [
    "SaRA",
    "SparseAdapter",
    "SparseEntries",
    "combine_adapters",
    "magnitude_threshold",
    "polar_factor",
    "suggested_learning_rate",
]
