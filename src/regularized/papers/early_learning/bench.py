"""Overhead of ELR and ELR+ over a plain step of the same model on the same batch."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.models import mlp, resnet18, seeded
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus

SAMPLES = 50_000  # as in CIFAR
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _batch(shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, shape[:1], generator=generator)
    return torch.randn(shape, generator=generator).to(DEVICE), labels.to(DEVICE)


def _image_net() -> nn.Module:
    return resnet18(10, width=16)


def _flat_net() -> nn.Module:
    return mlp([784, 256, 10])


def _plain(make: type[nn.Module] | object, x: Tensor, y: Tensor) -> StepFunction:
    model = seeded(0, make).to(DEVICE)
    optimizer = SGD(model.parameters())

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _indices(batch: int) -> list[Tensor]:
    # Another index in every step, as in training: the rows of the table are cold.
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    return list(torch.split(order, batch))[:-1]


def _elr(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = _batch(shape, 10)
    model = seeded(0, make).to(DEVICE)
    optimizer = SGD(model.parameters())
    criterion = EarlyLearningLoss(SAMPLES, 10).to(DEVICE)
    indices = _indices(len(x))

    def step() -> None:
        index = indices.pop()
        indices.insert(0, index)
        criterion(model(x), y, index).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _plain(make, x, y), step


def _elr_plus(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = _batch(shape, 10)
    seeds = iter((0, 1))
    plus = EarlyLearningPlus(
        lambda: seeded(next(seeds), make), num_samples=SAMPLES, num_classes=10, optimizer=SGD, device=DEVICE
    )
    indices = _indices(len(x))

    def step() -> None:
        index = indices.pop()
        indices.insert(0, index)
        for net in (0, 1):
            plus.training_step(net, (x, y, index))

    return _plain(make, x, y), step


def workloads() -> list[Workload]:
    """ELR on a small and on two convolutional workloads; ELR+ (both networks) against one plain step."""
    return [
        Workload(
            "ELR, MLP 784-256-10, B128", partial(_elr, _flat_net, (128, 784)), note="a step of 2 ms: the worst case"
        ),
        Workload("ELR, resnet18 w16, B64 (CIFAR shape)", partial(_elr, _image_net, (64, 3, 32, 32))),
        Workload("ELR, resnet18 w16, B128 (CIFAR shape)", partial(_elr, _image_net, (128, 3, 32, 32))),
        Workload(
            "ELR+, resnet18 w16, B64 (CIFAR shape)",
            partial(_elr_plus, _image_net, (64, 3, 32, 32)),
            note="both networks against one plain step; the floor counts passes: 2 x (3 + 1) / 3",
            floor=8 / 3,
        ),
    ]
