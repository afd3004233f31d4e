"""Cost of certified training beside plain training of the same network, and beside auto_LiRPA.

The network is CNN-7 of the paper at a quarter of its width: five convolutions and a linear layer, batch normalisation
behind each. auto_LiRPA, on which the official code stands, takes 4.3 times as long as plain training here, and 5.5
times with the official penalties.
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import classifier_step, device, on_first_call, placed, stepper
from regularized.robustness.certified_training import (
    CertifiedLoss,
    IntervalBounds,
    SmoothedRadius,
    interval_init_,
    linf_box,
    robust_cross_entropy,
)

Build = Callable[[], nn.Module]
Data = Callable[[], tuple[Tensor, Tensor]]

RADIUS = 8 / 255
Adam = partial(torch.optim.Adam, lr=5e-4)


def _cnn7(width: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for wide, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers += [nn.Conv2d(channels, wide, 3, stride, 1), nn.BatchNorm2d(wide), nn.ReLU()]
        channels = wide
    return nn.Sequential(
        *(*layers, nn.Flatten(), nn.Linear(2 * width * 256, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))
    )


def _perceptron() -> nn.Sequential:
    layers: list[nn.Module] = []
    for features in (64, 128, 128, 128, 128):
        layers += [nn.Linear(features, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(32, 3, 32, 32, generator=generator), torch.randint(10, (32,), generator=generator)
    return x.to(device()), y.to(device())


def _pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(100, 64, generator=generator), torch.randint(10, (100,), generator=generator)
    return x.to(device()), y.to(device())


def _certified(
    build: Callable[[], nn.Module], data: Callable[[], tuple[Tensor, Tensor]], penalty: float
) -> StepFunction:
    """In the middle of the warm-up, where everything is computed."""
    model, (x, y) = placed(build), data()
    interval_init_(model)
    radius = SmoothedRadius(RADIUS, start=1, length=10, batches_per_epoch=10)
    loss = CertifiedLoss(model, radius=radius, data_range=(0.0, 1.0), penalty=penalty).to(device())
    loss.steps = 50
    return stepper(lambda: loss(x, y), Adam(model.parameters()))


def _pair(build: Build, data: Data, penalty: float) -> tuple[StepFunction, StepFunction]:
    plain = on_first_call(lambda: classifier_step(placed(build), *data(), Adam))
    return plain, on_first_call(partial(_certified, build, data, penalty))


# -- auto_LiRPA ---------------------------------------------------------------------------------------


def _beside_auto_lirpa() -> tuple[StepFunction, StepFunction]:
    """Plain interval bound propagation at a radius that stays, by both; first the same bounds are asked for."""
    _compare_bounds()
    theirs = on_first_call(_auto_lirpa)
    return theirs, on_first_call(partial(_certified, _cnn7, _images, 0.0))


def _their_margins(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> tuple[Callable[[], Tensor], nn.Module]:
    """Margins by auto_LiRPA, the clean pass of the same batch before them, as in the official code."""
    library = import_module("auto_LiRPA")
    perturbations = import_module("auto_LiRPA.perturbations")
    logging.getLogger("auto_LiRPA").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounded = library.BoundedModule(model.eval(), x, device=x.device)  # converted in training, it evaluates wrongly
    low, high = (x - radius).clamp(min=0.0), (x + radius).clamp(max=1.0)
    box = library.BoundedTensor(x, perturbations.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
    identity = torch.eye(10, dtype=x.dtype, device=x.device)
    differences = identity[y].unsqueeze(1) - identity  # (B, K, K), a row for each class

    def margins() -> Tensor:
        bounded(box)
        lower: Tensor = bounded.compute_bounds(IBP=True, C=differences, method=None)[0]
        return lower

    return margins, bounded


def _auto_lirpa() -> StepFunction:
    model, (x, y) = placed(_cnn7), _images()
    interval_init_(model)
    margins, bounded = _their_margins(model, x, y, RADIUS / 2)
    bounded.train()
    return stepper(lambda: robust_cross_entropy(margins(), y), Adam(bounded.parameters()))


def _compare_bounds() -> None:
    """Refuses to time what does not compute the same: in double precision bounds are equal to rounding."""
    model, (x, y) = placed(_cnn7, 4).double(), _images()
    x = x.double()
    bounds = IntervalBounds(model)
    theirs, bounded = _their_margins(model, x, y, RADIUS)
    for training in (True, False):
        model.train(training)
        bounded.train(training)
        with torch.no_grad():
            expected = theirs()
            model(x)
            ours = bounds(linf_box(x, RADIUS, data_range=(0.0, 1.0))).margins(y)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def workloads() -> list[Workload]:
    """A perceptron, where calls cost as much as arithmetic; CNN-7 without and with penalties; beside auto_LiRPA."""
    name = "CNN-7 width 16, 3x32x32, B 32"
    rows = [
        Workload(
            "perceptron 64-128x5-10, B 100", partial(_pair, _perceptron, _pixels, 0.5), "penalties; as in the ledger"
        ),
        Workload(f"{name}, after the warm-up", partial(_pair, _cnn7, _images, 0.0), "bounds alone"),
        Workload(f"{name}, in the warm-up", partial(_pair, _cnn7, _images, 0.5), "bounds and both penalties"),
    ]
    if find_spec("auto_LiRPA") is not None:
        note = "auto_LiRPA's step counts as 1; bounds are compared first, equal to rounding in float64"
        rows.append(Workload(f"{name}, beside auto_LiRPA", _beside_auto_lirpa, note, floor=0.7))
    return rows
