"""Channel Vision Transformers: tokens of each channel's own, so that a missing channel is a shorter sequence.

A plain ViT mixes all channels of a patch into one token, and its filter counts on all of them. Here each channel of a
patch is a token: one filter and one table of positions are shared by all channels, and a learned vector says which
channel a token belongs to. Any subset of the channels is then an input.

    Bao, Sivanandan, Karaletsos, "Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words", ICLR 2024, arXiv
    2309.16108. Written from the paper alone: the authors' code (github.com/insitro/ChannelViT) is licensed for
    non-commercial use, CC BY-NC 4.0.

=============  ====================  ==========================================================================
paper          here                  meaning
=============  ====================  ==========================================================================
x              ``x``                 (B, n, H, W) the channels that there are, n of them
p              ``channels``          (n,) or (B, n) which channel each plane is: its id, 0 ... C - 1
C              ``in_channels``       channels that the model knows
P              ``patch_size``        side of a patch; L = (H / P) (W / P) patches of a channel
W, b           ``weight``, ``bias``  (D, 1, P, P) and (D,): the patch filter, shared by all channels
chn            ``channel_embed``     (C, D): what is added to all tokens of a channel
pos            ``pos_embed``         (1, L, D): what is added to all tokens of a place, whatever the channel
--             ``channel_tokens``    W patch_l(x_c) + b + chn[p_c] + pos_l, channel by channel: (B, n L, D)
m, S           ``kept``              how many channels a batch keeps in training, and which; in ``sampling.py``
=============  ====================  ==========================================================================

Paper and code differ in the positions. The released code interpolates its table as soon as there is more than one
channel, also where the grid is that of the training, and warps it a little by that; so an image of one channel sees
other places than one of several. The paper says nothing of it. Here the table is exact, and ``positions="official"``
warps it as their code does, for their weights.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.patches import patch_grid, patchify
from regularized.mechanisms.ranges import Choice, allowed, count

__all__ = ["ChannelPatchEmbed", "Channels", "Positions", "channel_ids", "channel_tokens", "place_embedding"]

# Shapes: B images, n channels of them, C channels that the model knows, P side of a patch, L patches of a channel, D
# width.

Channels: TypeAlias = Tensor | Sequence[int]
"""Which channel each plane is: (n,) for the whole batch or (B, n), whole numbers."""

Positions = Literal["exact", "official"]
POSITIONS = Choice(*get_args(Positions))

_WARP = 0.1  # added to the grid before the scale of the interpolation is computed, in the released code


def channel_tokens(
    x: Tensor, channels: Tensor, weight: Tensor, bias: Tensor, channel_embed: Tensor, places: Tensor | None = None
) -> Tensor:
    """The tokens of each patch of each channel, channel by channel.

    Args:
        x: (B, n, H, W); H and W multiples of P.
        channels: (n,) or (B, n) int64, the channel that each plane is.
        weight: (D, 1, P, P), the filter of all channels.
        bias: (D,).
        channel_embed: (C, D).
        places: (1, L, D) or (L, D), added to the tokens of each channel; default nothing.

    Returns:
        (B, n L, D): the L patches of the first plane, row by row, then those of the second.

    Examples:
        >>> x = torch.arange(32.0).view(1, 2, 4, 4)
        >>> mean = torch.full((1, 1, 2, 2), 0.25)
        >>> channel_tokens(x, torch.tensor([0, 1]), mean, torch.zeros(1), torch.tensor([[0.0], [100.0]])).flatten()
        tensor([  2.5000,   4.5000,  10.5000,  12.5000, 118.5000, 120.5000, 126.5000,
                128.5000])
    """
    batch, planes = x.shape[:2]
    patches = patchify(x.flatten(0, 1)[:, None], weight.shape[-1]).flatten(2)
    projected: Tensor = F.linear(patches, weight.flatten(1)).unflatten(0, (batch, planes))
    # All that does not depend on the pixels is one small table, added once.
    added = (bias + channel_embed[channels]).unsqueeze(-2)
    if places is not None:
        added = added + places
    tokens: Tensor = projected + added
    return tokens.flatten(1, 2)


def place_embedding(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int], *, warp: bool = False) -> Tensor:
    """The table of positions for a grid of patches: itself on its own grid, else interpolated.

    Args:
        table: (1, L, D) of the grid of the training.
        grid: rows and columns of the table.
        wanted: rows and columns of the image.
        warp: interpolate whatever the grid, with the scale of the released code; default False.

    Returns:
        (1, L', D) for the L' patches of the image; bicubic where it is interpolated.

    Examples:
        >>> table = torch.randn(1, 4, 8)
        >>> place_embedding(table, (2, 2), (2, 2)) is table, place_embedding(table, (2, 2), (3, 4)).shape
        (True, torch.Size([1, 12, 8]))
    """
    if grid == wanted and not warp:
        return table
    image = table.unflatten(1, grid).movedim(-1, 1)
    if warp:
        scale = [(new + _WARP) / old for new, old in zip(wanted, grid, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=wanted, mode="bicubic")
    return image.flatten(2).transpose(1, 2)


def channel_ids(channels: Channels | None, x: Tensor, in_channels: int) -> Tensor:
    """Which channel each plane is, as int64 on the device of the image; refuses what cannot be.

    Values are looked at where nobody has to wait for them: those of a sequence or of a tensor on the processor, outside
    of ``torch.compile``.

    Args:
        channels: (n,), or (B, n) where the images of a batch differ; None: x has all channels, in their order.
        x: (B, n, H, W).
        in_channels: C, how many channels there are.

    Raises:
        TypeError: ids that are no whole numbers.
        ValueError: no channel; not one id for each plane; an id that is none of 0 ... C - 1, or twice in an image; no
            ids, and not all channels.

    Examples:
        >>> channel_ids([2, 0], torch.zeros(1, 2, 4, 4), 3)
        tensor([2, 0])
    """
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, n, H, W), got {tuple(x.shape)}")
    images, planes = x.shape[:2]
    if planes == 0:
        raise ValueError(f"no channel present: x has shape {tuple(x.shape)}, and at least one channel is needed")
    if channels is None:
        if planes != in_channels:
            raise ValueError(
                f"x has {planes} channels and the model knows {in_channels}; say which ones they are, for example "
                f"channels={list(range(min(planes, in_channels)))}"
            )
        return torch.arange(planes, device=x.device)
    ids = channels if isinstance(channels, Tensor) else torch.tensor(channels, device="cpu")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"channels must be whole numbers from 0 to {in_channels - 1}, got {ids.dtype}")
    if ids.shape not in ((planes,), (images, planes)):
        raise ValueError(
            f"channels must hold one id for each of the {planes} channels of x, shape ({planes},) or "
            f"({images}, {planes}); got shape {tuple(ids.shape)}"
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        if int(ids.min()) < 0 or int(ids.max()) >= in_channels:
            strange = ids[(ids < 0) | (ids >= in_channels)].unique().tolist()
            raise ValueError(
                f"channels {strange} are unknown: the model has in_channels={in_channels}, so ids go from 0 to "
                f"{in_channels - 1}"
            )
        ordered = ids.sort(dim=-1).values
        if bool((ordered.diff(dim=-1) == 0).any()):
            twice = ordered[..., 1:][ordered.diff(dim=-1) == 0].unique().tolist()
            raise ValueError(f"channels {twice} stand twice in one image; each channel gives tokens once")
    return ids.to(x.device, torch.int64, non_blocking=True)


class ChannelPatchEmbed(nn.Module):
    """Tokens of each channel: one patch filter for all of them, and a vector for each channel.

    Args:
        in_channels: C, channels that it knows.
        patch_size: P, side of a patch; default 16 (paper).
        embed_dim: D, width of a token; default 384 (ViT-S).

    Attributes:
        proj: the filter, a ``Conv2d`` from one channel, with PyTorch's initialisation.
        channel_embed: an ``Embedding`` (C, D) of standard deviation 0.02.

    Raises:
        ValueError: a number below 1; at the call: sides that are no multiples of P, or channels that cannot be, see
            :func:`channel_ids`.

    Examples:
        >>> embed = ChannelPatchEmbed(5, patch_size=4, embed_dim=8)
        >>> embed(torch.randn(2, 5, 8, 8)).shape, embed(torch.randn(2, 2, 8, 8), channels=[4, 1]).shape
        (torch.Size([2, 20, 8]), torch.Size([2, 8, 8]))
    """

    @allowed(
        in_channels=count(1, "the channels that the model knows"),
        patch_size=count(1, "the side of a patch in pixels"),
        embed_dim=count(1, "the width of a token"),
    )
    def __init__(self, in_channels: int, *, patch_size: int = 16, embed_dim: int = 384) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.proj: nn.Conv2d = nn.Conv2d(1, embed_dim, patch_size, stride=patch_size)
        self.channel_embed: nn.Embedding = nn.Embedding(in_channels, embed_dim)
        nn.init.trunc_normal_(self.channel_embed.weight, std=0.02)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        Raises:
            ValueError: a side of it is no multiple of P.
        """
        return patch_grid(x.shape[-2], x.shape[-1], self.patch_size)

    def forward(self, x: Tensor, channels: Channels | None = None, *, places: Tensor | None = None) -> Tensor:
        """(B, n, H, W) to (B, n L, D); see :func:`channel_tokens` and :func:`channel_ids`."""
        ids = channel_ids(channels, x, self.in_channels)
        bias = self.proj.bias
        assert bias is not None
        return channel_tokens(x, ids, self.proj.weight, bias, self.channel_embed.weight, places)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """The released weights hold the filter of a 3-d convolution, (D, 1, 1, P, P)."""
        name = f"{prefix}proj.weight"
        if name in state_dict and state_dict[name].dim() == 5:
            state_dict[name] = state_dict[name].squeeze(2)
        super()._load_from_state_dict(state_dict, prefix, *args)
