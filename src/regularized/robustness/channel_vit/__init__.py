"""Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words."""

from regularized.robustness.channel_vit.layer import ChannelPatchEmbed, channel_tokens, place_embedding
from regularized.robustness.channel_vit.model import Block, ChannelTransformer, ChannelViT
from regularized.robustness.channel_vit.pretrained import ConvertedViT, convert_vit
from regularized.robustness.channel_vit.sampling import (
    HierarchicalChannelSampling,
    draw_channels,
    mask_channels,
    select_channels,
)
from regularized.robustness.channel_vit.term import SampleChannels

__all__ = [
    "Block",
    "ChannelPatchEmbed",
    "ChannelTransformer",
    "ChannelViT",
    "ConvertedViT",
    "HierarchicalChannelSampling",
    "SampleChannels",
    "channel_tokens",
    "convert_vit",
    "draw_channels",
    "mask_channels",
    "place_embedding",
    "select_channels",
]
