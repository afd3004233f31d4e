"""Cost of a step of the quiz beside a supervised step of the same trunk on the same images, whole."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, placed, stepper
from regularized.evidence.models import ResNet
from regularized.self_supervised.selfie.layer import AttentionPool
from regularized.self_supervised.selfie.pretext import Selfie


def _convolutions() -> nn.Sequential:
    """Four convolutions to 64 channels."""
    layers: list[nn.Module] = []
    for ins, outs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers)


def _stages() -> nn.Sequential:
    """Stem and three stages of a ResNet-18 of a quarter of the width, to 64 channels."""
    net = ResNet((2, 2, 2, 2), 10, width=16)
    return nn.Sequential(net.stem, net.norm, nn.ReLU(), *list(net.layers)[:6])


def _build(trunk: Callable[[], nn.Module], depth: int) -> tuple[StepFunction, StepFunction]:
    x, y = batch((32, 3, 32, 32))
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def whole() -> nn.Module:
        return nn.Sequential(trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def quiz() -> nn.Module:
        pool = AttentionPool(64, depth=depth, heads=4, hidden=128)
        return Selfie(trunk(), dim=64, patch_size=8, grid=(4, 4), pool=pool)

    selfie = placed(quiz)
    supervised = classifier_step(placed(whole), x, y, sgd)
    return supervised, stepper(lambda: selfie(x.to(device())).loss, sgd(selfie.parameters()))


def workloads() -> list[Workload]:
    """Images of 32 pixels in 16 patches, with the paper's three layers of pooling and with one."""
    return [
        Workload("4 convolutions, B32, 16 patches, pool of 3 layers", partial(_build, _convolutions, 3)),
        Workload("three stages of resnet18 w16, B32, 16 patches, pool of 3 layers", partial(_build, _stages, 3)),
        Workload("the same, pool of 1 layer", partial(_build, _stages, 1)),
    ]
