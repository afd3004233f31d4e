"""A Closer Look at Rehearsal-Free Continual Learning: distillation and weight anchors, told of tasks by the loop."""

from regularized.continual.rehearsal_free.fisher import diagonal_fisher
from regularized.continual.rehearsal_free.loss import (
    distillation,
    feature_distillation,
    local_cross_entropy,
    sigmoid_loss,
)
from regularized.continual.rehearsal_free.parameters import select_parameters, train_only
from regularized.continual.rehearsal_free.penalty import path_importance
from regularized.continual.rehearsal_free.term import ContinualLoss, WeightAnchor
from regularized.mechanisms.anchors import add_anchor_gradient, anchor_penalty

__all__ = [
    "ContinualLoss",
    "WeightAnchor",
    "add_anchor_gradient",
    "anchor_penalty",
    "diagonal_fisher",
    "distillation",
    "feature_distillation",
    "local_cross_entropy",
    "path_importance",
    "select_parameters",
    "sigmoid_loss",
    "train_only",
]
