"""What CAST is compared with: retraining under a fixed mask, and SR-STE, whose mask follows the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularized.compression.cast import semi_structured_mask
from regularized.compression.cast.pattern import Pattern

__all__ = ["SrSte", "cut", "quantised", "sr_ste"]


@torch.no_grad()
def cut(model: nn.Module, names: Iterable[str], pattern: Pattern) -> dict[str, Tensor]:
    """One-shot magnitude pruning of layers, in place; the masks by the names of the weights.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 1))
        >>> model[0].weight.data = torch.tensor([[0.1, -3.0, 2.0, 0.0]])
        >>> cut(model, ["0"], (2, 4)), model[0].weight.tolist()
        ({'0.weight': tensor([[False,  True,  True, False]])}, [[0.0, -3.0, 2.0, 0.0]])
    """
    masks = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        masks[f"{name}.weight"] = mask = semi_structured_mask(weight, pattern, name=name)
        weight.masked_fill_(~mask, 0.0)
    return masks


class _Straight(torch.autograd.Function):
    """The cut weight forward; backward the gradient as if it had not been cut, and a decay of what was."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern, decay: float) -> Tensor:
        mask = semi_structured_mask(weight, pattern)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.decay * weight.masked_fill(mask, 0.0), None, None


class SrSte(nn.Module):
    """The sparse-refined straight-through estimator of a weight.

    Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021.

    Args:
        pattern: (N, M).
        decay: their lambda_W; 2e-4 there.

    Examples:
        >>> weight = torch.tensor([[0.5, -3.0, 2.0, 0.0]], requires_grad=True)
        >>> SrSte((2, 4), decay=0.1)(weight).sum().backward()
        >>> weight.grad
        tensor([[1.0500, 1.0000, 1.0000, 1.0000]])
    """

    def __init__(self, pattern: Pattern, decay: float) -> None:
        super().__init__()
        self.pattern = pattern
        self.decay = decay

    def forward(self, weight: Tensor) -> Tensor:
        """(R, C) dense to (R, C) with the pattern."""
        out: Tensor = _Straight.apply(weight, self.pattern, self.decay)  # type: ignore[no-untyped-call]
        return out


def sr_ste(model: nn.Module, names: Iterable[str], pattern: Pattern, decay: float) -> None:
    """Let layers compute with cut weights while their dense ones are trained, in place.

    ``parametrize.remove_parametrizations(layer, "weight")`` leaves a layer with the cut weight behind.
    """
    for name in names:
        parametrize.register_parametrization(model.get_submodule(name), "weight", SrSte(pattern, decay))


@contextmanager
def quantised(model: nn.Module, names: Iterable[str], bits: int) -> Iterator[None]:
    """Inside, weights of layers are rounded to symmetric integers with a step for each output; zeros stay zeros.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 1))
        >>> model[0].weight.data = torch.tensor([[7.0, -3.2, 0.0]])
        >>> with quantised(model, ["0"], 4):
        ...     model[0].weight.tolist()
        [[7.0, -3.0, 0.0]]
    """
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    before = [weight.detach().to("cpu", copy=True) for weight in weights]  # a large model fills its GPU
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for weight in weights:
            step = (weight.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(weight.dtype).tiny)
            weight.copy_((weight / step).round() * step)
        try:
            yield
        finally:
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
