"""The product ``x (W + U diag(shift) V^T)^T`` in its two forms, and which of them is cheaper.

*Thin*: ``x W^T + ((x V) * shift) U^T``, two thin products beside the layer's own. *Folded*: the sum of the weights is
formed once, then one product as in the plain layer; the gradient of the shift comes from that of the weight. With few
directions the thin form costs next to nothing. With all of a square weight's it makes the layer three times as dear,
while folding costs as much as three more weights' worth of rows, whatever the batch.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.svd import weight_like, weight_matrix

__all__ = ["folding_pays", "shifted_forward", "shifted_weight"]

# Shapes: N rows of a batch (samples, tokens, positions), o outputs, i inputs, r directions.


def shifted_weight(weight: Tensor, left: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """The weight with its singular values shifted, ``W + U diag(shift) V^T``.

    Its gradient by the shift is ``diag(U^T G V)``, G being the gradient by the whole weight.

    Args:
        weight: (o, i) W.
        left: (o, r) U, orthonormal columns.
        shift: (r,) what is added to the singular values.
        right: (r, i) V^T, orthonormal rows.

    Returns:
        (o, i), in the type of the weight; float32 or wider within.

    Examples:
        >>> u, s, v = torch.linalg.svd(torch.eye(2, 3), full_matrices=False)
        >>> shifted_weight(torch.eye(2, 3), u, s, v)
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """
    wide = torch.promote_types(weight.dtype, torch.float32)  # a small shift would drown in bfloat16's last digit
    total = torch.addmm(weight.to(wide), left.to(wide) * shift.to(wide), right.to(wide))
    return total.to(weight.dtype)


def folding_pays(rows: int, outputs: int, inputs: int, rank: int, *, training: bool) -> bool:
    """Whether the folded product takes fewer multiply-adds than the thin one.

    Beyond the layer's own products the thin form needs ``N r (o + i)``, and as many again for the gradients. The folded
    form needs ``o i r`` to add the weights, and in training twice that again (once more to add them for the gradient of
    the input, once for that of the shift) and ``N o i`` for the gradient of the weight.

    Args:
        rows: N, rows of the batch.
        outputs: o.
        inputs: i.
        rank: r.
        training: whether gradients are wanted.

    Examples:
        >>> folding_pays(64, 768, 768, 8, training=True), folding_pays(4096, 768, 768, 768, training=True)
        (False, True)
    """
    thin, fold = rows * rank * (outputs + inputs), outputs * inputs * rank
    return 3 * fold + rows * outputs * inputs < 2 * thin if training else fold < thin


class _FoldedLinear(torch.autograd.Function):
    """``F.linear(x, W + U diag(shift) V^T, b)`` that keeps no (o, i) matrix for the backward pass but adds it again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, left: Tensor, shift: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, shifted_weight(weight, left, shift, right).to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, left, shift, right, _ = inputs
        ctx.save_for_backward(x, weight, left, shift, right)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        x, weight, left, shift, right = ctx.saved_tensors
        grad_x = grad_shift = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ shifted_weight(weight, left, shift, right).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            of_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(left.dtype)
            grad_shift = torch.linalg.vecdot(left, of_weight @ right.T, dim=0).to(shift.dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, None, grad_shift, None, grad_bias


def shifted_forward(layer: nn.Module, x: Tensor, left: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """Output of a layer whose weight has its singular values shifted; the cheaper form is chosen from the sizes.

    Half-precision and quantised weights are never folded: the rounded sum would lose a small shift.

    Args:
        layer: ``nn.Linear``, transformers' ``Conv1D`` or ``nn.Conv2d`` without groups; its weight is not trained.
        x: (..., i), or (B, channels, height, width) for a convolution.
        left: (o, r).
        shift: (r,).
        right: (r, i).

    Returns:
        What the layer gives with :func:`shifted_weight` as its weight.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(shifted_forward(layer, x, u, -s, v), layer.bias.expand(4, 2), atol=1e-6)
        True
    """
    convolution = layer if isinstance(layer, nn.Conv2d) else None
    rows = _positions(convolution, x) if convolution is not None else x.numel() // max(x.shape[-1], 1)
    training = torch.is_grad_enabled() and shift.requires_grad
    foldable = cast(Tensor, layer.weight).dtype in (torch.float32, torch.float64)
    if not (foldable and folding_pays(rows, len(left), right.shape[1], len(shift), training=training)):
        return _thin(layer, x, left, shift, right)
    bias = cast("Tensor | None", layer.bias)
    if convolution is not None:
        total = weight_like(layer, shifted_weight(weight_matrix(layer), left, shift, right))
        return cast(Tensor, convolution._conv_forward(x, total, bias))
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(low), None if bias is None else bias.to(low)
    with torch.autocast(x.device.type, enabled=False):  # the weights are added in their own precision
        if not training:
            return F.linear(x, shifted_weight(weight_matrix(layer), left, shift, right).to(x.dtype), bias)
        apply = cast("Callable[..., Tensor]", _FoldedLinear.apply)
        return apply(x, weight_matrix(layer), left, shift, right, bias)


def _thin(layer: nn.Module, x: Tensor, left: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    base: Tensor = layer(x)
    left, right = left.to(x.dtype), right.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        # The same convolution with r kernels, then 1 x 1: stride, padding and dilation are the layer's own.
        hidden = layer._conv_forward(x, right.view(-1, *layer.weight.shape[1:]), None)
        branch = F.conv2d((hidden * shift.view(-1, 1, 1)).to(hidden.dtype), left.view(*left.shape, 1, 1))
    else:
        hidden = F.linear(x, right)
        branch = F.linear((hidden * shift).to(hidden.dtype), left)
    return base + branch.to(base.dtype)


def _positions(layer: nn.Conv2d, x: Tensor) -> int:
    """About the number of output positions, at which the kernel is applied."""
    return x.numel() // x.shape[-3] // (layer.stride[0] * layer.stride[1])
