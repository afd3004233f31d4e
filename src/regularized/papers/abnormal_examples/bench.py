"""Cost of a step of one-step training with AAER: beside plain training, its host, a library, and PGD training."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, image_net, on_first_call, placed, stepper
from regularized.evidence.models import preact_resnet18
from regularized.robustness.abnormal_examples import AbnormalExamplesLoss
from regularized.robustness.attacks import OneStep, Threat, pgd

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)
THREAT = Threat(8 / 255)
Build = Callable[[], StepFunction]
preact_net = partial(preact_resnet18, 10, width=16)


def _pixels(size: int) -> tuple[Tensor, Tensor]:
    x, y = batch((size, 3, 32, 32))
    return x.sigmoid(), y


def _plain(make: object, size: int) -> StepFunction:
    return classifier_step(placed(make), *_pixels(size), SGD)


def _one_step(make: object, size: int, *, regularized: bool) -> StepFunction:
    """RS-FGSM, with the penalty or without it."""
    model, (x, y) = placed(make), _pixels(size)
    attack, criterion = OneStep.rs_fgsm(THREAT), AbnormalExamplesLoss()

    def loss() -> Tensor:
        found = attack(model, x, y)
        logits = model(found.inputs)
        value: Tensor = criterion(found.logits, found.losses, logits, y) if regularized else F.cross_entropy(logits, y)
        return value

    return stepper(loss, SGD(model.parameters()))


def _library(make: object, size: int) -> StepFunction:
    """RS-FGSM by torchattacks, as people train with it today; it has no such penalty."""
    import torchattacks

    model, (x, y) = placed(make), _pixels(size)
    attack = torchattacks.FFGSM(model, eps=8 / 255, alpha=10 / 255)
    attack.set_model_training_mode(True, batchnorm_training=True)
    return stepper(lambda: F.cross_entropy(model(attack(x, y)), y), SGD(model.parameters()))


def _many_steps(make: object, size: int) -> StepFunction:
    """PGD training with ten steps (Madry et al., 2018), which one-step training wants to do without."""
    model, (x, y) = placed(make), _pixels(size)

    def loss() -> Tensor:
        found = pgd(model.eval(), x, y, THREAT, steps=10, restarts=1)
        return F.cross_entropy(model.train()(found), y)

    return stepper(loss, SGD(model.parameters()))


def _pair(baseline: Build, method: Build) -> Callable[[], tuple[StepFunction, StepFunction]]:
    return lambda: (on_first_call(baseline), on_first_call(method))


def workloads() -> list[Workload]:
    """Two networks beside plain training; the penalty alone; a library's attack where it is installed; PGD training."""
    ours = partial(_one_step, regularized=True)
    beside_a_library = [
        Workload(
            "ResNet-18 width 16, 3x32x32, B 64, beside RS-FGSM of torchattacks",
            _pair(partial(_library, image_net, 64), partial(ours, image_net, 64)),
            "a torchattacks step counts as 1; theirs has no penalty",
            floor=1.0,
        )
    ]
    return [
        Workload(
            "ResNet-18 width 16, 3x32x32, B 64",
            _pair(partial(_plain, image_net, 64), partial(ours, image_net, 64)),
            "beside plain training; the official loop takes 2.11 here",
        ),
        Workload(
            "PreActResNet-18 width 16, 3x32x32, B 64",
            _pair(partial(_plain, preact_net, 64), partial(ours, preact_net, 64)),
            "beside plain training",
        ),
        Workload(
            "ResNet-18 width 16, 3x32x32, B 64, beside RS-FGSM",
            _pair(partial(_one_step, image_net, 64, regularized=False), partial(ours, image_net, 64)),
            "the same training without the penalty counts as 1",
            floor=1.0,
        ),
        *(beside_a_library if find_spec("torchattacks") else []),
        Workload(
            "ResNet-18 width 16, 3x32x32, B 16, beside PGD training with 10 steps",
            _pair(partial(_many_steps, image_net, 16), partial(ours, image_net, 16)),
            "a step of PGD training counts as 1",
            floor=5 / 23,  # a forward pass counts as 1: 2 + 1 + 2 beside 10 x 2 + 3
        ),
    ]
