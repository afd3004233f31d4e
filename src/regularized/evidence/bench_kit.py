"""What benches share: the device, batches on it, the two networks that most are timed on, and a plain training step."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction
from regularized.evidence.models import mlp, resnet18, seeded

__all__ = [
    "batch",
    "classifier_step",
    "device",
    "image_net",
    "on_first_call",
    "perceptron",
    "placed",
    "stepper",
    "trained",
]

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

perceptron = partial(mlp, [784, 256, 10])
"""A network whose step is a millisecond or two: the worst case for what a technique adds."""

image_net = partial(resnet18, 10, width=16)
"""A convolutional network of a size that a laptop trains."""


def device() -> torch.device:
    """Where every bench measures: on the GPU where there is one, so that no table mixes devices."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(build: type[nn.Module] | object, *args: object, seed: int = 0, **kwargs: object) -> nn.Module:
    """A module of its own initialisation seed, see :func:`~regularized.evidence.models.seeded`, on the device.

    Examples:
        >>> placed(nn.Linear, 3, 2).weight.shape
        torch.Size([2, 3])
    """
    return seeded(seed, build, *args, **kwargs).to(device())


def batch(shape: tuple[int, ...], classes: int = 10) -> tuple[Tensor, Tensor]:
    """Normal inputs of a shape and class labels, always the same, on the device.

    Examples:
        >>> x, y = batch((4, 3, 8, 8))
        >>> x.shape, y.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4]))
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, shape[:1], generator=generator)
    return torch.randn(shape, generator=generator).to(device()), y.to(device())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that need a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def stepper(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> StepFunction:
    """One whole training step: forward and backward pass, optimizer.

    Args:
        loss: the forward pass up to the scalar.
        optimizer: of what is trained.

    Examples:
        >>> layer = nn.Linear(3, 1)
        >>> step = stepper(lambda: layer(torch.ones(2, 3)).mean(), torch.optim.SGD(layer.parameters(), lr=0.1))
        >>> step()
    """

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def on_first_call(build: Callable[[], StepFunction]) -> StepFunction:
    """A step that is built when it is first taken, so that measuring the memory of one does not hold the other's model.

    Args:
        build: makes model, optimizer and step.

    Examples:
        >>> step = on_first_call(lambda: print("built") or (lambda: print("step")))
        >>> step(), step()
        built
        step
        step
        (None, None)
    """
    built: list[StepFunction] = []

    def step() -> None:
        if not built:
            built.append(build())
        built[0]()

    return step


def classifier_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer) -> StepFunction:
    """The plain step that classifiers are compared with: cross-entropy of one batch.

    Args:
        model: on the device.
        x: its inputs.
        y: (B,) labels.
        optimizer: factory.
    """
    return stepper(lambda: F.cross_entropy(model(x), y), optimizer(model.parameters()))
