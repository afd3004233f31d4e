"""Cost of the gathered first layer beside the product with one-hot vectors, and of the diagnostics beside training."""

from functools import partial

import torch
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    QuadraticMLP,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.report import MemorizationProbe
from regularized.understanding.grokking.scores import neuron_ipr


def _step(net: QuadraticMLP, x: torch.Tensor, y: torch.Tensor) -> StepFunction:
    optimizer = modular_optimizer(net.parameters(), weight_decay=5.0)
    return stepper(lambda: one_hot_mse(net(x), y), optimizer)


def _nets(p: int, width: int) -> tuple[QuadraticMLP, QuadraticMLP]:
    one, other = (placed(QuadraticMLP, p, width=width) for _ in range(2))
    assert isinstance(one, QuadraticMLP)
    assert isinstance(other, QuadraticMLP)
    return one, other


def _first_layer(p: int, width: int, frac: float) -> tuple[StepFunction, StepFunction]:
    (plain, gathered), task = _nets(p, width), ModularArithmetic(p, frac=frac, noise=0.3)
    x, y = (part.to(device()) for part in task.train.tensors)
    return _step(plain, F.one_hot(x, p).flatten(1).float(), y), _step(gathered, x, y)


def _with_probe(p: int, width: int, every: int) -> tuple[StepFunction, StepFunction]:
    (plain, watched), task = _nets(p, width), ModularArithmetic(p, noise=0.3)
    x, y = (part.to(device()) for part in task.train.tensors)
    one, other, probe = _step(plain, x, y), _step(watched, x, y), MemorizationProbe(task)

    def steps() -> None:
        for _ in range(every):
            one()

    def steps_and_probe() -> None:
        for _ in range(every):
            other()
        probe(watched)

    return steps, steps_and_probe


def _with_scores(p: int, width: int) -> tuple[StepFunction, StepFunction]:
    (plain, scored), task = _nets(p, width), ModularArithmetic(p, noise=0.3)
    x, y = (part.to(device()) for part in task.train.tensors)
    one, other = _step(plain, x, y), _step(scored, x, y)

    def step_and_scores() -> None:
        other()
        with torch.no_grad():
            neuron_ipr(*scored.neuron_maps(), p=p)

    return one, step_and_scores


def workloads() -> list[Workload]:
    """The first layer at two sizes, the probe every ten steps, and the scores alone."""
    return [
        Workload(
            "p 53, N 256, 1,685 pairs",
            partial(_first_layer, 53, 256, 0.6),
            "step with one-hot vectors beside a step with the gathered first layer",
            floor=0.5,
        ),
        Workload(
            "p 97, N 500, 4,704 pairs",
            partial(_first_layer, 97, 500, 0.5),
            "step with one-hot vectors beside a step with the gathered first layer",
            floor=0.5,
        ),
        Workload(
            "p 97, N 500, probe every 10 steps",
            partial(_with_probe, 97, 500, 10),
            "ten steps, without and with a look at all 9,409 pairs and all neurons",
            floor=1.0,
        ),
        Workload(
            "p 97, N 500, scores at every step",
            partial(_with_scores, 97, 500),
            "the transform of 1,500 rows of 97",
            floor=1.0,
        ),
    ]
