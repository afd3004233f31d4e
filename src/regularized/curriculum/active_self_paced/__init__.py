"""Active Self-Paced Learning for Cost-Effective and Progressive Face Identification."""

from regularized.curriculum.active_self_paced.loss import (
    one_vs_rest_hinge,
    one_vs_rest_labels,
    self_paced_implicit_loss,
    self_paced_penalty,
    self_paced_weights,
    unique_labels,
)
from regularized.curriculum.active_self_paced.oracles import CSVOracle, PromptOracle
from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.curriculum.active_self_paced.queries import ambiguity, disagreement, doubtful, lowest_best_score

__all__ = [
    "ActiveSelfPaced",
    "CSVOracle",
    "PromptOracle",
    "ambiguity",
    "disagreement",
    "doubtful",
    "lowest_best_score",
    "one_vs_rest_hinge",
    "one_vs_rest_labels",
    "self_paced_implicit_loss",
    "self_paced_penalty",
    "self_paced_weights",
    "unique_labels",
]
