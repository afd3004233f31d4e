"""What the contract suite checks of the diagnostics: the report on a network, and every bad input with its error."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, DiagnosticSubject
from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics, Spectrum, steps_for
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.report import frozen_drift, frozen_subspace


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def _pixels(device: torch.device) -> Tensor:
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    x[:, 6:] = 0.0
    return x.to(device)


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    spectra = frozen_subspace(model, [_pixels(next(model.parameters()).device)])
    return {
        f"{name}.{what}": value
        for name, layer in spectra.items()
        for what, value in (("eigenvalues", layer.eigenvalues), ("rank", torch.tensor(layer.rank)))
    }


def _forecast(model: nn.Module) -> Mapping[str, Tensor]:
    """Theory on the features of a hidden layer: what a user does with the last layer's inputs."""
    x = _pixels(next(model.parameters()).device)
    with torch.no_grad():
        hidden = torch.relu(model[0](x)) if isinstance(model, nn.Sequential) else x
    targets = x.sum(dim=1).sin()
    dynamics = LinearDynamics.from_features(hidden - hidden.mean(dim=0), targets - targets.mean(), noise=0.1)
    t = torch.logspace(-1, 3, 5)
    return {"test_error": dynamics.test_error(t), "flow": GradientFlow(hidden, targets).train_error(t)}


def subjects() -> list[DiagnosticSubject]:
    """The report on all layers, and the forecast for one layer's features."""
    return [
        DiagnosticSubject("frozen subspace", _network, _report),
        DiagnosticSubject("forecast from features", _network, _forecast),
    ]


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    x, y = torch.randn(20, 5), torch.randn(20)
    with_dropout = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 2))
    return [
        BadInput("alpha <= 0", lambda: LinearDynamics(0.0), ValueError, ("alpha", "> 0", "0.0")),
        BadInput("variance < 0", lambda: LinearDynamics(1.0, noise=-1.0), ValueError, ("noise", ">= 0", "-1.0")),
        BadInput("start < 0", lambda: LinearDynamics(1.0, start=-0.1), ValueError, ("start", "-0.1")),
        BadInput("gamma < 0", lambda: LinearDynamics(1.0, weight_decay=-0.1), ValueError, ("weight_decay", "-0.1")),
        BadInput(
            "gamma < 0 on data", lambda: GradientFlow(x, y, weight_decay=-0.1), ValueError, ("weight_decay", "-0.1")
        ),
        BadInput("t is nan", lambda: LinearDynamics(1.0).test_error(float("nan")), ValueError, ("times", "nan")),
        BadInput("t < 0", lambda: LinearDynamics(1.0).train_error(-1.0), ValueError, ("times", ">= 0")),
        BadInput("t < 0 on data", lambda: GradientFlow(x, y).weights(-1.0), ValueError, ("times", ">= 0")),
        BadInput(
            "features not centred",
            lambda: LinearDynamics.from_features(x + 10.0, y, noise=0.1),
            UserWarning,
            ("mean", "Subtract"),
        ),
        BadInput(
            "noise unknown, too few samples",
            lambda: LinearDynamics.from_features(x[:4], y[:4]),
            ValueError,
            ("4 samples of 5 features", "noise="),
        ),
        BadInput("features all zero", lambda: LinearDynamics.from_features(0 * x, y, noise=0.0), ValueError, ("zero",)),
        BadInput("shapes do not fit", lambda: GradientFlow(x, y[:3]), ValueError, ("(20, 5)", "(3,)")),
        BadInput("not finite", lambda: GradientFlow(x / 0.0, y), ValueError, ("finite",)),
        BadInput("eigenvalue zero", lambda: Spectrum(torch.zeros(2), torch.ones(2)), ValueError, ("positive",)),
        BadInput(
            "momentum of 1", lambda: steps_for(1.0, lr=0.1, samples=10, momentum=1.0), ValueError, ("[0, 1)", "1.0")
        ),
        BadInput(
            "unknown loss",
            lambda: steps_for(1.0, lr=0.1, samples=10, loss=cast(Any, "l1")),
            ValueError,
            ("mse", "'l1'"),
        ),
        BadInput(
            "batch normalisation or dropout active",
            lambda: frozen_subspace(with_dropout.train(), [x]),
            ValueError,
            ("training mode", "eval()"),
        ),
        BadInput(
            "unknown layer",
            lambda: frozen_subspace(_network(), [_pixels(torch.device("cpu"))], layers=["9"]),
            ValueError,
            ("['9']", "['0', '2']"),
        ),
        BadInput("no data", lambda: frozen_subspace(_network(), []), ValueError, ("no input reached",)),
        BadInput(
            "states do not match",
            lambda: frozen_drift(frozen_subspace(_network(), [_pixels(torch.device("cpu"))]), {}, {}),
            ValueError,
            ("0.weight", "both states"),
        ),
    ]
