"""Repulsion and anchor: gradients, limits, invariances, state."""

import copy
import warnings

import pytest
import torch
from torch import nn

from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.unlearning.adapt_unlearn import ElasticAnchor, Repulsion, collapse, repel, repel_slope

KINDS = ("exponential", "inverse", "negative_square")
DISTANCES = ("relative", "sum", "official")


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()


def repelled(model, references, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the unbounded kind
        repulsion = Repulsion(references, **options)
    repulsion.attach(model)
    return repulsion


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model):
    return flat(p.grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_formula(kind):
    """Fails with a wrong sign, factor or power: -2 v, -2 alpha e^(-alpha d^2) v, -2 v / d^4, v = theta - theta_N."""
    model, reference, alpha = network(0), network(1), 0.3
    v = flat(model.parameters()) - flat(reference.parameters())
    d2 = v.square().sum()
    expected = {
        "exponential": -2.0 * alpha * torch.exp(-alpha * d2) * v,
        "inverse": -2.0 * v / d2.square(),
        "negative_square": -2.0 * v,
    }[kind]
    repelled(model, [reference], kind=kind, alpha=alpha, distance="sum").add_gradient(1.0)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_autograd(kind, distance):
    """Fails when value and gradient disagree, for several references and any distance; or `.grad` is overwritten."""
    model, references = network(0), [network(k) for k in (1, 2, 3)]
    repulsion = repelled(model, references, kind=kind, distance=distance, alpha=0.7)
    for p in model.parameters():
        p.data.add_(0.1)
    expected = torch.autograd.grad(2.5 * repulsion.value(), list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    repulsion.add_gradient(2.5)
    torch.testing.assert_close(gradient(model), 1.0 + flat(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_away(kind):
    """Fails when the repulsion attracts: each step on it alone makes the distance larger."""
    model = network(0)
    repulsion = repelled(model, [network(1), network(2)], kind=kind)
    optimizer, distances = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(5):
        optimizer.zero_grad()
        repulsion.add_gradient(1.0)
        optimizer.step()
        distances.append(repulsion.squared_distance().item())
    assert distances == sorted(distances)
    assert distances[0] > 1.0


def test_references_collapse():
    """Fails when the mean over references is a sum, the spread is lost, or the update of mean and spread is wrong."""
    references = [[torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)] for _ in range(4)]
    theta = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    found = collapse(references)
    for p in range(2):
        stacked = torch.stack([reference[p] for reference in references])
        expected = (theta[p] - stacked).square().flatten(1).sum(dim=1).mean()
        got = (theta[p] - found.mean[p]).square().sum() + found.spread[p]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", ["sum", "relative"])
def test_equal_references_are_one(distance):
    """Fails when the distance grows with the number of references, as in the authors' code."""
    model, reference = network(0), network(1)
    one, three = (repelled(model, [reference] * k, distance=distance) for k in (1, 3))
    torch.testing.assert_close(three.value(), one.value(), rtol=1e-12, atol=0.0)


def test_official_distance_grows_with_the_square_of_their_number():
    """Fails when the official distance is cleaned up: three equal references count nine times."""
    model, reference = network(0), network(1)
    one, three = (repelled(model, [reference] * k, distance="official") for k in (1, 3))
    torch.testing.assert_close(three.squared_distance(), 9.0 * one.squared_distance(), rtol=1e-12, atol=0.0)


def test_relative_distance_starts_at_one_and_knows_no_units():
    """Fails when the distance at the start is not divided by, or is taken anew at each call."""
    model, reference = network(0), network(1)
    repulsion = repelled(model, [reference])
    assert abs(repulsion.squared_distance().item() - 1.0) < 1e-12
    v = flat(model.parameters()) - flat(reference.parameters())
    with torch.no_grad():
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            p.add_(p - r)  # twice as far
    assert abs(repulsion.squared_distance().item() - 4.0) < 1e-12
    repulsion.add_gradient(1.0)
    torch.testing.assert_close(gradient(model), -2.0 * torch.exp(torch.tensor(-4.0)) * 2.0 * v / v.square().sum())


def test_at_the_reference_the_exponential_is_a_saddle():
    """Fails when the exponential is not 1 with zero gradient where the weights are the reference's."""
    model = network(0)
    repulsion = repelled(model, [copy.deepcopy(model)], distance="sum")
    repulsion.add_gradient(1.0)
    assert repulsion.value().item() == 1.0
    assert not gradient(model).any()


def test_small_alpha_is_the_negative_square():
    """Fails when alpha stands outside the exponential: (1 - EL2) / alpha tends to d^2."""
    d2, alpha = torch.tensor(3.0, dtype=torch.float64), 1e-7
    assert abs(((1.0 - repel(d2, "exponential", alpha=alpha)) / alpha).item() - 3.0) < 1e-5
    slope = repel_slope(d2, "exponential", alpha=alpha) / alpha
    assert abs((slope - repel_slope(d2, "negative_square")).item()) < 1e-6


@pytest.mark.parametrize(("a", "bounded"), [(3.0, True), (1.5, False)])
def test_limit_of_the_unbounded_form(a, bounded):
    """Fails when the negative square has another coefficient: a/2 (t - m)^2 - w (t - n)^2 is stable for a > 2 w only.

    Then it ends at (a m - 2 w n) / (a - 2 w).
    """
    m, n, w = 2.0, 1.0, 1.0
    model = nn.Linear(1, 1, bias=False).double()
    reference = copy.deepcopy(model)
    nn.init.constant_(model.weight, m)
    nn.init.constant_(reference.weight, n)
    repulsion = repelled(model, [reference], kind="negative_square", distance="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        (a / 2.0 * (model.weight - m).square().sum()).backward()
        repulsion.add_gradient(w)
        optimizer.step()
    end = model.weight.item()
    if bounded:
        assert abs(end - (a * m - 2.0 * w * n) / (a - 2.0 * w)) < 1e-6
    else:
        assert abs(end) > 1e3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_repels_beyond_the_cap(kind):
    """Fails when the cap bounds the value and not the gradient, or acts below it."""
    model = network(0)
    repulsion = repelled(model, [network(1)], kind=kind, cap=1.5)
    repulsion.add_gradient(1.0)
    assert gradient(model).any()
    model.zero_grad()
    for p in model.parameters():
        p.data.mul_(10.0)
    repulsion.add_gradient(1.0)
    assert not gradient(model).any()
    assert abs(repulsion.value().item() - repel(torch.tensor(1.5), kind).item()) < 1e-6


def test_frozen_weights_and_buffers_are_left_alone():
    """Fails when frozen parameters count, or running statistics take part in the distance."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    reference = copy.deepcopy(model)
    nn.init.constant_(reference[0].weight, 9.0)
    reference[1].running_mean.add_(5.0)
    reference[1].bias.data.add_(2.0)
    repulsion = repelled(model, [reference], distance="sum")
    assert repulsion.names == ["1.weight", "1.bias"]
    assert repulsion.squared_distance().item() == 8.0


def test_low_precision_weights():
    """Fails when the distance is accumulated in bfloat16, or gradients come in another type than the weights."""
    model, reference = network(0).bfloat16(), network(1).bfloat16()
    repulsion = repelled(model, [reference], distance="sum")
    exact = (flat(model.parameters()).double() - flat(reference.parameters()).double()).square().sum()
    assert abs(repulsion.squared_distance().item() / exact.item() - 1.0) < 1e-5
    repulsion.add_gradient(1.0)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_state_goes_on():
    """Fails when mean, spread, scale or number of references is not saved: the loaded term must repel equally."""
    model = network(0)
    repulsion = repelled(model, [network(1), network(2)], kind="inverse")
    model[0].weight.data.add_(0.3)
    other_model = copy.deepcopy(model)
    other = repelled(other_model, [], kind="inverse")
    other.load_state_dict(repulsion.state_dict())
    assert torch.equal(other.value(), repulsion.value())
    other.add_gradient(1.0)
    repulsion.add_gradient(1.0)
    assert torch.equal(gradient(model), gradient(other_model))


def test_as_a_term_with_a_schedule():
    """Fails when the schedule is not asked at each step, or weight 0 touches the gradients."""
    model = network(0)
    repulsion = repelled(model, [network(1)], weight=lambda progress: float(progress.step))
    step = Step(model, Batch(torch.zeros(1, 3)), Progress(0, 10))
    repulsion.before_step(step)
    assert all(p.grad is None for p in model.parameters())
    repulsion.before_step(Step(model, Batch(torch.zeros(1, 3)), Progress(2, 10)))
    twice = gradient(model).clone()
    model.zero_grad()
    repulsion.add_gradient(1.0)
    torch.testing.assert_close(twice, 2.0 * gradient(model))


# -- anchor -------------------------------------------------------------------------------------


def test_anchor_gradient_equals_autograd():
    """Fails when the half, the importance or the coefficient is lost in the gradient; what has none is not held."""
    model = network(0)
    fisher = {"0.weight": torch.rand(4, 3).double(), "2.weight": torch.rand(2, 4).double()}
    anchor = ElasticAnchor(fisher, weight=3.0)
    anchor.attach(model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    expected = torch.autograd.grad(3.0 * anchor.value(), [model[0].weight, model[2].weight])
    anchor.before_step(Step(model, Batch(torch.zeros(1, 3)), Progress(0, 1)))
    torch.testing.assert_close(flat([model[0].weight.grad, model[2].weight.grad]), flat(expected))
    assert model[0].bias.grad is None


def test_huge_anchor_holds_what_matters():
    """Fails when the anchor pulls elsewhere than to the start, or holds weights without importance."""
    model = nn.Linear(2, 1, bias=False).double()
    start = model.weight.detach().clone()
    anchor = ElasticAnchor({"weight": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}, weight=1e6)
    anchor.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(50):
        optimizer.zero_grad()
        (1e3 * model.weight.sum()).backward()
        anchor.add_gradient(1e6)
        optimizer.step()
    moved = (model.weight - start).detach()[0]
    assert abs(moved[0].item()) < 2e-3
    assert abs(moved[1].item() + 0.05) < 1e-9
