"""Cost of training on the objective beside training on true signals, and of the newest layer alone."""

from functools import partial

import torch
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, stepper
from regularized.scientific.deep_unfolding.layer import UnfoldedISTA
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian


def _build(
    signal: int, measurements: int, layers: int, batch: int, frozen: int = 0
) -> tuple[StepFunction, StepFunction]:
    matrix = torch.randn(measurements, signal).to(device()) / measurements**0.5
    networks = [UnfoldedISTA(matrix, 0.3, layers=layers).to(device()) for _ in range(2)]
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in networks]
    objective = SparseObjective(matrix, 0.3).to(device())
    x, y = BernoulliGaussian(matrix)(batch)

    def loss(which: int, supervised: bool, frozen_layers: int) -> torch.Tensor:
        output = networks[which](y, frozen_layers=frozen_layers)
        value: torch.Tensor = F.mse_loss(output, x) if supervised else objective(output, y).mean()
        return value

    def step(which: int, supervised: bool, frozen_layers: int) -> None:
        stepper(partial(loss, which, supervised, frozen_layers), optimizers[which])()
        networks[which].clamp_steps_()

    return partial(step, 0, True, 0), partial(step, 1, False, frozen)


def workloads() -> list[Workload]:
    """The laptop's size, the literature's size, and a frozen prefix."""
    return [
        Workload("N 100, M 60, 15 layers, B 150", partial(_build, 100, 60, 15, 150), "supervised -> unsupervised"),
        Workload("N 500, M 250, 20 layers, B 200", partial(_build, 500, 250, 20, 200), "supervised -> unsupervised"),
        Workload(
            "N 500, M 250, 20 layers, B 200, newest layer alone",
            partial(_build, 500, 250, 20, 200, 19),
            "supervised, all layers -> unsupervised, the other 19 frozen",
            floor=0.37,
        ),
    ]
