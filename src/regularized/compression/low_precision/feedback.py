"""Gradients in few bits on their way between processes: error feedback, and QSGD."""

from collections.abc import Mapping

import torch
from torch import Tensor

from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.rounding import Rounder, Rounding
from regularized.mechanisms.ranges import allowed, count

__all__ = ["ErrorFeedback", "qsgd"]


class ErrorFeedback:
    """What rounding takes from a gradient is added to the next one: Q(g + e), e <- g + e - Q(g + e).

    With ``"binary"`` it is the compression of 1-bit Adam and 1-bit SGD.

    Args:
        form: the format or its name.
        rounding: default to nearest, ties to even.
        generator: for stochastic rounding.

    Examples:
        >>> feedback = ErrorFeedback("binary")
        >>> sent = [feedback("w", torch.tensor([[1.0, 0.1]])) for _ in range(200)]
        >>> torch.stack(sent).mean(0).round(decimals=1)  # in the mean nothing is lost
        tensor([[1.0000, 0.1000]])
    """

    def __init__(
        self, form: Format | str, *, rounding: Rounding = "nearest_even", generator: torch.Generator | None = None
    ) -> None:
        self.form: Format = as_format(form)
        self._rounder: Rounder = Rounder(rounding, generator=generator)
        self.errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """What is sent of a gradient.

        Args:
            name: tells whose error is added.
            gradient: any shape.
        """
        whole = gradient + self.errors[name] if name in self.errors else gradient
        sent = self.form.rounded(whole, self._rounder)
        self.errors[name] = whole - sent
        return sent

    def state_dict(self) -> dict[str, Tensor]:
        """The errors by name."""
        return dict(self.errors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What :meth:`state_dict` gave."""
        self.errors = {name: error.clone() for name, error in state.items()}


@allowed(levels=count(1))
def qsgd(gradient: Tensor, levels: int, *, generator: torch.Generator | None = None) -> Tensor:
    """QSGD: norm(g) sign(g) l / s with l the neighbours of s |g| / norm(g), drawn so that the mean is g.

    Args:
        gradient: any shape, a floating type.
        levels: s, at least 1.
        generator: of the draws.

    Raises:
        ValueError: ``levels`` below 1.

    Examples:
        >>> g = torch.tensor([3.0, 4.0])
        >>> mean = torch.stack([qsgd(g, 2, generator=torch.Generator().manual_seed(i)) for i in range(2000)]).mean(0)
        >>> bool((mean - g).abs().max() < 0.2)
        True
    """
    norm = torch.linalg.vector_norm(gradient)
    scaled = gradient.abs() * (levels / torch.where(norm == 0, 1.0, norm))
    whole = Rounder("stochastic", generator=generator).integers(scaled)
    return whole.mul_(norm / levels).copysign_(gradient)
