"""The networks of the experiment and the bench: a perceptron for 8 x 8 pixels, and DDPM's U-Net with labels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Perceptron", "UNet"]


def _time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of (B,) steps at wavelengths from 2 pi to 2 pi 10,000: (B, width)."""
    rates = torch.exp(torch.linspace(0.0, -math.log(10_000.0), width // 2, device=t.device))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Perceptron(nn.Module):
    """Residual layers on flattened pixels; step and label enter each of them.

    Args:
        pixels: of an image.
        num_classes: C.
        width: of the layers; default 128.
        blocks: residual layers; default 3.
    """

    def __init__(self, pixels: int, num_classes: int, *, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.label: nn.Embedding = nn.Embedding(num_classes, 32)
        self.condition: nn.Linear = nn.Linear(64, width * blocks)
        self.first: nn.Linear = nn.Linear(pixels, width)
        self.inner: nn.ModuleList = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer: nn.ModuleList = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last: nn.Linear = nn.Linear(width, pixels)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W)."""
        told = self.condition(torch.cat([_time_features(t, 32), self.label(labels)], dim=1))
        hidden = self.first(x_t.flatten(1))
        for inner, outer, shift in zip(self.inner, self.outer, told.chunk(len(self.inner), dim=1)):
            hidden = hidden + outer(F.silu(inner(hidden) + shift))
        pixels: Tensor = self.last(hidden)
        return pixels.view_as(x_t)


class _ResBlock(nn.Module):
    def __init__(self, ins: int, outs: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norm1: nn.GroupNorm = nn.GroupNorm(32, ins)
        self.conv1: nn.Conv2d = nn.Conv2d(ins, outs, 3, padding=1)
        self.shift: nn.Linear = nn.Linear(told, outs)
        self.norm2: nn.GroupNorm = nn.GroupNorm(32, outs)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.conv2: nn.Conv2d = nn.Conv2d(outs, outs, 3, padding=1)
        self.skip: nn.Module = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x))) + self.shift(F.silu(told))[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm: nn.GroupNorm = nn.GroupNorm(32, width)
        self.projections: nn.Conv2d = nn.Conv2d(width, 3 * width, 1)
        self.out: nn.Conv2d = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        q, k, v = self.projections(self.norm(x)).flatten(2).mT.chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        out: Tensor = x + self.out(attended)
        return out


class UNet(nn.Module):
    """DDPM's U-Net: residual blocks, attention at some resolutions, step and label added in each block.

    Args:
        channels: of the images.
        size: height and width.
        num_classes: C.
        width: of the first stage; default 128 (the authors' CIFAR-10).
        factors: widths of the stages, in ``width``; default (1, 2, 2, 2) (the same).
        attention: sizes at which there is attention; default (16,) (the same).
        blocks: of each stage; default 2 (the same).
        dropout: default 0.1 (the same).

    Examples:
        >>> net = UNet(1, 8, 3, width=32, factors=(1, 1), attention=(4,), blocks=1)
        >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 999.0]), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int,
        *,
        width: int = 128,
        factors: Sequence[int] = (1, 2, 2, 2),
        attention: Sequence[int] = (16,),
        blocks: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        told = 4 * width
        self.width = width
        self.time: nn.Sequential = nn.Sequential(nn.Linear(width, told), nn.SiLU(), nn.Linear(told, told))
        self.label: nn.Embedding = nn.Embedding(num_classes, told)
        self.first: nn.Conv2d = nn.Conv2d(channels, width, 3, padding=1)
        self.down: nn.ModuleList = nn.ModuleList()
        self.up: nn.ModuleList = nn.ModuleList()
        widths, now, last = [width], width, len(factors) - 1
        for stage, factor in enumerate(factors):
            for _ in range(blocks):
                self.down.append(self._layers(now, factor * width, told, dropout, size in attention))
                now = factor * width
                widths.append(now)
            if stage < last:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                widths.append(now)
                size //= 2
        self.middle: nn.ModuleList = nn.ModuleList(
            [_ResBlock(now, now, told, dropout), _Attention(now), _ResBlock(now, now, told, dropout)]
        )
        for stage, factor in reversed(list(enumerate(factors))):
            for _ in range(blocks + 1):
                self.up.append(self._layers(now + widths.pop(), factor * width, told, dropout, size in attention))
                now = factor * width
            if stage:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(now, now, 3, padding=1)))
                size *= 2
        self.last: nn.Sequential = nn.Sequential(
            nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1)
        )

    @staticmethod
    def _layers(ins: int, outs: int, told: int, dropout: float, attend: bool) -> nn.ModuleList:
        block = _ResBlock(ins, outs, told, dropout)
        return nn.ModuleList([block, _Attention(outs)] if attend else [block])

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W)."""
        told = self.time(_time_features(t, self.width)) + self.label(labels)
        kept = [self.first(x_t)]
        for layer in self.down:
            kept.append(_through(layer, kept[-1], told))
        x = _through(self.middle, kept[-1], told)
        for layer in self.up:
            x = _through(layer, torch.cat([x, kept.pop()], dim=1) if isinstance(layer, nn.ModuleList) else x, told)
        out: Tensor = self.last(x)
        return out


def _through(layer: nn.Module, x: Tensor, told: Tensor) -> Tensor:
    """Blocks are told step and label, what changes the size is not."""
    if not isinstance(layer, nn.ModuleList):
        resized: Tensor = layer(x)
        return resized
    for part in layer:
        x = part(x, told)
    return x
