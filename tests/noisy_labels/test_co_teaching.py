"""Co-teaching. Golden vectors, contract and bad input are checked in tests/test_contract.py.

Mutations that were tried, each caught: no exchange, the largest losses, losses in another order, selection in training
mode, halves taken twice or turned round, a sum divided by the whole half, rounding instead of truncation, frozen batch
normalisation with moving statistics or parameters, generators or the second network left out of the state, a rate that
reaches its value one epoch late, a schedule that is ignored.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.evidence.datasets import digits, flip_labels
from regularized.evidence.models import mlp, seeded
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule, num_kept, small_loss_selection
from regularized.noisy_labels.nested_dropout.layer import NestedLinear, draw_together
from regularized.noisy_labels.nested_dropout.width import select_width
from regularized.training.data import TensorData
from regularized.training.progress import Progress, piecewise

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network(dropout=0.0):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def build(dropout=0.0, seed=0, **chosen):
    nets = [seeded(2 * seed + k, network, dropout) for k in (1, 2)]
    return CoTeaching(*nets, **{"optimizer": SGD, "forget_rate": 0.4, **chosen})


def data(n=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def batches(size=6):
    return TensorData(*data(24), batch_size=size, seed=1)


@pytest.mark.parametrize(
    ("rate", "gradual", "epochs"), [(0.2, 5, 30), (0.5, 10, 12), (0.3, 0, 4), (0.3, 1, 4), (0.3, 2, 4)]
)
def test_forget_schedule(rate, gradual, epochs):
    """Fails when the rise does not start at 0, or reaches the rate in another epoch than gradual - 1."""
    expected = np.full(epochs, rate)
    expected[:gradual] = np.linspace(0, rate, gradual)
    schedule = forget_schedule(rate, gradual=gradual)
    np.testing.assert_allclose([schedule(Progress(0, 1, e, epochs)) for e in range(epochs)], expected, atol=1e-15)


@given(
    losses=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan")]), min_size=1, max_size=20),
    rate=st.floats(0, 0.99),
)
def test_selection(losses, rate):
    """Fails for the largest losses, an unstable order, nan before numbers, or another count."""
    keep = max(1, int((1 - rate) * len(losses)))
    order = sorted(
        range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i] if losses[i] == losses[i] else 0, i)
    )
    assert small_loss_selection(torch.tensor(losses), rate).tolist() == order[:keep]
    assert num_kept(len(losses), rate) == keep


def slow_step(nets, x, y, rate, split):
    """By hand from the description: halves, choice in evaluation mode, exchange, mean over the kept."""
    half = len(x) // 2
    parts = [(0, half), (half, 2 * half)] if split else [(0, len(x))] * 2
    chosen = []
    for net, (start, stop) in zip(nets, parts, strict=True):
        each = [
            F.cross_entropy(copy.deepcopy(net).eval()(x[i : i + 1]), y[i : i + 1]).item() for i in range(start, stop)
        ]
        keep = max(1, int((1 - rate) * len(each)))
        chosen.append([start + i for i in sorted(range(len(each)), key=each.__getitem__)[:keep]])
    losses = []
    for net, rows in zip(nets, reversed(chosen), strict=True):
        losses.append(F.cross_entropy(net.train()(x[rows]), y[rows]))
    return losses, chosen


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.6])
def test_step_against_a_slow_derivation(split, rate):
    """Fails when the exchange, the halves, the modes, or the mean over the kept are wrong; three steps."""
    co = build(forget_rate=rate, split=split)
    nets = copy.deepcopy(co.networks)
    optimizers = [SGD(net.parameters()) for net in nets]
    x, y = data()
    for _ in range(3):
        expected, chosen = slow_step(nets, x, y, rate, split)
        result = co.training_step((x, y))
        torch.testing.assert_close(torch.stack(result[:2]), torch.stack(expected).detach(), rtol=1e-12, atol=1e-12)
        assert result.chosen_by_first.tolist() == chosen[0]
        assert result.chosen_by_second.tolist() == chosen[1]
        for loss, optimizer in zip(expected, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(co.networks, nets, strict=True):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_rate_zero_trains_on_the_other_half():
    """The sheet's check: nothing is forgotten, and each network sees the half that the other looked at."""
    result = build(forget_rate=0.0).training_step(data())
    assert sorted(result.chosen_by_first.tolist()) == list(range(6))
    assert sorted(result.chosen_by_second.tolist()) == list(range(6, 12))


def test_choices_carry_no_gradient():
    """Fails when the samples that were not chosen, or the choosing pass, contribute to a gradient."""
    co = build(forget_rate=0.5)
    x, y = data()
    x.requires_grad_()
    result = co.losses((x, y), 0.5)
    (grad,) = torch.autograd.grad(result.first + result.second, x)
    touched = set(grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched == set(result.chosen_by_first.tolist()) | set(result.chosen_by_second.tolist())
    assert not result.chosen_by_first.requires_grad
    assert not any(logits.requires_grad for logits in result.logits)


def test_batch_of_mappings_and_extras():
    """Fails when inputs other than one tensor are not split."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, a, b):
            return self.layer(a + b)

    torch.manual_seed(0)
    co = CoTeaching(Two(), Two(), optimizer=SGD)
    x, y = data()
    result = co.training_step({"a": x, "b": x, "labels": y})
    assert torch.isfinite(result.first)


def test_frozen_normalisation():
    """Fails when statistics or parameters of frozen batch normalisation move, or others are frozen too."""
    co = build(freeze_norm=True)
    norms = [net[1] for net in co.networks]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    weights = [net[0].weight.detach().clone() for net in co.networks]
    co.fit(batches(), epochs=2)
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())
    assert not any(torch.equal(net[0].weight, weight) for net, weight in zip(co.networks, weights, strict=True))
    assert all(net[3].training for net in co.networks)


def test_schedules():
    """Fails when the learning rate or the forget rate does not follow the progress."""
    seen = []

    def rate(progress):
        seen.append((progress.epoch, progress.step, progress.total_steps))
        return 0.2

    co = build(forget_rate=rate, schedule=piecewise({0.5: 0.1}))
    co.fit(batches(12), epochs=2)
    assert seen == [(0, 0, 4), (0, 1, 4), (1, 2, 4), (1, 3, 4)]
    assert [group["lr"] for o in co.optimizers for group in o.param_groups] == pytest.approx([0.01, 0.01])


def nested(seed):
    nets = [
        seeded(
            seed + k,
            lambda: nn.Sequential(
                nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), NestedLinear(16, 3, sigma=6.0)
            ).double(),
        )
        for k in (1, 2)
    ]
    draw_together(*nets, seed=3)
    return CoTeaching(*nets, optimizer=SGD, forget_rate=forget_schedule(0.4, gradual=2), seed=7)


def choose(co):
    select_width(co.networks, batches())


def test_nested_networks_share_the_width_of_a_step():
    """Fails when the two networks train at different widths, or choose samples at a random one."""
    co = nested(0)
    choose(co)
    used = ([], [])
    for seen, net in zip(used, co.networks, strict=True):
        layer, original = net[3].nested, net[3].nested.current_width

        def record(layer=layer, original=original, seen=seen):
            width = original()
            seen.append((layer.training, width))
            return width

        layer.current_width = record
    for _ in range(8):
        co.training_step(data())
    assert used[0] == used[1]
    assert {width for training, width in used[0] if not training} == {co.networks[0][3].nested.keep}
    assert len({width for training, width in used[0] if training}) > 2


def test_resume_with_nested_layers_is_exact(tmp_path):
    """Fails when optimizers, generators of the widths, the chosen width, dropout or the epoch are not restored."""
    whole = nested(0)
    whole.fit(batches(), epochs=4, after_epoch=choose)
    first = nested(0)
    first.fit(batches(), epochs=2, after_epoch=choose)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    second = nested(5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (second.epoch, second.steps) == (2, 8)
    second.fit(batches(), epochs=4, after_epoch=choose)
    for ours, theirs in zip(second.networks, whole.networks, strict=True):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("stop", [1, 6])
def test_resume_in_the_middle_of_an_epoch_is_exact(stop):
    """Fails when widths, dropout, momentum or the position inside an epoch are not restored."""
    whole, first, second = nested(0), nested(0), nested(5)
    expected = whole.fit(batches(), epochs=3)

    def saving(co):
        if co.steps == stop:
            second.load_state_dict(copy.deepcopy(co.state_dict()))

    first.fit(batches(), epochs=3, after_step=saving)
    means = second.fit(batches(), epochs=3)
    assert means == expected[-len(means) :]
    for ours, theirs in zip(second.networks, whole.networks, strict=True):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_it_bites():
    """The mechanism: the chosen samples are mostly right, and fewer wrong labels are fitted than alone."""
    split = digits(400)
    noisy = flip_labels(split.train_y, 0.4, num_classes=10, generator=torch.Generator().manual_seed(0))
    wrong = noisy != split.train_y
    train = TensorData(split.train_x, noisy, batch_size=100)

    def memorised(rate):
        nets = [seeded(k, mlp, [64, 128, 10]) for k in (0, 1)]
        co = CoTeaching(*nets, optimizer=partial(SGD, lr=0.05), forget_rate=forget_schedule(rate, gradual=5))
        co.fit(train, epochs=60)
        predicted = co.predict(split.train_x).argmax(1)
        result = co.losses((split.train_x, noisy), rate)
        right = 1 - wrong[torch.cat([result.chosen_by_first, result.chosen_by_second])].float().mean()
        return float((predicted == noisy)[wrong].float().mean()), float(right)

    kept, clean = memorised(0.4)
    all_kept, _ = memorised(0.0)
    assert kept < all_kept - 0.3
    assert clean > 0.85


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build().load_state_dict({"networks": []}), ValueError, "missing"),
        (lambda: build().load_state_dict(nested(0).state_dict()), ValueError, r"networks\[0\] does not fit: missing"),
        (lambda: build().fit([], epochs=1), ValueError, "no batch"),
        (lambda: small_loss_selection(torch.zeros(2, 2), 0.1), ValueError, "one for each sample"),
        (lambda: build().losses(data()[0], 0.1), ValueError, "class labels"),
        (
            lambda: build().fit(TensorData(data()[0] * float("nan"), data()[1], batch_size=12), epochs=1),
            FloatingPointError,
            "not finite in epoch 0",
        ),
    ],
)
def test_errors(call, error, words):
    """Fails when a mistake goes on to an obscure error, or to none."""
    with pytest.raises(error, match=words):
        call()


def test_generators_must_correspond():
    """Fails when a state with generators is loaded into networks that draw from the global one."""
    state = nested(0).state_dict()
    plain = nested(0)
    for net in plain.networks:
        net[3].nested.generator = None
    with pytest.raises(ValueError, match="draw_together"):
        plain.load_state_dict(state)
