"""What the contract suite checks of the diagnostics: the report on a network, and the forecast."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import DiagnosticSubject
from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.report import frozen_subspace


def small_network() -> nn.Module:
    """Three classes of 8 pixels."""
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def pixels(device: torch.device) -> Tensor:
    """40 images of 8 pixels, the last two always black."""
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    x[:, 6:] = 0.0
    return x.to(device)


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    spectra = frozen_subspace(model, [pixels(next(model.parameters()).device)])
    return {
        f"{name}.{what}": value
        for name, layer in spectra.items()
        for what, value in (("eigenvalues", layer.eigenvalues), ("rank", torch.tensor(layer.rank)))
    }


def _forecast(model: nn.Module) -> Mapping[str, Tensor]:
    """Theory on the features of a hidden layer: what a user does with the last layer's inputs."""
    x = pixels(next(model.parameters()).device)
    with torch.no_grad():
        hidden = torch.relu(model[0](x)) if isinstance(model, nn.Sequential) else x
    targets = x.sum(dim=1).sin()
    dynamics = LinearDynamics.from_features(hidden - hidden.mean(dim=0), targets - targets.mean(), noise=0.1)
    t = torch.logspace(-1, 3, 5)
    return {"test_error": dynamics.test_error(t), "flow": GradientFlow(hidden, targets).train_error(t)}


def subjects() -> list[DiagnosticSubject]:
    """The report on all layers, and the forecast for one layer's features."""
    return [
        DiagnosticSubject("frozen subspace", small_network, _report),
        DiagnosticSubject("forecast from features", small_network, _forecast),
    ]
