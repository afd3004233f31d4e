"""OVOR: one prompt for all tasks in a frozen vision transformer, and virtual outliers for its head."""

from regularized.continual.ovor.features import extract_features
from regularized.continual.ovor.head import VirtualOutlierRegularizer
from regularized.continual.ovor.layer import PrefixAttention, prefix_attention
from regularized.continual.ovor.loss import energy, energy_gap, outlier_loss, task_cross_entropy
from regularized.continual.ovor.model import OnePrompt
from regularized.continual.ovor.neighbours import kth_squared_distance
from regularized.continual.ovor.outliers import (
    OutlierSampler,
    boundary_outliers,
    boundary_points,
    official_outliers,
)
from regularized.continual.ovor.schedule import epoch_cosine
from regularized.continual.ovor.term import HeadPhase, TaskCrossEntropy
from regularized.continual.ovor.thresholds import EnergyQuantile, Thresholds

__all__ = [
    "EnergyQuantile",
    "HeadPhase",
    "OnePrompt",
    "OutlierSampler",
    "PrefixAttention",
    "TaskCrossEntropy",
    "Thresholds",
    "VirtualOutlierRegularizer",
    "boundary_outliers",
    "boundary_points",
    "energy",
    "energy_gap",
    "epoch_cosine",
    "extract_features",
    "kth_squared_distance",
    "official_outliers",
    "outlier_loss",
    "prefix_attention",
    "task_cross_entropy",
]
