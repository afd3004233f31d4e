"""The parts of one stream, with the names of the released weights.

Both streams are the same but for how they embed patches. ``m`` is the modulation of a block: a learned table and the
embedding of the time of the noise, in six parts: shift, scale and gate of the attention, and of the feed-forward part.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.positions import rotate

__all__ = ["Block", "CrossAttention", "Head", "Modulation", "SelfAttention", "Stream", "attend", "sinusoid"]


def sinusoid(t: Tensor, numbers: int) -> Tensor:
    """Cosines, then sines, of the time of the noise at ``numbers / 2`` frequencies from 1 down to 1 / 10000.

    Args:
        t: (B,) in [0, 1000].
        numbers: even.

    Returns:
        (B, numbers) of the type of ``t``, which is worked out in float64.

    Examples:
        >>> sinusoid(torch.zeros(1), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """
    half = numbers // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.to(torch.float64).unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, tokens, heads, D) to (B, others, heads, D), as (B, tokens, heads D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Modulation(nn.Module):
    """A learned table that is added to the embedding of the time: (B, parts, d)."""

    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.modulation: nn.Parameter = nn.Parameter(torch.randn(1, parts, dim) / dim**0.5)

    def forward(self, e: Tensor) -> Tensor:
        """Table and time."""
        return self.modulation + e


class SelfAttention(nn.Module):
    """Attention among all tokens of a stream, the references too; queries and keys normalised over the full width."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q: nn.Linear = nn.Linear(dim, dim)
        self.k: nn.Linear = nn.Linear(dim, dim)
        self.v: nn.Linear = nn.Linear(dim, dim)
        self.o: nn.Linear = nn.Linear(dim, dim)
        self.norm_q: nn.RMSNorm = nn.RMSNorm(dim, eps=eps)
        self.norm_k: nn.RMSNorm = nn.RMSNorm(dim, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        """(B, tokens, d) to (B, tokens, heads, D)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """(B, tokens, d) to the same, with the rotations of its positions."""
        q, k = rotate(self.split(self.norm_q(self.q(x))), table), rotate(self.split(self.norm_k(self.k(x))), table)
        out: Tensor = self.o(attend(q, k, self.split(self.v(x))))
        return out


class CrossAttention(SelfAttention):
    """Attention to the text and to the other stream, with one query and one output for both."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim, heads, eps)
        self.k_fusion: nn.Linear = nn.Linear(dim, dim)
        self.v_fusion: nn.Linear = nn.Linear(dim, dim)
        self.pre_attn_norm_fusion: nn.LayerNorm = nn.LayerNorm(dim, eps=eps)
        self.norm_k_fusion: nn.RMSNorm = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, table: Tensor, text: Tensor, other: Tensor, other_table: Tensor) -> Tensor:  # type: ignore[override]
        """What the text says, which has no positions, and what the other stream says at its own.

        Args:
            x: (B, tokens, d).
            table: rotations of its positions.
            text: (B, states, d), padding included.
            other: (B, others, d), the other stream after its attention to itself.
            other_table: rotations of its positions.
        """
        q = self.split(self.norm_q(self.q(x)))
        told = attend(q, self.split(self.norm_k(self.k(text))), self.split(self.v(text)))
        other = self.pre_attn_norm_fusion(other)
        key = rotate(self.split(self.norm_k_fusion(self.k_fusion(other))), other_table)
        seen = attend(rotate(q, table), key, self.split(self.v_fusion(other)))
        out: Tensor = self.o(told + seen)
        return out


class Block(nn.Module):
    """One block of one stream; the model calls its three parts, and lets the streams meet between them."""

    def __init__(self, config: JointAVConfig) -> None:
        super().__init__()
        d, eps = config.dim, config.eps
        self.norm1: nn.LayerNorm = nn.LayerNorm(d, eps=eps, elementwise_affine=False)
        self.self_attn: SelfAttention = SelfAttention(d, config.heads, eps)
        self.norm3: nn.LayerNorm = nn.LayerNorm(d, eps=eps)
        self.cross_attn: CrossAttention = CrossAttention(d, config.heads, eps)
        self.norm2: nn.LayerNorm = nn.LayerNorm(d, eps=eps, elementwise_affine=False)
        self.ffn: nn.Sequential = nn.Sequential(
            nn.Linear(d, config.ffn), nn.GELU(approximate="tanh"), nn.Linear(config.ffn, d)
        )
        self.modulation: Modulation = Modulation(6, d)

    def among(self, x: Tensor, m: tuple[Tensor, ...], table: Tensor) -> Tensor:
        """1. Attention among the tokens of the stream."""
        shift, scale, gate = m[:3]
        return torch.addcmul(x, self.self_attn(torch.addcmul(shift, self.norm1(x), 1 + scale), table), gate)

    def across(self, x: Tensor, table: Tensor, text: Tensor, other: Tensor, other_table: Tensor) -> Tensor:
        """2. Attention to the text and to the other stream."""
        out: Tensor = x + self.cross_attn(self.norm3(x), table, text, other, other_table)
        return out

    def alone(self, x: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """3. The feed-forward part."""
        shift, scale, gate = m[3:]
        return torch.addcmul(x, self.ffn(torch.addcmul(shift, self.norm2(x), 1 + scale)), gate)


class Head(nn.Module):
    """Modulated normalisation and a linear layer."""

    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head: nn.Linear = nn.Linear(dim, out)
        self.modulation: nn.Parameter = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """(B, tokens, d) and the embedding of the time (B, d) to (B, tokens, out)."""
        shift, scale = (self.modulation + e.unsqueeze(1)).chunk(2, dim=1)
        out: Tensor = self.head(torch.addcmul(shift, self.norm(x), 1 + scale))
        return out


class _Convolution(nn.Conv1d):
    """A convolution over (B, steps, channels) that keeps the length."""

    def __init__(self, ins: int, outs: int, *, bias: bool = True) -> None:
        super().__init__(ins, outs, 7, padding=3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.mT).mT
        return out


class _GatedConvolutions(nn.Module):
    """``w2(silu(w1 x) * w3 x)``, inside two thirds of 4 d, rounded up to a multiple of 256."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inside = 256 * math.ceil((2 * 4 * dim // 3) / 256)
        self.w1: nn.Module = _Convolution(dim, inside, bias=False)
        self.w2: nn.Module = _Convolution(inside, dim, bias=False)
        self.w3: nn.Module = _Convolution(dim, inside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Stream(nn.Module):
    """One stream: embeddings of patches, text and time, the blocks, the head.

    Args:
        config: the sizes.
        video: whether it is the video's; the audio's otherwise.
    """

    def __init__(self, config: JointAVConfig, *, video: bool) -> None:
        super().__init__()
        d = config.dim
        if video:
            size = config.patch
            self.patch_embedding: nn.Module = nn.Conv3d(config.video_channels, d, kernel_size=size, stride=size)
        elif config.audio_embedding == "linear":
            self.patch_embedding = nn.Linear(config.audio_channels, d)
        else:
            self.patch_embedding = nn.Sequential(
                _Convolution(config.audio_channels, d), nn.SiLU(), _GatedConvolutions(d)
            )
        self.text_embedding: nn.Sequential = nn.Sequential(
            nn.Linear(config.text, d), nn.GELU(approximate="tanh"), nn.Linear(d, d)
        )
        self.time_embedding: nn.Sequential = nn.Sequential(nn.Linear(config.freq, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection: nn.Sequential = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks: nn.ModuleList = nn.ModuleList(Block(config) for _ in range(config.layers))
        out = config.video_channels * math.prod(config.patch) if video else config.audio_channels
        self.head: Head = Head(d, out, config.eps)
        self.freq = config.freq

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) to the embedding of the time (B, d), for the head, and its six parts (B, 6, d), for the blocks."""
        e: Tensor = self.time_embedding(sinusoid(t, self.freq))
        return e, self.time_projection(e).unflatten(-1, (6, -1))
