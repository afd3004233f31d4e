"""Attacks: what one may change, one step for training, many steps and AutoAttack to judge by."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import seeded, small_convnet
from regularized.robustness.attacks import OneStep, Threat, input_gradient, pgd
from regularized.robustness.evaluation import auto_attack, robust_accuracy

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def net(channels=3, classes=5):
    return seeded(0, nn.Sequential, nn.Flatten(), nn.Linear(channels * 16, 8), nn.Tanh(), nn.Linear(8, classes))


def batch(size=6, channels=3, classes=5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(size, channels, 4, 4, generator=draws)
    return x, torch.randint(classes, (size,), generator=draws)


def normalised(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


ONE_STEP = [OneStep.fgsm, OneStep.rs_fgsm, OneStep.n_fgsm]


@pytest.mark.parametrize("host", ONE_STEP)
@given(radius=st.floats(0.001, 0.9), seed=st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_what_is_found_is_allowed(host, radius, seed):
    """Fails when a projection is left out, is by another channel's numbers, or N-FGSM leaves the data's range."""
    x, y = batch(seed=seed)
    x = normalised(x)
    threat = Threat.normalised(radius, mean=MEAN, std=STD)
    found = host(threat)(net(), x, y)
    pixels = found.inputs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    raw = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    reach = 3.0 if host == OneStep.n_fgsm else 1.0
    assert (pixels - raw).abs().max() <= reach * radius + 1e-5


def test_fgsm_is_the_formula():
    """Fails when the sign, the length or the starting point of the step is another: x + radius * sign(dL/dx)."""
    x, y = batch()
    x = 0.2 + 0.6 * x  # away from the ends of the range
    leaf = x.clone().requires_grad_()
    model = net()
    F.cross_entropy(model(leaf), y).backward()
    torch.testing.assert_close(OneStep.fgsm(Threat(0.1))(model, x, y).inputs, x + 0.1 * leaf.grad.sign())


def test_the_three_differ_as_their_papers_say():
    """Fails when the starting noise of RS-FGSM and N-FGSM gets the other's width, or N-FGSM is projected."""
    x, y = torch.full((200, 1, 4, 4), 0.5), torch.zeros(200, dtype=torch.long)
    model, threat = net(channels=1), Threat(0.1)
    torch.manual_seed(0)
    rs, n = OneStep.rs_fgsm(threat), OneStep.n_fgsm(threat)
    assert 0.099 < rs.noise(x).abs().max() <= 0.1
    assert 0.199 < n.noise(x).abs().max() <= 0.2
    assert rs(model, x, y).perturbation.abs().max() <= 0.1 + 1e-7
    assert n(model, x, y).perturbation.abs().max() > 0.25
    assert not OneStep.fgsm(threat).noise(x).any()


def test_the_attack_leaves_the_model_alone():
    """Fails when parameters get a gradient, or their flags do not come back, or logits come with a graph."""
    model, (x, y) = net(), batch()
    model[1].weight.requires_grad_(False)
    found = OneStep.rs_fgsm(Threat(0.1))(model, x, y)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        OneStep.rs_fgsm(Threat(0.1))(model, x, y + 100)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert not found.logits.requires_grad
    assert not found.inputs.requires_grad
    kept = OneStep.rs_fgsm(Threat(0.1))(model, x, y, keep_graph=True)
    kept.losses.sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [False, True, True, True]


def test_the_gradient_is_that_of_each_sample_alone():
    """Fails when the loss is averaged: in a batch of two a gradient would be half of what it is alone."""
    model, (x, y) = net(), batch(2)
    together, _, _ = input_gradient(model, x, y)
    alone, _, _ = input_gradient(model, x[:1], y[:1])
    torch.testing.assert_close(together[:1], alone)


def linear_margin(model, x, y, radius):
    """The least margin that an attacker can leave a linear classifier of two classes: exact."""
    w = model.weight[1] - model.weight[0]
    margin = (x @ w + model.bias[1] - model.bias[0]) * (2 * y - 1)
    return margin - radius * w.abs().sum()


def test_pgd_finds_the_worst_of_a_linear_classifier():
    """Fails when PGD stops early, steps the wrong way or projects wrongly: there the worst input is known exactly."""
    draws = torch.Generator().manual_seed(0)
    model = seeded(0, nn.Linear, 12, 2).eval()
    x = 0.3 + 0.4 * torch.rand(300, 12, generator=draws)
    y = (model(x).argmax(dim=1) + (torch.rand(300, generator=draws) < 0.1)) % 2
    exact = (linear_margin(model, x, y, 0.05) > 0).double().mean().item()
    found = robust_accuracy(model, x, y, partial(pgd, threat=Threat(0.05, -1.0, 2.0), steps=20, restarts=2))
    assert 0.1 < exact < 0.9
    assert found == pytest.approx(exact, abs=1e-9)


def test_pgd_is_repeatable_and_draws_from_nobody():
    """Fails when it uses the global generator: an evaluation would change the training that goes on after it."""
    model, (x, y) = net().eval(), batch(20)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (pgd(model, x, y, Threat(0.1), steps=3, restarts=2) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, pgd(model, x, y, Threat(0.1), steps=3, restarts=2, seed=1))


def test_more_restarts_never_help_the_defender():
    """Fails when a later restart overwrites what an earlier one found."""
    model, (x, y) = net().eval(), batch(200)
    few, many = (robust_accuracy(model, x, y, partial(pgd, threat=Threat(0.05), steps=2, restarts=r)) for r in (1, 8))
    assert many <= few


def test_what_is_fooled_is_not_attacked_again():
    """Fails when a later restart goes on with samples that an earlier one fooled: time, and it could overwrite them."""
    model, (x, _) = net().eval(), batch(20)
    wrong, calls = (model(x).argmax(dim=1) + 1) % 5, []
    hook = model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    pgd(model, x, wrong, Threat(1e-6), steps=2, restarts=5)
    hook.remove()
    assert calls == [20, 20, 20]


def test_accuracy_is_looked_at_in_evaluation_mode_and_the_modes_come_back():
    """Fails when batch normalisation uses the statistics of the attacked batch, or a frozen part is set to train."""
    model = small_convnet(10, size=8).train()
    model.features[1].eval()
    x, y = torch.rand(9, 1, 8, 8), torch.arange(9)
    mean = model.features[4].running_mean.clone()
    robust_accuracy(model, x, y, partial(pgd, threat=Threat(0.1), steps=1, restarts=1), batch_size=4)
    assert torch.equal(mean, model.features[4].running_mean)
    assert model.training
    assert not model.features[1].training


def test_auto_attack_finds_the_worst_of_a_linear_classifier_of_normalised_inputs():
    """Fails when the package is given normalised inputs or a normalised radius: it knows pixels in [0, 1] alone."""
    pytest.importorskip("pyautoattack", reason="needs pyautoattack")
    draws = torch.Generator().manual_seed(0)
    model = seeded(0, nn.Sequential, nn.Flatten(), nn.Linear(48, 2)).eval()
    pixels = 0.3 + 0.4 * torch.rand(60, 3, 4, 4, generator=draws)
    x, threat = normalised(pixels), Threat.normalised(0.02, mean=MEAN, std=STD)
    y = model(x).argmax(dim=1)
    w = (model[1].weight[1] - model[1].weight[0]).view(3, 4, 4)
    margin = (model(x)[:, 1] - model(x)[:, 0]) * (2 * y - 1)
    exact = (margin > (w.abs().sum(dim=(1, 2)) * 0.02 / torch.tensor(STD)).sum()).double().mean().item()
    attack = partial(auto_attack, threat=threat, attacks=["apgd-ce"])
    assert 0.1 < exact < 0.9
    assert robust_accuracy(model, x, y, attack) == pytest.approx(exact, abs=1e-9)


def test_auto_attack_says_how_to_install_it(monkeypatch):
    """Fails when a missing package shows as a bare ModuleNotFoundError."""
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    assert_refused(lambda: auto_attack(net().eval(), *batch(), Threat(0.1)), ImportError, ["pip install pyautoattack"])


class _Structured(nn.Module):
    def forward(self, x):
        return {"logits": x}


def _attack(threat, x=None):
    inputs, y = batch()
    return lambda: OneStep.fgsm(threat)(net(), inputs if x is None else x, y)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        refused("radius of 8 for pixels in [0, 1]", lambda: Threat(8), UserWarning, ["radius of 8", "8 / 255"]),
        refused("no radius", lambda: Threat(0.0), ValueError, ["radius must be positive", "8 / 255"]),
        refused("empty range", lambda: Threat(0.1, 1.0, 0.0), ValueError, ["low must be below high", "1.0", "0.0"]),
        refused(
            "mean and std of other channels",
            lambda: Threat.normalised(0.1, mean=MEAN, std=(0.2, 0.2)),
            ValueError,
            ["mean (3,)", "std (2,)"],
        ),
        refused(
            "numbers of other channels than the inputs",
            _attack(Threat.normalised(0.1, mean=(0.5, 0.5), std=(0.2, 0.2))),
            ValueError,
            ["(2,)", "(6, 3, 4, 4)"],
        ),
        refused("std of 0", lambda: Threat.normalised(0.1, std=0.0), ValueError, ["std must be positive", "0.0"]),
        refused(
            "inputs outside the range",
            _attack(Threat(0.1), normalised(batch()[0])),
            ValueError,
            ["0.0 to 1.0", "Threat.normalised"],
        ),
        refused("inputs that are NaN", _attack(Threat(0.1), batch()[0] * float("nan")), ValueError, ["0.0 to 1.0"]),
        refused("bytes", _attack(Threat(0.1), torch.zeros(6, 3, 4, 4, dtype=torch.uint8)), TypeError, ["uint8", "255"]),
        refused("no step", lambda: OneStep(Threat(0.1), step=0.0), ValueError, ["step must be > 0", "0.0"]),
        refused("negative start", lambda: OneStep(Threat(0.1), start=-1.0), ValueError, ["start must be >= 0", "-1"]),
        refused(
            "a mean as loss",
            lambda: input_gradient(net(), *batch(), loss=F.cross_entropy),
            ValueError,
            ["(6,)", "reduction='none'"],
        ),
        refused(
            "a model that returns a structure",
            lambda: input_gradient(_Structured(), *batch()),
            TypeError,
            ["dict", "logits"],
        ),
        refused(
            "pgd in training mode", lambda: pgd(net().train(), *batch(), Threat(0.1), steps=1), UserWarning, ["eval()"]
        ),
        refused(
            "pgd without steps",
            lambda: pgd(net().eval(), *batch(), Threat(0.1), steps=0),
            ValueError,
            ["steps must be at least 1", "0"],
        ),
        refused(
            "a gradient that underflows",
            lambda: OneStep.fgsm(Threat(0.1))(
                nn.Sequential(nn.Flatten(), nn.Linear(48, 5, bias=False)).to(torch.bfloat16),
                batch()[0].bfloat16(),
                batch()[1],
                loss=lambda z, y: 0.0 * F.cross_entropy(z, y, reduction="none"),
            ),
            UserWarning,
            ["bfloat16", "1024"],
        ),
        refused("accuracy of nothing", lambda: robust_accuracy(net(), *batch(0)), ValueError, ["one sample"]),
        refused(
            "AutoAttack of unequal radii",
            lambda: auto_attack(net().eval(), *batch(), Threat((0.1, 0.2, 0.1))),
            ValueError,
            ["one radius", "0.2"],
        ),
        refused(
            "AutoAttack of an unknown version",
            lambda: auto_attack(net().eval(), *batch(), Threat(0.1), version="fast"),
            ValueError,
            ["version must be", "'fast'"],
        ),
    ],
)
def test_bad_input(call, error, says):
    """Fails when a bad input is taken, or refused without saying what was given and how to mend it."""
    assert_refused(call, error, says)
