"""Mixup: each sample of a batch blended with another one of the same batch (Zhang et al. 2017, arXiv 1710.09412)."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Mix", "draw_mix", "one_hot"]


@dataclass(frozen=True, slots=True)
class Mix:
    """Which samples are blended, and how much of the first stays; applied to inputs, soft labels, targets alike.

    Args:
        share: what stays of each sample, in [0, 1]; 1 changes nothing.
        partner: (B,) position in the batch of the sample that is blended in, on the device of the batch.

    Examples:
        >>> Mix(0.75, torch.tensor([1, 0]))(torch.tensor([[4.0], [0.0]])).flatten().tolist()
        [3.0, 1.0]
    """

    share: float
    partner: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """(B, ...) floating-point values to their blends of the same shape."""
        if self.share == 1.0:
            return values
        return torch.lerp(values.index_select(0, self.partner), values, self.share)


def draw_mix(
    batch_size: int,
    alpha: float,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    keep_larger: bool = False,
) -> Mix:
    """Draw one share for the whole batch, from Beta(alpha, alpha), and a random partner for each sample.

    Args:
        batch_size: B.
        alpha: both parameters of the Beta distribution, >= 0; 0 gives the share 1: no blending. 1 is uniform.
        generator: on the CPU; decides share and partners, and nothing else is drawn.
        device: where the partners are needed.
        keep_larger: replace the share by ``max(share, 1 - share)``, so that the sample itself always outweighs its
            partner (needed where the history of the sample goes with it).

    Raises:
        ValueError: ``alpha`` is negative.

    Examples:
        >>> mix = draw_mix(4, 1.0, generator=torch.Generator().manual_seed(0), keep_larger=True)
        >>> 0.5 <= mix.share <= 1, sorted(mix.partner.tolist())
        (True, [0, 1, 2, 3])
    """
    if alpha < 0:
        raise ValueError(f"alpha must be >= 0 (0 switches mixup off), got {alpha}")
    if alpha == 0:
        return Mix(1.0, torch.arange(batch_size, device=device))
    # torch has no Beta variate that takes a generator; one draw of it seeds the standard library's.
    seed = int(torch.randint(2**62, (), generator=generator))
    share = random.Random(seed).betavariate(alpha, alpha)
    if keep_larger:
        share = max(share, 1.0 - share)
    partner = torch.randperm(batch_size, generator=generator)
    return Mix(share, partner.to(device, non_blocking=True))


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B,) class labels to (B, C) rows, in floating point, so that they can be blended."""
    return F.one_hot(labels, num_classes).to(dtype)
