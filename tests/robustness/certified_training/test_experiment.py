"""The experiment of `certified_training` at smoke scale, and what its conformance adapter makes of other cases."""

import numpy as np
import pytest
import torch

from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.certified_training import conformance, experiment


@pytest.fixture(scope="module")
def runs():
    return {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS}


def test_arms_share_images_and_differ(runs):
    """Fails when two arms are the same run, or see other images."""
    assert len({run.data for run in runs.values()}) == 1
    seen = {(run.metrics["clean_error"], *run.curves["validation_verified_error"]) for run in runs.values()}
    assert len(seen) > 1


def test_initialisation_stops_the_growth_before_training(runs):
    """Fails when the growth is measured after training, or on the default weights."""
    growth = {arm: run.metrics["interval_growth"] for arm, run in runs.items()}
    assert growth["initialisation"] == growth["fast"]
    assert growth["batch_norm"] == growth["penalties"]
    assert growth["fast"] < growth["batch_norm"]


def test_long_training_is_three_times_as_long(runs):
    """Fails when more epochs are not given to the arm that is to have them."""
    last = {arm: run.curves["validation_verified_error"][-1][0] for arm, run in runs.items()}
    assert last["ibp_long"] == 3 * last["ibp"] == 3 * last["fast"]


def test_verified_error_bounds_the_clean_error(runs):
    """Fails when a sample that is wrong counts as verified."""
    assert all(run.metrics["clean_error"] <= run.metrics["verified_error"] <= 100.0 for run in runs.values())


def test_paper_scale_is_the_published_network_and_says_what_is_missing():
    """Fails when the large run begins on a processor, or another network is built."""
    assert experiment.about(resolve(experiment, "fast", "paper")).weights == 17_192_650
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="GPU"):
            run_arm(experiment, "fast", 0, "paper")


# -- conformance ------------------------------------------------------------------------------------


def case(layers, x, **hp):
    """A case as a golden file has it, of a network whose state is all that is known."""
    model = torch.nn.Sequential(*layers).double()
    state = {f"param/{name}": value.detach().numpy() for name, value in model.state_dict().items()}
    inputs = {"x": x.numpy(), "y": np.arange(len(x)) % 3, **state}
    shapes, hidden, number = {}, x, 0
    for layer in model.eval():
        if isinstance(layer, torch.nn.ReLU):
            shapes[f"relu{number}_lower"] = hidden.detach().numpy()
            number += 1
        hidden = layer(hidden)
    given = {"eps": 0.0, "max_eps": 0.1, "train": 0.0, **hp}
    return Case("any", inputs, {name: np.asarray(value) for name, value in given.items()}, shapes), model


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_adapter_finds_strides_and_missing_settings(stride):
    """Fails when the adapter knows only the networks of the golden file: other strides, depths, no range, no std."""
    nn = torch.nn
    torch.manual_seed(0)
    side = (8 - 1) // stride + 1
    layers = [nn.Conv2d(2, 3, 3, stride, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(2 * side * side, 7), nn.ReLU(), nn.Linear(7, 3)]
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64)
    given, model = case(layers, x)
    found = conformance.compute(given)
    np.testing.assert_allclose(found["logits"], model(x).detach().numpy(), rtol=1e-12)
    assert {"relu0_lower", "relu1_upper", "relu2_lower", "grad/0.weight"} <= set(found)


def test_adapter_refuses_what_it_does_not_understand():
    """Fails when an unknown case passes as if it had been compared."""
    with pytest.raises(UnknownCase):
        conformance.compute(Case("other", {"z": np.zeros(1)}))
    with pytest.raises(UnknownCase):
        conformance.compute(Case("other", {"x": np.zeros((2, 3)), "y": np.zeros(2)}, {"eps": np.asarray(0.1)}))
