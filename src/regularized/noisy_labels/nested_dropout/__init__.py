"""Compressing Features for Learning with Noisy Labels."""

from regularized.noisy_labels.nested_dropout.cutting import cut_to_width
from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    draw_together,
    nest_classifier,
    width_distribution,
)
from regularized.noisy_labels.nested_dropout.term import NestedWidth
from regularized.noisy_labels.nested_dropout.width import best_width, select_width, width_accuracies

__all__ = [
    "NestedDropout",
    "NestedLinear",
    "NestedWidth",
    "best_width",
    "cut_to_width",
    "draw_together",
    "nest_classifier",
    "select_width",
    "width_accuracies",
    "width_distribution",
]
