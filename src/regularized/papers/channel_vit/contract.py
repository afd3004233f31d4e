"""What the contract suite checks of Channel ViT: sampling as a term, for tokens of channels and for any network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import NotApplicable, Subject, plain
from regularized.robustness.channel_vit.layer import ChannelPatchEmbed
from regularized.robustness.channel_vit.model import ChannelViT
from regularized.robustness.channel_vit.term import SampleChannels

CHANNELS, SIDE, CLASSES = 3, 4, 3
NO_OFF = NotApplicable("sampling has no coefficient: without it all channels are kept")


def data(n: int, seed: int) -> Mapping[str, Tensor]:
    """Small images whose label is the channel with the largest mean."""
    x = torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return {"inputs": x, "targets": x.mean(dim=(2, 3)).argmax(1), "index": torch.arange(n)}


def transformer() -> ChannelViT:
    """The smallest with everything."""
    return ChannelViT(
        CHANNELS, num_classes=CLASSES, img_size=SIDE, patch_size=2, embed_dim=8, depth=2, num_heads=2, drop_path=0.0
    )


def convolutional() -> nn.Sequential:
    """A network that mixes channels from the first layer on."""
    return nn.Sequential(nn.Conv2d(CHANNELS, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES))


def _select() -> Mapping[str, nn.Module]:
    return {**plain(), "channels": SampleChannels()}


def _mask() -> Mapping[str, nn.Module]:
    return {**plain(), "channels": SampleChannels("mask")}


def _tokens() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = ChannelPatchEmbed(CHANNELS, patch_size=2, embed_dim=8)
    return layer, (torch.randn(2, 2, SIDE, SIDE, requires_grad=True), torch.tensor([2, 0]))


def _whole() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return transformer(), (torch.randn(2, 2, SIDE, SIDE, requires_grad=True), torch.tensor([2, 0]))


def subjects() -> list[Subject]:
    """Channels left out in front of tokens of channels; channels zeroed in front of a convolutional network."""
    return [
        Subject("select, Channel ViT", transformer, _select, plain, data, off=NO_OFF, part=_tokens),
        Subject("mask, CNN", convolutional, _mask, plain, data, off=NO_OFF, part=_whole),
    ]
