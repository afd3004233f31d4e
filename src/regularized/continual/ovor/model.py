"""OnePrompt: one set of prompts for all tasks, in the first layers of a frozen vision transformer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from regularized.continual.ovor.layer import PrefixAttention, is_attention, widths
from regularized.mechanisms.ranges import allowed, count
from regularized.training.step import call_model

__all__ = ["LENGTHS", "OnePrompt", "attentions", "encode"]

LENGTHS: Mapping[int, int] = MappingProxyType({0: 10, 1: 10, 2: 40, 3: 40, 4: 40})
"""Length of the prompt of each layer, in the paper: short ones in two layers, long ones in three."""


class OnePrompt(nn.Module):
    """A frozen vision transformer with learned prompts and a head: all tasks train the same prompts.

    There is no pool to choose from, so no pass that asks which prompt an image needs: inference is one pass.

    Args:
        vit: a ViT of timm's, or of transformers without its head (``ViTModel``), or any module whose attentions have
            their parts; taken over, frozen and kept in evaluation mode.
        num_classes: columns of the head, all tasks together.
        layers: length L of the prompt by layer, even; default :data:`LENGTHS`. Length 0 leaves a layer as it is.
        features: ``features(vit, images)`` gives (B, d); default :func:`encode`.

    Attributes:
        vit: the transformer with its prompts.
        head: linear, from features to logits.

    Raises:
        TypeError: the transformer has no attention that can be given a prompt.
        ValueError: a layer does not exist, or a length is odd.

    Shape:
        Images to logits (B, num_classes).

    Examples:
        >>> from torch.nn import functional as F
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)
        >>> vit = nn.Sequential(nn.Linear(4, 8), Attention(), nn.LayerNorm(8))
        >>> model = OnePrompt(vit, num_classes=6, layers={0: 4})
        >>> model(torch.randn(3, 5, 4)).shape, [name for name, p in model.named_parameters() if p.requires_grad]
        (torch.Size([3, 6]), ['vit.1.prompt', 'head.weight', 'head.bias'])
    """

    @allowed(num_classes=count(1))
    def __init__(
        self,
        vit: nn.Module,
        num_classes: int,
        *,
        layers: Mapping[int, int] = LENGTHS,
        features: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        found = attentions(vit)
        unknown = sorted(set(layers) - set(range(len(found))))
        odd = {layer: length for layer, length in layers.items() if length < 0 or length % 2}
        if unknown or odd:
            raise ValueError(
                f"layers must name layers of 0 to {len(found) - 1}, each with an even length, for a prompt is halved "
                f"into keys and values; got {dict(layers)}"
            )
        self.vit: nn.Module = vit.requires_grad_(False).eval()
        names = list(found)
        self._encode = encode if features is None else features
        like = next(vit.parameters())
        for layer, length in layers.items():
            if length:
                owner, _, last = names[layer].rpartition(".")
                attention = found[names[layer]]
                prompt = nn.Parameter(torch.rand(length, widths(attention)[1]).to(like))
                setattr(vit.get_submodule(owner), last, PrefixAttention(attention, prompt))
        self.head: nn.Linear = nn.Linear(widths(found[names[-1]])[0], num_classes).to(like)

    @property
    def prompts(self) -> Mapping[str, nn.Parameter]:
        """The prompts, by the name of the attention that has each."""
        found = ((name, module) for name, module in self.vit.named_modules() if isinstance(module, PrefixAttention))
        return {name: module.prompt for name, module in found}

    def train(self, mode: bool = True) -> "OnePrompt":
        """The transformer stays in evaluation mode: it is frozen, dropout included."""
        super().train(mode)
        self.vit.eval()
        return self

    def features(self, images: Any) -> Tensor:
        """(B, d) in front of the head."""
        return self._encode(self.vit, images)

    def forward(self, images: Any) -> Tensor:
        """Logits of all classes."""
        logits: Tensor = self.head(self.features(images))
        return logits


def attentions(vit: nn.Module) -> dict[str, nn.Module]:
    """Attentions that can be given a prompt, by name, in the order of the layers.

    Raises:
        TypeError: there is none, or some have prompts already.
    """
    if prompted := [name for name, module in vit.named_modules() if isinstance(module, PrefixAttention)]:
        raise TypeError(f"{type(vit).__name__} has prompts already, in {prompted}; give a network without")
    found = {name: module for name, module in vit.named_modules() if name and is_attention(module)}
    if not found:
        raise TypeError(
            f"{type(vit).__name__} has no attention with linear layers qkv and proj (timm), or q_proj, k_proj, v_proj "
            "and o_proj or out_proj (transformers), so there is nothing to prompt"
        )
    return found


def encode(vit: nn.Module, images: Any) -> Tensor:
    """What a transformer has in front of its head: for timm by its own pooling, else the first token.

    Args:
        vit: with ``forward_features`` and ``forward_head`` (timm); or it returns ``last_hidden_state`` (transformers),
            tokens (B, N, d), or features (B, d).
        images: its input; a mapping is given as keyword arguments.

    Raises:
        TypeError: it returns something else, such as logits.
    """
    if hasattr(vit, "forward_features") and hasattr(vit, "forward_head"):
        timm: Any = vit
        pooled: Tensor = timm.forward_head(timm.forward_features(images), pre_logits=True)
        return pooled
    output = call_model(vit, images)
    tokens = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (2, 3):
        raise TypeError(
            f"{type(vit).__name__} returns {type(output).__name__} without tokens (B, N, d) or features (B, d); give "
            "the network without its head, such as model.vit, or `features`, a function of it and the images"
        )
    return tokens[:, 0] if tokens.ndim == 3 else tokens
