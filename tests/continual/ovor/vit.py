"""A transformer of timm's form and names, for tests."""

import torch
from torch import nn
from torch.nn import functional as F

DIM, HEADS, TOKENS = 12, 3, 5


class Attention(nn.Module):
    def __init__(self, dim=DIM, heads=HEADS):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.drop = nn.LayerNorm(DIM), Attention(), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.attn(self.norm1(x)))


class Vit(nn.Module):
    """Inputs are (B, 4, 3): four patches of three numbers."""

    def __init__(self, depth=2):
        super().__init__()
        self.embed, self.cls_token = nn.Linear(3, DIM), nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 7)

    def forward_features(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        return self.norm(self.blocks(x))

    def forward_head(self, x, pre_logits=False):
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def images(count=6, seed=0):
    return torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(seed))
