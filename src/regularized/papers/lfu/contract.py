"""What the contract suite checks of LfU: the three kinds of step."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import NotApplicable, Subject, plain
from regularized.fine_tuning.lfu.penalty import hidden_state_consistency
from regularized.fine_tuning.lfu.term import LfUTerm

TOKENS, LENGTH, WIDTH = 11, 5, 6


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d), causally: a position sees the mean of those before it."""
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1)
        return x + torch.tanh(self.linear(before.to(x.dtype)))


class TinyLM(nn.Module):
    """Embedding, two blocks, head: the smallest network with hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks: nn.ModuleList = nn.ModuleList(_Block() for _ in range(2))
        self.head: nn.Linear = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) tokens to logits (B, T, tokens)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def _terms(aux: Any) -> Mapping[str, nn.Module]:
    # Strong enough to be seen in the weights after nine steps.
    return {**plain(), "lfu": LfUTerm(aux=aux, alpha=0.5, weight=5.0)}


def _off(aux: Any) -> Mapping[str, nn.Module]:
    return {**plain(), "lfu": LfUTerm(aux=aux, weight=0.0)}


def token_data(n: int, seed: int) -> Mapping[str, Tensor]:
    """Sequences of random tokens; the targets are their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (n, LENGTH), generator=generator)
    targets = ids.roll(-1, dims=1)
    # Uneven numbers of labels, so that a mean of means is not the mean.
    ignored = torch.arange(LENGTH) >= 1 + torch.randint(LENGTH, (n, 1), generator=generator)
    return {"inputs": ids, "targets": targets.masked_fill(ignored, -100), "index": torch.arange(n)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    clean, moved = torch.randn(2, 3, LENGTH, WIDTH, generator=generator)
    mask = torch.rand(3, LENGTH, generator=generator) < 0.5
    return hidden_state_consistency, (clean, moved.requires_grad_(), mask)


def subjects() -> list[Subject]:
    """The step of the parameters themselves, of a LoRA beside them, and of hidden states."""
    return [
        Subject(
            aux,
            model=TinyLM,
            terms=partial(_terms, aux),
            plain=plain,
            data=token_data,
            off=partial(_off, aux),
            part=_part if aux == "self" else NotApplicable("the penalty is the one of subject self"),
        )
        for aux in ("self", "lora", "steering")
    ]
