"""Prefix prompts: learned keys and values in front of an attention's own, so that no token is added to the sequence.

``P`` (L, d) is cut in two halves: ``K <- [P_k; K]`` and ``V <- [P_v; V]``, split into heads as they are, with no
projection and no norm applied to them. Queries stay as they are, and so does the number of outputs.

Attentions are recognised by their parts: timm's (``qkv``, ``proj``) and those of transformers (``q_proj``, ``k_proj``,
``v_proj``, and ``o_proj`` or ``out_proj``). Neither library is imported.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PrefixAttention", "is_attention", "prefix_attention", "widths"]

_FUSED = ("qkv", "proj")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_OUT = ("o_proj", "out_proj")
_RELATIVE = ("rope", "position_embeddings", "shared_rel_pos_bias", "relative_position_bias")
_TABLES = ("relative_position_bias_table", "relative_position_index", "relative_position_bias")


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention over the prompt and the sequence, from the sequence alone.

    Args:
        q: (B, heads, N, d / heads) queries.
        k: keys, likewise.
        v: values, likewise.
        prompt: (L, d), or (B, L, d) where each sample has its own; keys first, then values.
        scale: of the products; default ``(d / heads) ** -0.5``.
        mask: of attention over the N keys, boolean or added; the prompt is never masked.

    Returns:
        (B, heads, N, d / heads).

    Examples:
        >>> q = k = v = torch.zeros(1, 1, 1, 1)
        >>> prompt = torch.tensor([[0.0], [3.0]])  # a key of 0, and a value of 3
        >>> prefix_attention(q, k, v, prompt).item()  # both keys count the same
        1.5
    """
    heads = k.shape[1]
    halves = prompt.unflatten(-2, (2, -1)).unflatten(-1, (heads, -1)).transpose(-3, -2).to(k.dtype)
    p_k, p_v = (half.expand(len(k), -1, -1, -1) for half in halves.unbind(-4))
    if mask is not None:
        free = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([free(*mask.shape[:-1], p_k.shape[2]), mask], dim=-1)
    return F.scaled_dot_product_attention(
        q, torch.cat([p_k, k], dim=2), torch.cat([p_v, v], dim=2), attn_mask=mask, scale=scale
    )


def is_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of an attention that can be given a prompt.

    Examples:
        >>> is_attention(nn.Linear(2, 2)), is_attention(nn.MultiheadAttention(4, 2))
        (False, False)
    """

    def has(*names: str) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)

    return has(*_FUSED) or (has(*_SEPARATE) and any(has(name) for name in _OUT))


def widths(attention: nn.Module) -> tuple[int, int]:
    """Width D of an attention's tokens, and width d of its keys.

    Raises:
        TypeError: the module is no attention that is known.
    """
    _check_attention(attention)
    parts: Any = attention
    keys: nn.Linear = parts.qkv if isinstance(getattr(parts, "qkv", None), nn.Linear) else parts.k_proj
    return keys.in_features, keys.out_features // (1 if keys is getattr(parts, "k_proj", None) else 3)


class PrefixAttention(nn.Module):
    """An attention of a frozen transformer, with a prompt; it takes the place of the one that it is given.

    Dropout of the attention is not applied: the frozen network is in evaluation mode.

    Args:
        attention: the attention, kept and not copied.
        prompt: (L, d) with L even, P_k before P_v.

    Attributes:
        prompt: what is learned.

    Raises:
        TypeError: the module is no attention that is known, or one of relative or rotary positions, where a prompt has
            no place.
        ValueError: the prompt is not (L, d) with L even.

    Shape:
        (B, N, D) to (B, N, D); as a pair with None where transformers expects one.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_heads, self.qkv, self.proj = 2, nn.Linear(4, 12), nn.Linear(4, 4)
        >>> PrefixAttention(Attention(), nn.Parameter(torch.rand(6, 4)))(torch.zeros(1, 5, 4)).shape
        torch.Size([1, 5, 4])
    """

    def __init__(self, attention: nn.Module, prompt: nn.Parameter) -> None:
        super().__init__()
        _, width = widths(attention)
        self.attention: Any = attention
        self.fused: bool = isinstance(getattr(attention, "qkv", None), nn.Linear)
        if prompt.ndim < 2 or prompt.shape[-1] != width or prompt.shape[-2] % 2:
            raise ValueError(
                f"a prompt must be (L, {width}) with L even, for it is halved into keys and values; got "
                f"{tuple(prompt.shape)}"
            )
        self.prompt: nn.Parameter = prompt
        self.heads: int = _first(attention, "num_heads", "num_attention_heads")
        self.scale: float | None = _first(attention, "scale", "scaling", default=None)

    def current(self) -> Tensor:
        """The prompt of this pass: (L, d), or (B, L, d)."""
        return self.prompt

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """As the attention, with the prompt in front of keys and values."""
        mask = options.pop("attn_mask", attention_mask)
        if options.pop("is_causal", False) or any(options.get(name) is not None for name in _RELATIVE):
            raise TypeError("causal attention and positions that enter the attention leave a prompt no place")
        q, k, v = self._projected(hidden_states)
        mixed = prefix_attention(q, k, v, self.current(), scale=self.scale, mask=mask).transpose(1, 2).flatten(2)
        if self.fused:
            return self._optional("proj_drop", self.attention.proj(self._optional("norm", mixed)))
        out = next(getattr(self.attention, name) for name in _OUT if hasattr(self.attention, name))
        return out(mixed), None

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused:
            q, k, v = self.attention.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                getattr(self.attention, name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in _SEPARATE
            )
        return self._optional("q_norm", q), self._optional("k_norm", k), v

    def _optional(self, name: str, x: Tensor) -> Tensor:
        part = getattr(self.attention, name, None)
        return x if part is None else part(x)


def _check_attention(attention: nn.Module) -> None:
    name = type(attention).__name__
    if not is_attention(attention):
        raise TypeError(
            f"{name} is no attention that can be given a prompt: it needs linear layers qkv and proj (timm), or "
            "q_proj, k_proj, v_proj and o_proj or out_proj (transformers)"
        )
    options = inspect.signature(attention.forward).parameters
    odd = [n for n in _RELATIVE if n in options] + [n for n in _TABLES if getattr(attention, n, None) is not None]
    if odd:
        raise TypeError(
            f"{name} has positions inside its attention ({', '.join(dict.fromkeys(odd))}), where keys that stand "
            "nowhere have no place; take a ViT with a table of positions at its input"
        )


def _first(module: nn.Module, *names: str, **default: Any) -> Any:
    for name in names:
        if (value := getattr(module, name, None)) is not None:
            return value
    if default:
        return default["default"]
    raise TypeError(f"{type(module).__name__} has none of {list(names)}")
