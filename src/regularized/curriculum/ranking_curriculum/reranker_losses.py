"""Losses of re-rankers, one value a training sample, so that samples can be weighted.

Pairwise losses take a relevant document and one or more others of the same query. For pointwise losses on one score use
torch's own: ``nn.MSELoss(reduction="none")``, ``nn.L1Loss``, ``nn.SmoothL1Loss``.

Shapes: B samples, K documents that are not relevant.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "pairwise_cross_entropy_loss",
    "pairwise_hinge_loss",
    "pairwise_softmax_loss",
    "pointwise_cross_entropy_loss",
    "two_output_pairwise_loss",
]


def pairwise_softmax_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """One minus the probability of the relevant document, ``1 - softmax(s+, s-)[0]``.

    Bounded by 1, so that a pair that is hopelessly wrong (a false negative, often) has hardly any gradient. With one
    negative it is ``sigmoid(s- - s+)``.

    Args:
        positive: (B,) scores of the relevant documents.
        negative: (B,) or (B, K) scores of the others.

    Returns:
        (B,) in [0, 1].

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> pairwise_softmax_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.2689])
    """
    others = _others(positive, negative)
    # 1 - 1 / (1 + x) would lose the small values; this form does not.
    return torch.sigmoid(others.logsumexp(dim=1) - positive)


def pairwise_cross_entropy_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Minus the log-probability of the relevant document, ``-log softmax(s+, s-)[0]``.

    Args:
        positive: (B,) scores of the relevant documents.
        negative: (B,) or (B, K) scores of the others.

    Returns:
        (B,) >= 0.

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> pairwise_cross_entropy_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.3133])
    """
    others = _others(positive, negative)
    return F.softplus(others.logsumexp(dim=1) - positive)


def pairwise_hinge_loss(positive: Tensor, negative: Tensor, *, margin: float = 0.0) -> Tensor:
    """``max(0, margin - s+ + s-)``, mean over the negatives.

    Args:
        positive: (B,) scores of the relevant documents.
        negative: (B,) or (B, K) scores of the others.
        margin: by how much the relevant document must lead; default 0 (official code; 1 is usual elsewhere).

    Returns:
        (B,) >= 0.

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> pairwise_hinge_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.5]), margin=1.0)
        tensor([1.5000, 0.5000])
    """
    others = _others(positive, negative)
    return F.relu(margin - positive[:, None] + others).mean(dim=1)


def two_output_pairwise_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Cross-entropy of two documents by a ranker with two outputs each ("Nogueira"); output 0 means relevant.

    Args:
        positive: (B, 2) outputs for the relevant documents.
        negative: (B, 2) outputs for the others.

    Returns:
        (B,) ``-log p(relevant | d+) - log p(not relevant | d-)``.

    Raises:
        ValueError: the shapes are not (B, 2).

    Examples:
        >>> two_output_pairwise_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([1.3863])
    """
    if positive.ndim != 2 or positive.shape[1] != 2 or negative.shape != positive.shape:
        raise ValueError(
            f"two_output_pairwise_loss needs two outputs for each document, both (B, 2); got {tuple(positive.shape)} "
            f"and {tuple(negative.shape)}"
        )
    return -F.log_softmax(positive, dim=1)[:, 0] - F.log_softmax(negative, dim=1)[:, 1]


def pointwise_cross_entropy_loss(outputs: Tensor, relevant: Tensor) -> Tensor:
    """Cross-entropy of a ranker with two outputs; output 0 means relevant (official code).

    Args:
        outputs: (B, 2) before the softmax.
        relevant: (B,) labels; above 0 is relevant.

    Returns:
        (B,) >= 0.

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> pointwise_cross_entropy_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
        tensor([0.3133, 1.3133])
    """
    if outputs.ndim != 2 or outputs.shape[1] != 2 or relevant.shape != outputs.shape[:1]:
        raise ValueError(
            f"pointwise_cross_entropy_loss needs outputs (B, 2) and labels (B,); got {tuple(outputs.shape)} and "
            f"{tuple(relevant.shape)}"
        )
    return F.cross_entropy(outputs, (relevant <= 0).long(), reduction="none")


def _others(positive: Tensor, negative: Tensor) -> Tensor:
    """Scores of the negatives as (B, K)."""
    others = negative[:, None] if negative.ndim == 1 else negative
    if positive.ndim != 1 or others.ndim != 2 or len(others) != len(positive) or others.shape[1] == 0:
        raise ValueError(
            f"pairwise losses need positive scores (B,) and negative scores (B,) or (B, K); got "
            f"{tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    return others
