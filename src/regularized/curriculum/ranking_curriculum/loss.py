"""A training curriculum from the first stage's ranking: for re-rankers on top of BM25 or another first stage.

Each training sample is weighted by how easy the first stage finds it: relevant documents that it ranks high, others
that it ranks low. The weights start at this difficulty value and grow linearly to 1, where they stay. No second model
and no more labels are needed; the values are computed once, by
:mod:`regularized.curriculum.ranking_curriculum.first_stage`.

    MacAvaney, Nardini, Perego, Tonellotto, Goharian, Frieder, "Training Curricula for Open Domain Answer Re-Ranking",
    SIGIR 2020, arXiv 2004.14269. Official code: github.com/Georgetown-IR-Lab/OpenNIR at 8cfcb7b (MIT).

=========  ==================  =========================================================================
paper      here                meaning
=========  ==================  =========================================================================
D(d)       ``easiness``        how relevant the first stage takes document d to be, in [0, 1]
D          ``difficulty``      value of a training sample, in [0, 1]: 1 is easy, 0 is hard (sic)
i          ``epoch``           counted from 0; in the paper one is 32 batches of 16
m          ``end_epoch``       end of the curriculum: the first epoch in which all weights are 1
W          ``weights``         D (1 - i/m) + i/m for i < m, then 1
=========  ==================  =========================================================================

Paper and code differ: the paper weights each sample's loss, the code multiplies the batch's mean loss by the mean of
its weights, so that the samples of a batch are not told apart. The published numbers came from the code. We follow the
paper; ``aggregate="batch_mean"`` is the form of the code. The code adds 1e-8 to D (``smoothing``); we do not.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least, between
from regularized.mechanisms.sample_weights import Aggregate, WeightedLoss, check_unit_interval

__all__ = [
    "DifficultyWeightedLoss",
    "RankingCurriculum",
    "curriculum_weights",
    "pairwise_difficulty",
    "pointwise_difficulty",
]

# Shapes: B samples of a batch, N samples of the training set, K documents that are not relevant.

UNJUDGED = -999  # label of the official code
END_EPOCH = between(0.0, math.inf, remedy="0 is no curriculum, math.inf one without end")
_CLIP = "clamp values beyond, which a score outside the list may have, with clip=True"


def pointwise_difficulty(easiness: Tensor, labels: Tensor, *, anti: bool = False) -> Tensor:
    """Difficulty value of single documents: ``D(d)`` if d is relevant, else ``1 - D(d)``.

    Args:
        easiness: (B,) D(d), in [0, 1].
        labels: (B,) relevance: positive is relevant; 0, or -999 for unjudged, is not.
        anti: take ``1 - D(d)`` before, the reversed curriculum: an ablation; default False.

    Returns:
        (B,) in [0, 1]; 1 is easy.

    Raises:
        ValueError: easiness outside [0, 1], a label that is neither 0, nor positive, nor -999 (both looked at on the
            CPU only), or shapes that differ.

    Examples:
        >>> pointwise_difficulty(torch.tensor([0.9, 0.9, 0.2]), torch.tensor([1, 0, -999]))
        tensor([0.9000, 0.1000, 0.8000])
    """
    check_unit_interval(easiness, name="easiness", remedy=_CLIP)
    if easiness.shape != labels.shape:
        raise ValueError(f"easiness has the shape {tuple(easiness.shape)}, labels have {tuple(labels.shape)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[~((labels >= 0) | (labels == UNJUDGED))]
        if len(wrong):
            raise ValueError(
                f"labels must be 0, positive, or {UNJUDGED} for unjudged, got {wrong[0].item()}; map other negative "
                "labels (spam, say) to 0"
            )
    if anti:
        easiness = 1 - easiness
    return torch.where(labels > 0, easiness, 1 - easiness)


def pairwise_difficulty(easy_positive: Tensor, easy_negative: Tensor, *, anti: bool = False) -> Tensor:
    """Difficulty value of pairs: ``(D(d+) - D(d-) + 1) / 2``; of several negatives the hardest one decides.

    Args:
        easy_positive: (B,) D of the relevant documents, in [0, 1].
        easy_negative: (B,) or (B, K) D of the others, in [0, 1].
        anti: take one minus the value, the reversed curriculum: an ablation; default False.

    Returns:
        (B,) in [0, 1]; 1 is easy, 0.5 where the first stage cannot tell the documents apart.

    Raises:
        ValueError: easiness outside [0, 1] (looked at on the CPU only), or shapes that do not fit.

    Examples:
        >>> pairwise_difficulty(torch.tensor([1.0, 0.5]), torch.tensor([[0.0, 0.2], [0.5, 0.1]]))
        tensor([0.9000, 0.5000])
    """
    check_unit_interval(easy_positive, name="easiness of the relevant documents", remedy=_CLIP)
    check_unit_interval(easy_negative, name="easiness of the other documents", remedy=_CLIP)
    others = easy_negative[:, None] if easy_negative.ndim == 1 else easy_negative
    if easy_positive.ndim != 1 or others.ndim != 2 or len(others) != len(easy_positive) or others.shape[1] == 0:
        raise ValueError(
            f"pairs need easiness (B,) of the relevant and (B,) or (B, K) of the other documents; got "
            f"{tuple(easy_positive.shape)} and {tuple(easy_negative.shape)}"
        )
    # The smallest value belongs to the negative that the first stage likes best.
    difficulty = (easy_positive - others.amax(dim=1) + 1) / 2
    return 1 - difficulty if anti else difficulty


def curriculum_weights(difficulty: Tensor, progress: float) -> Tensor:
    """Weights ``D (1 - p) + p``: at the start the difficulty value, at the end 1.

    Args:
        difficulty: (B,) D, in [0, 1].
        progress: p = i/m, share of the curriculum that is done, in [0, 1].

    Returns:
        (B,) in [0, 1]; exactly D for p = 0, exactly 1 for p = 1 and where D = 1.

    Examples:
        >>> curriculum_weights(torch.tensor([0.0, 0.5, 1.0]), progress=0.5)
        tensor([0.5000, 0.7500, 1.0000])
    """
    return torch.lerp(difficulty, torch.ones_like(difficulty), progress)


class RankingCurriculum(nn.Module):
    """Weights of training samples that depend on the epoch; its state is the epoch.

    Published gains were obtained with ``aggregate="batch_mean"`` of :class:`DifficultyWeightedLoss`. Not for training
    far beyond the end of the curriculum: what it gains early need not last. Where hard samples are the ones that matter
    (few false negatives, a strong first stage), it starts by ignoring them.

    Args:
        end_epoch: m, the first epoch in which all weights are 1; default 20 epochs of 512 pairs (official code), that
            is 640 steps of 16: tune it on validation data. 0 switches the curriculum off, ``math.inf`` keeps the
            weights of the start forever.
        anti: reversed, hard samples first: an ablation; default False.
        clip: clamp easiness to [0, 1] where it would be refused; default False.
        smoothing: added to the difficulty value, >= 0; default 0 (the official code adds 1e-8).

    Raises:
        ValueError: ``end_epoch`` or ``smoothing`` is negative or NaN; at the call: easiness outside [0, 1] without
            ``clip`` (looked at on the CPU only), labels or shapes that do not fit.
        RuntimeError: weights are asked for before :meth:`set_epoch` was called.

    Examples:
        >>> curriculum = RankingCurriculum(end_epoch=10)
        >>> easy_positive, easy_negative = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])
        >>> for epoch in (0, 5, 10):
        ...     curriculum.set_epoch(epoch)
        ...     print(curriculum.pairwise(easy_positive, easy_negative))
        tensor([1.0000, 0.5000])
        tensor([1.0000, 0.7500])
        tensor([1., 1.])
    """

    @allowed(end_epoch=END_EPOCH, smoothing=at_least(0.0))
    def __init__(
        self, end_epoch: float = 20, *, anti: bool = False, clip: bool = False, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.end_epoch = end_epoch
        self.anti = anti
        self.clip = clip
        self.smoothing = smoothing
        self._epoch: float | None = None

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch that begins, counted from 0; fractions are allowed, for weights that change within epochs.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0 <= epoch < math.inf:
            raise ValueError(f"epoch must be >= 0, counted from 0; got {epoch}")
        self._epoch = epoch

    @property
    def progress(self) -> float:
        """Share of the curriculum that is done now.

        Raises:
            RuntimeError: :meth:`set_epoch` was never called.
        """
        if self._epoch is None:
            raise RuntimeError(
                "RankingCurriculum was never told the epoch: call set_epoch(epoch) at the start of each epoch; "
                "otherwise the weights would stay those of the start"
            )
        return share_done(self._epoch, self.end_epoch)

    def pointwise(self, easiness: Tensor, labels: Tensor) -> Tensor:
        """Weights of single documents now; arguments as of :func:`pointwise_difficulty`. Returns (B,)."""
        return self.forward(pointwise_difficulty(self._clipped(easiness), labels, anti=self.anti))

    def pairwise(self, easy_positive: Tensor, easy_negative: Tensor) -> Tensor:
        """Weights of pairs now; arguments as of :func:`pairwise_difficulty`. Returns (B,)."""
        positive, negative = self._clipped(easy_positive), self._clipped(easy_negative)
        return self.forward(pairwise_difficulty(positive, negative, anti=self.anti))

    def forward(self, difficulty: Tensor) -> Tensor:
        """Weights of samples of known difficulty value now.

        The values are taken as they are: ``anti`` and ``clip`` act where they are computed. Give a whole column of them
        to get a table, for :class:`~regularized.mechanisms.sample_weights.WeightedSampler` for example.

        Args:
            difficulty: (B,) D, in [0, 1].

        Returns:
            (B,) weights.
        """
        check_unit_interval(difficulty, name="difficulty")
        return curriculum_weights(difficulty + self.smoothing if self.smoothing else difficulty, self.progress)

    def _clipped(self, easiness: Tensor) -> Tensor:
        return easiness.clamp(0.0, 1.0) if self.clip else easiness

    def get_extra_state(self) -> Tensor:
        """The epoch, so that a resumed training goes on with the same weights; -1 when it was never told."""
        return torch.tensor(-1.0 if self._epoch is None else self._epoch, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the epoch."""
        epoch = float(state)
        self._epoch = None if epoch < 0 else epoch

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"end_epoch={self.end_epoch}, anti={self.anti}, clip={self.clip}, smoothing={self.smoothing}"


class DifficultyWeightedLoss(WeightedLoss):
    """Any per-sample loss, weighted by a curriculum: easy samples first, all alike later.

    ``mean_b [ W_b * loss_b ]``; in ``eval()`` mode the plain mean. Costs one multiplication a sample.

    Args:
        loss: called with two arguments: outputs and targets, or scores of the relevant and of the other documents as in
            :mod:`~regularized.curriculum.ranking_curriculum.reranker_losses`; returns one loss a sample, shape (B,),
            such as a torch loss with ``reduction="none"``.
        curriculum: gives the weights; tell it the epoch.
        aggregate: ``"per_sample"`` (default, the paper) or ``"batch_mean"`` (the official code): ``mean(W) *
            mean(loss)``, which does not tell the samples of a batch apart.

    Raises:
        ValueError: ``loss`` reduces to a mean, or ``aggregate`` is unknown; at the call: shapes of difficulty and loss
            differ, or difficulty is outside [0, 1] (looked at on the CPU only).
        TypeError: ``loss`` cannot be called, or ``curriculum`` is no :class:`RankingCurriculum`.
        RuntimeError: the curriculum was never told the epoch.

    Examples:
        >>> from regularized.curriculum.ranking_curriculum.reranker_losses import pairwise_softmax_loss
        >>> criterion = DifficultyWeightedLoss(pairwise_softmax_loss, RankingCurriculum(end_epoch=20))
        >>> difficulty = pairwise_difficulty(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))
        >>> ranker = nn.Linear(4, 1)
        >>> relevant, other = torch.randn(2, 4), torch.randn(2, 4)
        >>> for epoch in range(3):
        ...     criterion.curriculum.set_epoch(epoch)
        ...     loss = criterion(ranker(relevant).squeeze(1), ranker(other).squeeze(1), difficulty)
        ...     loss.backward()
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        curriculum: RankingCurriculum,
        *,
        aggregate: Aggregate = "per_sample",
    ) -> None:
        super().__init__(loss, aggregate=aggregate)
        if not isinstance(curriculum, RankingCurriculum):
            raise TypeError(f"curriculum must be a RankingCurriculum, got {type(curriculum).__name__}")
        self.curriculum = curriculum

    def forward(self, outputs: Any, targets: Any, difficulty: Tensor) -> Tensor:
        """Weighted mean loss of the batch.

        Args:
            outputs: first argument of the loss.
            targets: second argument of the loss.
            difficulty: (B,) values in [0, 1], from :func:`pointwise_difficulty` or :func:`pairwise_difficulty`.

        Returns:
            Scalar.
        """
        return super().forward(outputs, targets, self.curriculum(difficulty) if self.training else difficulty)


def share_done(epoch: float, end_epoch: float) -> float:
    """Share of the curriculum that is done in an epoch, in [0, 1]; 1 is its end."""
    return epoch / end_epoch if epoch < end_epoch else 1.0
