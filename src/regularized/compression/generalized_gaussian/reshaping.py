"""DeepShape: trained weights get the histogram of another generalised Gaussian, and keep their order."""

from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from regularized.compression.generalized_gaussian.distribution import GeneralizedGaussian
from regularized.mechanisms.ranges import Choice, allowed, count, positive

__all__ = ["Reshaped", "deepshape_", "reshape_histogram"]

Scope: TypeAlias = Literal["model", "layer"]

_FACTOR = positive(remedy="1 leaves it")
_BITS = count(0, "the number of binary digits behind the point")
_RARE = count(0, "how many weights of one value count as few").or_none("one in 100,000 weights")


class Reshaped(NamedTuple):
    """What :func:`reshape_histogram` made of weights.

    Attributes:
        weights: multiples of ``2^-bits``, of the shape and type of the given ones.
        before: the generalised Gaussian that the given weights had.
        centre: their mean, as a multiple of ``2^-bits``.
        selected: how many lay within the cut-off.
        assigned: how many of these have got a new value.

    Examples:
        >>> done = reshape_histogram(torch.linspace(-1, 1, 1000), bits=4, largest=16)
        >>> done.selected, done.assigned
        (1000, 1000)
    """

    weights: Tensor
    before: GeneralizedGaussian
    centre: int
    selected: int
    assigned: int


@allowed(
    shape_scale=_FACTOR,
    std_scale=_FACTOR,
    bits=_BITS,
    rare=_RARE,
    largest=count(1).or_none("the first value that is rare"),
)
@torch.no_grad()
def reshape_histogram(
    weights: Tensor,
    *,
    shape_scale: float = 0.8,
    std_scale: float = 0.6,
    bits: int = 13,
    rare: int | None = None,
    largest: int | None = None,
    official: bool = False,
) -> Reshaped:
    """Round weights to multiples of ``2^-bits`` and move those near their mean to the values of another histogram.

    The smallest weight gets the smallest value, and so on: the order stays, as in histogram specification of images.
    The target is a generalised Gaussian of the fitted shape times ``shape_scale`` and the fitted scale times
    ``std_scale``, cut off where values become rare; what lies beyond is rounded only.

    Args:
        weights: any shape, floating point.
        shape_scale: below 1 the tails become heavier; default 0.8, the repository's.
        std_scale: below 1 the weights become smaller; default 0.6, the repository's.
        bits: binary digits behind the point; default 13, the repository's.
        rare: the cut-off is the smallest positive multiple that at most so many weights have. Default one in 100,000
            weights: the repository's 1,000 is for 10^8 of them.
        largest: the cut-off itself.
        official: round the number of weights of each value down, as the repository does, so that the largest weights
            are left over and keep their values, and take equal multiples in the order of their positions. Default
            False: numbers are rounded so that they add up, and weights are taken in their order.

    Returns:
        The new weights, and what was found.

    Raises:
        ValueError: an option is out of range; a weight is not finite; all weights are rounded to the same value, or
            the cut-off leaves less than half of them.

    Examples:
        >>> weights = GeneralizedGaussian(1.0, 0.1).sample((10_000,), generator=torch.Generator().manual_seed(0))
        >>> after = GeneralizedGaussian.fit(reshape_histogram(weights, bits=8).weights)
        >>> round(after.shape, 1), round(after.scale, 2)
        (0.8, 0.06)
    """
    flat = weights.detach().flatten().double()
    before = GeneralizedGaussian.fit(flat)
    unit = 2.0**bits
    multiples = torch.round(flat * unit) + 0.0  # no -0; to even where a weight lies in the middle
    if bool((multiples == multiples[0]).all()):
        raise ValueError(f"all weights are {float(multiples[0] / unit):g} in multiples of 2^-{bits}; give more bits")
    cut = _first_rare(multiples, flat.numel() // 100_000 if rare is None else rare) if largest is None else largest
    centre = int(flat.mean() * unit)  # towards zero, as the repository
    near = (multiples - centre).abs() <= cut
    selected = int(near.sum())
    if not official and 2 * selected < flat.numel():
        raise ValueError(
            f"only {selected:,} of {flat.numel():,} weights lie within the cut-off of {cut} multiples of 2^-{bits}: "
            f"that value is rare already. Give fewer bits, or a smaller rare"
        )
    values = torch.arange(centre - cut, centre + cut + 1, dtype=torch.float64, device=flat.device)
    width = std_scale * before.scale * unit
    share = torch.softmax(-((values - centre).abs() / width).pow(before.shape * shape_scale), dim=0)
    if official:
        numbers = torch.floor(selected * share).long()
        order = torch.argsort(multiples[near], stable=True)
    else:
        until = torch.round(selected * share.cumsum(0)).long()
        until[-1] = selected
        numbers = until.diff(prepend=until.new_zeros(1))
        order = torch.argsort(flat[near], stable=True)
    new = values.repeat_interleave(numbers)
    chosen = multiples[near]
    chosen[order[: len(new)]] = new
    multiples[near] = chosen
    return Reshaped((multiples / unit).view_as(weights).to(weights.dtype), before, centre, selected, len(new))


@allowed(scope=Choice("model", "layer"))
@torch.no_grad()
def deepshape_(
    model: nn.Module,
    *,
    shape_scale: float = 0.8,
    std_scale: float = 0.6,
    bits: int = 13,
    rare: int | None = None,
    scope: Scope = "model",
) -> list[str]:
    """Reshape the weights of a trained model, in place; fine-tune a little afterwards.

    Biases and normalisation, everything with one dimension, stay as they are; the repository takes them, too.

    Args:
        model: trained.
        shape_scale: see :func:`reshape_histogram`.
        std_scale: as there.
        bits: as there.
        rare: as there.
        scope: one histogram of all layers (default, as in the repository), which mixes layers of different spread, or
            one for each.

    Returns:
        Names of the parameters.

    Raises:
        ValueError: an option is out of range; the model has no weight with two dimensions; one is not finite; or as
            in :func:`reshape_histogram`. The model is then as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> deepshape_(model, bits=8)
        ['0.weight', '2.weight']
    """
    named = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    if not named:
        raise ValueError("the model has no weight of two dimensions or more")
    for name, p in named.items():
        if not bool(torch.isfinite(p).all()):
            raise ValueError(f"the weight {name!r} is not finite (NaN or infinite)")
    parts = [[p] for p in named.values()] if scope == "layer" else [list(named.values())]
    reshape = partial(reshape_histogram, shape_scale=shape_scale, std_scale=std_scale, bits=bits, rare=rare)
    pooled = (torch.cat([p.detach().flatten().double() for p in part]) for part in parts)
    reshaped = [reshape(weights).weights for weights in pooled]  # all before any is written
    for part, weights in zip(parts, reshaped, strict=True):
        for p, new in zip(part, weights.split([p.numel() for p in part]), strict=True):
            p.copy_(new.view_as(p))
    return list(named)


def _first_rare(multiples: Tensor, rare: int) -> int:
    """The smallest positive multiple that at most ``rare`` weights have."""
    positive = multiples[multiples > 0].long()
    numbers = torch.bincount(positive, minlength=2)  # the one behind the largest has none
    few = (torch.nn.functional.pad(numbers, (0, 1))[1:] <= rare).nonzero()
    return int(few[0]) + 1
