"""Weight scaling: factors beside each weight that make up for what the decay takes from the whole of a row.

:mod:`regularized.compression.cast.optimizer` has the paper and its symbols. The layer computes with ``W_eff[r, c] =
W[r, c] A[r, c // (C / n)]``, where ``A = 1`` at the start: n blocks of neighbouring columns have a factor for each
output. The pattern is that of W, and what is zero in W is zero in W_eff; so the factors are folded into W at the end,
and nothing is left of them.
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import count
from regularized.mechanisms.surgery import check_called

__all__ = ["ScaledLinear", "fold_scales", "scale_weights"]

Layer = TypeVar("Layer", bound=nn.Linear)

# Shapes: R outputs, C inputs, n blocks of C / n columns.


class ScaledLinear(nn.Linear):
    """A linear layer whose weight is multiplied, block of columns by block, with trained factors.

    Made by :meth:`of`, which keeps the layer's parameters themselves, so that names, optimizers and checkpoints of the
    plain model still fit. The constructor is that of ``nn.Linear``; it makes no factors.

    Attributes:
        weight: (R, C) W, the parameter of the plain layer.
        scale: (R, n) A, ones at the start.

    Raises:
        ValueError: in :meth:`of`, where C is not divisible by the number of blocks.

    Examples:
        >>> linear = nn.Linear(8, 3)
        >>> scaled, x = ScaledLinear.of(linear, groups=2), torch.randn(5, 8)
        >>> torch.equal(scaled(x), linear(x)), scaled.weight is linear.weight, scaled.scale.shape
        (True, True, torch.Size([3, 2]))
    """

    scale: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, *, groups: int, name: str = "the layer") -> "ScaledLinear":
        """A scaled layer with the parameters of a plain one.

        Args:
            linear: the plain layer; it shares its parameters with the new one.
            groups: n, blocks of columns; the paper takes 2 for LLaMA.
            name: of the layer, for errors.
        """
        count(1)("groups", groups)
        rows, columns = linear.weight.shape
        if columns % groups:
            raise ValueError(
                f"{name} has {columns} inputs, which do not divide into {groups} blocks; change scale_groups"
            )
        scaled = _empty_like(cls, linear)
        scaled.scale = nn.Parameter(linear.weight.detach().new_ones(rows, groups))
        return scaled

    def scaled_weight(self) -> Tensor:
        """(R, C) W_eff, with its graph."""
        groups = self.scale.shape[1]
        scaled: Tensor = (self.weight.unflatten(1, (groups, -1)) * self.scale.unsqueeze(-1)).flatten(1)
        return scaled

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """An ordinary layer, whose weight, the same parameter, has become W_eff."""
        self.weight.copy_(self.scaled_weight())
        self.scale.fill_(1.0)
        return _empty_like(nn.Linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        return F.linear(x, self.scaled_weight(), self.bias)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, groups={self.scale.shape[1]}"


def _empty_like(kind: type[Layer], linear: nn.Linear) -> Layer:
    """A layer of another kind around the same parameters."""
    with torch.device("meta"):
        new = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    new.weight, new.bias = linear.weight, linear.bias
    return new.train(linear.training)


def scale_weights(model: nn.Module, names: Iterable[str], *, groups: int) -> list[str]:
    """Replace linear layers by :class:`ScaledLinear`, in place; build the optimizer afterwards.

    Args:
        model: changed in place, unless an error leaves it as it was.
        names: dotted names of the layers.
        groups: n, blocks of columns of each.

    Returns:
        The names.

    Raises:
        ValueError: the inputs of a layer do not divide into the blocks, or its weight is read without calling it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 3))
        >>> scale_weights(model, ["0"], groups=2), fold_scales(model), type(model[0]).__name__
        (['0'], ['0'], 'Linear')
    """
    names = list(names)
    check_called(model, names)
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = ScaledLinear.of(linear, groups=groups, name=name)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return names


def fold_scales(model: nn.Module) -> list[str]:
    """Replace each :class:`ScaledLinear` by an ordinary layer that computes the same, in place.

    Args:
        model: one without such layers is left as it is.

    Returns:
        Names of the layers.

    Examples:
        >>> fold_scales(nn.Sequential(nn.Linear(8, 3)))
        []
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.plain())
    return list(layers)
