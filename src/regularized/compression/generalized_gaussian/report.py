"""What weights would cost, and how they are distributed, without changing them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularized.compression.generalized_gaussian.distribution import GeneralizedGaussian
from regularized.compression.generalized_gaussian.golomb import ORDER, golomb_lengths, rank_symbols
from regularized.compression.generalized_gaussian.quantization import STEP, multiples
from regularized.mechanisms.ranges import allowed

__all__ = ["CodeLength", "code_length", "layer_shapes"]


class CodeLength(NamedTuple):
    """Lengths in bits a weight; :func:`~regularized.compression.generalized_gaussian.save_compressed` makes real files.

    Attributes:
        mean_bits: of the exponential-Golomb code.
        entropy: of the values, the least that any code needs which takes each weight alone.
        symbols: (n,) int64, the values in multiples of the step, the most frequent first.
        counts: (n,) int64, how many weights have each.
        lengths: (n,) int64, bits of the code word of each.

    Examples:
        >>> length = code_length([torch.tensor([0.0, 0.0, 0.0, 0.5])], step=0.5)
        >>> length.symbols.tolist(), length.counts.tolist(), length.lengths.tolist()
        ([0, 1], [3, 1], [1, 3])
    """

    mean_bits: float
    entropy: float
    symbols: Tensor
    counts: Tensor
    lengths: Tensor


@allowed(step=STEP, order=ORDER)
@torch.no_grad()
def code_length(weights: Iterable[Tensor], *, step: float = 2.0**-8, order: int = 0) -> CodeLength:
    """Bits a weight after rounding to multiples of a step, one table for all tensors, as BackSlash reports them.

    Args:
        weights: of any shapes, such as ``model.parameters()``.
        step: positive; default 1 / 256, ours.
        order: of the code; default 0, the papers'.

    Raises:
        ValueError: there is no weight; one is not finite, or too large for the step.

    Examples:
        >>> code_length([torch.tensor([0.0, 0.0, 0.0, 0.5])], step=0.5).mean_bits  # three of 1 bit, one of 3
        1.5
    """
    numbers = [multiples(w, step).flatten() for w in weights]
    if not sum(len(n) for n in numbers):
        raise ValueError("there is no weight to code")
    symbols, counts, _ = rank_symbols(torch.cat(numbers))
    lengths = golomb_lengths(torch.arange(len(symbols), device=symbols.device), order=order)
    share = counts.double() / counts.sum()
    return CodeLength(float((share * lengths).sum()), float(-(share * share.log2()).sum()), symbols, counts, lengths)


@torch.no_grad()
def layer_shapes(model: nn.Module) -> dict[str, GeneralizedGaussian]:
    """The generalised Gaussian of each weight with two dimensions or more, by name.

    Args:
        model: looked at only.

    Raises:
        ValueError: a weight is all zero or not finite.

    Examples:
        >>> layers = nn.Sequential(nn.Linear(64, 64))
        >>> _ = nn.init.normal_(layers[0].weight)
        >>> [1.8 < law.shape < 2.2 for law in layer_shapes(layers).values()]
        [True]
    """
    found = {}
    for name, p in model.named_parameters():
        if p.ndim > 1 and p.is_floating_point():
            try:
                found[name] = GeneralizedGaussian.fit(p)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found
