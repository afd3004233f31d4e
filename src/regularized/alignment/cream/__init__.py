"""CREAM: Consistency Regularized Self-Rewarding Language Models."""

from regularized.alignment.cream.consistency import rank_consistency
from regularized.alignment.cream.loss import ConsistencyDPOLoss, consistency_dpo_loss, preference_margin
from regularized.alignment.cream.pairs import PreferencePairs, build_preference_pairs
from regularized.alignment.cream.procedure import CREAM, Round
from regularized.alignment.cream.rewards import Judge, SyntheticJudge, length_normalised, likelihood_ratio

__all__ = [
    "CREAM",
    "ConsistencyDPOLoss",
    "Judge",
    "PreferencePairs",
    "Round",
    "SyntheticJudge",
    "build_preference_pairs",
    "consistency_dpo_loss",
    "length_normalised",
    "likelihood_ratio",
    "preference_margin",
    "rank_consistency",
]
