"""Early-Learning Regularization Prevents Memorization of Noisy Labels."""

from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.penalty import PredictionHistory, early_learning_penalty
from regularized.noisy_labels.early_learning.plus_loss import EarlyLearningPlusLoss, early_learning_plus_loss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus
from regularized.noisy_labels.early_learning.term import EarlyLearning

__all__ = [
    "EarlyLearning",
    "EarlyLearningLoss",
    "EarlyLearningPlus",
    "EarlyLearningPlusLoss",
    "PredictionHistory",
    "early_learning_penalty",
    "early_learning_plus_loss",
]
