"""The layer: a convolution with its predictor, in the place of the convolution; and the predictor.

:mod:`regularized.compression.dynamic_pruning.masks` has the paper and its symbols.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from regularized.compression.dynamic_pruning.groups import FilterGroup
from regularized.compression.dynamic_pruning.masks import filter_strengths, predicted_mask
from regularized.mechanisms.ranges import Choice, allowed, count

__all__ = ["DynamicConv2d", "MaskPredictor", "Pass", "Record"]

# Shapes: B images, Ci channels in, Co filters, H x W positions of the input, H' x W' of the output.

Pool: TypeAlias = Literal["mean", "max"]


class MaskPredictor(nn.Module):
    """Says which filters will answer: pooled input, softmax over its entries, one linear layer.

    Args:
        channels: Ci.
        filters: Co.
        pool: ``"mean"`` over positions (default, official code) or ``"max"`` (the paper, by a second-hand summary).
        softmax: softmax over the pooled entries; default True (official code).
        embedding: about so many entries to predict from: each channel is pooled to d x d entries, where d is the
            rounded root of ``embedding / Ci`` and at least 1. Default None: one entry a channel (official code).

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> MaskPredictor(16, 32)(torch.randn(5, 16, 8, 8)).shape
        torch.Size([5, 32])
    """

    @allowed(channels=count(1), filters=count(1), pool=Choice("mean", "max"), embedding=count(1).or_none("Ci"))
    def __init__(
        self,
        channels: int,
        filters: int,
        *,
        pool: Pool = "mean",
        softmax: bool = True,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        self.pool: Pool = pool
        self.softmax: bool = softmax
        self.side: int = 1 if embedding is None else max(round(math.sqrt(embedding / channels)), 1)
        self.linear: nn.Linear = nn.Linear(channels * self.side**2, filters)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Ci, H, W) to logits (B, Co)."""
        if self.side == 1:
            pooled = x.mean(dim=(2, 3)) if self.pool == "mean" else x.amax(dim=(2, 3))
        else:
            pool = F.adaptive_avg_pool2d if self.pool == "mean" else F.adaptive_max_pool2d
            pooled = pool(x, self.side).flatten(1)
        logits: Tensor = self.linear(pooled.softmax(dim=1) if self.softmax else pooled)
        return logits

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"pool={self.pool!r}, softmax={self.softmax}, side={self.side}"


@dataclass(slots=True)
class Record:
    """What one layer did in a forward pass.

    Args:
        name: of the layer.
        kept: (B, Co) bool, the filters that were on; all of them where nothing was masked.
        positions: H' W'.
        logits: (B, Co) of the predictor; None where it was not asked.
        wanted: (B, Co) bool, the target; None where it was not computed.
    """

    name: str
    kept: Tensor
    positions: int
    logits: Tensor | None = None
    wanted: Tensor | None = None


@dataclass(slots=True)
class Pass:
    """What the layers of a network share: how they work, and what they did in the latest forward pass.

    Args:
        masking: whether filters are switched off; if not, the network is the dense one.
        learning: whether training passes compute targets.
        watching: record in evaluation, too, with targets.
        records: of the latest pass, in the order of the layers.
        outputs: identities of what recorded passes returned, the latest last.
        handles: of the hooks on the network, and on modules whose outputs are masked.
    """

    masking: bool = True
    learning: bool = True
    watching: bool = False
    records: list[Record] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def follow(self, network: nn.Module) -> None:
        """From now on, a forward pass of the network begins with empty records."""
        self.handles += [network.register_forward_pre_hook(self._begin), network.register_forward_hook(self._end)]

    def leave(self) -> None:
        """Take the hooks off, and forget the records."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of the latest pass."""
        self.records.clear()
        self.outputs.clear()

    def _begin(self, network: nn.Module, inputs: Any) -> None:
        self.records.clear()

    def _end(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if self.records:
            self.outputs.append(id(output))


class DynamicConv2d(nn.Module):
    """A convolution, with its batch normalisation, whose filters are switched on and off for each image.

    It computes all filters and sets to zero those that are off, as training needs;
    :func:`~regularized.compression.dynamic_pruning.sparse.sparse_inference` makes of it what leaves them out.

    Args:
        conv: the convolution; its weights are kept, not copied.
        norm: its batch normalisation, or None.
        predictor: from (B, Ci, H, W) to logits (B, Co).
        group: names, and the activation that the network applies to the result.
        target: from strengths (B, Co) to the filters that shall be on.
        decoupled: the predictor sees a detached input; default True.
        state: shared with the other layers of the network; default its own.

    Attributes:
        choose: from logits to the filters that are on; default :func:`predicted_mask`.

    Examples:
        >>> from functools import partial
        >>> from regularized.compression.dynamic_pruning.masks import mass_mask
        >>> group, target = FilterGroup("0", activation=F.relu), partial(mass_mask, mass=0.9)
        >>> layer = DynamicConv2d(nn.Conv2d(3, 8, 3), None, MaskPredictor(3, 8), group=group, target=target)
        >>> layer(torch.randn(5, 3, 6, 6)).shape, layer.state.records[0].wanted.shape
        (torch.Size([5, 8, 4, 4]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None,
        predictor: nn.Module,
        *,
        group: FilterGroup,
        target: Callable[[Tensor], Tensor],
        decoupled: bool = True,
        state: Pass | None = None,
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d = conv
        self.norm: nn.BatchNorm2d | nn.Identity = nn.Identity() if norm is None else norm
        self.predictor: nn.Module = predictor
        self.group: FilterGroup = group
        self.target: Callable[[Tensor], Tensor] = target
        self.decoupled: bool = decoupled
        self.state: Pass = Pass() if state is None else state
        self.choose: Callable[[Tensor], Tensor] = predicted_mask
        self._pending: tuple[Tensor | None, Tensor | None] = (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Ci, H, W) to (B, Co, H', W'); filters that are off are 0, or will be in the group's output."""
        out: Tensor = self.norm(self.conv(x))
        logits, kept = None, None
        if self.state.masking:
            logits = self.predictor(x.detach() if self.decoupled else x)
            kept = self.choose(logits)
        if self.group.output is not None:
            self._pending = logits, kept
            return out
        return self._masked(out, logits, kept)

    def mask_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook on the group's output: what it returns is masked."""
        (logits, kept), self._pending = self._pending, (None, None)
        return self._masked(output, logits, kept)

    def _masked(self, out: Tensor, logits: Tensor | None, kept: Tensor | None) -> Tensor:
        state = self.state
        learning = state.learning and self.training and torch.is_grad_enabled()
        if learning or state.watching:
            wanted = self.target(filter_strengths(out, self.group.activation))
            on = torch.ones_like(wanted) if kept is None else kept
            state.records.append(Record(self.group.conv, on, out.shape[2] * out.shape[3], logits, wanted))
        return out if kept is None else out * kept[:, :, None, None].to(out.dtype)

    def extra_repr(self) -> str:
        """What it masks and how the predictor learns, for ``repr``."""
        return f"{self.group.conv!r}, {'decoupled' if self.decoupled else 'joint'}"
