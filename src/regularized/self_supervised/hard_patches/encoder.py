"""Encoders that can be shown a part of the patches: a plain vision transformer, and any of timm's."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regularized.mechanisms.patches import patch_grid, patch_vectors
from regularized.mechanisms.ranges import allowed, count

__all__ = ["PatchEncoder", "PatchTransformer", "TimmEncoder", "grid_positions", "transformer"]

# Shapes: B images, N patches, V of them visible, D features of a token, K tokens that stand before the patches (a
# class token).

NORM_EPS = 1e-6  # official


@runtime_checkable
class PatchEncoder(Protocol):
    """What a masked autoencoder asks of its encoder; a module of your own with these serves as well.

    Attributes:
        width: D.
        patch_size: P, pixels of a side.
        grid: rows and columns of patches.
        channels: C of the images.
        prefix: K, tokens that :meth:`encode` puts before the others.
    """

    width: int
    patch_size: int
    grid: tuple[int, int]
    channels: int
    prefix: int

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D) that know their positions; each of its own patch alone."""
        ...

    def encode(self, tokens: Tensor) -> Tensor:
        """Some tokens (B, V, D) to their features, behind those of the prefix: (B, K + V, D)."""
        ...


def grid_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sines and cosines of the column, then of the row: (N, width).

    Args:
        grid: rows and columns.
        width: D, a multiple of 4.

    Raises:
        ValueError: another width.

    Examples:
        >>> grid_positions((2, 3), 8).shape
        torch.Size([6, 8])
    """
    if width < 4 or width % 4:
        raise ValueError(f"positions in two dimensions need a width that is a multiple of 4, got {width}")
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64).outer(frequencies) for n in grid)
    parts = [
        angles.expand(*grid, quarter)
        for angles in (columns.sin()[None], columns.cos()[None], rows.sin()[:, None], rows.cos()[:, None])
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1).float()


def transformer(width: int, depth: int, heads: int) -> nn.Sequential:
    """Pre-norm transformer layers as those of a ViT: GELU, four times as wide inside, no dropout.

    Raises:
        ValueError: ``width`` is no multiple of ``heads``.
    """
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
    layers = (
        nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=NORM_EPS,
            batch_first=True,
            norm_first=True,
        )
        for _ in range(depth)
    )
    return nn.Sequential(*layers)


def reset_linear(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases in all linear layers and attentions of a module (official)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.MultiheadAttention):
            assert part.in_proj_weight is not None
            nn.init.xavier_uniform_(part.in_proj_weight)


class PatchTransformer(nn.Module):
    """A vision transformer with a class token and fixed positions, as in MAE; any image size, also not square.

    Called with images it returns the mean of the patch tokens (B, D), for probes and classifiers.

    Args:
        image_size: height and width in pixels, or one number for both.
        patch_size: P; default 16 (ViT-B/16).
        channels: C; default 3.
        width: D, a multiple of 4 and of ``heads``; default 768 (ViT-B).
        depth: layers; default 12 (ViT-B).
        heads: default 12 (ViT-B).

    Raises:
        ValueError: sides are no multiples of the patch, or a width fits neither heads nor positions.

    Examples:
        >>> encoder = PatchTransformer((16, 24), patch_size=4, channels=1, width=32, depth=2, heads=4)
        >>> images = torch.randn(5, 1, 16, 24)
        >>> encoder.grid, encoder.embed(images).shape, encoder(images).shape
        ((4, 6), torch.Size([5, 24, 32]), torch.Size([5, 32]))
    """

    @allowed(depth=count(1), channels=count(1))
    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.width: int = width
        self.patch_size: int = patch_size
        self.grid: tuple[int, int] = patch_grid(height, breadth, patch_size)
        self.channels: int = channels
        self.prefix: int = 1
        self.patch_embedding: nn.Linear = nn.Linear(patch_size**2 * channels, width)
        self.class_token: nn.Parameter = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("positions", grid_positions(self.grid, width), persistent=False)
        self.positions: Tensor
        self.blocks: nn.Sequential = transformer(width, depth, heads)
        self.norm: nn.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)
        reset_linear(self)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to tokens (B, N, D)."""
        vectors = patch_vectors(images, self.patch_size)
        if vectors.shape[1] != len(self.positions):
            raise ValueError(
                f"the encoder was made for a grid of {self.grid[0]} x {self.grid[1]} patches, the images have "
                f"{vectors.shape[1]}; resize them, or build it with their image_size"
            )
        tokens: Tensor = self.patch_embedding(vectors) + self.positions
        return tokens

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, V, D) to (B, 1 + V, D)."""
        whole = torch.cat([self.class_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        features: Tensor = self.norm(self.blocks(whole))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D)."""
        return self.encode(self.embed(images))[:, self.prefix :].mean(dim=1)


class TimmEncoder(nn.Module):
    """A ``timm`` vision transformer that can be shown a part of its patches; its weights stay where they are.

    Whatever has ``patch_embed``, ``pos_embed``, ``cls_token``, ``blocks`` and ``norm`` as timm's ``VisionTransformer``
    serves; timm itself is not imported. After pretraining ``vit`` is the model, ready for timm's own fine-tuning.
    Called with images it returns the mean of the patch tokens (B, D).

    Args:
        vit: made by ``timm.create_model("vit_base_patch16_224")``, for one image size.

    Raises:
        TypeError: it lacks an attribute that is needed.
        ValueError: its patches are not square, its size is dynamic, or it has positions of another kind.

    Examples:
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)  # doctest: +SKIP
        >>> model = MaskedAutoencoder(TimmEncoder(vit))  # doctest: +SKIP
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        needed = ("patch_embed", "pos_embed", "cls_token", "blocks", "norm")
        if missing := [name for name in needed if not hasattr(vit, name)]:
            raise TypeError(
                f"{type(vit).__name__} has no {', '.join(missing)}, as timm's VisionTransformer has; give an "
                "encoder of your own with the methods of PatchEncoder"
            )
        self.vit = vit
        patches = vit.patch_embed
        height, width = patches.patch_size
        if height != width:
            raise ValueError(f"patches must be square, got {height} x {width}")
        self.prefix: int = getattr(vit, "num_prefix_tokens", 1)
        if vit.pos_embed is None or getattr(vit, "dynamic_img_size", False):
            raise ValueError(
                "the model must have learned positions for one image size; make it without dynamic_img_size and "
                "with pos_embed='learn'"
            )
        self.patch_size: int = int(height)
        self.grid: tuple[int, int] = (int(patches.grid_size[0]), int(patches.grid_size[1]))
        self.channels: int = int(patches.proj.in_channels)
        self.width: int = int(vit.embed_dim)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Those of the prefix (empty where it has none), and (1, N, D) of the patches."""
        positions = self.vit.pos_embed
        of_prefix = positions.shape[1] - math.prod(self.grid)
        return positions[:, :of_prefix], positions[:, of_prefix:]

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to tokens (B, N, D)."""
        tokens: Tensor = self.vit.patch_embed(images) + self._positions()[1]
        return tokens

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, V, D) to (B, K + V, D)."""
        parts = [part for name in ("cls_token", "reg_token") if (part := getattr(self.vit, name, None)) is not None]
        if parts:
            prefix = torch.cat(parts, dim=1)
            own = self._positions()[0]
            prefix = prefix + own if own.shape[1] == prefix.shape[1] else prefix
            tokens = torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        before = getattr(self.vit, "norm_pre", None)
        features: Tensor = self.vit.norm(self.vit.blocks(tokens if before is None else before(tokens)))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D)."""
        return self.encode(self.embed(images))[:, self.prefix :].mean(dim=1)
