"""Cost of a step that forgets beside a step of plain distillation, and of one evaluation beside fifty.

Both steps have the same kept samples. The authors' code runs every term a second time, on a whole batch of the
forgotten label: 1.91 times the plain step of a U-Net of width 128, four stages, 8 x 8 pixels, batch 8.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed
from regularized.papers.score_forgetting.networks import Perceptron, UNet
from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion, OneStepGenerator
from regularized.unlearning.score_forgetting.procedure import ScoreForgettingDistillation


def _teacher(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> ConditionalDiffusion:
    # It was never trained, which is seen where noise is to be predicted.
    model = ConditionalDiffusion(placed(build), shape=shape, num_classes=10, prediction="v")
    return model.eval().requires_grad_(False)


def _steps(
    build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, share: float
) -> tuple[StepFunction, StepFunction]:
    plain = ScoreForgettingDistillation(_teacher(build, shape), forget=None)
    method = ScoreForgettingDistillation(_teacher(build, shape), forget=0, override=1, forget_share=share)
    return partial(_step, plain, batch), partial(_step, method, batch)


def _step(distillation: ScoreForgettingDistillation, batch: int) -> None:
    distillation.step(batch)


def _sampling(build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int) -> tuple[StepFunction, StepFunction]:
    teacher = _teacher(build, shape)
    labels = torch.arange(batch, device=device()) % 10

    def many() -> None:
        teacher.sample(labels, steps=50)

    def one() -> None:
        OneStepGenerator(teacher).sample(labels)

    return many, one


_WIDE = partial(UNet, 3, 8, 10, factors=(1, 2), attention=(4,), blocks=1)
_SMALL = partial(UNet, 3, 8, 10, width=32, factors=(1, 2), attention=(4,), blocks=1)
_PERCEPTRON = partial(Perceptron, 64, 10)


def workloads() -> list[Workload]:
    """A perceptron, a small U-Net, and one of the authors' width."""
    small = "U-Net ch 32, 2 stages, 8x8, B16"
    whole = "a whole batch of the forgotten label, as the authors have"
    return [
        Workload("MLP 128, 8x8, B64", partial(_steps, _PERCEPTRON, (1, 8, 8), 64, 0.125)),
        Workload(small, partial(_steps, _SMALL, (3, 8, 8), 16, 0.125)),
        Workload(f"{small}, forget_share 1", partial(_steps, _SMALL, (3, 8, 8), 16, 1.0), whole, floor=2.0),
        Workload(
            "U-Net ch 128, 2 stages, 8x8, B8",
            partial(_steps, _WIDE, (3, 8, 8), 8, 0.125),
            "the authors' code with four stages of this width: 1.91",
        ),
        Workload(
            "MLP 128, 8x8, 64 samples: one evaluation",
            partial(_sampling, _PERCEPTRON, (1, 8, 8), 64),
            "50 evaluations count as 1",
            floor=0.02,
        ),
    ]
