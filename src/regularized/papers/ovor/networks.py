"""A small vision transformer of timm's form, and a pool of prompts, which OnePrompt is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.continual.ovor.layer import PrefixAttention, widths
from regularized.continual.ovor.model import attentions, encode
from regularized.continual.tasks import Task
from regularized.training.terms import Term

__all__ = ["PoolTasks", "PromptPool", "SmallViT"]


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallViT(nn.Module):
    """Pre-norm transformer over patches, with a class token; its parts have timm's names.

    Args:
        size: side of the images.
        patch: side of a patch.
        channels: of the images.
        dim: width.
        depth: blocks.
        heads: of each.
        num_classes: columns of the head.

    Examples:
        >>> vit = SmallViT(size=8, patch=4, channels=1, dim=16, depth=2, heads=2, num_classes=5)
        >>> vit(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self, *, size: int, patch: int, channels: int, dim: int, depth: int, heads: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to tokens (B, N, dim)."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        out: Tensor = self.norm(self.blocks(tokens))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the class token, or the token itself."""
        token = x[:, 0]
        return token if pre_logits else self.head(token)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.forward_head(self.forward_features(x))


class _PooledAttention(PrefixAttention):
    """Takes the prompt that was chosen for each sample; none in the pass that chooses."""

    chosen: Tensor | int | None = None

    def current(self) -> Tensor:
        return self.prompt.new_empty(0, self.prompt.shape[-1]) if self.chosen is None else self.prompt[self.chosen]


class PromptPool(nn.Module):
    """One set of prompts for each task, as DualPrompt has them: what OnePrompt does without.

    A pass without prompts gives the query. In training the task's own prompts are used, and its key is the mean of the
    queries; afterwards those whose key is nearest by cosine are used for each image, in a second pass.

    Args:
        vit: taken over and frozen.
        num_classes: columns of the head.
        tasks: how many sets there are.
        layers: length of the prompts by layer.
        shared: layers whose prompts all tasks share.
        features: as of ``OnePrompt``.

    Examples:
        >>> vit = SmallViT(size=8, patch=4, channels=1, dim=16, depth=2, heads=2, num_classes=5)
        >>> pool = PromptPool(vit, 4, tasks=2, layers={0: 2, 1: 4}, shared=(0,))
        >>> pool(torch.zeros(3, 1, 8, 8)).shape, pool.eval()(torch.zeros(3, 1, 8, 8)).shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        vit: nn.Module,
        num_classes: int,
        *,
        tasks: int,
        layers: Mapping[int, int],
        shared: tuple[int, ...],
        features: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._encode = encode if features is None else features
        found = attentions(vit)
        names = list(found)
        self.vit = vit.requires_grad_(False).eval()
        self._pooled: list[_PooledAttention] = []
        self._shared: list[_PooledAttention] = []
        dim = widths(found[names[-1]])[0]
        for layer, length in layers.items():
            owner, _, last = names[layer].rpartition(".")
            width = widths(found[names[layer]])[1]
            sets = 1 if layer in shared else tasks
            attention = _PooledAttention(found[names[layer]], nn.Parameter(torch.rand(sets, length, width)))
            setattr(vit.get_submodule(owner), last, attention)
            (self._shared if layer in shared else self._pooled).append(attention)
        self.head = nn.Linear(dim, num_classes)
        self.task = 0
        self.keys: Tensor
        self.counts: Tensor
        self.register_buffer("keys", torch.zeros(tasks, dim))
        self.register_buffer("counts", torch.zeros(tasks))

    def train(self, mode: bool = True) -> "PromptPool":
        """The transformer stays as it is."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits, from two passes."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """(B, dim) in front of the head."""
        with torch.no_grad():
            query = F.normalize(self._encode(self.vit, images), dim=1)
            if self.training:
                self.keys[self.task] += query.sum(dim=0)
                self.counts[self.task] += len(query)
        try:
            for attention in self._pooled:
                attention.chosen = self.task if self.training else self._nearest(query)
            for attention in self._shared:
                attention.chosen = 0
            return self._encode(self.vit, images)
        finally:
            for attention in (*self._pooled, *self._shared):
                attention.chosen = None

    def _nearest(self, query: Tensor) -> Tensor:
        likeness = query @ F.normalize(self.keys, dim=1).T
        return likeness.masked_fill(self.counts == 0, -torch.inf).argmax(dim=1)


class PoolTasks(Term):
    """Tells a pool which task it is trained on.

    Args:
        pool: the pool.
    """

    contributes = False

    def __init__(self, pool: PromptPool) -> None:
        super().__init__()
        self._pool = [pool]

    def task_start(self, task: Task) -> None:
        """Train this task's prompts from now on."""
        self._pool[0].task = task.number
