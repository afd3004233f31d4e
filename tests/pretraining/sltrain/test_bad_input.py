"""Bad inputs of SLTrain: each is answered by what was given, what is allowed, and how to mend it."""

from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.evidence.language_models import small_lm
from regularized.pretraining.sltrain import SparseLowRankLinear, convert, init_from_dense


def a_model():
    return nn.ModuleDict({"mlp": nn.Linear(8, 8), "head": nn.Linear(8, 2)})


def _tied():
    convert(small_lm(0, 32, width=8, layers=1, heads=1, tied=True), rank=1, density=0.1, include=[""])


def _shared_module():
    layer = nn.Linear(8, 8)
    convert(nn.ModuleDict({"mlp_1": layer, "mlp_2": layer}), rank=1, density=0.1)


def _trained():
    model = a_model()
    model["mlp"](torch.ones(8)).sum().backward()
    convert(model, rank=1, density=0.1)


def _parametrised():
    model = a_model()
    nn.utils.parametrizations.weight_norm(model["mlp"])
    convert(model, rank=1, density=0.1)


def _converted(**settings):
    model = a_model()
    convert(model, **{"rank": 2, "density": 0.2, **settings})
    return model


def _dense_state():
    _converted().load_state_dict(a_model().state_dict(), strict=False)


def _other_density():
    _converted(density=0.3).load_state_dict(_converted().state_dict())


def _positions(change):
    state = _converted().state_dict()
    state["mlp.positions"] = change(state["mlp.positions"])
    _converted().load_state_dict(state)


def _lacking():
    state = a_model().state_dict()
    del state["mlp.weight"]
    state["other.weight"] = torch.zeros(2, 2)
    init_from_dense(_converted(), state)


def bad_inputs():
    """Every line of the sheet's "bad input", and what damaged files bring."""
    small = partial(SparseLowRankLinear, 8, 8)
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    return [
        refused(
            "density above 1", partial(convert, a_model(), rank=1, density=1.5), ValueError, ("'mlp'", "[0, 1]", "1.5")
        ),
        refused("density below 0", partial(small, rank=1, density=-0.1), ValueError, ("density", "[0, 1]", "-0.1")),
        refused("rank below 0", partial(convert, a_model(), rank=-1), ValueError, ("'mlp'", "at least 0", "-1")),
        refused("rank not whole", partial(small, rank=1.5), ValueError, ("whole number", "1.5")),
        refused("both 0", partial(convert, a_model(), rank=0, density=0), ValueError, ("'mlp'", "both 0", "set one")),
        refused("alpha", partial(small, rank=1, alpha=0.0), ValueError, ("alpha must be positive", "0.0")),
        refused("rank above the sides", partial(small, rank=9), UserWarning, ("145 trained numbers", "rank=9", "64")),
        refused("more than dense", partial(small, rank=4), UserWarning, ("a dense one 64", "nothing is saved")),
        refused(
            "no entry", partial(convert, a_model(), rank=1, density=0.01), ValueError, ("'mlp'", "8 x 8", "density=0")
        ),
        refused("tied weight", _tied, ValueError, ("'head'", "embedding.weight = head.weight", "exclude")),
        refused("shared module", _shared_module, ValueError, ("mlp_1.weight = mlp_2.weight",)),
        refused("after training began", _trained, ValueError, ("'mlp'", "gradient", "then build the optimizer")),
        refused("frozen", partial(convert, a_model().requires_grad_(False), rank=1), ValueError, ("'mlp'", "frozen")),
        refused("parametrised", _parametrised, ValueError, ("'mlp'", "of its own", "exclude")),
        refused(
            "read by its owner", partial(convert, attention, rank=1), ValueError, ("attn.out_proj", "reads its weight")
        ),
        refused("dense state", _dense_state, RuntimeError, ("mlp.weight", "from scratch", "init_from_dense")),
        refused("other density", _other_density, RuntimeError, ("mlp.values", "size mismatch")),
        refused(
            "positions outside",
            partial(_positions, lambda p: p + 60),
            RuntimeError,
            ("mlp.positions go from", "64 entries", "damaged"),
        ),
        refused("positions not sorted", partial(_positions, lambda p: p.flip(0)), RuntimeError, ("not ascending",)),
        refused("positions of floats", partial(_positions, lambda p: p.float()), RuntimeError, ("float32",)),
        refused(
            "nothing matches",
            partial(convert, a_model(), rank=1, include=["attn"]),
            ValueError,
            ("'attn'", "['mlp', 'head']"),
        ),
        refused("a string", partial(convert, a_model(), rank=1, include="mlp"), ValueError, ("['mlp']",)),
        refused(
            "dense state that is another's",
            _lacking,
            ValueError,
            ("missing ['mlp.weight']", "unknown ['other.weight']"),
        ),
        refused("another shape", lambda: small(rank=1).set_weight(torch.ones(3, 8)), ValueError, ("8 x 8", "(3, 8)")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_a_refused_model_is_as_it_was():
    """Fails when some layers are converted before the others are refused."""
    model = nn.ModuleDict({"mlp_1": nn.Linear(40, 40), "mlp_2": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="'mlp_2'"):
        convert(model, rank=1, density=0.03)
    assert isinstance(model["mlp_1"], nn.Linear)
