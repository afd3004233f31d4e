"""Cost of PS-KD beside plain cross-entropy: one read and one write of a row of predictions for each sample."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, device, image_net, perceptron, placed, stepper
from regularized.evidence.models import mlp
from regularized.mechanisms.prediction_store import DenseStore, PredictionStore, TopKStore
from regularized.overfitting.ps_kd import ProgressiveDistillationLoss

SAMPLES = 50_000  # the table has the size of CIFAR's; batches are drawn from it


def _training_step(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> StepFunction:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    return stepper(lambda: loss(model(x)), optimizer)


def _build(
    model: Callable[[], nn.Module],
    shape: tuple[int, ...],
    classes: int,
    store: Callable[[int, int], PredictionStore] = DenseStore,
) -> tuple[StepFunction, StepFunction]:
    x, y = batch(shape, classes)
    criterion = ProgressiveDistillationLoss(SAMPLES, classes, epochs=300, store=store(SAMPLES, classes)).to(device())
    criterion.set_progress(2 / 3)  # an epoch without end
    batches = torch.randperm(SAMPLES).to(device())[: 16 * shape[0]].view(16, -1).unbind()
    for index in batches:  # past the first epoch, where every label would still be one-hot
        criterion.store.write(index, torch.rand(len(index), classes).to(device()).softmax(dim=1))
    order = cycle(batches)
    plain, distilled = placed(model), placed(model)
    return (
        _training_step(plain, lambda z: F.cross_entropy(z, y), x),
        _training_step(distilled, lambda z: criterion(z, y, next(order)), x),
    )


def workloads() -> list[Workload]:
    """A tiny MLP (the worst case), ResNet-18 on images of CIFAR's shape, and many classes with two stores."""
    wide = partial(mlp, [512, 1024, 1024, 1000])
    lean = partial(TopKStore, k=10)
    return [
        Workload("MLP 784-256-10, B 128", partial(_build, perceptron, (128, 784), 10), floor=1.1),
        Workload("ResNet-18 width 16, 3x32x32, B 64", partial(_build, image_net, (64, 3, 32, 32), 10)),
        Workload("ResNet-18 width 16, 3x32x32, B 128", partial(_build, image_net, (128, 3, 32, 32), 10)),
        Workload("MLP 512-1024-1024-1000, B 128", partial(_build, wide, (128, 512), 1000)),
        Workload("the same, ten largest entries", partial(_build, wide, (128, 512), 1000, lean)),
    ]
