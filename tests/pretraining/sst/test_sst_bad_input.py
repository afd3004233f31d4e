"""Bad inputs of `sst`: each is answered by what was given, what is allowed, and how to mend it."""

from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from regularized.pretraining.sst.layer import SpectralLinear, spectral_linear
from regularized.pretraining.sst.lorentz import LorentzLinear
from regularized.pretraining.sst.sampling import draw_directions
from regularized.pretraining.sst.term import SST


def _model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _tied():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    SST(model, rank=1)


def _parametrized():
    model = _model()
    parametrizations.weight_norm(model[0])
    SST(model, rank=1)


def _changed(change):
    model = _model()
    change(model[0])
    SST(model, rank=1)


def _quantized(layer):
    layer.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    layer.weight.requires_grad = False


def _old_optimizer(bind):
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sst = SST(model, rank=1)
    if bind:
        sst.bind(optimizer)
    else:
        optimizer.step()


def _copied():
    model, other = _model(), _model()
    sst = SST(model, rank=1)
    SST(other, rank=1)
    sst.bind(torch.optim.SGD(other.parameters(), lr=0.1))


def _bound(factory):
    model = _model()
    SST(model, rank=1).bind(factory(model.parameters()))


def _diverged():
    model = _model()
    sst = SST(model, rank=2, steps_per_iteration=2, iterations_per_round=1, warmup_steps=0)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        (model(torch.randn(4, 6)).sum() * float("inf")).backward()
        optimizer.step()


def _wrapped():
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)  # a real one needs a process group
    nn.Module.__init__(wrapper)
    SST(wrapper, rank=1)


def _shapes():
    SpectralLinear(torch.eye(3), torch.ones(2), torch.eye(3), torch.tensor([0]))


def _pruned():
    model = _model()
    SST(model, rank=1).prune(model, rank=4)


def bad_inputs():
    """Every line of the sheet's "bad input", and those of this implementation."""
    with_rank = partial(SST, rank=1)
    gradient = partial(spectral_linear, torch.ones(1, 2), torch.eye(2), torch.ones(2), torch.eye(2), torch.tensor([0]))
    return [
        refused("rank 0", lambda: SST(_model(), rank=0), ValueError, ("rank must be at least 1", "0")),
        refused(
            "rank too large",
            lambda: SST(_model(), rank=4),
            ValueError,
            ("rank=4", "3 directions", "'2'", "(3, 8)", "exclude=['2']"),
        ),
        refused("optimizer of before", lambda: _old_optimizer(True), ValueError, ("0.active_left", "SGD(model.param")),
        refused("the same, not bound", lambda: _old_optimizer(False), ValueError, ("0.active_left", "SGD(model.param")),
        refused("foreign copies of U and V", _copied, ValueError, ("does not hold 6", "after SST has seen the model")),
        refused("LBFGS", lambda: _bound(torch.optim.LBFGS), ValueError, ("LBFGS", "one history", "Adam")),
        refused(
            "decay of unit vectors",
            lambda: _bound(partial(torch.optim.AdamW, weight_decay=0.1)),
            UserWarning,
            ("unit length", "sst.groups(model, weight_decay=...)"),
        ),
        refused("diverged", _diverged, ValueError, ("layer '0'", "after step 2", "NaN or infinite")),
        refused("tied", _tied, ValueError, ("'head'", "embed.weight", "exclude=['head']")),
        refused("parametrized", _parametrized, ValueError, ("'0'", "parametrized", "exclude=['0']")),
        refused(
            "frozen",
            lambda: _changed(lambda layer: layer.requires_grad_(False)),
            ValueError,
            ("'0'", "frozen", "exclude"),
        ),
        refused("meta", lambda: _changed(lambda layer: layer.to("meta")), ValueError, ("'0'", "meta device")),
        refused(
            "a weight with NaN", lambda: _changed(lambda one: one.weight.data.fill_(float("nan"))), ValueError, ("'0'",)
        ),
        refused(
            "of a class of its own",
            lambda: SST(nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)), rank=1),
            ValueError,
            ("'0'", "NonDynamicallyQuantizableLinear", "exclude=['0']"),
        ),
        refused(
            "of multi-head attention",
            lambda: SST(nn.Sequential(nn.MultiheadAttention(4, 2)), rank=1),
            ValueError,
            ("0.out_proj", "MultiheadAttention"),
        ),
        refused(
            "unknown target", lambda: with_rank(_model(), target_modules=["q"]), ValueError, ("target_modules", "'q'")
        ),
        refused("unknown exclude", lambda: with_rank(_model(), exclude=["q"]), ValueError, ("exclude", "'q'")),
        refused(
            "target without layers", lambda: with_rank(_model(), target_modules=["1"]), ValueError, ("'1'", "ReLU")
        ),
        refused("nothing to convert", lambda: with_rank(nn.Sequential(nn.ReLU())), UserWarning, ("no nn.Linear",)),
        refused("wrapped already", _wrapped, ValueError, ("SST(model, ...) first",)),
        refused("steps < 1", lambda: with_rank(steps_per_iteration=0), ValueError, ("steps_per_iteration", "0")),
        refused(
            "all warm-up",
            lambda: with_rank(steps_per_iteration=10, warmup_steps=10),
            ValueError,
            ("warmup_steps", "steps_per_iteration=10"),
        ),
        refused("sampling", lambda: with_rank(sampling="top"), ValueError, ("'mixed', 'proportional' or 'largest'",)),
        refused("gradient", lambda: with_rank(gradient="plain"), ValueError, ("'enhanced' or 'default'", "plain")),
        refused(
            "a draw by another rule", lambda: draw_directions(torch.ones(2), 1, sampling="x"), ValueError, ("'x'",)
        ),
        refused(
            "gradient of the function",
            lambda: gradient(torch.ones(1, 2), torch.ones(1, 2), gradient="x"),
            ValueError,
            ("'enhanced'",),
        ),
        refused("factors that do not fit", _shapes, ValueError, ("(3, 3)", "(2,)", "one row a direction")),
        refused("pruned to more than there is", _pruned, ValueError, ("[1, 3]", "4")),
        refused("a hyperbolic layer of one coordinate", lambda: LorentzLinear(3, 1), ValueError, ("out_features", "2")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when a bad input passes, or its message does not help."""
    assert_refused(call, error, says)


def test_quantized_weights_are_refused():
    """Fails when an integer weight reaches the decomposition."""
    with pytest.raises(ValueError, match=r"frozen|quantized"):
        _changed(_quantized)
