"""SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining."""

from regularized.pretraining.sltrain.layer import SparseLowRankLinear
from regularized.pretraining.sltrain.model import convert, init_from_dense, merge
from regularized.pretraining.sltrain.product import dense_weight, sparse_low_rank_linear
from regularized.pretraining.sltrain.term import SLTrain

__all__ = [
    "SLTrain",
    "SparseLowRankLinear",
    "convert",
    "dense_weight",
    "init_from_dense",
    "merge",
    "sparse_low_rank_linear",
]
