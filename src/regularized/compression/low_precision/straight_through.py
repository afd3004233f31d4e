"""Rounding inside a network that is trained: what the gradient of a step function shall be.

================  ===============================================================================================
``identity``      as if nothing had been rounded (Bengio et al. 2013)
``inside``        the same for values within the range of their block, 0 for those that were cut
``trusted``       0 where rounding moved a value by more than a threshold (QuEST's trust mask)
================  ===============================================================================================
"""

from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regularized.compression.low_precision.elements import FixedPoint
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.rounding import Rounder, Rounding
from regularized.mechanisms.ranges import Choice, between, positive

__all__ = ["LearnedStep", "StraightThrough", "fake_quantize"]

StraightThrough: TypeAlias = Literal["identity", "inside", "trusted"]


def fake_quantize(
    x: Tensor,
    form: Format | str,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest_even",
    gradient: StraightThrough = "identity",
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The values of a format, with a gradient.

    Args:
        x: a floating type.
        form: the format or its name.
        axis: along which blocks lie.
        rounding: default to nearest, ties to even.
        gradient: see the module; default ``"identity"``.
        threshold: for ``"trusted"``: the distance beyond which a value gets no gradient.
        generator: for stochastic rounding.

    Raises:
        ValueError: no such format or rule; ``"trusted"`` without a threshold.

    Examples:
        >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, "e2m1", gradient="inside")
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.5, 6.0], [1.0, 0.0])
    """
    Choice("identity", "inside", "trusted")("gradient", gradient)
    if gradient == "trusted":
        positive('for gradient="trusted"')("threshold", threshold)
    rounder = Rounder(rounding, "saturate", generator)
    return cast(Tensor, _Rounded.apply(x, as_format(form), axis, rounder, gradient, threshold))  # type: ignore[no-untyped-call]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, form: Format, axis: int, rounder: Rounder, gradient: str, threshold: float | None
    ) -> Tensor:
        """Rounded values; kept is a mask, where the rule needs one."""
        y = form.rounded(x, rounder, axis=axis)
        if gradient == "inside":
            ctx.save_for_backward(x.abs() <= form.limit(x, axis=axis))
        elif gradient == "trusted":
            assert threshold is not None
            ctx.save_for_backward((x - y).abs() <= threshold)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, masked by the rule."""
        masks = ctx.saved_tensors
        return (gradient * masks[0] if masks else gradient), None, None, None, None, None


class LearnedStep(nn.Module):
    """LSQ: an integer grid whose step is learned with the network (Esser et al. 2020).

    The gradient of the step is that of s clip(round(x / s)) with round taken as the identity, divided by
    sqrt(values * Q), so that step and weights learn at like speed. The first batch sets s = 2 mean|x| / sqrt(Q).

    Args:
        word: bits; Q = 2^(bits - 1) - 1 and the range is [-Q - 1, Q]. Default 4.

    Examples:
        >>> step = LearnedStep(4)
        >>> y = step(torch.randn(64))
        >>> bool(torch.allclose(y / step.step, (y / step.step).round(), atol=1e-5))
        True
    """

    def __init__(self, word: int = 4) -> None:
        super().__init__()
        between(2, 8, whole=True, meaning="bits")("word", word)
        self.grid: FixedPoint = FixedPoint(word)
        self.step: nn.Parameter = nn.Parameter(torch.ones(()))
        self.started: Tensor
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        if self.training:
            with torch.no_grad():
                first = 2.0 * x.abs().mean() / self.grid.largest**0.5
                self.step.copy_(torch.where(self.started, self.step, first.to(self.step.dtype)))
                self.started.fill_(True)
        share = 1.0 / (x.numel() * self.grid.largest) ** 0.5
        step = self.step * share + (self.step * (1.0 - share)).detach()
        scaled = (x / step).clamp(self.grid.lowest, self.grid.largest)
        out: Tensor = (scaled + (scaled.round() - scaled).detach()) * step
        return out
