"""Bad inputs of `generalization_dynamics`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.papers.generalization_dynamics.contract import pixels, small_network
from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics, Spectrum, steps_for
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.report import frozen_drift, frozen_subspace


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    x, y = torch.randn(20, 5), torch.randn(20)
    with_dropout = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 2))
    return [
        refused("alpha <= 0", lambda: LinearDynamics(0.0), ValueError, ("alpha", "> 0", "0.0")),
        refused("variance < 0", lambda: LinearDynamics(1.0, noise=-1.0), ValueError, ("noise", ">= 0", "-1.0")),
        refused("start < 0", lambda: LinearDynamics(1.0, start=-0.1), ValueError, ("start", "-0.1")),
        refused("gamma < 0", lambda: LinearDynamics(1.0, weight_decay=-0.1), ValueError, ("weight_decay", "-0.1")),
        refused(
            "gamma < 0 on data", lambda: GradientFlow(x, y, weight_decay=-0.1), ValueError, ("weight_decay", "-0.1")
        ),
        refused("t is nan", lambda: LinearDynamics(1.0).test_error(float("nan")), ValueError, ("times", "nan")),
        refused("t < 0", lambda: LinearDynamics(1.0).train_error(-1.0), ValueError, ("times", ">= 0")),
        refused("t < 0 on data", lambda: GradientFlow(x, y).weights(-1.0), ValueError, ("times", ">= 0")),
        refused(
            "features not centred",
            lambda: LinearDynamics.from_features(x + 10.0, y, noise=0.1),
            UserWarning,
            ("mean", "Subtract"),
        ),
        refused(
            "noise unknown, too few samples",
            lambda: LinearDynamics.from_features(x[:4], y[:4]),
            ValueError,
            ("4 samples of 5 features", "noise="),
        ),
        refused("features all zero", lambda: LinearDynamics.from_features(0 * x, y, noise=0.0), ValueError, ("zero",)),
        refused("shapes do not fit", lambda: GradientFlow(x, y[:3]), ValueError, ("(20, 5)", "(3,)")),
        refused("not finite", lambda: GradientFlow(x / 0.0, y), ValueError, ("finite",)),
        refused("eigenvalue zero", lambda: Spectrum(torch.zeros(2), torch.ones(2)), ValueError, ("positive",)),
        refused(
            "momentum of 1", lambda: steps_for(1.0, lr=0.1, samples=10, momentum=1.0), ValueError, ("[0, 1)", "1.0")
        ),
        refused(
            "unknown loss",
            lambda: steps_for(1.0, lr=0.1, samples=10, loss="l1"),
            ValueError,
            ("mse", "'l1'"),
        ),
        refused(
            "batch normalisation or dropout active",
            lambda: frozen_subspace(with_dropout.train(), [x]),
            ValueError,
            ("training mode", "eval()"),
        ),
        refused(
            "unknown layer",
            lambda: frozen_subspace(small_network(), [pixels(torch.device("cpu"))], layers=["9"]),
            ValueError,
            ("['9']", "['0', '2']"),
        ),
        refused("no data", lambda: frozen_subspace(small_network(), []), ValueError, ("no input reached",)),
        refused(
            "states do not match",
            lambda: frozen_drift(frozen_subspace(small_network(), [pixels(torch.device("cpu"))]), {}, {}),
            ValueError,
            ("0.weight", "both states"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
