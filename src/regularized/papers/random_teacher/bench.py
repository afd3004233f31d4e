"""Cost of a step against a random teacher, beside a supervised step of the same network on the same batch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.evidence.models import ResNet, mlp
from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.teacher import RandomTeacher


def _resnet(head: partial[BottleneckHead]) -> nn.Module:
    encoder = ResNet((2, 2, 2, 2), 10, width=16)
    encoder.head = nn.Identity()  # type: ignore[assignment]
    return EncoderWithHead(encoder, head(128))


def _perceptron(head: partial[BottleneckHead]) -> nn.Module:
    return EncoderWithHead(mlp([784, 512, 512]), head(512))


def _build(
    network: Callable[[], nn.Module], shape: tuple[int, ...], *, remember: bool, chunk: int | None = None
) -> tuple[StepFunction, StepFunction]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device())
    index = torch.arange(len(x), device=device())
    plain, student, teacher = (placed(network, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        labels = torch.randint(plain(x).shape[1], (len(x),), generator=torch.Generator().manual_seed(1)).to(device())
    match = RandomTeacher(student, teacher, chunk=chunk)
    if remember:
        match.remember(x)
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)

    supervised = stepper(lambda: F.cross_entropy(plain(x), labels), adamw(plain.parameters()))
    return supervised, stepper(lambda: match(x, index), adamw(student.parameters()))


SMALL = partial(BottleneckHead, hidden=(512, 512), bottleneck=128, out_features=4096)
WIDE = partial(BottleneckHead, out_features=65536)  # the paper's: 2048, 2048, 256, 65536


def workloads() -> list[Workload]:
    """A convolutional encoder with a small head, the teacher run and remembered; and the paper's head."""
    image, flat = (64, 3, 32, 32), (64, 784)
    return [
        Workload(
            "resnet18 w16, B64, head of 4096, teacher run",
            partial(_build, partial(_resnet, SMALL), image, remember=False),
            floor=4 / 3,
        ),
        Workload(
            "resnet18 w16, B64, head of 4096, teacher remembered",
            partial(_build, partial(_resnet, SMALL), image, remember=True),
            note="the teacher's last matrix is still multiplied in each step",
            floor=1.0,
        ),
        Workload(
            "MLP 784-512-512, B64, head of 65536, teacher remembered",
            partial(_build, partial(_perceptron, WIDE), flat, remember=True),
            note="the head is nearly everything here; the teacher's last matrix is multiplied in each step",
            floor=4 / 3,
        ),
        Workload(
            "MLP 784-512-512, B64, head of 65536, teacher remembered, chunk 32",
            partial(_build, partial(_perceptron, WIDE), flat, remember=True, chunk=32),
            note="32 samples at a time",
            floor=4 / 3,
        ),
    ]
