"""Adapt then Unlearn: a GAN stops making what users flagged, kept away from copies that make nothing else."""

from regularized.unlearning.adapt_unlearn.feedback import Feedback, collect_feedback, percent_unlearned, sample
from regularized.unlearning.adapt_unlearn.fisher import generator_fisher
from regularized.unlearning.adapt_unlearn.gan import GAN, GANSettings
from regularized.unlearning.adapt_unlearn.loss import discriminator_loss, generator_loss, gradient_penalty
from regularized.unlearning.adapt_unlearn.penalty import collapse, repel, repel_slope, squared_distance
from regularized.unlearning.adapt_unlearn.procedure import AdaptThenUnlearn, adapt_then_unlearn
from regularized.unlearning.adapt_unlearn.term import ElasticAnchor, Repulsion

__all__ = [
    "GAN",
    "AdaptThenUnlearn",
    "ElasticAnchor",
    "Feedback",
    "GANSettings",
    "Repulsion",
    "adapt_then_unlearn",
    "collapse",
    "collect_feedback",
    "discriminator_loss",
    "generator_fisher",
    "generator_loss",
    "gradient_penalty",
    "percent_unlearned",
    "repel",
    "repel_slope",
    "sample",
    "squared_distance",
]
