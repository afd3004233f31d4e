"""T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data."""

from regularized.self_supervised.t_jepa.layer import (
    PostNormLayer,
    PostNormStack,
    RowClassifier,
    TabularTransformer,
    TargetPredictor,
)
from regularized.self_supervised.t_jepa.loss import prediction_loss
from regularized.self_supervised.t_jepa.masks import MaskSizes, draw_masks
from regularized.self_supervised.t_jepa.model import TJEPA
from regularized.self_supervised.t_jepa.procedure import TJEPATraining
from regularized.self_supervised.t_jepa.report import CollapseReport, CollapseWarning, collapse_report, warn_of_collapse
from regularized.self_supervised.t_jepa.schedule import average_momentum, cosine_value, warmup_cosine
from regularized.self_supervised.t_jepa.tokens import ColumnTokenizer, encoder_positions, predictor_positions

__all__ = [
    "TJEPA",
    "CollapseReport",
    "CollapseWarning",
    "ColumnTokenizer",
    "MaskSizes",
    "PostNormLayer",
    "PostNormStack",
    "RowClassifier",
    "TJEPATraining",
    "TabularTransformer",
    "TargetPredictor",
    "average_momentum",
    "collapse_report",
    "cosine_value",
    "draw_masks",
    "encoder_positions",
    "prediction_loss",
    "predictor_positions",
    "warmup_cosine",
    "warn_of_collapse",
]
