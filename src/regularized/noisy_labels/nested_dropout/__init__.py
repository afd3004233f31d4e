"""Compressing Features for Learning with Noisy Labels."""

from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    draw_together,
    nest_classifier,
    width_distribution,
)
from regularized.noisy_labels.nested_dropout.width import (
    NestedWidth,
    best_width,
    cut_to_width,
    select_width,
    width_accuracies,
)

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
