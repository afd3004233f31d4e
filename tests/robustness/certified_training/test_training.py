"""Penalties, radius, initialisation, loss, term, procedure and verification of certified training."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import resnet18
from regularized.robustness.certified_training import (
    CertifiedLoss,
    CertifiedTraining,
    FastCertifiedTraining,
    Interval,
    IntervalBounds,
    SmoothedRadius,
    interval_init_,
    linf_box,
    relu_balance,
    robust_cross_entropy,
    tightness,
    verified,
    verify,
)
from regularized.training import Batch, CrossEntropy, Progress, TensorData, Trainer
from regularized.training.step import Step


def network(norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*[m for m in layers if norm or not isinstance(m, nn.BatchNorm1d)], nn.Linear(16, 3)).double()


def batch(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 6, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


# -- penalties --------------------------------------------------------------------------------------


def reference(box, relu_inputs, tolerance):
    """The official formulas, with their branches, in numbers."""
    at_input, tight, balance = float(box.radius.mean()), 0.0, 0.0
    for before in relu_inputs:
        c, low, up = before.centre.flatten().tolist(), before.lower.flatten().tolist(), before.upper.flatten().tolist()
        n, mean = len(c), sum(c) / len(c)
        tight += max(tolerance - at_input / max(float(before.radius.mean()), 1e-12), 0.0) / tolerance
        a = sum(x for x, end in zip(c, low, strict=True) if end > 0) / n
        i = -sum(x for x, end in zip(c, up, strict=True) if end < 0) / n
        va = sum((x - mean) ** 2 for x, end in zip(c, low, strict=True) if end > 0)
        vn = sum((x - mean) ** 2 for x, end in zip(c, up, strict=True) if end < 0)
        if i == 0:
            continue
        rm, rv = a / i, va / vn
        rm, rv = min(rm, 1 / max(rm, 1e-12)), min(rv, 1 / max(rv, 1e-12))
        balance += (max(tolerance - rm, 0.0) + max(tolerance - rv, 0.0)) / tolerance
    return tight / len(relu_inputs), balance / len(relu_inputs)


@pytest.mark.parametrize("seed", range(4))
def test_penalties_by_another_derivation(seed):
    """Fails when a sum, a mean, a mask or a folded ratio is another one."""
    g = torch.Generator().manual_seed(seed)
    box = Interval.around(torch.zeros(5, 4, dtype=torch.float64), torch.rand(5, 4, generator=g, dtype=torch.float64))
    layers = []
    for shift in (-0.6, 0.0, 0.9, 5.0):  # the last has no inactive entry
        centre = torch.randn(5, 7, generator=g, dtype=torch.float64) + shift
        layers.append(Interval.around(centre, torch.rand(5, 7, generator=g, dtype=torch.float64) * (1 + seed)))
    for tolerance in (0.5, 0.9):
        tight, balance = reference(box, layers, tolerance)
        assert float(tightness(box, layers, tolerance=tolerance)) == pytest.approx(tight, rel=1e-12)
        assert float(relu_balance(layers, tolerance=tolerance)) == pytest.approx(balance, rel=1e-12)


def test_tightness_is_zero_up_to_twice_the_input():
    """Fails when the tolerance is on the other side: bounds up to 1 / tau = 2 times the input's cost nothing."""
    box = Interval.around(torch.zeros(2, 3), torch.full((2, 3), 0.1))
    assert float(tightness(box, [Interval.around(torch.randn(2, 3), torch.full((2, 3), 0.19))])) == 0.0
    assert float(tightness(box, [Interval.around(torch.randn(2, 3), torch.full((2, 3), 0.3))])) > 0.0


@pytest.mark.parametrize("centre", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [-1.0, -2.0, 4.0], [-1.0, -2.0, -2.0]])
def test_balance_has_a_finite_gradient_where_entries_of_a_kind_are_missing(centre):
    """Fails when an undefined ratio reaches the gradient as 0 * inf, or the balance leaves [0, 2]."""
    c = torch.tensor([centre], requires_grad=True)
    value = relu_balance([Interval.around(c, torch.full_like(c, 0.5))])
    assert 0.0 <= float(value.detach()) <= 2.0
    assert bool(torch.isfinite(torch.autograd.grad(value, c)[0]).all())


# -- radius -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "length", "batches", "middle"), [(2, 3, 10, 0.25), (1, 1, 3, 0.25), (3, 2, 7, 0.9)])
def test_radius_grows_from_zero_to_the_largest(start, length, batches, middle):
    """Fails when the growth begins or ends a step early, falls, or has a kink where the line begins."""
    radius = SmoothedRadius(0.3, start=start, length=length, batches_per_epoch=batches, middle=middle)
    first, last = (start - 1) * batches, (start + length - 1) * batches
    values = [radius.at(step) for step in range(last + 3)]
    assert values[: first + 1] == [0.0] * (first + 1)
    assert values[last - 1] < values[last] == values[-1] == 0.3
    assert values == sorted(values)
    assert radius(Progress(last - 1, 100)) == values[last - 1]


def test_radius_has_one_slope_in_the_middle():
    """Fails when power and line do not meet with equal slopes."""
    radius = SmoothedRadius(1.0, start=1, length=1, batches_per_epoch=100_000)
    middle = 25_000
    before, after = (radius.at(middle + k + 1) - radius.at(middle + k) for k in (-1, 0))
    assert before == pytest.approx(after, rel=1e-3)


# -- initialisation ---------------------------------------------------------------------------------


def test_initialisation_keeps_the_radius():
    """Fails when the deviation is another one: Kaiming's widens bounds a hundredfold over six layers, ours by 1.08."""
    growth = {}
    for name in ("default", "interval"):
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(128, 10))
        if name == "interval":
            interval_init_(model)
        radii = [b.radius.mean().item() for b in IntervalBounds(model)(linf_box(torch.rand(64, 128), 0.1)).relu_inputs]
        growth[name] = radii[-1] / radii[0]
    assert growth["interval"] < 1.5
    assert growth["default"] > 50


def test_initialisation_draws_what_the_official_code_draws():
    """Fails when the last weight, biases or normalisations are drawn, or a weight behind a sum is not halved."""
    torch.manual_seed(0)
    model = resnet18(width=16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    drawn = interval_init_(model)
    after = dict(model.named_parameters())
    assert "head.weight" not in drawn
    assert all(after[name].ndim >= 2 for name in drawn)
    assert all(torch.equal(before[name], p) for name, p in after.items() if name not in drawn)
    stem, inner, behind = (after[name] for name in ("stem.weight", "layers.0.conv2.weight", "layers.1.conv1.weight"))
    for weight, factor in ((stem, 1.0), (inner, 1.0), (behind, 0.5)):
        expected = factor * math.sqrt(2 * math.pi) / weight[0].numel()
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)


# -- loss -------------------------------------------------------------------------------------------


def test_robust_loss_is_cross_entropy_at_radius_zero():
    """Fails when the margins are not logit differences, or the right class counts twice."""
    model, (x, y) = network().eval(), batch()
    margins = IntervalBounds(model)(linf_box(x, 0.0)).margins(y)
    torch.testing.assert_close(robust_cross_entropy(margins, y), F.cross_entropy(model(x), y), rtol=1e-12, atol=1e-12)
    wrong = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], value=False)
    padded = torch.cat([torch.zeros(len(y), 1), -margins[wrong].reshape(len(y), -1)], dim=1)  # the official form
    official = F.cross_entropy(padded, torch.zeros_like(y))
    torch.testing.assert_close(robust_cross_entropy(margins, y), official)


def test_penalty_fades_with_the_growing_radius():
    """Fails when the penalties are not scaled by 1 - radius / largest, or stay when the radius is reached."""
    model, (x, y) = network(), batch()
    with_penalty = CertifiedLoss(model, radius=SmoothedRadius(0.2, start=1, length=1, batches_per_epoch=4))
    without = CertifiedLoss(model, radius=0.2, penalty=0.0)

    def extra(radius):
        log_p = F.log_softmax(model(x), dim=-1)
        return float(
            with_penalty.summed(log_p, x, y, radius=radius).detach()
            - without.summed(log_p, x, y, radius=radius).detach()
        )

    def penalties(radius):
        model(x)
        box = linf_box(x, radius)
        found = without.bounds(box).relu_inputs
        return float((tightness(box, found) + relu_balance(found)).detach())

    assert extra(0.2) == 0.0
    assert extra(0.05) == pytest.approx(len(x) * 0.5 * 0.75 * penalties(0.05), rel=1e-9)
    assert extra(0.0) == pytest.approx(len(x) * 0.5 * penalties(1e-6), rel=1e-9)
    with_penalty.eval()
    assert extra(0.05) == 0.0


def test_no_bounds_where_nothing_asks_for_them(monkeypatch):
    """Fails when a step of radius 0 without penalty pays for bounds."""
    model, (x, y) = network(norm=False), batch()
    criterion = CertifiedLoss(model, radius=0.0)
    monkeypatch.setattr(IntervalBounds, "__call__", None)  # whoever asks fails
    torch.testing.assert_close(criterion(x, y), F.cross_entropy(model(x), y))


def test_the_number_of_steps_is_state():
    """Fails when a loop that goes on from a checkpoint starts its radius again."""
    radius = SmoothedRadius(0.2, start=1, length=2, batches_per_epoch=4)
    criterion = CertifiedLoss(network(), radius=radius)
    for _ in range(5):
        criterion.advance()
    fresh = CertifiedLoss(network(), radius=radius)
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.steps == 5


def test_without_penalty_and_initialisation_it_is_plain_ibp():
    """Fails when anything but the robust cross-entropy is in the loss."""
    model, (x, y) = network(norm=False), batch()
    loss = CertifiedLoss(model, radius=0.1, penalty=0.0)(x, y)
    torch.testing.assert_close(loss, robust_cross_entropy(IntervalBounds(model)(linf_box(x, 0.1)).margins(y), y))


# -- term and procedure -----------------------------------------------------------------------------


def test_term_is_the_loss_of_ones_own_loop():
    """Fails when the term scales the loss otherwise, or does not share the loop's forward pass."""
    (x, y), radius = batch(), SmoothedRadius(0.2, start=1, length=2, batches_per_epoch=4)
    one, two = network(), network()
    criterion, term = CertifiedLoss(one, radius=radius), CertifiedTraining(radius=radius)
    criterion.steps = 6
    term.attach(two)
    step = Step(two, Batch(x, y), Progress(6, 8))
    value = term(step) / term.count(step.batch)
    torch.testing.assert_close(value, criterion(x, y))
    assert int(two[1].num_batches_tracked) == 1
    term.merge(two)
    assert not two._forward_pre_hooks


def test_trainer_lowers_the_verified_error():
    """Fails when the term does not train: on three well separated classes every sample must come out verified."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    x = F.one_hot(y, 6) * 0.8 + 0.1 * torch.rand(96, 6, generator=g)
    data = TensorData(x, y, batch_size=24)
    model = network().float()
    interval_init_(model)
    radius = SmoothedRadius(0.1, start=2, length=8, batches_per_epoch=4)
    trainer = Trainer(
        model,
        terms={"certified": CertifiedTraining(radius=radius, data_range=(0.0, 1.0))},
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    trainer.fit(data, epochs=20)
    found = verify(trainer.merge(), data.batches(0), radius=0.1, data_range=(0.0, 1.0))
    assert found.verified_error == 0.0


def _procedure(**options):
    given = {"radius": 0.1, "length": 2, "data_range": (0.0, 1.0), "optimizer": partial(torch.optim.Adam, lr=1e-2)}
    return FastCertifiedTraining(network().float(), **(given | options))


def test_procedure_ends_at_the_radius_and_clips():
    """Fails when the radius is not reached after start + length - 1 epochs, or gradients are not clipped."""
    x, y = batch(24)
    procedure = _procedure(start=2, length=2, clip_norm=1e-3)
    norms = []
    records = procedure.fit(
        TensorData(x.float(), y, batch_size=12),
        epochs=4,
        after_step=lambda p: norms.append(
            float(torch.stack([q.grad.norm() for q in p.model.parameters() if q.grad is not None]).norm())
        ),
    )
    assert [record["radius"] for record in records[2:]] == [0.1, 0.1]
    assert records[0]["radius"] == 0.0
    assert max(norms) <= 1.001e-3


def test_procedure_without_initialisation_leaves_the_weights():
    """Fails when initialise=False draws weights, or True does not."""
    plain = network().float()
    for initialise in (True, False):
        drawn = _procedure(initialise=initialise).model
        assert torch.equal(drawn[0].weight, plain[0].weight) is not initialise


# -- verification -----------------------------------------------------------------------------------


def test_verified_error_at_radius_zero_is_the_clean_error():
    """Fails when verification looks at another thing than the prediction; it also grows with the radius."""
    model, (x, y) = network().eval(), batch(60)
    data = [(x[:25], y[:25]), (x[25:], y[25:])]
    found = [verify(model, data, radius=r) for r in (0.0, 0.01, 0.05, 0.5)]
    assert (
        found[0].verified_error
        == found[0].clean_error
        == pytest.approx(float((model(x).argmax(1) != y).double().mean()))
    )
    errors = [one.verified_error for one in found]
    assert errors == sorted(errors)
    assert {one.samples for one in found} == {60}


def test_what_is_verified_withstands_attacks():
    """Fails when a sample counts as verified that signed gradients, or any corner, turn."""
    model, (x, _) = network(seed=3).eval(), batch(200)
    model[-1].bias.data -= model(x).mean(0).detach()  # so that all classes occur
    y = model(x).argmax(1)
    proved = verified(IntervalBounds(model), x, y, radius=0.01)
    assert 0 < int(proved.sum()) < len(y)
    for _ in range(50):
        corner = x + 0.01 * torch.sign(torch.randn_like(x))
        assert bool((model(corner).argmax(1) == y)[proved].all())
    point = x.clone().requires_grad_()
    F.cross_entropy(model(point), y).backward()
    assert bool((model(x + 0.01 * point.grad.sign()).argmax(1) == y)[proved].all())


def test_bounds_that_are_not_finite_prove_nothing():
    """Fails when NaN counts as a margin that is not negative."""
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, math.inf)
    assert not bool(verified(IntervalBounds(model), torch.zeros(1, 2), torch.tensor([0]), radius=0.1).any())


def test_verification_leaves_the_mode():
    """Fails when a network in training comes back in evaluation, or with hooks."""
    model = network().train()
    model[1].eval()
    verify(model, [batch()], radius=0.1)
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert not model._forward_pre_hooks


def test_off_is_cross_entropy():
    """Fails when the term at radius 0 without penalty is not cross-entropy, bit for bit."""
    model, (x, y) = network(norm=False), batch()
    term = CertifiedTraining(radius=0.0, penalty=0.0)
    term.attach(model)
    step = Step(model, Batch(x, y), Progress(0, 1))
    assert torch.equal(term(step), CrossEntropy()(step))
