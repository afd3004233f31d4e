"""Contrast between two frames, in which unreliable pairs count little.

====================  ======================================================================================
``x_i``, ``y_j``      crops of frame a and of frame b of one video
``S_ij``              cosine similarity of their features
pairs (i, j)          maximum-weight matching of each video, each crop at most once; no gradient goes through
``P_ij``              ``exp(S_ij / tau) / sum_k exp(S_ik / tau)``, k over frame-b crops of *all* videos
``q``                 how much reliability counts
====================  ======================================================================================

InfoNCE, ``-log P``, pulls hardest at the pairs with the smallest P, which are the wrong ones. The family::

    L_q(P) = (1 - P^q) / q          q -> 0: -log P,  q = 1: 1 - P

has the gradient of InfoNCE times ``P^q``: each pair is weighted by its own reliability. The paper's goal is confirmed,
its formula could not be read: **the family is ours**. A crop without a pair is a negative of the others, and no anchor.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, finite, positive, share
from regularized.self_supervised.identity_seeking.matching import Solver, max_weight_matching

__all__ = ["InterFrame", "InterFrameContrastive", "Reliability", "inter_frame_contrast", "reliability_loss"]

Reliability: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(similarity, probability, pairs) -> (k,)`` weights of the pairs; see :class:`InterFrameContrastive`."""

_SAME = 1.0 - 1e-6


class InterFrame(NamedTuple):
    """What came of a pair of frames, or of several.

    Attributes:
        loss: the scalar; a mean over the pairs.
        pairs: (k, 2) matched crops, as rows of the two feature matrices.
        reliability: (k,) mean of the two probabilities of each pair, detached.
        similarity: (n, m) cosine similarities, with their graph.
        skipped: videos that have crops in one frame only.
    """

    loss: Tensor
    pairs: Tensor
    reliability: Tensor
    similarity: Tensor
    skipped: int


@allowed(q=share("0 is InfoNCE, 1 is 1 - P"))
def reliability_loss(log_probability: Tensor, q: float) -> Tensor:
    """``(1 - P^q) / q``, exact for small q, too; ``-log P`` for 0.

    Args:
        log_probability: log P, of any shape.
        q: how much reliability counts.

    Returns:
        The loss of each pair, in the same shape.

    Examples:
        >>> log_p = torch.tensor([0.5, 0.01]).log()
        >>> reliability_loss(log_p, 0.0), reliability_loss(log_p, 1.0)
        (tensor([0.6931, 4.6052]), tensor([0.5000, 0.9900]))
    """
    return -log_probability if q == 0.0 else -torch.expm1(q * log_probability) / q


def inter_frame_contrast(similarity: Tensor, pairs: Tensor, *, tau: float = 0.1) -> Tensor:
    """Log-probabilities of matched pairs, from each side against all crops of the other frame.

    Args:
        similarity: (n, m) cosine similarities of all crops, whatever their video.
        pairs: (k, 2) matched rows and columns.
        tau: temperature.

    Returns:
        (2, k): rows against columns, and columns against rows.

    Examples:
        >>> inter_frame_contrast(torch.eye(2), torch.tensor([[0, 0], [1, 1]]), tau=0.5).exp()
        tensor([[0.8808, 0.8808],
                [0.8808, 0.8808]])
    """
    logits = similarity / tau
    rows, columns = pairs.unbind(dim=1)
    return torch.stack([logits.log_softmax(dim=dim)[rows, columns] for dim in (1, 0)])


class InterFrameContrastive(nn.Module):
    """Matches the crops of two frames of each video, and contrasts each pair with all other crops of the batch.

    Args:
        tau: temperature; default 0.1 (ours).
        q: how much reliability counts, see the module; default 1 (ours). It may be set between steps.
        reliability: weights of your own in place of ``P^q``: a function ``(similarity, probability, pairs)`` of
            detached values, (n, m), (2, k) and (k, 2), that gives (k,) weights of InfoNCE; ``q`` is then not used.
        normalize_weights: divide by the mean weight, so that the step does not depend on how sure the pairs are.
            Default False.
        min_similarity: see :func:`max_weight_matching`; default None.
        solver: see :func:`max_weight_matching`; default None.

    Attributes:
        skipped: videos so far that had crops in one frame only.

    Raises:
        ValueError: ``tau`` is not positive, ``q`` is outside [0, 1].

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> loss = InterFrameContrastive()
        >>> frame_a = torch.randn(3, 8, requires_grad=True)
        >>> out = loss(frame_a, frame_a.detach()[[2, 0, 1]] + 0.1 * torch.randn(3, 8))
        >>> out.pairs
        tensor([[0, 1],
                [1, 2],
                [2, 0]])
        >>> out.loss.backward()
    """

    @allowed(tau=positive(), q=share("0 is InfoNCE, 1 is 1 - P"), min_similarity=finite().or_none("all pairs"))
    def __init__(
        self,
        *,
        tau: float = 0.1,
        q: float = 1.0,
        reliability: Reliability | None = None,
        normalize_weights: bool = False,
        min_similarity: float | None = None,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.tau = tau
        self.q = q
        self.reliability = reliability
        self.normalize_weights = normalize_weights
        self.min_similarity = min_similarity
        self.solver = solver
        self.skipped = 0

    def forward(
        self, first: Tensor, second: Tensor, group_a: Tensor | None = None, group_b: Tensor | None = None
    ) -> InterFrame:
        """Match and contrast.

        Similarities are copied to the CPU once, where the assignments of all videos are solved.

        Args:
            first: (n, d) features of the crops of one frame of each video; they are normalised here.
            second: (m, d) features of the crops of the other frame.
            group_a: (n,) video of each crop of ``first``; default None on both sides: all are of one video.
            group_b: (m,) video of each crop of ``second``.

        Returns:
            The loss and what it rests on. Where no video has crops in both frames the loss is 0, with a graph.

        Raises:
            ValueError: features are no matrices of equal width or not finite, or only one side has groups.

        Warns:
            UserWarning: nothing was matched; there are no negatives; or both frames are the same images.
        """
        _check_features(first, second)
        groups = _groups(first, second, group_a, group_b)
        similarity = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
        pairs, skipped = self._match(similarity.detach(), *groups)
        self.skipped += skipped
        if not len(pairs):
            warnings.warn("no video has crops in both frames: the loss of this batch is 0", stacklevel=2)
            nothing = 0.0 * (first.sum() + second.sum())
            return InterFrame(nothing, pairs, similarity.new_zeros(0), similarity, skipped)
        log_p = inter_frame_contrast(similarity, pairs, tau=self.tau)
        probability = log_p.detach().exp()
        if self.reliability is None:
            losses, weights = reliability_loss(log_p, self.q), probability**self.q
        else:
            weights = self.reliability(similarity.detach(), probability, pairs)
            losses = -weights * log_p
        loss = losses.mean()
        if self.normalize_weights:
            loss = loss / weights.mean()
        return InterFrame(loss, pairs, probability.mean(dim=0), similarity, skipped)

    @torch.no_grad()
    def _match(self, similarity: Tensor, group_a: Tensor, group_b: Tensor) -> tuple[Tensor, int]:
        """(k, 2) pairs within videos, sorted by row, and how many videos have one frame only."""
        host, a, b = similarity.cpu(), group_a.cpu(), group_b.cpu()
        if not bool(host.isfinite().all()):
            wrong = sorted({*a[~host.isfinite().any(dim=1)].tolist()} | {*b[~host.isfinite().any(dim=0)].tolist()})
            bad = wrong[:3]
            raise ValueError(
                f"features are not finite; crops of the videos {bad} are among them. Lower the learning rate"
            )
        found, skipped = [torch.zeros(0, 2, dtype=torch.long)], 0
        for video in torch.cat([a, b]).unique().tolist():
            rows, columns = (torch.nonzero(group == video).squeeze(1) for group in (a, b))
            if not len(rows) or not len(columns):
                skipped += 1
                continue
            inside = max_weight_matching(host[rows][:, columns], min_similarity=self.min_similarity, solver=self.solver)
            found.append(torch.stack([rows[inside[:, 0]], columns[inside[:, 1]]], dim=1))
        pairs = torch.cat(found)
        pairs = pairs[pairs[:, 0].argsort()]
        if len(pairs):
            _warn_of_trivial(host, pairs)
        return pairs.to(similarity.device), skipped


def _warn_of_trivial(similarity: Tensor, pairs: Tensor) -> None:
    if similarity.numel() == 1:
        warnings.warn("there is one crop in each frame and no negative: nothing can be learned", stacklevel=4)
    elif bool((similarity[pairs[:, 0], pairs[:, 1]] > _SAME).all()):
        warnings.warn(
            "all pairs are the same to six digits: are both frames the same images (a gap of 0), or has the network "
            "collapsed?",
            stacklevel=4,
        )


def _check_features(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features are (crops, d) with the same d, got {tuple(first.shape)} and {tuple(second.shape)}; pool or "
            "flatten what a backbone gives"
        )


def _groups(first: Tensor, second: Tensor, group_a: Tensor | None, group_b: Tensor | None) -> tuple[Tensor, Tensor]:
    if (group_a is None) != (group_b is None):
        raise ValueError("give group_a and group_b, the videos of both sides, or neither, where all is of one video")
    if group_a is None or group_b is None:
        return torch.zeros(len(first), dtype=torch.long), torch.zeros(len(second), dtype=torch.long)
    for name, group, features in (("group_a", group_a, first), ("group_b", group_b, second)):
        if group.shape != features.shape[:1]:
            raise ValueError(
                f"{name} must have one video for each of {len(features)} crops, got shape {tuple(group.shape)}"
            )
    return group_a, group_b
