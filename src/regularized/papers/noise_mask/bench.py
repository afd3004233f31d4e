"""Cost of a phase-1 step, beside a plain step of the same classifier."""

from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import classifier_step, device, placed
from regularized.evidence.models import ResNet, resnet18
from regularized.overfitting.noise_mask.layer import BetaMaskPolicy, NoiseMask
from regularized.overfitting.noise_mask.procedure import NoiseMaskPretraining


def _build(batch: int, side: int, width: int, policy_width: int, grid: int) -> tuple[StepFunction, StepFunction]:
    x, y = torch.rand(batch, 3, side, side).to(device()), torch.randint(10, (batch,)).to(device())
    plain, masked = placed(resnet18, width=width), placed(resnet18, width=width)
    features = placed(ResNet, (1, 1, 1, 1), 1, width=policy_width, seed=1)
    features.head = nn.Identity()
    policy = BetaMaskPolicy(features, features=8 * policy_width, grid=grid).to(device())
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    pretraining = NoiseMaskPretraining(masked, NoiseMask(policy), optimizer=sgd, policy_optimizer=sgd, coupled=False)

    def method_step() -> None:
        pretraining.training_step((x, y))

    return classifier_step(plain, x, y, sgd), method_step


def workloads() -> list[Workload]:
    """A policy of a quarter of the classifier's width, and one of its own width and half its depth."""
    return [
        Workload(
            "ResNet-18 width 16, 3x32x32, B 32, grid 16",
            partial(_build, 32, 32, 16, 4, 16),
            "small policy: ResNet-10 of width 4, about 0.03 of the classifier's arithmetic",
            floor=1.05,
        ),
        Workload(
            "ResNet-18 width 16, 3x32x32, B 32, grid 32",
            partial(_build, 32, 32, 16, 16, 32),
            "policy: ResNet-10 of width 16, about 0.4 of the classifier's arithmetic",
            floor=1.4,
        ),
    ]
