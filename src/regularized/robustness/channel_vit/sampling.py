"""Hierarchical channel sampling: in training each batch has a random number of its channels, then a random choice.

Every number of channels is equally likely, and so is each subset of that size. Dropping each channel by a coin of its
own would nearly always leave about the same number; here the network meets a single channel as often as all of them.
:mod:`regularized.robustness.channel_vit.layer` has the paper and its symbols.

Of n channels each is kept with probability (n + 1) / (2 n), so a step has about half of the tokens of all channels.
"""

import random
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.robustness.channel_vit.layer import Channels

__all__ = [
    "HierarchicalChannelSampling",
    "Mode",
    "Rng",
    "draw_channels",
    "mask_channels",
    "present_planes",
    "select_channels",
]

# Shapes: B images of a batch, n planes (channels) of them.

Mode = Literal["select", "mask"]
MODE = Choice(
    *get_args(Mode),
    remedy="'select' leaves channels out, for tokens of each channel; 'mask' zeroes them, for any other network",
)

Rng: TypeAlias = torch.Generator | random.Random


@allowed(planes=count(1, "the channels that there are"))
def draw_channels(planes: int, rng: Rng) -> list[int]:
    """How many channels are kept, 1 ... n, all alike; then which, in random order.

    Args:
        planes: n, channels that there are, at least 1.
        rng: a generator of torch on the processor, or ``random.Random``, from which the draws are those of the released
            code. It is drawn from on the host: no device is waited for.

    Returns:
        Positions of those that are kept, each once.

    Examples:
        >>> draw_channels(5, random.Random(3)), draw_channels(1, torch.Generator())
        ([4, 1], [0])
    """
    if isinstance(rng, random.Random):
        return rng.sample(range(planes), rng.randint(1, planes))
    many = int(torch.randint(1, planes + 1, (), generator=rng, device="cpu"))
    order: list[int] = torch.randperm(planes, generator=rng, device="cpu").tolist()
    return order[:many]


def select_channels(x: Tensor, channels: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some of the channels, unscaled, and which they are.

    Args:
        x: (B, n, ...).
        channels: (n,) or (B, n), the channel that each plane is.
        kept: positions of planes, in the order that the result has.

    Returns:
        (B, m, ...), and (m,) or (B, m).

    Examples:
        >>> some, ids = select_channels(torch.tensor([[10.0, 20.0, 30.0]]), torch.tensor([4, 5, 6]), [2, 0])
        >>> some.tolist(), ids.tolist()
        ([[30.0, 10.0]], [6, 4])
    """
    planes = _positions(kept, x.device)
    return x.index_select(1, planes), channels.index_select(-1, planes.to(channels.device, non_blocking=True))


def mask_channels(x: Tensor, kept: Sequence[int], *, present: Sequence[int] | None = None) -> Tensor:
    """All channels, the kept ones times n / m, the others 0: for a network that adds channels up.

    Args:
        x: (B, n, ...); not changed.
        kept: positions of the m planes that stay.
        present: positions of the planes that hold anything; their number is what m is compared with. Default all.

    Returns:
        (B, n, ...).

    Examples:
        >>> mask_channels(torch.ones(1, 4), [1, 3]), mask_channels(torch.ones(1, 4), [1, 3], present=[0, 1, 3])
        (tensor([[0., 2., 0., 2.]]), tensor([[0.0000, 1.5000, 0.0000, 1.5000]]))
    """
    whole = x.shape[1] if present is None else len(present)
    factors = torch.zeros(x.shape[1], dtype=x.dtype, device="cpu")
    factors[list(kept)] = whole / len(kept)
    return x * factors.to(x.device, non_blocking=True).view(-1, *(1,) * (x.dim() - 2))


def present_planes(present: Tensor | Sequence[bool] | None, x: Tensor) -> list[int]:
    """Positions of the channels that hold anything.

    Args:
        present: (n,) booleans; None: all of them. A tensor must lie on the processor.
        x: (B, n, ...).

    Raises:
        ValueError: none is; there is not one boolean for each channel; or, where they are on the processor, all pixels
            are 0.

    Examples:
        >>> present_planes([True, False, True], torch.ones(1, 3)), present_planes(None, torch.ones(1, 2))
        ([0, 2], [0, 1])
    """
    flags = [True] * x.shape[1] if present is None else [bool(flag) for flag in present]
    if len(flags) != x.shape[1]:
        raise ValueError(f"present must hold one boolean for each of the {x.shape[1]} channels, got {len(flags)}")
    planes = [position for position, flag in enumerate(flags) if flag]
    if not planes or (x.device.type == "cpu" and x.shape[0] and not x.any()):
        of = f"of {x.shape[1]} channels, " if x.shape[1] else ""
        raise ValueError(
            f"no channel present: {of}{'all are zero' if planes else 'none holds anything'}; leave such images out"
        )
    return planes


class HierarchicalChannelSampling(nn.Module):
    """In training a random choice of the channels, one for the whole batch; in ``eval()`` mode all that are given.

    Put it in front of the network::

        x, channels = sampling(x, channels)

    ``mode="select"`` is for :class:`~regularized.robustness.channel_vit.model.ChannelViT`: the others are left out and
    cost nothing. ``mode="mask"`` is for any other network with a fixed number of channels, a plain ViT or a CNN: the
    others are 0, and the kept ones are scaled by n / m, so that their sum over channels keeps its mean. In evaluation
    nothing is scaled: where channels are missing then, :func:`mask_channels` does it, or leave the others as they are.

    The choice is drawn on the host, so no device is waited for, and the sequence has another length in each step.
    Compile the network, not this. Its generator is an attribute, which checkpoints of the trainer restore; a loop of
    your own keeps ``sampling.generator.get_state()``.

    Args:
        mode: default ``"select"``.
        seed: of the draws; default 0.
        generator: what is drawn from instead, see :func:`draw_channels`; default a new generator with that seed.

    Raises:
        ValueError: no such mode; at the call: no channel present.

    Warns:
        UserWarning: the images of a batch name different channels, which are then dropped by position; or a choice is
            given in ``eval()`` mode, and not made.

    Examples:
        >>> sampling = HierarchicalChannelSampling(seed=1)
        >>> some, channels = sampling(torch.randn(2, 4, 8, 8))
        >>> some.shape, channels
        (torch.Size([2, 2, 8, 8]), tensor([3, 1]))
        >>> same, channels = sampling.eval()(torch.ones(2, 4, 8, 8), [0, 1, 2, 5])
        >>> same.shape, channels
        (torch.Size([2, 4, 8, 8]), tensor([0, 1, 2, 5]))
    """

    @allowed(mode=MODE)
    def __init__(self, mode: Mode = "select", *, seed: int = 0, generator: Rng | None = None) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.generator: Rng = torch.Generator().manual_seed(seed) if generator is None else generator

    def draw(self, x: Tensor, present: Tensor | Sequence[bool] | None = None) -> list[int]:
        """Positions of the channels that the next step keeps; all of them in ``eval()`` mode.

        Args:
            x: (B, n, ...).
            present: (n,) booleans, which channels hold anything; default all.
        """
        planes = present_planes(present, x)
        return [planes[k] for k in draw_channels(len(planes), self.generator)] if self.training else planes

    def forward(
        self,
        x: Tensor,
        channels: Channels | None = None,
        *,
        kept: Sequence[int] | None = None,
        present: Tensor | Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The batch as the step sees it, and which channel each of its planes is.

        Args:
            x: (B, n, ...); not changed.
            channels: (n,) or (B, n), which channel each plane is; default 0 ... n - 1.
            kept: positions from :meth:`draw`, for several micro-batches of one step; default a new draw.
            present: (n,) booleans, which planes hold anything; default all.

        Returns:
            In ``"select"`` mode (B, m, ...) and the ids of those; in ``"mask"`` mode (B, n, ...) and all ids.
        """
        ids = as_ids(channels, x)
        if not self.training:
            if kept is not None:
                warnings.warn("kept is ignored in evaluation mode: all channels stay; call train() first", stacklevel=2)
            present_planes(present, x)
            return x, ids
        if kept is None:
            kept = self.draw(x, present)
        return apply_choice(self.mode, x, ids, kept, present)


def as_ids(channels: Channels | None, x: Tensor) -> Tensor:
    """Ids as a tensor, 0 ... n - 1 where none are given."""
    if channels is None:
        return torch.arange(x.shape[1], device=x.device)
    ids = channels if isinstance(channels, Tensor) else torch.tensor(channels, device="cpu")
    if ids.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"channels must hold one id for each of the {x.shape[1]} channels of x, got shape {tuple(ids.shape)}"
        )
    return ids


def apply_choice(
    mode: Mode, x: Tensor, ids: Tensor, kept: Sequence[int], present: Tensor | Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """A choice of channels in one of the two ways; the batch itself where all stay as they are."""
    planes = x.shape[1]
    if mode == "mask":
        holding = present_planes(present, x)
        return (x if len(kept) == planes else mask_channels(x, kept, present=holding)), ids
    if ids.dim() == 2 and ids.device.type == "cpu" and bool((ids != ids[:1]).any()):
        warnings.warn(
            "the images of this batch name different channels; sampling drops planes by position, the same for all",
            stacklevel=3,
        )
    return (x, ids) if list(kept) == list(range(planes)) else select_channels(x, ids, kept)


def _positions(kept: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(kept, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
