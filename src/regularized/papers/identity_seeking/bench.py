"""Cost of matching and weighting beside a contrastive step on given pairs, and of the two solvers.

There is no training code of the authors, and no package matches crops of two frames. The plain step is what anybody
trains who knows the pairs: InfoNCE both ways on the same crops.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, device, image_net, placed, stepper
from regularized.self_supervised.identity_seeking.loss import InterFrameContrastive
from regularized.self_supervised.identity_seeking.matching import Solver, max_weight_matching


def _steps(videos: int, people: int, solver: Solver | None) -> tuple[StepFunction, StepFunction]:
    """ResNet-18 of width 16 on 32 x 32 pixels; the encoder sees both frames in one batch in both steps."""
    count = videos * people
    crops, _ = batch((2 * count, 3, 32, 32))
    video = torch.arange(videos, device=device()).repeat_interleave(people)
    given = torch.arange(count, device=device())
    nets = [placed(image_net) for _ in range(2)]
    contrast = InterFrameContrastive(solver=solver)

    def plain() -> Tensor:
        first, second = F.normalize(nets[0](crops), dim=1).split(count)
        logits = first @ second.T / 0.1
        return (F.cross_entropy(logits, given) + F.cross_entropy(logits.T, given)) / 2

    def method() -> Tensor:
        first, second = nets[1](crops).split(count)
        loss: Tensor = contrast(first, second, video, video).loss
        return loss

    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    return stepper(plain, optimizers[0]), stepper(method, optimizers[1])


def _solvers(people: int) -> tuple[StepFunction, StepFunction]:
    similarity = torch.rand(people, people, generator=torch.Generator().manual_seed(0))

    def match(solver: Solver | None) -> StepFunction:
        return lambda: (max_weight_matching(similarity, solver=solver), None)[1]

    return match(_scipy()), match(None)


def _scipy() -> Solver:
    from scipy.optimize import linear_sum_assignment

    solver: Solver = linear_sum_assignment
    return solver


def _with_scipy(
    build: Callable[..., tuple[StepFunction, StepFunction]], *sizes: int
) -> tuple[StepFunction, StepFunction]:
    return build(*sizes, _scipy())


def workloads() -> list[Workload]:
    """Steps with a dozen and with thirty crops a frame, and the solvers alone."""
    size = "ResNet-18 of width 16, 32 x 32 pixels"
    return [
        Workload(f"{size}, 4 videos x 12 crops", partial(_steps, 4, 12, None)),
        Workload(f"{size}, 4 videos x 30 crops", partial(_steps, 4, 30, None)),
        Workload(f"{size}, 4 videos x 30 crops, SciPy's solver", partial(_with_scipy, _steps, 4, 30)),
        Workload("30 x 30 assignment, plain Python", partial(_solvers, 30), "SciPy's solver counts as 1", floor=1.0),
    ]
