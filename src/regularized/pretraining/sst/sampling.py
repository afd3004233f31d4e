"""Which directions are trained next: a few, without replacement, large singular values with the higher chance."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed
from regularized.training.randomness import mix

__all__ = ["Sampling", "draw_directions", "sampling_probabilities"]

Sampling: TypeAlias = Literal["mixed", "proportional", "largest"]
"""How directions are chosen; see :func:`sampling_probabilities`."""

RULES = Choice("mixed", "proportional", "largest")


@allowed(sampling=Choice("mixed", "proportional"))
def sampling_probabilities(values: Tensor, *, sampling: Sampling = "mixed") -> Tensor:
    """Probabilities of the directions, for the first draw.

    Args:
        values: (m,) singular values, >= 0. Where all are zero, all directions are equally likely.
        sampling: ``"mixed"`` (default, text of the paper, section 4.4) is half uniform, half proportional to the
            singular value, so that no direction has less than ``1 / (2 m)``; ``"proportional"`` (algorithm box of the
            first version) leaves the uniform half out.

    Returns:
        (m,), of sum 1.

    Raises:
        ValueError: another ``sampling``.

    Examples:
        >>> sampling_probabilities(torch.tensor([3.0, 1.0, 0.0, 0.0]))
        tensor([0.5000, 0.2500, 0.1250, 0.1250])
    """
    total = values.sum()
    proportional = torch.where(total > 0, values / total, 1.0 / len(values))
    return proportional if sampling == "proportional" else 0.5 * (1.0 / len(values) + proportional)


@allowed(sampling=RULES)
def draw_directions(values: Tensor, rank: int, *, sampling: Sampling = "mixed", seed: tuple[int, ...] = (0,)) -> Tensor:
    """Draw ``rank`` distinct directions, one after the other from what is left.

    All draws come from one race: direction k arrives after an exponential time over p_k, and the first to arrive are
    taken, which has the distribution of successive draws. The times are a function of the seed alone and drawn on the
    CPU, so that all devices, processes and resumed runs agree, and no device is waited for.

    Args:
        values: (m,) singular values, >= 0, on any device.
        rank: how many, from 1 to m.
        sampling: ``"mixed"`` (default) or ``"proportional"``, see :func:`sampling_probabilities`; or ``"largest"``, the
            directions of the largest values.
        seed: numbers; equal ones give equal draws.

    Returns:
        (rank,) int64, ascending, on the device of the values.

    Raises:
        ValueError: another ``sampling``.

    Examples:
        >>> draw_directions(torch.tensor([5.0, 1.0, 1.0]), 2, sampling="largest")
        tensor([0, 1])
        >>> draw_directions(torch.ones(4), 4)
        tensor([0, 1, 2, 3])
    """
    values = values.detach().float()
    if sampling == "largest":
        scores = values
    else:
        generator = torch.Generator().manual_seed(mix(*seed))
        times = torch.empty(len(values)).exponential_(generator=generator)
        scores = sampling_probabilities(values, sampling=sampling) / times.to(values.device, non_blocking=True)
    return scores.topk(rank).indices.sort().values
