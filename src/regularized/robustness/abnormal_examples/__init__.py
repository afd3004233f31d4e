"""Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization."""

from regularized.robustness.abnormal_examples.loss import AbnormalExamplesLoss
from regularized.robustness.abnormal_examples.penalty import Variation, abnormal_penalty, variation
from regularized.robustness.abnormal_examples.term import AbnormalExamples, AbnormalShare, OneStepTraining

__all__ = [
    "AbnormalExamples",
    "AbnormalExamplesLoss",
    "AbnormalShare",
    "OneStepTraining",
    "Variation",
    "abnormal_penalty",
    "variation",
]
