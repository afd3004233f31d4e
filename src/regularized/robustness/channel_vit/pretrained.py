"""A trained ViT of timm's goes on with tokens of channels.

Its blocks, norms, registers, pooling and head stay what they are, whatever variant it is; what changes is how tokens
are made. The filter of its first layer becomes one for a single channel, the sum over its input channels: a grey image,
given as one channel, gives the tokens that the ViT makes of the same grey image in all its channels. What the channels
mean is then learned.

timm itself is not imported here: the ViT is given, and recognised by its parts.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, count
from regularized.robustness.channel_vit.layer import ChannelPatchEmbed
from regularized.robustness.channel_vit.model import ChannelTransformer

__all__ = ["ConvertedViT", "convert_vit"]

_IN_FRONT = ("cls_token", "dist_token", "reg_token")  # in timm's order
_PARTS = ("patch_embed", "pos_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "forward_head")


class ConvertedViT(ChannelTransformer):
    """The trunk of a timm ViT behind tokens of channels; made by :func:`convert_vit`.

    Attributes:
        vit: the trunk, without what made its tokens.
    """

    def __init__(
        self, vit: nn.Module, patch_embed: ChannelPatchEmbed, prefix: Tensor, pos_embed: Tensor, grid: tuple[int, int]
    ) -> None:
        super().__init__(patch_embed, prefix, pos_embed, grid)
        self.vit: nn.Module = vit

    def encode(self, tokens: Tensor) -> Tensor:
        """Dropout of tokens, blocks and norm of the ViT."""
        vit: Any = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
        for block in vit.blocks:
            tokens = block(tokens)
        normalised: Tensor = vit.norm(tokens)
        return normalised

    def classify(self, features: Tensor) -> Tensor:
        """Pooling and head of the ViT; where it takes a mean, over the tokens of all channels."""
        vit: Any = self.vit
        output: Tensor = vit.forward_head(features)
        return output


@allowed(in_channels=count(1, "the channels that the model shall know"))
def convert_vit(vit: nn.Module, in_channels: int, *, num_classes: int | None = None) -> ConvertedViT:
    """A ViT of timm's with its weights, for any subset of ``in_channels`` channels.

    Args:
        vit: ``timm.create_model("vit_small_patch16_224", pretrained=True)`` or any other ``VisionTransformer`` with a
            table of positions; copied, not changed.
        in_channels: channels that the result knows.
        num_classes: outputs of a new head; default the head that it has.

    Returns:
        A network that is called with images (B, n, H, W) and ``channels``, as
        :class:`~regularized.robustness.channel_vit.model.ChannelViT`. The vectors of the channels are new, of standard
        deviation 0.02; ``patch_embed.channel_embed`` is what else is new, beside a new head.

    Raises:
        TypeError: it is no ViT of timm's form.
        ValueError: its patches overlap or are not square, are normalised or made by a network, or its positions are no
            table.

    Examples:
        >>> from importlib.util import find_spec
        >>> if find_spec("timm"):
        ...     import timm
        ...     vit = timm.create_model("vit_tiny_patch16_224")
        ...     net = convert_vit(vit, 12, num_classes=3)
        ...     assert net(torch.zeros(1, 2, 224, 224), channels=[0, 7]).shape == (1, 3)
    """
    _check(vit)
    source: Any = copy.deepcopy(vit)
    embed = source.patch_embed
    filters: Tensor = embed.proj.weight.detach()
    patch_embed = ChannelPatchEmbed(in_channels, patch_size=filters.shape[-1], embed_dim=len(filters))
    patch_embed.to(filters.device, filters.dtype)
    with torch.no_grad():
        patch_embed.proj.weight.copy_(filters.sum(dim=1, keepdim=True))
        bias = patch_embed.proj.bias
        assert bias is not None
        bias.zero_() if embed.proj.bias is None else bias.copy_(embed.proj.bias)

    places: Tensor = source.pos_embed.detach()
    in_front = [t.detach() for name in _IN_FRONT if (t := getattr(source, name, None)) is not None]
    prefix = torch.cat([places[:, :0], *in_front], dim=1)
    if places.shape[1] == math.prod(embed.grid_size):  # no places for the tokens in front
        places = torch.cat([torch.zeros_like(prefix), places], dim=1)

    source.patch_embed = nn.Identity()
    for name in ("pos_embed", *_IN_FRONT):
        setattr(source, name, None)
    if num_classes is not None:
        source.reset_classifier(num_classes)
        source.to(filters.device, filters.dtype)
    return ConvertedViT(source, patch_embed, prefix.clone(), places.clone(), embed.grid_size)


def _check(vit: nn.Module) -> None:
    """Refuse what has not the parts of a timm ViT, or has others that would be lost."""
    name = type(vit).__name__
    if missing := [part for part in _PARTS if not hasattr(vit, part)]:
        raise TypeError(
            f"convert_vit takes a timm VisionTransformer; {name} has no {', '.join(missing)}. For another network take "
            "HierarchicalChannelSampling(mode='mask')"
        )
    given: Any = vit
    embed = given.patch_embed
    if not isinstance(given.pos_embed, Tensor) or getattr(given, "rope", None) is not None:
        raise ValueError(
            f"{name} has no table of positions (pos_embed) alone; relative and rotary positions count the tokens of "
            "one image, where those of several channels would stand in other places"
        )
    if hasattr(embed, "backbone"):
        raise ValueError(f"{name} makes its tokens by a network, {type(embed.backbone).__name__}, and not by a filter")
    if not isinstance(getattr(embed, "norm", None), nn.Identity | None):
        raise ValueError(f"the patch embedding of {name} normalises its tokens ({embed.norm}), which is not supported")
    kernel, stride = embed.proj.kernel_size, embed.proj.stride
    if kernel != stride or kernel[0] != kernel[1]:
        raise ValueError(f"patches must be square and must not overlap, got kernel {kernel} and stride {stride}")
