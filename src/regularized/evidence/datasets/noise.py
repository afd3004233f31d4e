"""Wrong labels, made on purpose."""

import torch
from torch import Tensor

__all__ = ["flip_labels"]


def flip_labels(labels: Tensor, share: float, *, num_classes: int, generator: torch.Generator) -> Tensor:
    """Symmetric label noise: a share of the labels, exactly, is replaced by a *different* class, drawn uniformly.

    Args:
        labels: (N,) int64.
        share: share of wrong labels in [0, 1].
        num_classes: number of classes C.
        generator: decides which labels and which classes.

    Returns:
        (N,) labels, ``round(share * N)`` of them wrong.

    Examples:
        >>> y = torch.arange(10)
        >>> int((flip_labels(y, 0.4, num_classes=10, generator=torch.Generator().manual_seed(0)) != y).sum())
        4
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy
