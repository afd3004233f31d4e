"""What the predictors learn by, and how often they are right.

:mod:`regularized.compression.dynamic_pruning.masks` has the paper and its symbols.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["mask_agreement", "mask_loss"]


def mask_loss(logits: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the predictions: mean over the batch, *sum* over the filters, mean over the layers.

    Args:
        logits: z of each layer, (B, Co) or with further dimensions of size 1.
        wanted: g of each layer, of the same shapes; bool, or 0 and 1.

    Returns:
        A scalar; no gradient flows into ``wanted``.

    Raises:
        ValueError: no layer, or another number of targets than of predictions.

    Examples:
        >>> mask_loss([torch.zeros(3, 4), torch.zeros(3, 6)], [torch.ones(3, 4), torch.zeros(3, 6)])  # 5 ln 2
        tensor(3.4657)
    """
    if not logits or len(logits) != len(wanted):
        raise ValueError(f"mask_loss needs a target for each layer, got {len(logits)} layers and {len(wanted)} targets")
    if len({len(z) for z in logits}) == 1:  # one kernel for all layers
        flat, goals = (torch.cat([t.flatten(1) for t in tensors], dim=1) for tensors in (logits, wanted))
        return _cross_entropy(flat, goals) / len(logits)
    return torch.stack([_cross_entropy(z, g) for z, g in zip(logits, wanted)]).mean()


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    goals = wanted.detach() if wanted.is_floating_point() else wanted.to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, goals, reduction="none")
    return (each.sum(dim=0) / max(len(each), 1)).sum()  # the part of a batch that a process has may be empty


@torch.no_grad()
def mask_agreement(kept: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Share of the filters on which mask and target agree; mean over filters, images and layers.

    Args:
        kept: mask of each layer, (B, Co).
        wanted: target of each layer, (B, Co).

    Returns:
        A scalar in [0, 1], float32.

    Examples:
        >>> mask_agreement([torch.tensor([[True, False]])], [torch.tensor([[True, True]])])
        tensor(0.5000)
    """
    total = torch.zeros(())
    for m, g in zip(kept, wanted):
        total = total.to(m.device) + (m == g).sum(dim=1).float().div(m.shape[1]).mean()
    return total / len(kept)
