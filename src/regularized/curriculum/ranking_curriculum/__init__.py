"""Training Curricula for Open Domain Answer Re-Ranking."""

from regularized.curriculum.ranking_curriculum.evaluation import evaluate_ranking
from regularized.curriculum.ranking_curriculum.first_stage import (
    FirstStageDifficulty,
    FirstStageRun,
    kde_score,
    normalised_score,
    read_qrels,
    read_run,
    reciprocal_rank,
)
from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeightedLoss,
    RankingCurriculum,
    curriculum_weights,
    pairwise_difficulty,
    pointwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import (
    pairwise_cross_entropy_loss,
    pairwise_hinge_loss,
    pairwise_softmax_loss,
    pointwise_cross_entropy_loss,
    two_output_pairwise_loss,
)
from regularized.curriculum.ranking_curriculum.term import DifficultyWeighted

__all__ = [
    "DifficultyWeighted",
    "DifficultyWeightedLoss",
    "FirstStageDifficulty",
    "FirstStageRun",
    "RankingCurriculum",
    "curriculum_weights",
    "evaluate_ranking",
    "kde_score",
    "normalised_score",
    "pairwise_cross_entropy_loss",
    "pairwise_difficulty",
    "pairwise_hinge_loss",
    "pairwise_softmax_loss",
    "pointwise_cross_entropy_loss",
    "pointwise_difficulty",
    "read_qrels",
    "read_run",
    "reciprocal_rank",
    "two_output_pairwise_loss",
]
