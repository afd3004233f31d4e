"""What the common contract trains and provokes: the three kinds of step, and the sheet's bad inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.contract import BadInput, NotApplicable, Subject, plain
from regularized.fine_tuning.lfu.penalty import hidden_state_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.steps import AuxiliaryLoRA
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
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)

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


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
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
            data=_data,
            off=partial(_off, aux),
            part=_part if aux == "self" else NotApplicable("the penalty is the one of subject self"),
        )
        for aux in ("self", "lora", "steering")
    ]


def _batch() -> tuple[Tensor, Tensor]:
    data = _data(4, 0)
    return data["inputs"], data["targets"]


def _loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")


def _step(
    *, labels: Tensor | None = None, training: bool = True, grad: bool = True, factor: float = 1.0, **settings: Any
) -> Tensor:
    ids, targets = _batch()
    labels = targets if labels is None else labels
    lfu = LfU(TinyLM().train(training), **settings)
    with torch.set_grad_enabled(grad), lfu.record(mask=labels != -100):
        loss = _loss(lfu.model, ids, labels)
    (loss * factor).backward()
    return lfu.backward()


def _not_back_propagated() -> None:
    lfu = LfU(TinyLM())
    with lfu.record():
        _loss(lfu.model, *_batch())
    lfu.backward()


def _bare_term() -> None:
    LfUTerm().transform(None)  # type: ignore[arg-type]


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    flat = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    states = torch.zeros(2, 3, 4)
    none = torch.full((4, LENGTH), -100)
    return [
        BadInput("alpha <= 0", lambda: LfU(TinyLM(), alpha=0.0), ValueError, ("alpha must be positive", "0.0")),
        BadInput("alpha > 1", lambda: LfU(TinyLM(), alpha=2.0), UserWarning, ("alpha=2.0", "0.1")),
        BadInput("alpha <= 0, the term", lambda: LfUTerm(alpha=-1.0), ValueError, ("alpha must be positive", "-1.0")),
        BadInput("lambda < 0", lambda: LfU(TinyLM(), strength=-1.0), ValueError, ("strength", ">= 0", "-1.0")),
        BadInput("lambda < 0, the term", lambda: LfUTerm(weight=-1.0), ValueError, ("weight", ">= 0", "-1.0")),
        BadInput("no hidden states", lambda: LfU(flat), ValueError, ("no list of equal blocks", "layers=['0']")),
        BadInput(
            "no hidden states in the output",
            lambda: _step(layers="hidden_states"),
            ValueError,
            ("output_hidden_states=True", "layers="),
        ),
        BadInput("layer out of range", lambda: LfU(TinyLM(), layers=[2]), ValueError, ("layer 2", "2 blocks")),
        BadInput("no such layer", lambda: LfU(TinyLM(), layers=["blocks.9"]), ValueError, ("blocks.9", "did you mean")),
        BadInput("no layer", lambda: LfU(TinyLM(), layers=[]), ValueError, ("layers is empty",)),
        BadInput("a layer as a word", lambda: LfU(TinyLM(), layers="last"), ValueError, ("layers must be", "last")),
        BadInput("no valid token", lambda: _step(labels=none), UserWarning, ("ascent gradient is 0", "left out")),
        BadInput("no valid token", lambda: _other_batch(none), UserWarning, ("no position is valid", "left out")),
        BadInput("gradient not finite", lambda: _step(factor=torch.inf), UserWarning, ("not finite", "left out")),
        BadInput(
            "hidden states of another shape",
            lambda: hidden_state_consistency(states, states[:, :2]),
            ValueError,
            ("same batch", "(2, 3, 4)", "(2, 2, 4)"),
        ),
        BadInput(
            "other number of layers", lambda: hidden_state_consistency([states], [states] * 2), ValueError, ("1 and 2",)
        ),
        BadInput(
            "mask that does not fit",
            lambda: hidden_state_consistency(states, states, torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            ("mask must be boolean", "(2, 3)", "(2, 4)"),
        ),
        BadInput("evaluation mode", lambda: _step(training=False), RuntimeError, ("evaluation mode", "model.train()")),
        BadInput("no_grad", lambda: _step(grad=False), RuntimeError, ("no_grad",)),
        BadInput("nothing recorded", lambda: LfU(TinyLM()).backward(), RuntimeError, ("no forward pass was recorded",)),
        BadInput("loss not back-propagated", _not_back_propagated, RuntimeError, ("loss.backward()", "ascend")),
        BadInput(
            "compiled model", _step_through_another_module, RuntimeError, ("no forward pass was recorded", "was given")
        ),
        BadInput("unknown aux", lambda: LfU(TinyLM(), aux="rep"), ValueError, ("lora", "self", "rep")),  # type: ignore[arg-type]
        BadInput("unknown reduction", lambda: LfU(TinyLM(), reduction="all"), ValueError, ("'sum'", "all")),  # type: ignore[arg-type]
        BadInput("clip_norm <= 0", lambda: LfU(TinyLM(), clip_norm=0.0), ValueError, ("clip_norm", "0.0")),
        BadInput("rank < 1", lambda: AuxiliaryLoRA(rank=0), ValueError, ("rank", "0")),
        BadInput(
            "LoRA on what is not linear",
            lambda: LfU(TinyLM(), aux=AuxiliaryLoRA(targets=["embedding"])),
            ValueError,
            ("embedding", "blocks.0.linear"),
        ),
        BadInput(
            "steering without layers",
            lambda: LfU(TinyLM(), aux="steering", layers="hidden_states"),
            ValueError,
            ("steering needs layers",),
        ),
        BadInput("nothing trainable", _frozen, ValueError, ("nothing in the model is trainable",)),
        BadInput("term without attach", _bare_term, RuntimeError, ("attach(model)",)),
    ]


def _other_batch(labels: Tensor) -> None:
    ids, targets = _batch()
    lfu = LfU(TinyLM())
    lfu.ascend(lambda model: _loss(model, ids, targets))
    with lfu.record(mask=labels != -100):
        lfu.model(ids).sum().backward()
    lfu.backward()


def _step_through_another_module() -> None:
    ids, targets = _batch()
    lfu = LfU(TinyLM())
    with lfu.record():
        loss = _loss(TinyLM(), ids, targets)
    loss.backward()
    lfu.backward()


def _frozen() -> None:
    ids, _ = _batch()
    lfu = LfU(TinyLM().requires_grad_(False))
    with lfu.record():
        lfu.model(ids)
    lfu.backward()
