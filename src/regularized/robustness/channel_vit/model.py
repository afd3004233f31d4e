"""A vision transformer over tokens of channels: for any subset of the channels that it knows.

:mod:`regularized.robustness.channel_vit.layer` has the paper and its symbols.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, between, count, positive
from regularized.robustness.channel_vit.layer import (
    POSITIONS,
    ChannelPatchEmbed,
    Channels,
    Positions,
    place_embedding,
)

__all__ = ["Block", "ChannelTransformer", "ChannelViT", "initialise"]

# Shapes: B images, n channels of them, C that the model knows, L patches of a channel on a grid of gh x gw, D width, K
# classes, p tokens in front (class token, registers).


class ChannelTransformer(nn.Module):
    """What transformers over channel tokens share: tokens, positions, and maps; without the blocks.

    Args:
        patch_embed: makes the tokens.
        prefix: (1, p, D), tokens in front.
        pos_embed: (1, p + L, D).
        grid: rows and columns of patches that ``pos_embed`` is for.
        positions: see :class:`ChannelViT`.
    """

    def __init__(
        self,
        patch_embed: ChannelPatchEmbed,
        prefix: Tensor,
        pos_embed: Tensor,
        grid: tuple[int, int],
        positions: Positions = "exact",
    ) -> None:
        super().__init__()
        self.patch_embed: ChannelPatchEmbed = patch_embed
        self.cls_token: nn.Parameter = nn.Parameter(prefix)
        self.pos_embed: nn.Parameter = nn.Parameter(pos_embed)
        self.grid_size: tuple[int, int] = grid
        self.positions: Positions = positions

    @property
    def in_channels(self) -> int:
        """C, channels that it knows."""
        return self.patch_embed.in_channels

    @property
    def num_prefix(self) -> int:
        """p, tokens in front of those of the channels."""
        return self.cls_token.shape[1]

    def places(self, x: Tensor) -> Tensor:
        """(1, L, D): what is added to the tokens of each place, for images like this one."""
        wanted = self.patch_embed.grid(x)
        warp = self.positions == "official" and (x.shape[1] > 1 or wanted != self.grid_size)
        return place_embedding(self.pos_embed[:, self.num_prefix :], self.grid_size, wanted, warp=warp)

    def tokens(self, x: Tensor, channels: Channels | None = None) -> Tensor:
        """(B, n, H, W) to (B, p + n L, D): what the blocks see.

        Args:
            x: images; H and W multiples of the patch size.
            channels: (n,) or (B, n), which channel each plane is; default all, in their order.

        Raises:
            ValueError: sides or channels that cannot be, see
                :func:`~regularized.robustness.channel_vit.layer.channel_ids`.
        """
        of_channels: Tensor = self.patch_embed(x, channels, places=self.places(x))
        front = self.cls_token + self.pos_embed[:, : self.num_prefix]
        return torch.cat([front.expand(len(x), -1, -1), of_channels], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """Blocks and last norm: (B, N, D) to (B, N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(tokens)")

    def classify(self, features: Tensor) -> Tensor:
        """(B, N, D) from :meth:`encode` to the output."""
        raise NotImplementedError(f"{type(self).__name__} must define classify(features)")

    def forward_features(self, x: Tensor, channels: Channels | None = None) -> Tensor:
        """(B, p + n L, D), normalised; see :meth:`tokens`."""
        return self.encode(self.tokens(x, channels))

    def feature_maps(self, x: Tensor, channels: Channels | None = None) -> Tensor:
        """For dense tasks: (B, n, D, gh, gw), a map of features for each channel; its mean over n is one for all."""
        rows, columns = self.patch_embed.grid(x)
        of_channels: Tensor = self.forward_features(x, channels)[:, self.num_prefix :]
        maps: Tensor = of_channels.unflatten(1, (x.shape[1], rows, columns)).permute(0, 1, 4, 2, 3)
        return maps

    def forward(self, x: Tensor, channels: Channels | None = None) -> Tensor:
        """(B, n, H, W) to the output; see :meth:`tokens`."""
        return self.classify(self.forward_features(x, channels))


class ChannelViT(ChannelTransformer):
    """A ViT whose tokens are patches of single channels, and which takes any subset of the channels.

    n channels give n times the tokens of a plain ViT: linear layers cost n times as much, attention n^2 times. Train it
    with :class:`~regularized.robustness.channel_vit.sampling.HierarchicalChannelSampling`, which halves that, and
    without which it is not used to missing channels. The loss, the optimizer and the gradient are the usual ones.

    Names and shapes of the parameters are those of the released weights and, but for the filter, of timm's ViT; for
    timm's weights see :func:`~regularized.robustness.channel_vit.pretrained.convert_vit`.

    Args:
        in_channels: C, channels that it knows.
        num_classes: K; 0 gives the class token's features instead of logits.
        img_size: side of the training images, or height and width; others are taken, too, with interpolated positions.
            Default 224 (paper).
        patch_size: P; default 16 (paper; 8 for small images).
        embed_dim: D; default 384 (ViT-S).
        depth: blocks; default 12.
        num_heads: default 6.
        mlp_ratio: hidden width of a block's MLP over D; default 4.
        drop_path: probability to skip the last block, falling linearly to 0 for the first; default 0.1 (official
            recipe).
        positions: ``"exact"`` (default; paper), or ``"official"``, which warps the table for several channels as the
            released code does, see :mod:`~regularized.robustness.channel_vit.layer`; for square images only.

    Raises:
        ValueError: a number outside its range, a width that the heads do not divide, an image side that P does not
            divide; at the call: images or channels that cannot be.

    Examples:
        >>> net = ChannelViT(5, num_classes=3, img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
        >>> x = torch.randn(2, 5, 8, 8)
        >>> net(x).shape, net(x[:, :2], channels=[0, 1]).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
        >>> net.feature_maps(x[:, :2], channels=[0, 1]).shape
        torch.Size([2, 2, 16, 2, 2])
    """

    @allowed(
        num_classes=count(0, "0 gives features"),
        depth=count(1),
        num_heads=count(1),
        mlp_ratio=positive("the hidden width of a block over embed_dim"),
        drop_path=between(0.0, 1.0, "[)", "the probability to skip the last block"),
        positions=POSITIONS,
    )
    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        positions: Positions = "exact",
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        patch_embed = ChannelPatchEmbed(in_channels, patch_size=patch_size, embed_dim=embed_dim)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rows, columns = patch_embed.grid(torch.empty(0, 1, height, width, device="meta"))
        if positions == "official" and rows != columns:
            raise ValueError(f"positions='official' is for square images, got {height} x {width}; take 'exact'")
        super().__init__(
            patch_embed,
            torch.empty(1, 1, embed_dim),
            torch.empty(1, 1 + rows * columns, embed_dim),
            (rows, columns),
            positions,
        )
        self.num_classes: int = num_classes
        self.blocks: nn.ModuleList = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path * number / max(depth - 1, 1))
            for number in range(depth)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        initialise(self.blocks)
        initialise(self.head)

    def encode(self, tokens: Tensor) -> Tensor:
        """Blocks and last norm."""
        for block in self.blocks:
            tokens = block(tokens)
        normalised: Tensor = self.norm(tokens)
        return normalised

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, K) of the class token, or its features (B, D)."""
        output: Tensor = self.head(features[:, 0])
        return output


def initialise(module: nn.Module) -> None:
    """Linear layers as in the paper: weights of standard deviation 0.02, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """A pre-norm transformer block with timm's names of parameters.

    Args:
        dim: D.
        num_heads: a divisor of D.
        mlp_ratio: hidden width over D; default 4.
        drop_path: probability that an image skips a branch in training; default 0.

    Examples:
        >>> Block(16, 2)(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])
    """

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim, eps=1e-6)
        self.attn: _Attention = _Attention(dim, num_heads)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: _Mlp = _Mlp(dim, round(dim * mlp_ratio))
        self.drop_path: float = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self._skipped(self.attn(self.norm1(x)))
        return x + self._skipped(self.mlp(self.norm2(x)))

    def _skipped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        kept = 1.0 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the layers."""
        return f"drop_path={self.drop_path:.3g}"


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads: int = num_heads
        self.qkv: nn.Linear = nn.Linear(dim, 3 * dim)
        self.proj: nn.Linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 D) to three times (B, heads, N, D / heads)
        of_head = x.shape[-1] // self.num_heads
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, of_head)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return output


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Linear = nn.Linear(dim, hidden)
        self.fc2: nn.Linear = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return output
