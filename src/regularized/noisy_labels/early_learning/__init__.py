"""Early-Learning Regularization Prevents Memorization of Noisy Labels."""

from regularized.noisy_labels.early_learning.loss import (
    EarlyLearning,
    EarlyLearningLoss,
    PredictionHistory,
    early_learning_penalty,
)
from regularized.noisy_labels.early_learning.procedure import (
    EarlyLearningPlus,
    EarlyLearningPlusLoss,
    early_learning_plus_loss,
)

__all__ = [
    "EarlyLearning",
    "EarlyLearningLoss",
    "EarlyLearningPlus",
    "EarlyLearningPlusLoss",
    "PredictionHistory",
    "early_learning_penalty",
    "early_learning_plus_loss",
]
