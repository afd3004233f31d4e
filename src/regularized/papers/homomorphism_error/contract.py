"""What the contract suite checks of the homomorphism term and its diagnostic."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, DiagnosticSubject, Subject
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.training.terms import CrossEntropy
from regularized.understanding.homomorphism_error.command_language import commands, encode
from regularized.understanding.homomorphism_error.penalty import (
    Compositionality,
    CompositionOperators,
    PairPool,
    composition_loss,
    find_pairs,
)
from regularized.understanding.homomorphism_error.probes import (
    CompositionProbe,
    homomorphism_error,
    modifier_triples,
    segment_triples,
)

_WORDS, _MODIFIERS = (1, 2), (3, 4)


class _Tagger(nn.Module):
    """An embedding, two blocks that also look one position back, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(torch.cat([x, x.roll(1, dims=1)], dim=-1))
        logits: Tensor = self.head(x)
        return logits


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
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
        Subject("term", _Tagger, _with_term, _plain, _data, off, _part, sgd),
        Subject(
            "constant target", _Tagger, partial(_with_term, 0.5, True), _plain, _data, off, partial(_part, True), sgd
        ),
        DiagnosticSubject("probes", _Tagger, _report),
    ]


def _term(**options: Any) -> Compositionality:
    given: dict[str, Any] = {"words": [1, 2], "modifiers": [3], "layers": ["blocks.0"], **options}
    return Compositionality(8, **given)


def _untapped() -> None:
    batch = Batch.of(_data(4, 0))
    _term()(Step(_Tagger(), batch, Progress(0, 1)))


def _not_tokens() -> None:
    _term().count(Batch.of({"inputs": torch.randn(4, 7), "targets": torch.zeros(4, 7)}))


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    tokens = torch.tensor([[1, 5, 3, 5]])
    operators = CompositionOperators(4, [3], hidden=6)
    at = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    return [
        BadInput(
            "empty pool", lambda: PairPool.mine(tokens, [1], [3]), ValueError, ("[1]", "[3]", "directly followed")
        ),
        BadInput(
            "unknown layer",
            lambda: PairPool.mine(torch.tensor([[1, 3]]), [1], [3]).loss(_Tagger(), ["blocks.7"], operators),
            ValueError,
            ("blocks.7",),
        ),
        BadInput(
            "no hidden states", lambda: composition_loss([], at, torch.tensor([0]), operators), ValueError, ("Taps",)
        ),
        BadInput("no layer named", lambda: _term(layers=[]), ValueError, ("layers=", "blocks.3")),
        BadInput("nothing tapped", _untapped, ValueError, ("taps", "blocks.0")),
        BadInput(
            "positions do not fit",
            lambda: composition_loss([torch.zeros(1, 3, 4)], at, torch.tensor([0, 0]), operators),
            ValueError,
            ("(n,)", "(2,)"),
        ),
        BadInput(
            "position beyond the sequence",
            lambda: composition_loss(
                [torch.zeros(1, 3, 4)], (at[0], at[1], torch.tensor([5])), torch.tensor([0]), operators
            ),
            IndexError,
            ("out of",),
        ),
        BadInput("no modifier", lambda: CompositionOperators(4, []), ValueError, ("one or more",)),
        BadInput("modifier twice", lambda: CompositionOperators(4, [3, 3]), ValueError, ("different", "[3, 3]")),
        BadInput("word is a modifier", lambda: _term(modifiers=[2, 3]), ValueError, ("no modifiers", "[2, 3]")),
        BadInput("inputs are not tokens", _not_tokens, ValueError, ("(B, T) integer", "(4, 7)")),
        BadInput(
            "too few triples", lambda: homomorphism_error(torch.randn(5, 3, 4)), ValueError, ("5 triples", "10 or more")
        ),
        BadInput(
            "wrong triples", lambda: homomorphism_error(torch.randn(5, 2, 4)), ValueError, ("(n, 3, d)", "(5, 2, 4)")
        ),
        BadInput("unknown probe", lambda: CompositionProbe(4, cast(Any, "cubic")), ValueError, ("'cubic'", "bilinear")),
        BadInput("unknown word", lambda: encode([("run",)]), ValueError, ("['run']", "walk")),
        BadInput("too long", lambda: encode([("walk", "twice")], length=1), ValueError, ("2 words", "length=1")),
        BadInput("no words", lambda: commands(0), ValueError, ("at least 1", "0")),
        BadInput("no word given", lambda: _term(words=[]), ValueError, ("one or more tokens", "[]")),
        BadInput("tokens of another rank", lambda: find_pairs(tokens[0], [1], [3]), IndexError, ("dimension",)),
    ]
