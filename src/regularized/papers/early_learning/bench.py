"""Overhead of ELR and ELR+ over a plain step of the same model on the same batch."""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, image_net, perceptron, placed, stepper
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus

SAMPLES = 50_000  # as in CIFAR
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)


def _indices(size: int) -> list[Tensor]:
    # Another index in every step, as in training: the rows of the table are cold.
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    return list(torch.split(order, size))[:-1]


def _elr(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = batch(shape)
    plain, model = placed(make), placed(make)
    criterion = EarlyLearningLoss(SAMPLES, 10).to(device())
    indices = cycle(_indices(len(x)))

    def loss() -> Tensor:
        value: Tensor = criterion(model(x), y, next(indices))
        return value

    return classifier_step(plain, x, y, SGD), stepper(loss, SGD(model.parameters()))


def _elr_plus(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = batch(shape)
    seeds = iter((0, 1))
    plus = EarlyLearningPlus(
        lambda: placed(make, seed=next(seeds)), num_samples=SAMPLES, num_classes=10, optimizer=SGD, device=device()
    )
    indices = cycle(_indices(len(x)))

    def step() -> None:
        index = next(indices)
        for net in (0, 1):
            plus.training_step(net, (x, y, index))

    return classifier_step(placed(make), x, y, SGD), step


def workloads() -> list[Workload]:
    """ELR on a small and on two convolutional workloads; ELR+ (both networks) against one plain step."""
    return [
        Workload(
            "ELR, MLP 784-256-10, B128", partial(_elr, perceptron, (128, 784)), note="a step of 2 ms: the worst case"
        ),
        Workload("ELR, resnet18 w16, B64 (CIFAR shape)", partial(_elr, image_net, (64, 3, 32, 32))),
        Workload("ELR, resnet18 w16, B128 (CIFAR shape)", partial(_elr, image_net, (128, 3, 32, 32))),
        Workload(
            "ELR+, resnet18 w16, B64 (CIFAR shape)",
            partial(_elr_plus, image_net, (64, 3, 32, 32)),
            note="both networks against one plain step; the floor counts passes: 2 x (3 + 1) / 3",
            floor=8 / 3,
        ),
    ]
