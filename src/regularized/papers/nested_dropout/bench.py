"""Overhead of nested dropout and of co-teaching over a plain step of the same model on the same batch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, image_net, perceptron, placed
from regularized.noisy_labels.co_teaching import CoTeaching
from regularized.noisy_labels.nested_dropout.layer import NestedDropout, nest_classifier

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def _sliced(
    make: Callable[[], nn.Module], classifier: str, sigma: float, shape: tuple[int, ...]
) -> tuple[StepFunction, StepFunction]:
    plain, nested = placed(make), placed(make)
    nest_classifier(nested, classifier, sigma=sigma)
    return classifier_step(plain, *batch(shape), SGD), classifier_step(nested, *batch(shape), SGD)


def _masked(shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    plain, nested = placed(perceptron), placed(perceptron)
    assert isinstance(nested, nn.Sequential)
    nested.insert(2, NestedDropout(256, sigma=10.0).to(device()))
    return classifier_step(plain, *batch(shape), SGD), classifier_step(nested, *batch(shape), SGD)


def _co_teaching(shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    x, y = batch(shape)
    plain = placed(image_net)
    co = CoTeaching(*(placed(image_net, seed=seed) for seed in (0, 1)), optimizer=SGD, forget_rate=0.2)

    def step() -> None:
        co.training_step((x, y))

    return classifier_step(plain, x, y, SGD), step


def workloads() -> list[Workload]:
    """The layer in both forms where a step is shortest, on a convolutional net, and co-teaching."""
    images = (64, 3, 32, 32)
    kept = int(0.8 * 32) / 32
    return [
        Workload(
            "NestedLinear, MLP 784-256-10, B 128",
            partial(_sliced, perceptron, "2", 10.0, (128, 784)),
            note="a step of 2 ms: the worst case",
        ),
        Workload("NestedDropout and nn.Linear, MLP 784-256-10, B 128", partial(_masked, (128, 784))),
        Workload("NestedLinear, ResNet-18 width 16, 3x32x32, B 64", partial(_sliced, image_net, "head", 10.0, images)),
        Workload(
            "co-teaching, ResNet-18 width 16, 3x32x32, B 64",
            partial(_co_teaching, images),
            note="both networks, 32 samples each, 25 of them kept, against one plain network with all 64; the floor "
            "counts passes: (1 + 3 x 25/32) / 3",
            floor=round((1 + 3 * kept) / 3, 2),
        ),
    ]
