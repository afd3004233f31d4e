"""What the contract suite checks of the homomorphism term and its diagnostic."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import DiagnosticSubject, Subject
from regularized.training.terms import CrossEntropy
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss
from regularized.understanding.homomorphism_error.probes import (
    homomorphism_error,
    modifier_triples,
    segment_triples,
)
from regularized.understanding.homomorphism_error.term import Compositionality

_WORDS, _MODIFIERS = (1, 2), (3, 4)


class Tagger(nn.Module):
    """An embedding, two blocks that also look one position back, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(6, 8)
        self.blocks: nn.ModuleList = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.Tanh()) for _ in range(2))
        self.head: nn.Linear = nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens to logits (B, T, 6)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(torch.cat([x, x.roll(1, dims=1)], dim=-1))
        logits: Tensor = self.head(x)
        return logits


def token_data(n: int, seed: int) -> Mapping[str, Tensor]:
    """Sequences of random tokens; the targets are their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 6, (n, 7), generator=generator)
    return {"inputs": tokens, "targets": tokens.roll(1, dims=1), "index": torch.arange(n)}


def _plain() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(ignore_index=0)}


def _with_term(weight: float = 0.5, detach: bool = False) -> Mapping[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        term = Compositionality(
            8,
            words=_WORDS,
            modifiers=_MODIFIERS,
            layers=["blocks.0", "blocks.1"],
            hidden=8,
            detach_target=detach,
            weight=weight,
        )
    return {**_plain(), "compositionality": term}


class _Part(nn.Module):
    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.operators = CompositionOperators(4, [3, 4], hidden=6)

    def forward(self, hidden: Tensor, row: Tensor, first: Tensor, which: Tensor) -> Tensor:
        return composition_loss([hidden], (row, first, first + 1), which, self.operators, detach_target=self.detach)


def _part(detach: bool = False) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    row, first = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])
    return _Part(detach), (torch.randn(2, 6, 4, requires_grad=True), row, first, torch.tensor([0, 1, 0]))


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    tokens = torch.randint(1, 6, (40, 7), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(model.parameters()).device)
    states: list[Tensor] = []
    handle = model.get_submodule("blocks.1").register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    triples = modifier_triples(tokens, states[0], _WORDS, _MODIFIERS)
    report = homomorphism_error(triples, epochs=2)
    segments = homomorphism_error(segment_triples(tokens, states[0], _WORDS), families=["linear"], epochs=2)
    return {"modifier": torch.tensor(report.mean), "sequence": torch.tensor(segments.mean)}


def subjects() -> list[Subject | DiagnosticSubject]:
    """The term, with and without gradients through its target, and the probes."""
    off = partial(_with_term, 0.0)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return [
        Subject("term", Tagger, _with_term, _plain, token_data, off, _part, sgd),
        Subject(
            "constant target",
            Tagger,
            partial(_with_term, 0.5, True),
            _plain,
            token_data,
            off,
            partial(_part, True),
            sgd,
        ),
        DiagnosticSubject("probes", Tagger, _report),
    ]
