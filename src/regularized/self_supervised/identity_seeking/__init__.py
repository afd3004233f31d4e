"""Identity-Seeking Self-Supervised Representation Learning for Generalizable Person Re-identification (ISR)."""

from regularized.self_supervised.identity_seeking.loss import (
    InterFrame,
    InterFrameContrastive,
    inter_frame_contrast,
    reliability_loss,
)
from regularized.self_supervised.identity_seeking.matching import max_weight_matching
from regularized.self_supervised.identity_seeking.pretext import IdentitySeeking
from regularized.self_supervised.identity_seeking.retrieval import Retrieval, retrieval_scores
from regularized.self_supervised.identity_seeking.sampler import FramePairs

__all__ = [
    "FramePairs",
    "IdentitySeeking",
    "InterFrame",
    "InterFrameContrastive",
    "Retrieval",
    "inter_frame_contrast",
    "max_weight_matching",
    "reliability_loss",
    "retrieval_scores",
]
