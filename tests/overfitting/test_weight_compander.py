"""Weight Compander. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import mlp, seeded
from regularized.mechanisms.surgery import check_optimizer_is_current
from regularized.overfitting.weight_compander import (
    Compander,
    WeightCompander,
    compand,
    compand_inverse,
    compand_weights,
    compander_param_groups,
    load_plain_state_dict,
    merge_companders,
    plain_state_dict,
)

positive = st.floats(0.05, 20.0)


def train(net: nn.Module, steps: int = 30, *, weight_decay: float = 0.0) -> nn.Module:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()).dtype)
    y = torch.arange(16) % 3
    optimizer = torch.optim.SGD(compander_param_groups(net, weight_decay=weight_decay), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


@given(a=positive, b=positive, seed=st.integers(0, 99))
@settings(max_examples=30)
def test_odd_bounded_and_slope(a, b, seed):
    """Fails for another odd function with the same bound (tanh, say) or a slope other than a / b at zero."""
    v = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10 * b
    w = compand(v, a, b)
    assert torch.equal(compand(-v, a, b), -w)
    assert float(w.abs().max()) < a * math.pi / 2
    small = torch.tensor([1e-7 * b], dtype=torch.float64)
    assert float(compand(small, a, b) / small) == pytest.approx(a / b, rel=1e-10)
    # An independent route: Psi(b tan(t)) = a t for |t| < pi / 2.
    t = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)
    torch.testing.assert_close(compand(b * torch.tan(t), a, b), a * t, rtol=1e-12, atol=1e-12)


@given(a=positive, b=positive)
@settings(max_examples=20)
def test_gradients_by_differences(a, b):
    """Fails for a wrong sign in the gradient of b, a missing factor, or one that is not summed over the tensor."""
    leaves = [torch.randn(3, 2, dtype=torch.float64), torch.tensor(a).double(), torch.tensor(b).double()]
    assert torch.autograd.gradcheck(compand, [leaf.requires_grad_() for leaf in leaves])


def test_second_derivative():
    """The custom backward must itself be differentiable: curvature-based techniques stack on it."""
    v = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a, b = torch.tensor(1.3).double().requires_grad_(), torch.tensor(0.7).double().requires_grad_()
    assert torch.autograd.gradgradcheck(compand, (v, a, b))


@given(a=positive, b=positive, seed=st.integers(0, 99))
@settings(max_examples=30)
def test_inverse(a, b, seed):
    """Fails when the inverse divides where it should multiply, or cuts off inside the allowed range."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.rand(100, dtype=torch.float64, generator=generator) * 2 - 1) * 0.98 * a * math.pi / 2
    torch.testing.assert_close(compand(compand_inverse(w, a, b), a, b), w, rtol=1e-12, atol=1e-12 * a)


def test_inverse_of_what_is_out_of_range_is_finite():
    """Fails without the cut-off: tan beyond pi / 2 changes sign."""
    v = compand_inverse(torch.tensor([5.0, -5.0]), 1.0, 1.0)
    assert v[0] > 0 > v[1]
    assert torch.isfinite(v).all()


def test_half_precision_inverse_is_computed_in_float32():
    """tan near its pole in float16 is off by far more than a rounding of the result."""
    w = torch.linspace(-1.5, 1.5, 101).half()
    exact = compand_inverse(w.double(), 1.0, 1.0)
    torch.testing.assert_close(compand_inverse(w, 1.0, 1.0).double(), exact, rtol=1e-3, atol=1e-4)


def test_wide_curve_is_plain_training():
    """a = b = 1e8 is the identity: a whole training in float64 agrees with plain training."""
    plain, companded = (seeded(0, mlp, [6, 8, 3]).double() for _ in range(2))
    compand_weights(companded, a=1e8, b=1e8, relative=False)
    torch.testing.assert_close(companded[0].weight, plain[0].weight, rtol=1e-12, atol=1e-12)
    train(plain, weight_decay=1e-3)
    train(companded, weight_decay=1e-3)
    for name, value in plain_state_dict(companded).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_sgd_step_identity():
    """The latent weight moves by -lr g (a/b) / (1 + (v/b)^2): fails if weight decay or the slope acts on w instead."""
    layer = nn.Linear(5, 1, bias=False).double()
    compand_weights(layer, a=0.8, b=0.3, relative=False)
    v = layer.parametrizations.weight.original
    before = v.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(1, 5, dtype=torch.float64)
    layer(x).sum().backward()  # dL/dw = x
    optimizer.step()
    expected = -0.1 * x * (0.8 / 0.3) / (1 + (before / 0.3) ** 2)
    # a and b are stored in the weight's own type, so the identity holds to double precision
    torch.testing.assert_close(v.detach() - before, expected, rtol=1e-12, atol=1e-14)


def test_preserving_start_leaves_the_function():
    """Fails when the inverse is not used: the default start must not change a pre-trained model."""
    net = seeded(0, mlp, [6, 8, 3]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = net(x)
    compand_weights(net)
    torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)


def test_shrinking_start_takes_weights_as_latent():
    """Fails when all starts are the same: here the weights are slightly smaller than before, and v equals them."""
    net = seeded(0, mlp, [6, 8, 3])
    before = net[0].weight.detach().clone()
    compand_weights(net, init="shrink", a=0.5, b=0.5)
    assert torch.equal(net[0].parametrizations.weight.original, before)
    assert (net[0].weight.abs() <= before.abs()).all()
    assert (net[0].weight.abs() < before.abs()).any()


def test_merge_is_exact_and_leaves_a_plain_model():
    """Fails if merging keeps the latent weight, or evaluates the curve in another precision."""
    net = train(seeded(0, mlp, [6, 8, 3]))
    compand_weights(net, learnable=True)
    train(net)
    x = torch.randn(4, 6)
    state, before = plain_state_dict(net), net(x)
    assert len(merge_companders(net)) == 2
    assert torch.equal(net(x), before)
    plain = mlp([6, 8, 3])
    assert set(net.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(state)
    assert torch.equal(plain(x), before)
    assert merge_companders(net) == []


def test_bound_holds_during_training():
    """The promise itself: with large gradients no weight passes a pi / 2, where plain training goes beyond."""
    plain, companded = (seeded(0, mlp, [6, 8, 3]) for _ in range(2))
    compand_weights(companded, a=1.0, b=1.0, init="clamp")
    bounds = [float(layer.parametrizations.weight[0].a) * math.pi / 2 for layer in (companded[0], companded[2])]
    train(plain, 200)
    train(companded, 200)
    for layer, free, bound in zip((companded[0], companded[2]), (plain[0], plain[2]), bounds, strict=True):
        assert float(layer.weight.detach().abs().max()) < bound < float(free.weight.detach().abs().max())


def test_learned_shape_moves_stays_positive_and_is_not_decayed():
    """Fails if a, b are constants, unconstrained, or in the decayed group (huge decay would pull log a to 0)."""
    net = seeded(0, mlp, [6, 8, 3])
    compand_weights(net, learnable=True)
    start = {name: p.detach().clone() for name, p in net.named_parameters() if "log_" in name}
    groups = compander_param_groups(net, weight_decay=5.0, shape_lr=1e-2)
    assert [group["weight_decay"] for group in groups] == [5.0, 0.0]
    assert groups[1]["lr"] == 1e-2
    assert {id(p) for p in groups[1]["params"]} == {id(p) for n, p in net.named_parameters() if "log_" in n}
    train(net, weight_decay=1e-3)
    moved = dict(net.named_parameters())
    assert all(not torch.equal(moved[name], value) for name, value in start.items())
    for layer in (net[0], net[2]):
        a, b = layer.parametrizations.weight[0].shape_parameters(layer.weight)
        assert a > 0 < b


def test_relative_is_in_standard_deviations():
    """Fails if a is taken in absolute units by default."""
    layer = nn.Linear(50, 40)
    unit = float(layer.weight.detach().std(correction=0))
    compand_weights(layer, a=2.0, b=3.0)
    a, b = layer.parametrizations.weight[0].shape_parameters(layer.weight)
    assert float(a) == pytest.approx(2 * unit, rel=1e-5)
    assert float(b) == pytest.approx(3 * unit, rel=1e-5)


def test_plain_checkpoint_loads():
    """A checkpoint of the plain model gives the companded one the same function; a misfit changes nothing."""
    plain, net = seeded(1, mlp, [6, 8, 3]).double(), seeded(0, mlp, [6, 8, 3]).double()
    compand_weights(net, a=4.0, b=4.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    load_plain_state_dict(net, plain.state_dict())
    torch.testing.assert_close(net(x), plain(x), rtol=1e-9, atol=1e-9)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="out of range"):
        load_plain_state_dict(net, {k: 100 * v for k, v in plain.state_dict().items()})
    with pytest.raises(RuntimeError, match="missing"):
        load_plain_state_dict(net, {"nothing": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="shape"):
        load_plain_state_dict(net, {k: v[..., :1] for k, v in plain.state_dict().items()})
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_state_dict_round_trip_and_deepcopy():
    """The parametrised state loads into a model wrapped in the same way, learned numbers included."""
    nets = [seeded(seed, mlp, [6, 8, 3]) for seed in (0, 1)]
    for net in nets:
        compand_weights(net, learnable=True)
    train(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(nets[0](x), nets[1](x))
    assert torch.equal(copy.deepcopy(nets[0])(x), nets[0](x))


def test_error_leaves_the_model_untouched():
    """Fails if layers are wrapped one by one before all are looked at."""
    net = mlp([6, 8, 3])
    with torch.no_grad():
        net[2].weight[0, 0] = 50.0
    names = list(net.state_dict())
    with pytest.raises(ValueError, match="out of range"):
        compand_weights(net)
    assert list(net.state_dict()) == names


def test_smallest_valid_a_in_the_message_is_valid():
    """Fails if the advice in the message is wrong: just above the named a it works, just below it does not."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 3.0
    smallest = 3.0 * 2 / math.pi
    with pytest.raises(ValueError, match=f"{smallest:.4g}"):
        compand_weights(copy.deepcopy(layer), a=0.1, b=0.1, relative=False)
    compand_weights(layer, a=smallest * 1.0001, b=1.0, relative=False)


def test_optimizer_of_fixed_companders_survives_wrapping():
    """With fixed a and b the latent weight is the old Parameter object, so an earlier optimizer still trains it."""
    net = mlp([6, 8, 3])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compand_weights(net)
    check_optimizer_is_current(net, optimizer)


def test_term_excludes_and_groups():
    """Fails if the term does not pass its settings on."""
    net = mlp([6, 8, 3])
    term = WeightCompander(learnable=True, exclude=["2"], shape_lr=1e-3)
    term.attach(net)
    assert [len(group["params"]) for group in term.param_groups(net)] == [2]
    assert isinstance(net[2].weight, nn.Parameter)
    term.merge(net)
    assert set(net.state_dict()) == set(mlp([6, 8, 3]).state_dict())


def test_convolutions_and_float16():
    """Any layer shape, any floating type: same weights after wrapping up to the precision of the type."""
    for layer in (nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.Linear(7, 5).half()):
        before = layer.weight.detach().clone()
        compand_weights(layer, a=4.0, b=4.0)
        assert layer.weight.dtype == before.dtype
        np.testing.assert_allclose(layer.weight.detach().float(), before.float(), rtol=5e-3, atol=1e-4)


def test_compander_state_is_a_and_b():
    """The checkpoint holds v, a and b and nothing else."""
    layer = nn.Linear(3, 2)
    compand_weights(layer)
    assert set(layer.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.a",
        "parametrizations.weight.0.b",
    }
    assert set(Compander(1.0, 1.0, learnable=True).state_dict()) == {"log_a", "log_b"}
