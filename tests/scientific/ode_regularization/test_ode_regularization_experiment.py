"""The comparison behind the card: what its arms share, how they differ, and that the penalties reach the dynamics.

Each test names the fault that makes it fail.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from regularized.evidence.datasets import idx
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.ode_regularization import experiment
from regularized.papers.ode_regularization.experiment import ARMS, TUNING, Classifier

MECHANISM = {"train": 120, "batch": 40, "hidden": 16, "epochs": 8, "tight": 1e-8}


def settings(arm, **overrides):
    return resolve(experiment, arm, "smoke", overrides)


def run(arm, seed, scale, **overrides):
    return run_arm(experiment, arm, seed, scale, **overrides)


def test_controls_that_follow_from_tuned_arms():
    """Fails when an arm is tuned and the control derived from it keeps the old setting, or has trials of its own."""
    tenfold = 10 * ARMS["error_regularized"]["weight"]
    assert ARMS["error_tenfold"] == {**ARMS["error_regularized"], "weight": tenfold, "curves": False}
    assert ARMS["sde_plain_sosri2"] == {**ARMS["sde_plain"], "method": "sosri2"}
    assert set(ARMS) - set(TUNING.grids) == {"error_tenfold", "sde_plain_sosri2"}


@pytest.mark.parametrize("arm", TUNING.grids)
def test_every_chosen_setting_was_a_trial(arm):
    """Fails when a setting was typed in that was never tried."""
    chosen = resolve(experiment, arm, TUNING.scale)
    assert any(all(chosen[name] == value for name, value in trial.items()) for trial in TUNING.grids[arm])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARMS[arm].get("penalty") and ARMS[arm]["family"] == "ode"])
def test_arms_differ_in_their_penalty_alone(arm):
    """Fails when a method has other data, weights, order or rate than the baseline: without penalty they are one."""
    kept, plain = (run(name, 1003, "smoke", penalty=None, lr=0.1).metrics for name in (arm, "plain"))
    if arm == "local_error":  # its layer takes its one step whether a penalty wants it or not
        assert kept.pop("training_evaluations") > plain.pop("training_evaluations")
    assert kept == plain


@pytest.mark.parametrize("arm", ["random_end", "sde_error"])
def test_runs_repeat_and_leave_the_global_generator_alone(arm):
    """Fails when random ends or noise come from a stream that the seed does not decide."""
    state = torch.get_rng_state()
    first = run(arm, 1003, "smoke")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert run(arm, 1003, "smoke") == first


def test_a_doubling_costs_two_points():
    """Fails for the natural logarithm, or a sign."""
    assert experiment._score(90.0, 128) == pytest.approx(experiment._score(90.0, 64) - 2.0)


def test_kinetic_energy_of_constant_speed():
    """A field that is 0.5 everywhere has the mean square 0.25; fails for a sum, or one end alone."""
    s = settings("kinetic_energy")
    net = Classifier(3, s)
    for parameter in net.equation.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(net.equation.f.outer.bias, 0.5493061443340549)  # atanh(0.5)
    start = torch.zeros(2, 3)
    assert float(experiment._penalty(net.equation, start, net.equation(start), s).detach()) == pytest.approx(0.25)
    torch.nn.init.constant_(net.equation.f.outer.weight[:, -1].detach(), 10.0)  # the last column is the time
    later = float(experiment._penalty(net.equation, start, net.equation(start), s).detach())
    assert later == pytest.approx((0.25 + 1.0) / 2, abs=1e-4)


def test_ten_paths_of_a_noiseless_equation_are_one():
    """Fails when paths and rows are mixed up in the average."""
    net = Classifier(5, settings("sde_plain"))
    for parameter in net.equation.diffusion.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(6, 5)
    net.eval()
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    assert experiment._measure(net, x, y)[0] == 100.0
    assert experiment._measure(net, x, (y + 1) % 10)[0] == 0.0


def test_penalty_lowers_the_evaluations_on_small_data():
    """Fails when the penalty has the wrong sign, or its gradient does not reach the field."""
    plain = run("plain", 1003, "smoke", **MECHANISM, lr=0.1)
    regularized = run("error_regularized", 1003, "smoke", **MECHANISM, weight=100.0)
    assert regularized.metrics["evaluations"] < 0.85 * plain.metrics["evaluations"]
    assert regularized.metrics["training_evaluations"] < plain.metrics["training_evaluations"]


def test_paper_scale_says_what_is_missing(monkeypatch, tmp_path):
    """Fails when the original set-up dies with a traceback, or silently runs on other data."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # which would download it
    for arm in ("plain", "sde_error"):
        with pytest.raises(Unavailable, match="MNIST is not here"):
            run(arm, 0, "paper")


@pytest.mark.parametrize("arm", ["error_regularized", "sde_error"])
def test_paper_scale_runs_where_the_files_are(arm, monkeypatch, tmp_path):
    """Fails when the original set-up, which no machine of ours has run, does not fit its images or its settings."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 10)):
        for kind, shape, largest in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            body = draws.integers(0, largest, shape, dtype=np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + body)
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    monkeypatch.setattr(idx, "MNIST", replace(idx.MNIST, sha256=None))
    small = {"train": 40, "validation": 20, "batch": 20, "epochs": 1, "tight": 1e-4}
    measured = run(arm, 1003, "paper", **small)
    assert measured.metrics["evaluations"] > 0
    assert len(next(iter(measured.curves.values()))) == 1
