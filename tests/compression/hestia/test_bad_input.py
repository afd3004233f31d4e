"""Bad inputs of `hestia`: each is answered by what was given, what is allowed, and how to mend it."""

import math

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from regularized.compression.hestia import (
    Annealer,
    Annealing,
    Hestia,
    PackedLinear,
    anneal,
    anneal_weights,
    freeze_weights,
    hessian_traces,
    hutchpp,
    load_packed,
    optimal_temperature,
    pack_codes,
    pack_weights,
    save_packed,
    sensitivities,
    to_codes,
    unpack_codes,
)
from regularized.evidence.models import mlp
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.training.progress import Progress


def model(**options):
    net = mlp([8, 8, 8])
    anneal_weights(net, group_size=-1, **options)
    return net


def _nan_in_training():
    net = model()
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, 0] = math.nan
    net(torch.ones(1, 8))


def _tied():
    net = mlp([8, 8, 8])
    net[2].weight = net[0].weight
    anneal_weights(net, group_size=-1)


def _hard_again():
    net = nn.Sequential(nn.Linear(64, 8))
    anneal_weights(net, group_size=32)
    freeze_weights(net, warn=False)
    anneal_weights(net, group_size=32)


def _outside_training():
    annealer = Annealer(model(), total_steps=10)
    annealer.step(10)
    annealer.step(11)


def _unknown_length():
    term = Hestia(group_size=-1)
    term.attach(mlp([8, 8]))
    term.epoch_start(Progress(0, 0))


def square(net, x):
    return net(x).square().mean()


def _no_second_derivative():
    def attention(net, x):
        h = net(x)[None, None]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(h, h, h).square().mean()

    hessian_traces(nn.Sequential(nn.Linear(4, 8)), attention, [torch.ones(6, 4)])


def _not_reached():
    net = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    hessian_traces(net, lambda net, x: net["used"](x).square().mean(), [torch.ones(1, 4)])


def bad_inputs():
    x = torch.randn(2, 8)
    plain = nn.Sequential(nn.Linear(8, 4))
    return [
        refused(
            "last dimension not divisible",
            lambda: anneal_weights(nn.Sequential(nn.Linear(100, 4))),
            ValueError,
            ("'0'", "(4, 100)", "128", "-1"),
        ),
        refused(
            "group size below -1", lambda: anneal(x, temperature=0.1, group_size=-2), ValueError, ("group_size", "-2")
        ),
        refused(
            "empty codebook", lambda: anneal(x, temperature=0.1, codebook=()), ValueError, ("2 to 256", "(-1, 0, 1)")
        ),
        refused(
            "unsorted codebook",
            lambda: anneal_weights(plain, codebook=(1.0, 0.0), group_size=-1),
            ValueError,
            ("rise", "(1.0, 0.0)"),
        ),
        refused(
            "unknown codebook",
            lambda: anneal_weights(plain, codebook="int8", group_size=-1),
            ValueError,
            ("'ternary'", "int8"),
        ),
        refused("NaN weights in training", _nan_in_training, ValueError, ("layer '0'", "NaN")),
        refused(
            "NaN weights to codes", lambda: to_codes(torch.full((1, 4), math.nan), group_size=-1), ValueError, ("NaN",)
        ),
        refused(
            "training without a length", lambda: Annealer(model(), total_steps=0), ValueError, ("total_steps", "0")
        ),
        refused("length not known to the loop", _unknown_length, ValueError, ("not known",)),
        refused("length exceeded", _outside_training, ValueError, ("step 11", "10 steps")),
        refused(
            "shares above the whole", lambda: Annealing(compress=0.3, anneal=0.8), ValueError, ("0.3", "0.8", "whole")
        ),
        refused("no annealing", lambda: Annealing(anneal=0.0), ValueError, ("anneal", "(0, 1]")),
        refused("negative temperature", lambda: Annealing(temperature=-0.1), ValueError, ("temperature", ">= 0")),
        refused(
            "negative temperature of a weight",
            lambda: anneal(x, temperature=-1.0, group_size=-1),
            ValueError,
            ("temperature",),
        ),
        refused(
            "pressure above 1",
            lambda: anneal(x, temperature=0.1, pressure=1.5, group_size=-1),
            ValueError,
            ("pressure", "[0, 1]"),
        ),
        refused(
            "factors lack a layer",
            lambda: Annealer(model(), total_steps=5, factors={"0": 0.8}),
            ValueError,
            ("'2'", "1 of 2", "traces"),
        ),
        refused(
            "factor that is not positive",
            lambda: Annealer(model(), total_steps=5, factors={"0": 0.8, "2": 0.0}),
            ValueError,
            ("'2'", "positive"),
        ),
        refused(
            "negative trace", lambda: sensitivities({"0": -1.0, "2": 2.0}), UserWarning, ("1 of 2", "'0'", "1e-08")
        ),
        refused("trace that is not finite", lambda: sensitivities({"0": math.nan}), ValueError, ("'0'", "finite")),
        refused("no traces", lambda: sensitivities({}), ValueError, ("hessian_traces",)),
        refused("no second derivative", _no_second_derivative, RuntimeError, ("eager", "flash")),
        refused("layer that the loss does not reach", _not_reached, ValueError, ("reach", "exclude")),
        refused(
            "loss that is no scalar", lambda: hessian_traces(plain, lambda net, x: net(x), [x]), ValueError, ("scalar",)
        ),
        refused("no calibration data", lambda: hessian_traces(plain, square, []), ValueError, ("no batch",)),
        refused(
            "traces of an annealed model",
            lambda: hessian_traces(model(), square, [x]),
            ValueError,
            ("'0'", "full precision"),
        ),
        refused(
            "sketch and probes of two sizes",
            lambda: hutchpp(lambda v: v, torch.ones(4, 2), torch.ones(5, 2)),
            ValueError,
            ("4", "5"),
        ),
        refused("search without a range", lambda: optimal_temperature(low=2.0, high=1.0), ValueError, ("low=2.0",)),
        refused("frozen too early", lambda: freeze_weights(model()), UserWarning, ("pressure 0", "moves by", "loss=")),
        refused(
            "annealed twice", lambda: anneal_weights(model(), group_size=-1), ValueError, ("already", "freeze_weights")
        ),
        refused("hard weights again", _hard_again, ValueError, ("hard already", "latent")),
        refused("tied weights", _tied, ValueError, ("0.weight", "2.weight", "exclude")),
        refused("lazy layer", lambda: anneal_weights(nn.Sequential(nn.LazyLinear(4))), ValueError, ("lazy",)),
        refused("nothing to anneal", lambda: anneal_weights(nn.Sequential(nn.ReLU())), NoEffectWarning, ("Linear",)),
        refused(
            "loop without annealed layers", lambda: Annealer(plain, total_steps=5), ValueError, ("anneal_weights",)
        ),
        refused("term without a model", lambda: Hestia().epoch_start(Progress(0, 5)), RuntimeError, ("attach",)),
        refused("pack without annealed layers", lambda: pack_weights(plain), ValueError, ("anneal_weights",)),
        refused(
            "codes that do not fit",
            lambda: pack_codes(torch.tensor([4], dtype=torch.uint8)),
            ValueError,
            ("below 4", "4"),
        ),
        refused("codes of another type", lambda: pack_codes(torch.tensor([1])), ValueError, ("uint8", "int64")),
        refused(
            "codes of three bits",
            lambda: pack_codes(torch.zeros(1, dtype=torch.uint8), 3),
            ValueError,
            ("1, 2, 4 or 8", "3"),
        ),
        refused(
            "rows of another length",
            lambda: unpack_codes(torch.zeros(2, dtype=torch.uint8), 4),
            ValueError,
            ("1 bytes", "2"),
        ),
        refused("packed layer without inputs", lambda: PackedLinear(0, 4), ValueError, ("in_features",)),
        refused("save without packed layers", lambda: save_packed(plain, "nowhere"), ValueError, ("pack_weights",)),
        refused("no file", lambda: load_packed(plain, "nowhere"), ValueError, ("nowhere",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_refusals(call, error, says):
    """Fails when an input that cannot work is taken, or its message does not help."""
    assert_refused(call, error, says)


def test_file_of_another_model(tmp_path):
    """Fails when a file is loaded in part: the model must be as it was."""
    net = mlp([8, 8, 8, 8])
    kinds = [type(layer) for layer in net]
    source = model()
    pack_weights(source)
    save_packed(source, tmp_path)
    assert_refused(lambda: load_packed(net, tmp_path), ValueError, ("differ",))
    assert [type(layer) for layer in net] == kinds
    assert_refused(lambda: load_packed(nn.Sequential(nn.ReLU()), tmp_path), ValueError, ("'0'", "ReLU", "linear"))


def test_an_error_leaves_the_model_as_it_was():
    """Fails when the first layers are annealed before the last one is refused."""
    net = nn.Sequential(nn.Linear(128, 100), nn.Linear(100, 4))
    with pytest.raises(ValueError, match="divisible"):
        anneal_weights(net)
    assert set(net.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
