"""Cost of the diagnostics: the report beside a plain pass over the data, theory beside solving one data set."""

from functools import partial

import torch

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed
from regularized.evidence.models import mlp
from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.report import frozen_subspace


def _report(sizes: tuple[int, ...], rows: int) -> tuple[StepFunction, StepFunction]:
    model = placed(mlp, sizes).eval()
    batches = list(torch.rand(rows, sizes[0]).to(device()).split(500))

    def plain() -> None:
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()

    def with_report() -> None:
        plain()
        frozen_subspace(model, batches)

    return plain, with_report


def _curves(parameters: int) -> tuple[StepFunction, StepFunction]:
    x, y = (torch.randn(shape).double().to(device()) for shape in ((parameters, parameters), (parameters,)))
    x /= parameters**0.5
    t = torch.logspace(-2, 2, 400, dtype=torch.float64)
    dynamics = LinearDynamics(1.0, noise=0.25)

    def one_data_set() -> None:
        GradientFlow(x, y).train_error(t)

    def theory() -> None:
        dynamics.test_error(t)

    return one_data_set, theory


def workloads() -> list[Workload]:
    """The report after an epoch, and the curves."""
    return [
        Workload(
            "MLP 64-256-10, 5,000 samples",
            partial(_report, (64, 256, 10), 5000),
            "an epoch of forward and backward passes, without and with one report at its end; the training step itself "
            "costs nothing more",
            floor=2.0,
        ),
        Workload(
            "400 times, N = P = 400",
            partial(_curves, 400),
            "closed-form curve beside the exact solution of one data set",
            floor=0.1,
        ),
    ]
