"""Inference that really leaves filters out: weights of the active filters are gathered, and nothing else is computed.

For one image at a time, or a few, where a convolution is bound by arithmetic: the gathered weights are convolved with
the gathered input channels, so that a layer with a third of its filters behind one with a third costs about a ninth.
Batches are gone through image by image, since each has filters of its own. On a GPU with large batches, and in layers
with hardly any arithmetic, this saves nothing; such layers stay dense, by a rule of their own.

:mod:`regularized.compression.dynamic_pruning.masks` has the paper and its symbols.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from regularized.compression.dynamic_pruning.layer import DynamicConv2d
from regularized.compression.dynamic_pruning.masks import predicted_mask
from regularized.compression.dynamic_pruning.term import dynamic_layers
from regularized.mechanisms.ranges import allowed, between

__all__ = ["SparseConv2d", "sparse_inference"]

# Shapes: B images, Ci channels in, Co filters, H x W positions of the input, H' x W' of the output.

DENSE_ABOVE = 0.5
"""Share of the multiplications from which on a layer is computed densely: gathering costs more than it saves."""


@dataclass(slots=True)
class _Active:
    """Active filters of the layers in the pass that is under way: for each image their numbers, by layer."""

    filters: dict[str, list[Tensor]] = field(default_factory=dict)


class SparseConv2d(nn.Module):
    """Computes the active filters of a convolution from the channels that are not empty; the others stay 0.

    Batch normalisation is part of the weights. Made by :func:`sparse_inference`.

    Args:
        layer: what it takes the place of; in evaluation mode.
        dense_above: see :func:`sparse_inference`.
        active: masks that the layers of a network tell each other; default its own.
    """

    def __init__(
        self, layer: DynamicConv2d, *, dense_above: float = DENSE_ABOVE, active: _Active | None = None
    ) -> None:
        super().__init__()
        conv = layer.conv if isinstance(layer.norm, nn.Identity) else fuse_conv_bn_eval(layer.conv, layer.norm)
        self.conv: nn.Conv2d = conv
        self.predictor: nn.Module = layer.predictor
        self.name: str = layer.group.conv
        self.source: str | None = layer.group.source
        self.dense_above: float = dense_above
        self.active: _Active = _Active() if active is None else active
        self.depthwise: bool = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
        # Other groups would have to keep equally many filters each; other paddings need the whole image.
        self.gathers: bool = (self.depthwise or conv.groups == 1) and conv.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        """(B, Ci, H, W) to (B, Co, H', W'); filters that are off are 0."""
        kept = predicted_mask(self.predictor(x))
        found = [of_image.nonzero().flatten() for of_image in kept]
        given = None if self.source is None or self.depthwise else self.active.filters[self.source]
        self.active.filters[self.name] = found
        images = [self._image(x[i : i + 1], rows, None if given is None else given[i]) for i, rows in enumerate(found)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def mask_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook on the group's output, where that is not the convolution's own: what it returns is masked."""
        masked = torch.zeros_like(output)
        for image, filled, rows in zip(masked, output, self.active.filters[self.name], strict=True):
            image.index_copy_(0, rows, filled.index_select(0, rows))
        return masked

    def _image(self, x: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """One image, of which the filters ``rows`` are wanted, and channels ``columns`` are filled; None: all are."""
        conv = self.conv
        silent = len(rows) == 0
        share = len(rows) / conv.out_channels * (1.0 if columns is None else len(columns) / conv.in_channels)
        if silent:  # the size of the output is asked of one filter
            rows = rows.new_zeros(1)
        if not self.gathers or share > self.dense_above:
            found: Tensor = conv(x)
            found = found if len(rows) == conv.out_channels else found.index_select(1, rows)
        else:
            found = self._gathered(x, rows, columns)
        if len(rows) == conv.out_channels and not silent:
            return found
        out: Tensor = found.new_zeros(1, conv.out_channels, *found.shape[2:])
        return out if silent else out.index_copy_(1, rows, found)

    def _gathered(self, x: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        conv = self.conv
        weight, groups = conv.weight.index_select(0, rows), 1
        bias = None if conv.bias is None else conv.bias.index_select(0, rows)
        if self.depthwise:
            x, groups = x.index_select(1, rows), len(rows)
        elif columns is not None:
            if not len(columns):  # any channel: all are empty, and what is left is the bias
                columns = columns.new_zeros(1)
            x, weight = x.index_select(1, columns), weight.index_select(1, columns)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)

    def extra_repr(self) -> str:
        """Where its empty channels come from, for ``repr``."""
        return f"{self.name!r}, source={self.source!r}, dense_above={self.dense_above}"


@allowed(dense_above=between(0.0, 1.0, meaning="the share of a layer's multiplications from which on it is dense"))
def sparse_inference(network: nn.Module, *, dense_above: float = DENSE_ABOVE) -> nn.Module:
    """A copy of a network for inference, which leaves out what the predictors switch off.

    Args:
        network: after :class:`~regularized.compression.dynamic_pruning.term.DynamicPruning`; it stays as it is.
        dense_above: a layer is computed densely for an image that keeps a larger share of its multiplications;
            default 0.5, where gathering begins to cost more than it saves in our measurements. 1 always gathers, 0
            never does.

    Returns:
        A network in evaluation mode, without gradients, of equal outputs up to rounding.

    Raises:
        ValueError: the network has no dynamically pruned layer, or one whose masks are not its predictor's.

    Examples:
        >>> from regularized.compression.dynamic_pruning.term import DynamicPruning
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        ...                     nn.Linear(256, 10)).eval()
        >>> _ = DynamicPruning(net, mass=0.7)
        >>> x = torch.randn(1, 1, 8, 8)
        >>> torch.allclose(sparse_inference(net)(x), net(x), atol=1e-5)
        True
    """
    layers = dynamic_layers(network)
    if not layers:
        raise ValueError(f"{type(network).__name__} has no dynamically pruned layer; prune it first: DynamicPruning")
    if chosen := [name for name, layer in layers.items() if layer.choose is not predicted_mask]:
        raise ValueError(f"the masks of {chosen} are not those of their predictors, which is what is computed here")
    sparse = copy.deepcopy(network).eval().requires_grad_(False)
    active = _Active()
    for name, layer in dynamic_layers(sparse).items():
        layer.state.leave()
        gathering = SparseConv2d(layer, dense_above=dense_above, active=active)
        sparse.set_submodule(name, gathering)
        if layer.group.output is not None:
            sparse.get_submodule(layer.group.output).register_forward_hook(gathering.mask_output)
    return sparse
