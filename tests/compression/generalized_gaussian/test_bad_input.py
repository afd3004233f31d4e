"""Bad inputs of `generalized_gaussian`: each is answered by what was given, what is allowed, and how to mend it."""

import sys

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.compression import generalized_gaussian as gg
from regularized.evidence.models import mlp
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step


def _nan(model):
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


def _decayed():
    model = mlp([6, 6])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    gg.Shrinker(model.parameters(), 1e-3, optimizer=optimizer)


def _unknown_parameter():
    step = Step(mlp([6, 4]), Batch.of(torch.zeros(2, 6)), Progress(0, 1))
    gg.BackSlash(weight=1.0, parameters=["body.weight"])(step)


W = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))

ROWS = [
    refused(
        "shape of the law", lambda: gg.GeneralizedGaussian(0.0, 1.0), ValueError, ("shape must be positive", "0.0")
    ),
    refused("scale of the law", lambda: gg.GeneralizedGaussian(1.0, -1.0), ValueError, ("scale must be positive",)),
    refused("ratio of shape 0", lambda: gg.moment_ratio(0.0), ValueError, ("shape must be positive",)),
    refused("shape of initial weights", lambda: gg.initialize_(mlp([3, 3]), shape=0), ValueError, ("Laplace", "got 0")),
    refused("xi", lambda: gg.initialize_(mlp([3, 3]), xi=0), ValueError, ("xi must be positive", "2 for ReLU")),
    refused("fan", lambda: gg.initialize_(mlp([3, 3]), fan="both"), ValueError, ("'in' or 'out'",)),
    refused("initial vector", lambda: gg.generalized_gaussian_(torch.empty(3)), ValueError, ("two dimensions", "(3,)")),
    refused("fit of zeros", lambda: gg.GeneralizedGaussian.fit(torch.zeros(5)), ValueError, ("weights are all zero",)),
    refused("fit of nothing", lambda: gg.GeneralizedGaussian.fit(), ValueError, ("no weight",)),
    refused("fit of NaN", lambda: gg.GeneralizedGaussian.fit(W / 0), ValueError, ("not finite",)),
    refused(
        "layers of zeros",
        lambda: gg.layer_shapes(nn.Sequential(nn.Embedding.from_pretrained(torch.zeros(3, 2)))),
        ValueError,
        ("0.weight", "all zero"),
    ),
    refused("eps", lambda: gg.rate([W], eps=-1.0), ValueError, ("eps must be >= 0", "1e-3")),
    refused("shape of the rate", lambda: gg.rate([W], shape=-1.0), ValueError, ("shape must be positive", "None")),
    refused("rate of nothing", lambda: gg.rate([]), ValueError, ("no weight", "model.parameters()")),
    refused("strength", lambda: gg.shrink_([W], -1.0), ValueError, ("strength must be >= 0", "0 switches it off")),
    refused("strength of the term", lambda: gg.BackSlash(weight=-1.0), ValueError, ("weight must be >= 0",)),
    refused(
        "strength of the step", lambda: gg.DecoupledBackSlash(strength=-1.0), ValueError, ("strength must be >= 0",)
    ),
    refused("one name", lambda: gg.BackSlash(weight=1.0, parameters="w"), ValueError, ("several names", "['w']")),
    refused("unknown parameter", _unknown_parameter, ValueError, ("no parameter ['body.weight']", "0.weight")),
    refused("too strong", lambda: gg.Shrinker([W], 1e6), UserWarning, ("change their signs", "number of weights")),
    refused(
        "too strong a term", lambda: gg.DecoupledBackSlash(strength=1e4).attach(mlp([6, 6])), UserWarning, ("signs",)
    ),
    refused("weight decay besides", _decayed, UserWarning, ("weight_decay=0.01", "both pull")),
    refused("rf8 of whole numbers", lambda: gg.rf8(torch.arange(3)), TypeError, ("floating-point", "int64")),
    refused("rf8 of complex numbers", lambda: gg.rf8(W * 1j), TypeError, ("complex64",)),
    refused("rf8 of infinity", lambda: gg.rf8(W / 0), ValueError, ("not finite",)),
    refused("bytes of another type", lambda: gg.PackedRF8(W, 0), TypeError, ("uint8", "float32")),
    refused(
        "bytes of no value", lambda: gg.PackedRF8(torch.tensor([15], dtype=torch.uint8), 0), ValueError, ("no RF8",)
    ),
    refused(
        "too few bits", lambda: gg.reshape_histogram(0.01 * W, bits=1), ValueError, ("all weights are 0", "more bits")
    ),
    refused(
        "too small a cut-off", lambda: gg.reshape_histogram(W, bits=13, rare=50), ValueError, ("only", "fewer bits")
    ),
    refused("reshaping of NaN", lambda: gg.deepshape_(_nan(mlp([6, 6]))), ValueError, ("'0.weight' is not finite",)),
    refused("nothing to reshape", lambda: gg.deepshape_(nn.LayerNorm(3)), ValueError, ("two dimensions",)),
    refused("scope", lambda: gg.deepshape_(mlp([6, 6]), scope="head"), ValueError, ("'model' or 'layer'",)),
    refused("factor", lambda: gg.deepshape_(mlp([6, 6]), std_scale=0), ValueError, ("std_scale must be positive",)),
    refused("step", lambda: gg.quantize(W, 0.0), ValueError, ("step must be positive", "power of two")),
    refused("rounding of NaN", lambda: gg.quantize(W / 0, 0.1), ValueError, ("one is not finite",)),
    refused("rounding to too many", lambda: gg.quantize(W, 1e-12), ValueError, ("2^31 - 1 steps", "largest is")),
    refused("rounding of whole numbers", lambda: gg.quantize(torch.arange(3), 0.1), TypeError, ("int64",)),
    refused("order of the code", lambda: gg.golomb_lengths(torch.arange(3), order=-1), ValueError, ("order must be",)),
    refused("code length of nothing", lambda: gg.code_length([]), ValueError, ("no weight to code",)),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when a bad input passes, or its message lacks what was given, what is allowed, or how to mend it."""
    assert_refused(call, error, says)


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (lambda: _nan(mlp([6, 6])), {}, "0.weight: weights must be finite"),
        (lambda: nn.LayerNorm(3), {}, "nothing to compress"),
        (lambda: mlp([6, 6]), {"coder": "zip"}, "'range', 'golomb' or 'lzma'"),
        (lambda: mlp([6, 6]), {"step": -1.0}, "step must be positive"),
    ],
)
def test_bad_models_are_not_written(tmp_path, build, options, says):
    """Fails when a model that cannot be written leaves a file."""
    with pytest.raises(ValueError, match=says):
        gg.save_compressed(tmp_path, build(), **options)
    assert not list(tmp_path.iterdir())


def test_without_the_coder(tmp_path, monkeypatch):
    """Fails when a missing package gives another message than how to get it, or do without."""
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"regularized\[compression\].*golomb"):
        gg.save_compressed(tmp_path, mlp([6, 6]))
    gg.save_compressed(tmp_path, mlp([6, 6]), coder="golomb")


def test_a_failed_reshaping_leaves_the_model():
    """Fails when a layer is written before another is refused."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    nn.init.constant_(model[1].weight, 0.3)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="more bits"):
        gg.deepshape_(model, bits=8, scope="layer")
    assert torch.equal(model[0].weight, before)


def test_messages_of_strength_help():
    """Fails when the strength that a warning proposes still warns."""
    with pytest.warns(UserWarning, match="would move them by 1 %") as caught:
        gg.Shrinker([W], 1e6)
    proposed = float(str(caught[0].message).rsplit("; ", 1)[1].split()[0])
    shrinker = gg.Shrinker([W], proposed)
    before = W.clone()
    shrinker.weights = [W.clone()]
    shrinker.step()
    moved = (shrinker.weights[0] - before).abs().median()
    assert float(moved / before.abs().median()) == pytest.approx(0.01, rel=0.3)
