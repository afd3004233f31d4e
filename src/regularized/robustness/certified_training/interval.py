"""Intervals: a box around a tensor, as two ends or as centre and radius, and the box around an input.

Two descriptions of the same box, because each is cheap where the other is not: a linear map takes the centre by its
weights and the radius by their absolute values, a monotone function takes both ends.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from regularized.mechanisms.ranges import allowed, at_least

__all__ = ["Interval", "Scale", "check_scales", "linf_box"]

Scale: TypeAlias = float | Sequence[float] | Tensor
"""A number, or one for each channel: the second dimension of the input."""


class Interval:
    """A box: each entry of a tensor lies between two ends.

    Made by :meth:`between` or :meth:`around`; what it was not made of is computed when it is asked for, once.

    Args:
        lower: the lower end; together with ``upper``.
        upper: the upper end.
        centre: the middle; together with ``radius``.
        radius: half the width.

    Raises:
        ValueError: neither two ends nor centre and radius are given.

    Examples:
        >>> box = Interval.between(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0]))
        >>> box.centre, box.radius
        (tensor([0.5000, 0.0000]), tensor([0.5000, 1.0000]))
    """

    __slots__ = ("_centre", "_lower", "_radius", "_upper")

    def __init__(
        self,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        centre: Tensor | None = None,
        radius: Tensor | None = None,
    ) -> None:
        if (lower is None or upper is None) and (centre is None or radius is None):
            raise ValueError("an interval needs both ends, or centre and radius; see Interval.between and .around")
        self._lower, self._upper, self._centre, self._radius = lower, upper, centre, radius

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> "Interval":
        """From two ends of one shape; nothing checks that they are in order."""
        return cls(lower=lower, upper=upper)

    @classmethod
    def around(cls, centre: Tensor, radius: Tensor) -> "Interval":
        """From centre and radius of one shape; nothing checks that the radius is not negative."""
        return cls(centre=centre, radius=radius)

    @classmethod
    def point(cls, value: Tensor) -> "Interval":
        """A box without extent."""
        return cls.around(value, torch.zeros_like(value))

    @property
    def has_ends(self) -> bool:
        """Whether the ends are known already."""
        return self._lower is not None

    @property
    def lower(self) -> Tensor:
        """The lower end."""
        if self._lower is None:
            self._lower = self.centre - self.radius
        return self._lower

    @property
    def upper(self) -> Tensor:
        """The upper end."""
        if self._upper is None:
            self._upper = self.centre + self.radius
        return self._upper

    @property
    def centre(self) -> Tensor:
        """The middle."""
        if self._centre is None:
            assert self._lower is not None
            assert self._upper is not None
            self._centre = torch.lerp(self._lower, self._upper, 0.5)
        return self._centre

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        if self._radius is None:
            assert self._lower is not None
            assert self._upper is not None
            self._radius = (self._upper - self._lower) * 0.5
        return self._radius

    @property
    def example(self) -> Tensor:
        """A tensor of the box's shape, type and device, whichever is there."""
        found = self._lower if self._lower is not None else self._centre
        assert found is not None
        return found

    @property
    def shape(self) -> torch.Size:
        """Of each end."""
        return self.example.shape

    def map(self, function: Callable[[Tensor], Tensor]) -> "Interval":
        """The image under a function that does not fall in any entry: of both ends."""
        return Interval.between(function(self.lower), function(self.upper))

    def rearrange(self, function: Callable[[Tensor], Tensor]) -> "Interval":
        """The image under a linear map without negative coefficients, which moves or averages entries."""
        if self.has_ends:
            return self.map(function)
        return Interval.around(function(self.centre), function(self.radius))

    def relu(self) -> "Interval":
        """The image under max(x, 0)."""
        if self.has_ends:
            return self.map(torch.relu)
        centre, radius = _ReLU.apply(self.centre, self.radius)  # type: ignore[no-untyped-call]
        return Interval.around(centre, radius)

    def __repr__(self) -> str:
        """Shape and type."""
        return f"Interval(shape={tuple(self.shape)}, dtype={self.example.dtype})"


class _ReLU(torch.autograd.Function):
    """ReLU of a box given by centre and radius, in six passes over it and six backwards."""

    @staticmethod
    def forward(ctx: FunctionCtx, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        upper, lower = (centre + radius).relu_(), (centre - radius).relu_()
        ctx.save_for_backward(upper, lower)
        middle = torch.lerp(lower, upper, 0.5)
        return middle, upper - middle

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        upper, lower = ctx.saved_tensors  # type: ignore[attr-defined]
        of_centre, of_radius = gradients
        of_upper = torch.ops.aten.threshold_backward(of_centre + of_radius, upper, 0)
        of_lower = torch.ops.aten.threshold_backward(of_centre - of_radius, lower, 0)
        middle = torch.lerp(of_lower, of_upper, 0.5)
        return middle, of_upper - middle


# -- the input ----------------------------------------------------------------------------------------


@allowed(radius=at_least(0.0, "in units of the raw input"))
def linf_box(
    inputs: Tensor,
    radius: float,
    *,
    std: Scale = 1.0,
    data_range: tuple[Scale, Scale] | None = None,
) -> Interval:
    """All inputs that differ by at most ``radius`` in each entry, and lie in the range of the data.

    Args:
        inputs: (B, C, ...), as the network gets them.
        radius: in units of the raw input, such as 8/255 for pixels in [0, 1].
        std: what the raw input was divided by, a number or one for each channel; default 1.
        data_range: smallest and largest input that occurs, *normalised* as ``inputs`` are, numbers or one for each
            channel: ``((0 - mean) / std, (1 - mean) / std)``. Default None: the box is not clipped.

    Returns:
        The box, of the inputs' shape.

    Raises:
        ValueError: the radius is negative; or numbers that are no tensors: ``std`` is not positive, the range is empty.
        ValueError: not one value, nor one for each channel of the inputs.
        TypeError: the inputs are no tensor of floating-point numbers.

    Warns:
        UserWarning: the box is wider than the whole range.

    Examples:
        >>> box = linf_box(torch.tensor([[0.5, 0.95]]), 0.1, data_range=(0.0, 1.0))
        >>> box.lower, box.upper
        (tensor([[0.4000, 0.8500]]), tensor([[0.6000, 1.0000]]))
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        what = f"a tensor of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(
            f"a box is drawn around one tensor of floating-point numbers, got {what}; pixels: x.float() / 255"
        )
    if not isinstance(std, Tensor):  # of tensors, which may lie on a GPU, whoever holds them looks once
        check_scales(radius, std, data_range)
    width = radius / _per_channel("std", std, inputs)
    if data_range is None:
        # Expanded, not copied: layers compute once what is the same for the whole batch.
        return Interval.around(inputs, width.expand(inputs.shape))
    low, high = (_per_channel("data_range", end, inputs) for end in data_range)
    return Interval.between(torch.maximum(inputs - width, low), torch.minimum(inputs + width, high))


def check_scales(radius: float, std: Scale, data_range: tuple[Scale, Scale] | None) -> None:
    """Look at what describes the inputs.

    Raises:
        ValueError: ``std`` is not positive, or the range is empty.

    Warns:
        UserWarning: a box of this radius is wider than the whole range.
    """
    deviation = torch.as_tensor(std, dtype=torch.float64).cpu()
    if not bool((deviation > 0).all()):
        raise ValueError(f"std must be positive, got {deviation.tolist()}; for inputs that were not divided give 1")
    if data_range is None:
        return
    low, high = (torch.as_tensor(end, dtype=torch.float64).cpu() for end in data_range)
    if not bool((low < high).all()):
        raise ValueError(
            f"data_range must be (smallest, largest) normalised input, got {low.tolist()} and {high.tolist()}; for "
            "pixels in [0, 1] they are (0 - mean) / std and (1 - mean) / std"
        )
    if bool((2.0 * radius / deviation > high - low).any()):
        warnings.warn(
            f"a box of radius {radius:g} / std {deviation.tolist()} is wider than the whole range from {low.tolist()} "
            f"to {high.tolist()}: give the radius in units of the raw input (8/255, not 8) and the std that the inputs "
            "were divided by",
            stacklevel=3,
        )


def _per_channel(name: str, value: Scale, inputs: Tensor) -> Tensor:
    """A number, or one for each channel, in a shape that broadcasts with (B, C, ...)."""
    values = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device)
    if values.numel() == 1:
        return values.reshape([1] * inputs.ndim)
    channels = inputs.shape[1] if inputs.ndim > 1 else 0
    if values.ndim != 1 or len(values) != channels:
        raise ValueError(
            f"{name} must be one number, or one for each of the {channels} channels of the input; got shape "
            f"{tuple(values.shape)}"
        )
    return values.reshape(-1, *[1] * (inputs.ndim - 2))
