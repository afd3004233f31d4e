"""Cost of companding every linear and convolutional weight, beside the same model without."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, image_net, perceptron, placed, stepper
from regularized.overfitting.weight_compander import compand_weights, compander_param_groups


def _training_step(model: nn.Module, x: Tensor, y: Tensor) -> StepFunction:
    optimizer = torch.optim.SGD(compander_param_groups(model, weight_decay=5e-4), lr=1e-3, momentum=0.9)
    return stepper(lambda: F.cross_entropy(model(x), y), optimizer)


def _build(
    model: Callable[[], nn.Module], shape: tuple[int, ...], learnable: bool
) -> tuple[StepFunction, StepFunction]:
    x, y = batch(shape)
    plain, companded = placed(model), placed(model)
    compand_weights(companded, learnable=learnable, init="clamp")
    return _training_step(plain, x, y), _training_step(companded, x, y)


def workloads() -> list[Workload]:
    """An MLP whose step is mostly weights (the worst case), and a convolutional net."""
    return [
        Workload(
            "MLP 784-256-10, B 128", partial(_build, perceptron, (128, 784), False), "mostly weights: the worst case"
        ),
        Workload("ResNet-18 width 16, 3x32x32, B 64", partial(_build, image_net, (64, 3, 32, 32), False)),
        Workload("ResNet-18 width 16, 3x32x32, B 128", partial(_build, image_net, (128, 3, 32, 32), False)),
        Workload("the same, a and b learned", partial(_build, image_net, (128, 3, 32, 32), True)),
    ]
