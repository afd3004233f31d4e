"""Small language models that are trained from scratch in seconds: the network, the loop, and the loss on held-out text.

For experiments on pretraining. Texts for them: :mod:`regularized.evidence.corpora`. A million weights take 0.1 s for a
step of 1,024 tokens on one core of 2024, a third of the weights a third of the time::

    text = draw_text("library", seed, train=520_000, validation=40_960, test=81_920)
    model = small_lm(seed, text.vocabulary.size, width=128, layers=4, heads=4)
    fit(model, text.train, torch.optim.AdamW(model.parameters(), lr=3e-3), steps=250, seed=seed)
    nats = evaluate(model, text.test)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.models import seeded
from regularized.training.progress import Progress, cosine, warmup

__all__ = ["LanguageModel", "evaluate", "fit", "next_token_loss", "random_windows", "small_lm"]

_ROTARY_BASE = 10_000.0


class _Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, width) to the same shape."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            _rotated(query, rotation), _rotated(key, rotation), value, is_causal=True
        )
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class _MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same shape."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm: nn.RMSNorm = nn.RMSNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm: nn.RMSNorm = nn.RMSNorm(width)
        self.mlp = _MLP(width, hidden)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class LanguageModel(nn.Module):
    """A decoder of Llama's kind: RMSNorm before each part, rotary positions, SwiGLU, no biases.

    All that is linear is a plain :class:`torch.nn.Linear` with torch's own initialisation: ``head``, and
    ``blocks.0.attention.query``, ``.key``, ``.value``, ``.output``, ``blocks.0.mlp.gate``, ``.up``, ``.down``.
    Embeddings are normal with deviation 0.3: with Llama's 0.02 a network of this size stays at the frequencies of the
    tokens for the first hundred steps (tried on a tuning seed: 4.68 nats after 250 steps, with 0.3 4.35, with 1 4.43).

    Args:
        vocabulary: number of token ids.
        width: of the residual stream, a multiple of twice the heads.
        layers: blocks.
        heads: of each attention.
        hidden: width inside of SwiGLU; default 8/3 of ``width``, rounded up to a multiple of 16.
        tied: head and embedding are one weight; default False, as in Llama.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, *, hidden: int | None = None, tied: bool = False
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of twice the heads, got width={width}, heads={heads}")
        if hidden is None:
            hidden = 16 * math.ceil(width / 6)
        self.head_width: int = width // heads
        self.embedding: nn.Embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.blocks: nn.ModuleList = nn.ModuleList(_Block(width, heads, hidden) for _ in range(layers))
        self.norm: nn.RMSNorm = nn.RMSNorm(width)
        self.head: nn.Linear = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 to logits (B, T, vocabulary) of each next token."""
        x = self.embedding(tokens)
        rotation = _rotation(tokens.shape[1], self.head_width, x)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def small_lm(
    seed: int,
    vocabulary: int,
    *,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    hidden: int | None = None,
    tied: bool = False,
) -> LanguageModel:
    """A :class:`LanguageModel` of its own initialisation seed; the global random state stays as it was.

    With 1,024 token ids: width 64, layers 3, heads 2 make 0.28 million weights; the defaults 1.07 million; width 192,
    layers 6, heads 6 make 3.05 million.

    Args:
        seed: of the initialisation.
        vocabulary: number of token ids.
        width: default 128.
        layers: default 4.
        heads: default 4.
        hidden: default 8/3 of ``width``.
        tied: default False.

    Examples:
        >>> model = small_lm(0, 1024)
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.blocks.parameters())
        (1066112, 803840)
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 1024])
    """
    model = seeded(seed, LanguageModel, vocabulary, width, layers, heads, hidden=hidden, tied=tied)
    assert isinstance(model, LanguageModel)
    return model


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text that begin anywhere, (count, length).

    Args:
        tokens: (n,) ids, at least ``length`` of them.
        count: how many.
        length: tokens in each.
        generator: decides where; on the processor.

    Examples:
        >>> random_windows(torch.arange(9), 2, 4, torch.Generator().manual_seed(0)).diff()
        tensor([[1, 1, 1],
                [1, 1, 1]])
    """
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, a window needs {length}")
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return tokens[(starts[:, None] + torch.arange(length)).to(tokens.device)]


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every token of the windows (B, T + 1) but the first, in nats."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def fit(
    model: nn.Module,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int = 16,
    context: int = 64,
    warm_up: float = 0.1,
    floor: float = 0.1,
    clip: float | None = 1.0,
    seed: int = 0,
    loss: Callable[[nn.Module, Tensor], Tensor] = next_token_loss,
    after_step: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """Train on random windows of a text; rates rise on a line, then fall on half a cosine.

    Args:
        model: from token ids (B, T) to logits (B, T, V); trained in place.
        tokens: (n,) ids of the training text, on the model's device.
        optimizer: of what is trained; the rates of its groups are the highest.
        steps: optimizer steps.
        batch: windows in a step; default 16.
        context: tokens of a window; default 64, so that a step has 1,024.
        warm_up: share of the steps in which the rates rise; default 0.1.
        floor: share of the rates that is left in the end; default 0.1.
        clip: largest norm of the whole gradient; default 1; None clips nothing.
        seed: decides the windows, and dropout or whatever else the model draws; the global state stays as it was.
        loss: of the model on windows (B, T + 1), a scalar; default :func:`next_token_loss`.
        after_step: called after each step with the number of steps done.

    Returns:
        (step, mean training loss since the point before), at most 20 points.

    Examples:
        >>> model = small_lm(0, 8, width=16, layers=1, heads=2)
        >>> text = torch.arange(8).repeat(20)
        >>> curve = fit(model, text, torch.optim.Adam(model.parameters(), lr=0.01), steps=40, context=16)
        >>> evaluate(model, text, context=16) < 0.5 < curve[0][1]
        True
    """
    rate = warmup(cosine(1.0, floor), warm_up)
    highest = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    draws = torch.Generator().manual_seed(seed)
    every = max(1, steps // 20)
    curve: list[tuple[float, float]] = []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        total = torch.zeros((), device=tokens.device)
        for step in range(steps):
            # Counted from 1: a rate of 0 would waste the first step.
            factor = rate(Progress(step + 1, steps + 1))
            for group, lr in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = lr * factor
            value = loss(model, random_windows(tokens, batch, context + 1, draws))
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            if after_step is not None:
                after_step(step + 1)
            total += value.detach()
            if (step + 1) % every == 0:
                curve.append((float(step + 1), float(total) / every))
                total.zero_()
    return curve


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, *, context: int = 64, batch: int = 32) -> float:
    """Mean loss on a text, in nats a token; its exponential is the perplexity.

    The text is cut into windows one after another, and each token is predicted from those before it in its window.

    Args:
        model: from token ids (B, T) to logits (B, T, V); evaluated in evaluation mode, left as it was.
        tokens: (n,) ids, more than ``context``; a rest that fills no window is left out.
        context: tokens of a window; default 64.
        batch: windows at a time; default 32.

    Examples:
        >>> model = small_lm(0, 8, width=16, layers=1, heads=2)
        >>> 1.0 < evaluate(model, torch.arange(8).repeat(20), context=16) < 4.0  # a guess: ln 8 = 2.08
        True
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"the text has {len(tokens)} tokens; evaluation needs more than context={context}")
    at = torch.arange(context + 1, device=tokens.device) + context * torch.arange(count, device=tokens.device)[:, None]
    training = model.training
    model.eval()
    losses = [len(rows) * next_token_loss(model, tokens[rows]).double() for rows in at.split(batch)]
    model.train(training)
    return float(torch.stack(losses).sum()) / count


def _rotation(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, width / 2) of each position's angles."""
    rates = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair (first half, second half) of (B, heads, T, width) turned by its position's angle."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
