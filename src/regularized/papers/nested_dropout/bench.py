"""Overhead of nested dropout and of co-teaching over a plain step of the same model on the same batch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.models import mlp, resnet18, seeded
from regularized.noisy_labels.co_teaching import CoTeaching
from regularized.noisy_labels.nested_dropout.layer import NestedDropout, nest_classifier

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, shape[:1], generator=generator)
    return torch.randn(shape, generator=generator).to(DEVICE), y.to(DEVICE)


def _flat_net() -> nn.Module:
    return mlp([784, 256, 10])


def _image_net() -> nn.Module:
    return resnet18(10, width=16)


def _step(model: nn.Module, x: Tensor, y: Tensor) -> StepFunction:
    optimizer = SGD(model.parameters())

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sliced(
    make: Callable[[], nn.Module], classifier: str, sigma: float, shape: tuple[int, ...]
) -> tuple[StepFunction, StepFunction]:
    plain, nested = seeded(0, make).to(DEVICE), seeded(0, make).to(DEVICE)
    nest_classifier(nested, classifier, sigma=sigma)
    return _step(plain, *_batch(shape)), _step(nested, *_batch(shape))


def _masked(shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    plain, nested = seeded(0, _flat_net).to(DEVICE), seeded(0, _flat_net).to(DEVICE)
    assert isinstance(nested, nn.Sequential)
    nested.insert(2, NestedDropout(256, sigma=10.0).to(DEVICE))
    return _step(plain, *_batch(shape)), _step(nested, *_batch(shape))


def _co_teaching(shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = _batch(shape)
    plain = seeded(0, _image_net).to(DEVICE)
    co = CoTeaching(*(seeded(seed, _image_net).to(DEVICE) for seed in (0, 1)), optimizer=SGD, forget_rate=0.2)

    def step() -> None:
        co.training_step((x, y))

    return _step(plain, x, y), step


def workloads() -> list[Workload]:
    """The layer in both forms where a step is shortest, on a convolutional net, and co-teaching."""
    images = (64, 3, 32, 32)
    kept = int(0.8 * 32) / 32
    return [
        Workload(
            "NestedLinear, MLP 784-256-10, B 128",
            partial(_sliced, _flat_net, "2", 10.0, (128, 784)),
            note="a step of 2 ms: the worst case",
        ),
        Workload("NestedDropout and nn.Linear, MLP 784-256-10, B 128", partial(_masked, (128, 784))),
        Workload("NestedLinear, ResNet-18 width 16, 3x32x32, B 64", partial(_sliced, _image_net, "head", 10.0, images)),
        Workload(
            "co-teaching, ResNet-18 width 16, 3x32x32, B 64",
            partial(_co_teaching, images),
            note="both networks, 32 samples each, 25 of them kept, against one plain network with all 64; the floor "
            "counts passes: (1 + 3 x 25/32) / 3",
            floor=round((1 + 3 * kept) / 3, 2),
        ),
    ]
