"""Bad inputs of `homomorphism_error`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.papers.homomorphism_error.contract import Tagger, token_data
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.understanding.homomorphism_error.command_language import commands, encode
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss, find_pairs
from regularized.understanding.homomorphism_error.pool import PairPool
from regularized.understanding.homomorphism_error.probes import CompositionProbe, homomorphism_error
from regularized.understanding.homomorphism_error.term import Compositionality


def _term(**options: Any):
    given: dict[str, Any] = {"words": [1, 2], "modifiers": [3], "layers": ["blocks.0"], **options}
    return Compositionality(8, **given)


def _untapped():
    batch = Batch.of(token_data(4, 0))
    _term()(Step(Tagger(), batch, Progress(0, 1)))


def _not_tokens():
    _term().count(Batch.of({"inputs": torch.randn(4, 7), "targets": torch.zeros(4, 7)}))


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    tokens = torch.tensor([[1, 5, 3, 5]])
    operators = CompositionOperators(4, [3], hidden=6)
    at = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    return [
        refused("empty pool", lambda: PairPool.mine(tokens, [1], [3]), ValueError, ("[1]", "[3]", "directly followed")),
        refused(
            "unknown layer",
            lambda: PairPool.mine(torch.tensor([[1, 3]]), [1], [3]).loss(Tagger(), ["blocks.7"], operators),
            ValueError,
            ("blocks.7",),
        ),
        refused(
            "no hidden states", lambda: composition_loss([], at, torch.tensor([0]), operators), ValueError, ("Taps",)
        ),
        refused("no layer named", lambda: _term(layers=[]), ValueError, ("layers=", "blocks.3")),
        refused("nothing tapped", _untapped, ValueError, ("taps", "blocks.0")),
        refused(
            "positions do not fit",
            lambda: composition_loss([torch.zeros(1, 3, 4)], at, torch.tensor([0, 0]), operators),
            ValueError,
            ("(n,)", "(2,)"),
        ),
        refused(
            "position beyond the sequence",
            lambda: composition_loss(
                [torch.zeros(1, 3, 4)], (at[0], at[1], torch.tensor([5])), torch.tensor([0]), operators
            ),
            IndexError,
            ("out of",),
        ),
        refused("no modifier", lambda: CompositionOperators(4, []), ValueError, ("one or more",)),
        refused("modifier twice", lambda: CompositionOperators(4, [3, 3]), ValueError, ("different", "[3, 3]")),
        refused("word is a modifier", lambda: _term(modifiers=[2, 3]), ValueError, ("no modifiers", "[2, 3]")),
        refused("inputs are not tokens", _not_tokens, ValueError, ("(B, T) integer", "(4, 7)")),
        refused(
            "too few triples", lambda: homomorphism_error(torch.randn(5, 3, 4)), ValueError, ("5 triples", "10 or more")
        ),
        refused(
            "wrong triples", lambda: homomorphism_error(torch.randn(5, 2, 4)), ValueError, ("(n, 3, d)", "(5, 2, 4)")
        ),
        refused("unknown probe", lambda: CompositionProbe(4, "cubic"), ValueError, ("'cubic'", "bilinear")),
        refused("unknown word", lambda: encode([("run",)]), ValueError, ("['run']", "walk")),
        refused("too long", lambda: encode([("walk", "twice")], length=1), ValueError, ("2 words", "length=1")),
        refused("no words", lambda: commands(0), ValueError, ("at least 1", "0")),
        refused("no word given", lambda: _term(words=[]), ValueError, ("one or more tokens", "[]")),
        refused("tokens of another rank", lambda: find_pairs(tokens[0], [1], [3]), IndexError, ("dimension",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
