"""SLTrain as a term of our loop and of its adapters to other trainers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from regularized.pretraining.sltrain.model import _INCLUDE, convert, merge, sparse_low_rank_layers
from regularized.training.terms import Term

__all__ = ["SLTrain"]


class SLTrain(Term):
    """SLTrain in the loop: the model is converted before the optimizer is built and merged at the end; no loss.

    Args:
        rank: see :class:`~regularized.pretraining.sltrain.SparseLowRankLinear`.
        density: see :class:`~regularized.pretraining.sltrain.SparseLowRankLinear`.
        alpha: see :class:`~regularized.pretraining.sltrain.SparseLowRankLinear`.
        trained_scale: see :class:`~regularized.pretraining.sltrain.SparseLowRankLinear`.
        include: see :func:`~regularized.pretraining.sltrain.convert`.
        exclude: see :func:`~regularized.pretraining.sltrain.convert`.
        seed: of positions and start; default 0.

    Raises:
        ValueError: when it is attached, as :func:`~regularized.pretraining.sltrain.convert`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> term = SLTrain(rank=8, include=["0"])
        >>> term.attach(model)
        >>> term.merge(model)
    """

    sharding = "forward"
    contributes = False

    def __init__(
        self,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 16.0,
        trained_scale: bool = False,
        include: Sequence[str] = _INCLUDE,
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "rank": rank,
            "density": density,
            "alpha": alpha,
            "trained_scale": trained_scale,
            "include": include,
            "exclude": exclude,
        }
        self.seed = seed

    def attach(self, model: nn.Module) -> None:
        """Convert the model; one that is converted already stays as it is."""
        if next(sparse_low_rank_layers(model), None) is None:
            convert(model, **self.settings, generator=torch.Generator().manual_seed(self.seed))

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model."""
        merge(model)
