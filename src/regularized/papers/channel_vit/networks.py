"""What Channel ViT is compared with: the same transformer behind tokens that mix all channels."""

import torch
from torch import Tensor, nn

from regularized.robustness.channel_vit.model import Block, initialise

__all__ = ["PlainViT"]


class PlainViT(nn.Module):
    """A ViT of a fixed number of channels, with the blocks and the initialisation of ``ChannelViT``.

    Args:
        in_channels: C.
        num_classes: K.
        img_size: side of the images.
        patch_size: P.
        embed_dim: D.
        depth: blocks.
        num_heads: of each.
        drop_path: as of ``ChannelViT``; default 0.

    Examples:
        >>> net = PlainViT(4, num_classes=3, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
        >>> net(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed: nn.Conv2d = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.cls_token: nn.Parameter = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed: nn.Parameter = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.blocks: nn.Sequential = nn.Sequential(
            *(Block(embed_dim, num_heads, drop_path=drop_path * k / max(depth - 1, 1)) for k in range(depth))
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Linear = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        initialise(self.blocks)
        initialise(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K) logits."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits
