"""Delayed scaling of FP8: the scale of a tensor comes from the magnitudes that it had in the steps before."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regularized.compression.low_precision.elements import Element, element
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import count, finite

__all__ = ["AmaxHistory", "Delayed"]


@dataclass(frozen=True, slots=True)
class Delayed(Format):
    """Elements times a scale of the tensor's past: amax over the last steps / largest * 2^margin.

    A layer keeps the past in an :class:`AmaxHistory`. Without one, as in :meth:`quantize`, the tensor is its own past.

    Args:
        form: the elements, by name or as a format; default ``"e4m3"``.
        length: steps that are remembered; default 1,024, Transformer Engine's.
        margin: powers of two that are left free above; default 0, Transformer Engine's.

    Examples:
        >>> Delayed("e4m3").quantize(torch.tensor([0.3, 1.0]))
        tensor([0.2857, 1.0000])
    """

    form: Element | str = "e4m3"
    length: int = 1024
    margin: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.form, str):
            object.__setattr__(self, "form", element(self.form))
        count(1)("length", self.length)
        finite()("margin", self.margin)

    @property
    def elements(self) -> Element:
        """The elements' format."""
        assert isinstance(self.form, Element)
        return self.form

    @property
    def name(self) -> str:
        """Such as ``float8_e4m3fn / delayed``."""
        return f"{self.elements.name} / delayed"

    @property
    def bits(self) -> float:
        """Those of an element."""
        return self.elements.bits

    @property
    def needs_axis(self) -> bool:
        """False: one scale for the tensor."""
        return False

    def scale(self, amax: Tensor) -> Tensor:
        """The scale for a largest magnitude; 1 where that is 0."""
        scale = amax / self.elements.largest * 2.0**self.margin
        return torch.where(scale == 0, 1.0, scale)

    def with_scale(self, x: Tensor, scale: Tensor, rounder: Rounder) -> Tensor:
        """Values on the grid of a given scale; what the past did not foresee overflows by the rule."""
        return self.elements.cast_(x / scale, rounder, x).mul_(scale)

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        return self.with_scale(x, self.scale(x.abs().amax()), rounder)

    def limit(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """That of the tensor as its own past."""
        return (self.scale(x.abs().amax()) * self.elements.largest).expand_as(x)


class AmaxHistory(nn.Module):
    """The largest magnitudes of a tensor in the last steps, as a buffer that checkpoints hold.

    Args:
        form: says how many steps.

    Examples:
        >>> history = AmaxHistory(Delayed("e4m3", length=2))
        >>> history.limit.item()  # nothing seen: the scale is 1
        448.0
        >>> _ = history(torch.tensor([896.0]), Rounder())
        >>> history.limit.item(), history(torch.tensor([896.0]), Rounder()).item()
        (896.0, 896.0)
    """

    def __init__(self, form: Delayed) -> None:
        super().__init__()
        self.form = form
        self.amax: Tensor
        self.register_buffer("amax", torch.zeros(form.length))

    @property
    def limit(self) -> Tensor:
        """The largest magnitude that the scale of now can hold."""
        return self.form.scale(self.amax.amax()) * self.form.elements.largest

    def forward(self, x: Tensor, rounder: Rounder) -> Tensor:
        """Round a float32 tensor with the scale of the past; in training mode it then becomes part of the past."""
        if x.numel() == 0:
            return x
        scale = self.form.scale(self.amax.amax())
        if self.training:
            latest = x.detach().abs().amax().reshape(1)
            self.amax = torch.cat([self.amax[1:], torch.where(torch.isfinite(latest), latest, self.amax[-1:])])
        return self.form.with_scale(x, scale, rounder)
