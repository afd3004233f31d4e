"""Cost of prompts, of the second phase, and of the search for outliers, each beside what one would do without."""

from functools import partial

import torch
from torch import nn

from regularized.continual.ovor.features import extract_features
from regularized.continual.ovor.head import VirtualOutlierRegularizer
from regularized.continual.ovor.model import LENGTHS, OnePrompt
from regularized.continual.ovor.neighbours import kth_squared_distance, unit
from regularized.continual.ovor.outliers import OutlierSampler, boundary_outliers, boundary_points, official_outliers
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, placed, stepper, trained
from regularized.papers.ovor.networks import PromptPool, SmallViT
from regularized.training.step import Batch

ADAM = partial(torch.optim.Adam, lr=1e-3)
CLASSES = tuple(range(10))
VIT = partial(SmallViT, size=32, patch=8, channels=3, dim=96, depth=5, heads=4, num_classes=10)


def one_prompt() -> OnePrompt:
    """The paper's prompts in a transformer of half a million weights."""
    return OnePrompt(VIT(), 10, layers=LENGTHS)


def _prompted() -> tuple[StepFunction, StepFunction]:
    """A step of prompts and head, beside one of all weights."""
    x, y = batch((64, 3, 32, 32))
    model = placed(one_prompt)
    loss = nn.CrossEntropyLoss()
    return classifier_step(placed(VIT), x, y, ADAM), stepper(lambda: loss(model(x), y), ADAM(trained(model)))


def _inference() -> tuple[StepFunction, StepFunction]:
    """An answer of a pool, and of one prompt."""
    x, _ = batch((64, 3, 32, 32))
    pool = placed(lambda: PromptPool(VIT(), 10, tasks=5, layers=LENGTHS, shared=(0, 1))).eval()
    pool.get_buffer("counts").fill_(1.0)
    model = placed(one_prompt).eval()

    def answer(network: nn.Module) -> None:
        with torch.no_grad():
            network(x)

    return partial(answer, pool), partial(answer, model)


def _phases() -> tuple[StepFunction, StepFunction]:
    """16 epochs of the first phase; the same, then features once and 4 epochs of the second phase."""
    x, y = batch((32, 3, 32, 32))
    sampler = OutlierSampler(k=10, select=20, noises=100)
    both = []
    for outliers in (False, True):
        model = placed(one_prompt)
        step = classifier_step(model, x, y, ADAM)
        vor = VirtualOutlierRegularizer(sampler=sampler).to(device())

        def task(
            model: nn.Module = model,
            step: StepFunction = step,
            vor: VirtualOutlierRegularizer = vor,
            outliers: bool = outliers,
        ) -> None:
            for _ in range(16):
                step()
            if outliers:
                features, labels = extract_features(model, [Batch(x, y)])
                vor.fit_head(model.get_submodule("head"), features, labels, classes=CLASSES, epochs=4)

        both.append(task)
    return both[0], both[1]


def _search(around: str) -> tuple[StepFunction, StepFunction]:
    """Every candidate searched by itself, as the released code does, and ours, with the same result."""
    features, _ = batch((1000, 256))
    noises = 0.1 * batch((100, 256))[0]
    k, select, keep = 50, 50, 400
    points = unit(features)

    def all_of_them() -> None:
        boundary = boundary_points(features, k=k, select=select)
        bases = features[boundary] if around == "boundary" else torch.zeros_like(features[boundary])
        candidates = (bases[:, None] + noises).flatten(0, 1)
        searched = unit(candidates) if around == "boundary" else candidates
        candidates[kth_squared_distance(searched, points, k).topk(keep).indices]

    def ours() -> None:
        if around == "origin":
            official_outliers(features, noises, k=k, select=select, keep=keep)
            return
        boundary_outliers(features, boundary_points(features, k=k, select=select), noises, k=k, keep=keep)

    return all_of_them, ours


def workloads() -> list[Workload]:
    """Steps, an answer, a task, and the search."""
    return [
        Workload("one prompt against all weights, ViT 96x5, B64", _prompted, floor=0.8),
        Workload(
            "inference, one prompt against a pool, ViT 96x5, B64",
            _inference,
            note="half the passes",
            floor=0.5,
        ),
        Workload(
            "a task of 16 + 4 epochs against its 16 alone, ViT 96x5, 32 images",
            _phases,
            note="features computed once; 2,000 candidates",
        ),
        Workload(
            "outliers as released, against a search of all 5,000 candidates, 1,000 features d 256",
            partial(_search, "origin"),
            note="the same outliers",
            floor=0.02,
        ),
        Workload(
            "outliers at the boundary, against a search of all 5,000 candidates, 1,000 features d 256",
            partial(_search, "boundary"),
            note="the same outliers; products of sums are sums of products",
            floor=0.1,
        ),
    ]
