"""Selfie: Self-supervised Pretraining for Image Embedding."""

from regularized.self_supervised.selfie.layer import AttentionPool, GridPositions, grid_table
from regularized.self_supervised.selfie.loss import selection_accuracy, selection_logits, selection_loss
from regularized.self_supervised.selfie.pretext import Quiz, Selfie, load_trunk

__all__ = [
    "AttentionPool",
    "GridPositions",
    "Quiz",
    "Selfie",
    "grid_table",
    "load_trunk",
    "selection_accuracy",
    "selection_logits",
    "selection_loss",
]
