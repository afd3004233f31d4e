"""What training did to the spectrum of a weight: the drift of singular values and vectors (the paper's Figure 2)."""

from typing import NamedTuple

from torch import Tensor

from regularized.mechanisms.svd import thin_svd

__all__ = ["SpectralDrift", "spectral_drift"]


class SpectralDrift(NamedTuple):
    """How far a weight has moved from the pretrained one.

    Attributes:
        values: mean absolute change of the singular values.
        vectors: ``1 - (|<u_t, u_0>| + |<v_t, v_0>|) / 2``, mean over the triplets; 0 unturned, 1 orthogonal.
    """

    values: Tensor
    vectors: Tensor


def spectral_drift(before: Tensor, after: Tensor, *, rank: int | None = None) -> SpectralDrift:
    """Change of singular values and singular vectors, triplet by triplet in descending order.

    Says little where singular values cross or repeat: then triplets are paired that do not belong together.

    Args:
        before: (o, i) pretrained weight.
        after: (o, i) fine-tuned weight.
        rank: look at the leading triplets alone; default all.

    Returns:
        Two scalars, float32 at least.

    Raises:
        ValueError: the shapes differ, or a weight is not finite.

    Examples:
        >>> import torch
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> spectral_drift(weight, 2 * weight)
        SpectralDrift(values=tensor(2.), vectors=tensor(0.))
    """
    if before.shape != after.shape:
        raise ValueError(f"the two weights must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    old, new = thin_svd(before, rank=rank, name="before"), thin_svd(after, rank=rank, name="after")
    values = (new.values - old.values).abs().mean()
    left = (new.left * old.left).sum(dim=0).abs()
    right = (new.right * old.right).sum(dim=1).abs()
    return SpectralDrift(values, 1.0 - 0.5 * (left + right).mean())
