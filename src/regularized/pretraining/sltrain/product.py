"""The product with a sparse plus low-rank weight, and a backward pass that keeps no dense weight alive.

Between the forward and the backward pass of a layer its input and its factors are alive, and nothing of the weight's
size: the weight is built again when it is needed, and goes at once. What a step holds densely is one layer's weight and
one layer's gradient, one after the other.

Without entries there is nothing to add to the thin product, and the weight is never built. With entries it is, even
for one row of input: sparse products by gathering and scattering were tried, and on a processor lose to it from some
ten rows on. To generate token by token, merge first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dense_weight", "sparse_low_rank_linear"]

# Shapes: n rows of the input, o outputs, i inputs, r rank, k entries.


def dense_weight(
    shape: tuple[int, int],
    left: Tensor | None,
    right: Tensor | None,
    values: Tensor | None,
    positions: Tensor | None,
    scale: Tensor | float,
) -> Tensor:
    """``scale * left @ right`` with ``values`` added at ``positions``, (o, i); differentiable.

    As the authors' code does, the scale is applied to the right factor, and in bfloat16 the sum is rounded to bfloat16.

    Args:
        shape: (o, i).
        left: (o, r) B; None for a rank of 0.
        right: (r, i) A.
        values: (k,) v; None for no entries.
        positions: (k,) int32 or int64, flat: row * i + column; all different.
        scale: s, a number or a tensor of one.

    Examples:
        >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> dense_weight((2, 3), left, right, torch.tensor([5.0]), torch.tensor([4]), 0.5)
        tensor([[0.5000, 0.0000, 0.5000],
                [1.0000, 5.0000, 1.0000]])
    """
    if left is None or right is None:
        assert values is not None
        weight = values.new_zeros(shape)
    else:
        weight = left @ (right * scale)
    if values is not None:
        assert positions is not None
        weight = weight.view(-1).index_add_(0, positions, values).view(shape)
    return weight


def sparse_low_rank_linear(
    x: Tensor,
    shape: tuple[int, int],
    left: Tensor | None,
    right: Tensor | None,
    values: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """``F.linear(x, dense_weight(...), bias)`` that saves no tensor of the weight's size for the backward pass.

    Twice differentiable. Under autocast everything is computed in its type, as ``F.linear`` does.

    Args:
        x: (..., i).
        shape: (o, i).
        left: see :func:`dense_weight`.
        right: see :func:`dense_weight`.
        values: see :func:`dense_weight`.
        positions: see :func:`dense_weight`.
        bias: (o,), or None.
        scale: see :func:`dense_weight`.

    Returns:
        (..., o).

    Examples:
        >>> left, right = torch.ones(2, 1), torch.ones(1, 3)
        >>> sparse_low_rank_linear(torch.ones(4, 3), (2, 3), left, right, torch.ones(1), torch.tensor([0]))[0]
        tensor([4., 3.])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        left, right, values, bias = (t if t is None else t.to(dtype) for t in (left, right, values, bias))
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)
    if values is None and left is not None and right is not None:
        return F.linear(F.linear(x, right * scale), left, bias)
    out: Tensor = _Product.apply(x, left, right, values, positions, bias, scale, shape)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        values: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        scale: Tensor | float,
        shape: tuple[int, int],
    ) -> Tensor:
        trained_scale, ctx.number = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
        ctx.save_for_backward(x, left, right, values, positions, trained_scale)
        ctx.shape = shape
        return F.linear(x, dense_weight(shape, left, right, values, positions, scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, values, positions, trained_scale = ctx.saved_tensors
        scale = ctx.number if trained_scale is None else trained_scale
        of_x, of_left, of_right, of_values, _, of_bias, of_scale, _ = ctx.needs_input_grad
        rows, y_grad = x.reshape(-1, ctx.shape[1]), gradients[0].reshape(-1, ctx.shape[0])
        x_grad = left_grad = right_grad = values_grad = scale_grad = None
        if of_x:
            x_grad = (y_grad @ dense_weight(ctx.shape, left, right, values, positions, scale)).view(x.shape)
        if of_left or of_right or of_values or of_scale:
            # The one dense gradient, of this layer, until the end of this function.
            weight_grad = y_grad.T @ rows
            if of_left or of_scale:
                unscaled = weight_grad @ right.T
                left_grad = unscaled * scale if of_left else None
                scale_grad = (unscaled * left).sum().view(trained_scale.shape) if of_scale else None
            if of_right:
                right_grad = left.T @ weight_grad * scale
            if of_values:
                values_grad = weight_grad.reshape(-1).index_select(0, positions)
        return x_grad, left_grad, right_grad, values_grad, None, y_grad.sum(0) if of_bias else None, scale_grad, None
