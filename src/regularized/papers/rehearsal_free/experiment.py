"""Ten classes come in five tasks; what was learnt before is gone. Which cheap penalty keeps it, from which start?

A perceptron learns Fashion-MNIST of 8 x 8 pixels, two classes a task, in an order of the seed's own; at the end it is
asked about all ten, and nobody says which task an image is of (``final_accuracy``, the paper's A_1:N). ``..._alone``:
no distillation. ``pretrained``: the encoder has learnt 1,500 other images, turned by 90 degrees, before.

Claims: ``distillation_is_needed``, ``softmax_distillation_fails`` (the sigmoid loss is part of it);
``anchor_hurts_from_scratch`` and ``fisher_forgets_less`` (what the anchor buys is less forgetting: ``forgetting`` is
the paper's F^G in points); ``anchor_helps_pretrained``, ``plain_anchor_best``, ``plain_beats_features``. A claim is
refuted by an interval below the smallest effect of the card.

Every arm has six trials, judged by its accuracy on validation images at the end of the whole sequence: the learning
rate where there is no penalty, the coefficient at that rate where there is one. About eight minutes for ten seeds on
two cores, with the trials. *Paper* scale: CIFAR-100 in ten tasks, ResNet-18, 250 epochs a task; the network is timm's,
and so are the weights that the pretrained arms begin with.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.continual.rehearsal_free.term import ContinualLoss, WeightAnchor
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import class_groups, class_incremental
from regularized.evidence.datasets import cifar, eight_by_eight
from regularized.evidence.datasets.samples import eight_by_eight_name, resplit
from regularized.evidence.experiment import About, Measurements, Tuning, data_fingerprint
from regularized.evidence.models import mlp, seeded
from regularized.evidence.requirements import need_package
from regularized.training.options import Compute
from regularized.training.progress import piecewise

DEFAULTS: Mapping[str, Any] = {
    "start": "scratch",
    "classifier": "sigmoid",
    "distil": 0.0,
    "features": 0.0,  # coefficient of feature distillation
    "anchor": None,  # "none" (L2) or "fisher" (EWC)
    "strength": 0.0,
    "lr": 1e-3,  # "Adam, 1e-3"
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **{"data": "digits", "train": 200, "validation": 100, "test": 200, "source": 200},
        **{"classes": 10, "per_task": 2, "epochs": 2, "batch": 32, "width": 32, "decay": 0.0},
    },
    # Ours, by what runs in two seconds; network, batch and epochs as in our sheet's trial.
    "laptop": {
        **{"data": "fashion_mnist", "train": 2000, "validation": 500, "test": 1000, "source": 1500},
        **{"classes": 10, "per_task": 2, "epochs": 20, "batch": 64, "width": 128, "decay": 0.0},
    },
    # "10 tasks", "250 epochs a task", "decay 2e-4", "batch 128": the paper, by a summary of it.
    "paper": {
        **{"data": "cifar100", "train": 45_000, "validation": 5_000, "test": 10_000, "source": 0},
        **{"classes": 100, "per_task": 10, "epochs": 250, "batch": 128, "width": 64, "decay": 2e-4},
    },
}

_KD: dict[str, Any] = {"distil": 1.0, "lr": 1e-4}
_PRE: dict[str, Any] = {"start": "pretrained"}
_KD_PRE: dict[str, Any] = {**_PRE, "distil": 1.0, "lr": 2e-3}
_ALONE: dict[str, Any] = {"lr": 2e-3}
# Rates are the best of TUNING without a penalty; strengths are the best at these rates.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "naive": {**_ALONE},
    "l2_alone": {**_ALONE, "anchor": "none", "strength": 0.001},
    "ewc_alone": {**_ALONE, "anchor": "fisher", "strength": 0.3},
    "softmax_distillation": {**_KD, "classifier": "softmax", "lr": 3e-3},
    "distillation": {**_KD},
    "distillation_l2": {**_KD, "anchor": "none", "strength": 0.01},
    "distillation_ewc": {**_KD, "anchor": "fisher", "strength": 3.0},
    "distillation_features": {**_KD, "features": 0.03},
    "naive_pretrained": {**_PRE},
    "l2_alone_pretrained": {**_PRE, "anchor": "none", "strength": 0.003},
    "distillation_pretrained": {**_KD_PRE},
    "distillation_l2_pretrained": {**_KD_PRE, "anchor": "none", "strength": 0.03},
    "distillation_ewc_pretrained": {**_KD_PRE, "anchor": "fisher", "strength": 0.003},
    "distillation_features_pretrained": {**_KD_PRE, "features": 1e-5},
}

_RATES = [{"lr": lr} for lr in (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 1e-2)]
_L2 = [{"strength": s} for s in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
_EWC = [{"strength": s} for s in (0.3, 3.0, 30.0, 100.0, 300.0, 3000.0)]
_FEATURES = [{"features": f} for f in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "naive": _RATES,
        "l2_alone": _L2,
        "ewc_alone": _EWC,
        "softmax_distillation": _RATES,
        # Its best was at the end of the others' grid.
        "distillation": [{"lr": lr} for lr in (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)],
        "distillation_l2": _L2,
        "distillation_ewc": _EWC,
        "distillation_features": _FEATURES,
        "naive_pretrained": _RATES,
        "l2_alone_pretrained": _L2,
        "distillation_pretrained": _RATES,
        "distillation_l2_pretrained": _L2,
        # These two were best at the lower end of the others' grids, and still are: the weaker, the better.
        "distillation_ewc_pretrained": [{"strength": s} for s in (0.003, 0.03, 0.3, 3.0, 30.0, 300.0)],
        "distillation_features_pretrained": [{"features": f} for f in (1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.1)],
    },
)


class Images(NamedTuple):
    """Inputs and labels of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: tuple[Tensor, Tensor]  # what a pretrained encoder has learnt


def about(s: Mapping[str, Any]) -> About:
    """Small images through a perceptron, or CIFAR-100 through a ResNet."""
    if s["data"] == "cifar100":
        return About("45,000 CIFAR-100 images", s["train"], "ResNet-18, 11M weights", 11_200_000, 10_000 / 45_000)
    width = s["width"]
    weights = 64 * width + width * width + width * width // 2 + 10 * width // 2
    again = resplit(s["data"], train=s["train"], test=s["test"])
    name = f"{s['train']:,} {eight_by_eight_name(s['data'])}"
    return About(name, s["train"], f"MLP, {weights // 1000}k weights", weights, again)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Learn the sequence by one arm, and ask about all classes.

    Raises:
        Unavailable: at paper scale, CIFAR-100 or timm's weights are not there.
    """
    images = load(s["data"], seed, s["train"], s["validation"], s["test"], s["source"])
    groups = class_groups(s["classes"], s["per_task"], seed=seed)
    model, features = network(s, seed)
    if s["start"] == "pretrained" and s["data"] != "cifar100":
        _pretrain(model, images.source, s, seed)
    terms: dict[str, nn.Module] = {
        "task": ContinualLoss(
            s["classes"],
            classifier=s["classifier"],
            distil=s["distil"],
            features=features,
            feature_weight=s["features"],
        )
    }
    if s["anchor"] is not None:
        pretrained = s["start"] == "pretrained"
        terms["anchor"] = WeightAnchor(weight=s["strength"], importance=s["anchor"], pretrained=pretrained)
    sequence = TaskSequence(
        model,
        class_incremental(images.train, groups, test=images.test, batch_size=s["batch"], seed=seed),
        terms=terms,
        optimizer=partial(torch.optim.Adam, lr=s["lr"], weight_decay=s["decay"]),
        epochs=s["epochs"],
        schedule=piecewise({0.4: 0.1, 0.6: 0.01, 0.8: 0.001}) if s["data"] == "cifar100" else 1.0,
        seed=seed,
        compute=Compute(device="auto" if s["data"] == "cifar100" else "cpu"),
    )
    record = sequence.fit()
    accuracies = [(i + 1.0, 100.0 * float(record.whole[i, : i + 1].mean())) for i in range(len(groups))]
    return Measurements(
        metrics={
            "final_accuracy": 100.0 * record.final_accuracy,
            "forgetting": 100.0 * record.global_forgetting,
            "local_forgetting": 100.0 * record.local_forgetting,
            "validation_accuracy": 100.0 * _accuracy(sequence.model, images.validation),
        },
        curves={"accuracy_on_tasks_so_far": accuracies},
        data=data_fingerprint(*(tensor.numpy() for tensor in (*images.train, *images.test))),
        curve_unit="task",
    )


@lru_cache(maxsize=2)
def load(name: str, seed: int, train: int, validation: int, test: int, source: int) -> Images:
    """A seed's images, scaled by those of its training set; those of the source are turned by 90 degrees."""
    if name == "cifar100":
        whole = cifar(100)
        order = torch.randperm(len(whole.train_x), generator=torch.Generator().manual_seed(seed))
        fitted, held = ((whole.train_x[rows], whole.train_y[rows]) for rows in order.split([train, validation]))
        return Images(fitted, held, (whole.test_x, whole.test_y), fitted)
    pixels, y = eight_by_eight(name, seed, train + validation + test + source)
    x = ((pixels - pixels[:train].mean(dim=0)) / 0.3).float()
    xs, ys = (tensor.split([train, validation, test, source]) for tensor in (x, y))
    turned = torch.rot90(xs[3].view(-1, 8, 8), 1, (1, 2)).flatten(1)
    return Images((xs[0], ys[0]), (xs[1], ys[1]), (xs[2], ys[2]), (turned, ys[3]))


def network(s: Mapping[str, Any], seed: int) -> tuple[nn.Module, str]:
    """The classifier, and the name of the module in front of its head."""
    if s["data"] != "cifar100":
        width = s["width"]
        return seeded(seed, mlp, [64, width, width, width // 2, s["classes"]]), "5"
    need_package("timm", "pip install timm")
    timm: Any = import_module("timm")
    pretrained = s["start"] == "pretrained"
    return seeded(seed, timm.create_model, "resnet18", pretrained=pretrained, num_classes=s["classes"]), "global_pool"


def _pretrain(model: nn.Module, source: tuple[Tensor, Tensor], s: Mapping[str, Any], seed: int) -> None:
    """Train the encoder on another domain; the head is as it was afterwards."""
    head = [tensor.clone() for tensor in list(model.state_dict().values())[-2:]]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(10 * seed + 7)
    x, y = source
    for _ in range(s["epochs"]):
        for rows in torch.randperm(len(x), generator=order).split(s["batch"]):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(list(model.parameters())[-2:], head, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    device = next(model.parameters()).device
    found = torch.cat([model(part.to(device)).argmax(dim=1).cpu() for part in data[0].split(1000)])
    return float((found == data[1]).double().mean())
