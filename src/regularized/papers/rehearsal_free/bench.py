"""Cost of distillation and of anchors over a plain step of the same network on the same batch."""

from functools import partial

import torch
from torch import nn

from regularized.continual.rehearsal_free.term import ContinualLoss, WeightAnchor
from regularized.continual.tasks import Task
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, image_net, perceptron, placed
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

ADAM = partial(torch.optim.Adam, lr=1e-3)
OLD, NEW = tuple(range(5)), tuple(range(5, 10))


def _workload(
    make: type[nn.Module] | object, shape: tuple[int, ...], *, distil: float, anchor: bool
) -> tuple[StepFunction, StepFunction]:
    """The second of two tasks of five classes."""
    x, y = batch(shape)
    y = y % 5 + 5
    plain, model = placed(make), placed(make)
    loss = ContinualLoss(10, known=OLD, distil=distil).to(device())
    hold = WeightAnchor(weight=0.01, pretrained=True).to(device())
    for term in (loss, hold):
        term.attach(model)
        term.to(device())
    loss.task_start(Task(1, NEW, None))
    optimizer, given, at = ADAM(model.parameters()), Batch(x, y), Progress(1, 10)

    def step() -> None:
        seen = Step(model, given, at)
        (loss(seen) / len(x)).backward()
        if anchor:
            hold.before_step(seen)
        optimizer.step()
        optimizer.zero_grad()

    return classifier_step(plain, x, y, ADAM), step


def workloads() -> list[Workload]:
    """Distillation, an anchor alone, and both, on a perceptron and a small ResNet."""
    mlp, images = (128, 784), (64, 3, 32, 32)
    return [
        Workload(
            "distillation, MLP 784-256-10, B128",
            partial(_workload, perceptron, mlp, distil=1.0, anchor=False),
            note="a step of 2 ms: the worst case",
        ),
        Workload(
            "distillation, resnet18 w16, B64 (CIFAR shape)",
            partial(_workload, image_net, images, distil=1.0, anchor=False),
        ),
        Workload(
            "L2 anchor alone, resnet18 w16, B64 (CIFAR shape)",
            partial(_workload, image_net, images, distil=0.0, anchor=True),
            floor=1.0,
        ),
        Workload(
            "distillation and L2 anchor, resnet18 w16, B64 (CIFAR shape)",
            partial(_workload, image_net, images, distil=1.0, anchor=True),
        ),
    ]
