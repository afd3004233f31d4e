"""Rounding and overflow, each of them named: nothing here depends on what a backend's cast happens to do.

=================  =================================================================================================
``nearest_even``   to the nearest neighbour, ties to the one whose last bit is 0 (IEEE 754, OCP)
``nearest_away``   to the nearest neighbour, ties away from zero (microxcaling's ``nearest``, QPyTorch)
``toward_zero``    to the neighbour nearer to zero: the bits behind the last are dropped
``stochastic``     for neighbours a <= x < b to b with the probability (x - a) / (b - a), so that the mean is x
=================  =================================================================================================

What is above the largest number after rounding is cut to it (``saturate``), or becomes infinite (``inf``) or not a
number (``nan``) where the format has such a code. Infinite inputs follow the same rule; what is not a number stays so.

Stochastic rounding draws from a ``torch.Generator`` that is given. :class:`RandomStream` makes one for every draw from
a seed and a position, so that a run which goes on from a checkpoint draws what it would have drawn.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.distributed import world_size
from regularized.mechanisms.ranges import Choice
from regularized.training.randomness import mix

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
    "Overflow",
    "RandomStream",
    "Rounder",
    "Rounding",
    "drop_bits",
    "round_to_integers",
]

Rounding: TypeAlias = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
Overflow: TypeAlias = Literal["saturate", "inf", "nan"]

ROUNDINGS = Choice("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS = Choice("saturate", "inf", "nan")


def round_to_integers(x: Tensor, rounding: Rounding = "nearest_even", *, uniforms: Tensor | None = None) -> Tensor:
    """Integers near the entries of a tensor; a grid of step d is ``d * round_to_integers(x / d)``.

    Args:
        x: of a floating type; infinities and NaN stay.
        rounding: see the module.
        uniforms: for stochastic rounding, draws from [0, 1) in the shape and type of ``x``: the result is
            ``floor(x + uniforms)``.

    Raises:
        ValueError: stochastic rounding without ``uniforms``.

    Examples:
        >>> x = torch.tensor([0.5, 1.5, -2.5])
        >>> [round_to_integers(x, how).tolist() for how in ("nearest_even", "nearest_away", "toward_zero")]
        [[0.0, 2.0, -2.0], [1.0, 2.0, -3.0], [0.0, 1.0, -2.0]]
        >>> round_to_integers(x, "stochastic", uniforms=torch.tensor([0.4, 0.4, 0.6]))
        tensor([ 0.,  1., -2.])
    """
    ROUNDINGS("rounding", rounding)
    if rounding == "nearest_even":
        return x.round()
    if rounding == "toward_zero":
        return x.trunc()
    if rounding == "nearest_away":
        whole = x.trunc()
        return whole + ((x - whole).abs() >= 0.5).to(x.dtype).copysign_(x)
    if uniforms is None:
        raise ValueError('rounding="stochastic" needs uniforms: draws from [0, 1) of the shape of x')
    below = x.floor()
    # x - below and 1 - (x - below) lose nothing that a draw of as many bits could see, where x + uniforms would.
    return below + (uniforms >= 1.0 - (x - below)).to(x.dtype)


def drop_bits(
    x: Tensor, bits: int, rounding: Rounding = "nearest_even", *, random_bits: Tensor | None = None
) -> Tensor:
    """Round float32 to a shorter mantissa in its bit pattern: exact for subnormals too, since patterns are in order.

    Args:
        x: float32.
        bits: how many of the 23 bits go: 16 gives bfloat16, 13 gives TF32.
        rounding: see the module.
        random_bits: for stochastic rounding, int32 from [0, 2^bits), which are added to the pattern.

    Returns:
        Float32; finite numbers may become infinite, as the largest does when it is rounded up.

    Examples:
        >>> drop_bits(torch.tensor([1.00390625, 1.01171875]), 16)  # both ties: to the even neighbour
        tensor([1.0000, 1.0156])
        >>> drop_bits(torch.tensor([1.001, 1.001]), 16, "stochastic", random_bits=torch.tensor([0, 60000]).int())
        tensor([1.0000, 1.0078])
    """
    ROUNDINGS("rounding", rounding)
    pattern = x.view(torch.int32)
    if rounding == "nearest_even":
        moved = pattern + ((pattern >> bits) & 1).add_((1 << (bits - 1)) - 1)
    elif rounding == "nearest_away":
        moved = pattern + (1 << (bits - 1))
    elif rounding == "toward_zero":
        moved = pattern.clone()
    elif random_bits is None:
        raise ValueError(f'rounding="stochastic" needs random_bits: int32 from [0, 2^{bits})')
    else:
        moved = pattern + random_bits
    rounded = moved.bitwise_and_(-1 << bits).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


@dataclass(frozen=True, slots=True)
class Rounder:
    """How to round, what to do above the largest number, and where randomness comes from.

    Args:
        rounding: see the module; default ``"nearest_even"``.
        overflow: see the module; default ``"saturate"``.
        generator: for stochastic rounding, on the device of what is rounded; default torch's global one.

    Raises:
        ValueError: no such rounding or overflow.

    Examples:
        >>> Rounder("stochastic", generator=torch.Generator().manual_seed(0)).integers(torch.full((5,), 0.5))
        tensor([0., 1., 0., 0., 0.])
    """

    rounding: Rounding = "nearest_even"
    overflow: Overflow = "saturate"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        ROUNDINGS("rounding", self.rounding)
        OVERFLOWS("overflow", self.overflow)

    def integers(self, x: Tensor) -> Tensor:
        """Integers near the entries, see :func:`round_to_integers`; they may overwrite ``x``."""
        if self.rounding == "nearest_even":
            return x.round_()
        if self.rounding != "stochastic":
            return round_to_integers(x, self.rounding)
        self._check_draws(x)
        uniforms = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
        return round_to_integers(x, "stochastic", uniforms=uniforms)

    def mantissa(self, x: Tensor, bits: int) -> Tensor:
        """Float32 without the last bits of its mantissa, see :func:`drop_bits`."""
        if self.rounding != "stochastic":
            return drop_bits(x, bits, self.rounding)
        self._check_draws(x)
        draws = torch.randint(1 << bits, x.shape, dtype=torch.int32, device=x.device, generator=self.generator)
        return drop_bits(x, bits, "stochastic", random_bits=draws)

    def _check_draws(self, x: Tensor) -> None:
        if self.generator is not None and self.generator.device.type != x.device.type:
            raise ValueError(
                f"the generator is on {self.generator.device.type}, what is rounded on {x.device.type}; make it with "
                f"torch.Generator({x.device.type!r})"
            )
        if self.generator is not None and torch.compiler.is_compiling():
            raise ValueError(
                "stochastic rounding from a generator cannot be compiled: the graph would draw the same numbers at "
                "every call. Leave it out of torch.compile, or leave the generator out"
            )
        if self.generator is None and world_size() > 1:
            warnings.warn(
                "stochastic rounding without a generator in several processes: each draws its own numbers, so weights "
                "that should be copies of each other drift apart; give every process a generator of the same seed",
                stacklevel=3,
            )


class RandomStream:
    """Generators for one draw after the other, each a function of a seed and its position alone.

    A loop that may be interrupted within a step calls :meth:`settle` behind each step, and :meth:`rewind` before it
    goes on: what the interrupted step has drawn is drawn again.

    Args:
        seed: of the whole run.
        key: tells this stream from others of the same seed, such as the number of a layer.
        position: of the next draw; the state.

    Examples:
        >>> stream = RandomStream(0, key=3)
        >>> first = torch.rand(2, generator=stream.next(torch.device("cpu")))
        >>> stream.position
        1
        >>> again = RandomStream(0, key=3)
        >>> bool((torch.rand(2, generator=again.next(torch.device("cpu"))) == first).all())
        True
    """

    def __init__(self, seed: int, *, key: int = 0, position: int = 0) -> None:
        self.seed: int = seed
        self.key: int = key
        self.position: int = position
        self._settled: int = position

    def settle(self) -> None:
        """The draws so far belong to a step that is done."""
        self._settled = self.position

    def rewind(self) -> None:
        """Draw again what was drawn since :meth:`settle`."""
        self.position = self._settled

    def seek(self, position: int) -> None:
        """Go on from a position of a checkpoint."""
        self.position = self._settled = position

    def next(self, device: torch.device) -> torch.Generator:
        """The generator of the next draw."""
        generator = torch.Generator(device)
        generator.manual_seed(mix(self.seed, self.key, self.position))
        self.position += 1
        return generator
