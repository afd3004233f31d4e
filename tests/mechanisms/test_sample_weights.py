"""Weights of samples: on any loss, and as probabilities of a sampler.

Mutations tried and seen: division by the sum of the weights, weights in evaluation, a sampler that forgets the epoch or
the seed, a boundary draw that goes to the sample before it, broadcasting of shapes that differ.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regularized.mechanisms.sample_weights import (
    WeightedLoss,
    WeightedSampler,
    check_unit_interval,
    weighted_mean,
)
from regularized.training.data import as_source


def test_mean_divides_by_the_number_of_samples():
    """Fails when the sum of the weights divides: a batch of half weights must count half."""
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert weighted_mean(losses, torch.full((3,), 0.5)).item() == pytest.approx(1.5)
    assert weighted_mean(losses, torch.tensor([0.0, 0.0, 1.0])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("form", ["per_sample", "batch_mean"])
def test_weight_one_is_no_weight(form):
    """Fails when weights of 1 change a single bit."""
    losses = torch.rand(7)
    assert torch.equal(weighted_mean(losses, torch.ones(7), aggregate=form), losses.mean())


def test_evaluation_is_plain():
    """Fails when a validation loss is weighted."""
    criterion = WeightedLoss(nn.L1Loss(reduction="none")).eval()
    assert criterion(torch.ones(4), torch.zeros(4), torch.zeros(4)).item() == 1.0


def test_weight_k_is_the_sample_k_times():
    """Fails when a weight is anything but a multiplicity: gradients of 3x the row and of weight 3 agree."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 3, 3])
    model = nn.Linear(3, 1).double()
    losses = (
        WeightedLoss(nn.MSELoss(reduction="none"))(model(x).squeeze(1), y, weights) * 4,
        nn.functional.mse_loss(model(x[rows]).squeeze(1), y[rows], reduction="sum"),
    )
    gradients = [torch.autograd.grad(loss, model.weight)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("losses", "weights"), [((3,), (3, 1)), ((3, 1), (3,)), ((), ()), ((3,), (1,)), ((3, 3), (3, 3))]
)
def test_shapes_are_not_broadcast(losses, weights):
    """Fails when (B, 1) against (B,) silently becomes (B, B)."""
    with pytest.raises(ValueError, match=r"shape|single number"):
        weighted_mean(torch.ones(losses), torch.ones(weights))


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=6))
def test_unit_interval(values):
    """Fails when a value outside [0, 1], or NaN, passes, or one inside is refused."""
    tensor = torch.tensor(values)
    if all(0 <= value <= 1 for value in values):
        check_unit_interval(tensor, name="x")
    else:
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\]"):
            check_unit_interval(tensor, name="x")


def test_sampler_draws_in_proportion():
    """Fails when frequencies do not follow the weights: within five standard errors of 10^5 draws."""
    weights = torch.tensor([0.5, 0.0, 1.0, 2.5])
    n = 100_000
    counts = torch.bincount(torch.tensor(list(WeightedSampler(weights, num_samples=n))), minlength=4)
    for count, p in zip(counts.tolist(), (weights / weights.sum()).tolist()):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 1e30]), min_size=1, max_size=8).filter(any), st.integers(0, 99))
def test_weight_zero_is_never_drawn(weights, seed):
    """Fails when a draw on a boundary, or the last bit of the total, falls to a sample of weight 0."""
    assert all(weights[i] > 0 for i in WeightedSampler(weights, num_samples=64, seed=seed))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_draws_on_the_boundary(uniform, monkeypatch):
    """Fails when the smallest draw, or one that rounds up to the total, falls to a neighbour of weight 0, or beyond."""
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, generator: torch.full(size, uniform, dtype=dtype))
    assert list(WeightedSampler([0.0, 1.0, 0.0])) == [1, 1, 1]


def test_sampler_is_a_function_of_seed_and_epoch():
    """Fails when order depends on what was drawn before, or does not change with the epoch or the seed."""
    weights = torch.rand(50)
    first = WeightedSampler(weights, seed=1)
    orders = {}
    for epoch in (0, 1, 0):
        first.set_epoch(epoch)
        order = list(first)
        assert orders.setdefault(epoch, order) == order
    assert orders[0] != orders[1]
    assert list(WeightedSampler(weights, seed=2)) != orders[0]
    assert len(first) == 50 == len(orders[0])
    neighbour = WeightedSampler(weights, seed=0)
    neighbour.set_epoch(1)
    assert list(neighbour) != orders[0]  # seed + epoch would mix them up


def test_sampler_in_our_loop_knows_the_epoch():
    """Fails when the loop does not tell the sampler the epoch, so that its weights never change."""
    dataset = TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10))
    half = torch.arange(10) < 5
    sampler = WeightedSampler(lambda epoch: (half if epoch == 0 else ~half).double())
    source = as_source(DataLoader(dataset, batch_size=5, sampler=sampler), seed=0)
    for epoch in (0, 1):
        drawn = torch.cat([batch.index for batch in source.batches(epoch)])
        assert bool((half[drawn] == (epoch == 0)).all())


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [1.0, math.nan], [math.inf, 1.0], [[1.0], [2.0]]])
def test_sampler_refuses(weights):
    """Fails when weights without a distribution are accepted."""
    with pytest.raises(ValueError, match="weights must"):
        WeightedSampler(torch.tensor(weights, dtype=torch.float64))


def test_sampler_needs_a_draw():
    """Fails when an epoch of no draws is accepted."""
    with pytest.raises(ValueError, match="num_samples"):
        WeightedSampler([1.0], num_samples=0)


def test_loss_must_be_callable():
    """Fails when a mistake is found only at the first step."""
    with pytest.raises(TypeError, match="WeightedLoss needs a loss function"):
        WeightedLoss("mse")  # type: ignore[arg-type]
