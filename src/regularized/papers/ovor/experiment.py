"""Twenty classes come in five tasks to a frozen transformer; do outliers for its head, and one prompt, suffice?

A small vision transformer is trained on 5,000 images of Fashion-MNIST lying on their left or right side, 20 classes,
and frozen: one transformer for all seeds, as people take one pretrained model. Then come *other* images, upright or
upside down, of each seed's own: 20 new classes, four a task, in an order of the seed's own. Nothing old is kept. At the
end all 20 are asked for, and nobody says which task an image is of (``final_accuracy``). ``energy_gap``: by how much
the energies of fresh outliers at the edge of a task's features are above those of the features, at the end of the task,
mean over tasks. ``inference_mflop``: of one image, counted by torch.

Arms: ``prompt_pool``, prompts of each task's own and a pass that chooses, as in DualPrompt; ``one_prompt``, the same
prompts for all, as many epochs and no second phase; ``head_only``, everything but the outliers: the head alone learns
in the last fifth; ``outliers``, the paper; ``official_outliers``, drawn around the origin as in the released code;
``pool_outliers``, the second phase on top of the pool.

Trials, four for an arm, judged by validation images of all classes at the end: learning rates for ``one_prompt`` and
``prompt_pool``, at which the others stay (0.02 was the best of a first grid, at its end, so 0.05 took the place of the
smallest, 0.002); strength, noise and distance of thresholds for ``outliers`` and ``official_outliers``.
``pool_outliers`` has what was chosen for ``outliers``. In that first tuning outliers did nothing: the second phase had
six steps. Before any evidence the head got batches of 8, and among the strengths (10, 0.1, 6) took the place of
(0.1, 1.0, 6).

Since a second phase moves nothing that a first one reads, all arms of a seed share their first phases, which a process
keeps, and all seeds the transformer: without that it would take five times as long. *Paper* scale: CIFAR-100 in ten
tasks, timm's ViT-B/16, 16 + 4 epochs, the published settings; it needs timm with its weights, CIFAR-100 and a GPU.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regularized.continual.forgetting import Forgetting
from regularized.continual.ovor.features import extract_features
from regularized.continual.ovor.head import VirtualOutlierRegularizer
from regularized.continual.ovor.loss import energy_gap
from regularized.continual.ovor.model import OnePrompt, encode
from regularized.continual.ovor.outliers import OutlierSampler
from regularized.continual.ovor.schedule import epoch_cosine
from regularized.continual.ovor.term import TaskCrossEntropy
from regularized.continual.ovor.thresholds import EnergyQuantile
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import Task, class_groups, class_incremental
from regularized.evidence.datasets.samples import TUNING_SEEDS_FROM, draw, resplit, sampling
from regularized.evidence.experiment import About, Measurements, Tuning, data_fingerprint
from regularized.evidence.models import seeded
from regularized.evidence.requirements import need_package
from regularized.papers.ovor.networks import PoolTasks, PromptPool, SmallViT
from regularized.training.data import as_source
from regularized.training.options import Compute
from regularized.training.randomness import mix

DEFAULTS: Mapping[str, Any] = {
    "prompts": "one",  # or "pool"
    "head_share": 0.0,  # of the epochs, which the head spends alone
    "weight": 0.0,
    "around": "boundary",
    "sigma": 0.1,
    "margin": 12.0,  # -3 less -15
    "thresholds": None,  # fixed ones, in place of the first task's energies
    "lr": 5e-3,
    "batch": 40,
    "head_batch": 8,  # of the second phase: as many steps as it takes, at no cost
    "lengths": (4, 4, 8, 8, 8),  # of the prompts, by layer
    "probe_sigma": 0.5,  # of the outliers that measure the gap, the same for all arms
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **{"data": "digits", "train": 300, "validation": 100, "test": 300, "source": 200},
        **{"size": 8, "patch": 4, "dim": 16, "depth": 5, "heads": 2, "source_epochs": 1},
        **{"classes": 20, "per_task": 4, "epochs": 5, "k": 5, "select": 10, "noises": 20, "per_class": 10},
    },
    # Ours, by what runs in half a minute for all arms of a seed: 120 features a task, so K = 5; 16 patches instead of
    # 196, so shorter prompts.
    "laptop": {
        **{"data": "fashion_mnist", "train": 600, "validation": 300, "test": 1000, "source": 5000},
        **{"size": 28, "patch": 7, "dim": 32, "depth": 5, "heads": 4, "source_epochs": 4},
        **{"classes": 20, "per_task": 4, "epochs": 10, "k": 5, "select": 20, "noises": 100, "per_class": 40},
    },
    # CIFAR-100, ten tasks, "16 + 4" epochs, batch 128, the options of common.yaml.
    "paper": {
        **{
            "data": "cifar100",
            "train": 45_000,
            "validation": 5_000,
            "test": 10_000,
            "source": 0,
            "batch": 128,
            "head_batch": 128,
        },
        **{"size": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12, "source_epochs": 0},
        **{"classes": 100, "per_task": 10, "epochs": 20, "k": 50, "select": 50, "noises": 600, "per_class": 40},
        "lengths": (10, 10, 40, 40, 40),
    },
}

# The best of TUNING; rates first, strengths at these rates.
_ONE: dict[str, Any] = {"lr": 0.05}
_POOL: dict[str, Any] = {"prompts": "pool", "lr": 0.05}
_SECOND: dict[str, Any] = {"head_share": 0.2}
_OUTLIERS: dict[str, Any] = {"weight": 0.1, "sigma": 0.1, "margin": 12.0}
_OFFICIAL: dict[str, Any] = {"weight": 0.1, "sigma": 0.1, "margin": 12.0}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "prompt_pool": {**_POOL},
    "one_prompt": {**_ONE},
    "head_only": {**_ONE, **_SECOND},
    "outliers": {**_ONE, **_SECOND, **_OUTLIERS},
    "official_outliers": {**_ONE, **_SECOND, **_OFFICIAL, "around": "origin"},
    "pool_outliers": {**_POOL, **_SECOND, **_OUTLIERS},
}

_RATE: Mapping[str, Any] = {"lr": 1e-3}
_PUBLISHED: Mapping[str, Any] = {**_RATE, "weight": 0.1, "sigma": 0.1, "margin": 12.0, "thresholds": (-15.0, -3.0)}
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        **dict.fromkeys(("prompt_pool", "one_prompt", "head_only"), _RATE),
        **dict.fromkeys(("outliers", "official_outliers", "pool_outliers"), _PUBLISHED),
    }
}

_RATES = [{"lr": lr} for lr in (5e-3, 1e-2, 2e-2, 5e-2)]
_STRENGTHS = [
    {"weight": weight, "sigma": sigma, "margin": margin}
    for weight, sigma, margin in (
        (0.1, 0.1, 12.0),
        (1.0, 0.1, 6.0),
        (1.0, 1.0, 6.0),
        (10.0, 0.1, 6.0),
    )
]
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "prompt_pool": _RATES,
        "one_prompt": _RATES,
        "outliers": _STRENGTHS,
        "official_outliers": _STRENGTHS,
    },
)


class Images(NamedTuple):
    """Inputs and labels of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class FirstPhase(NamedTuple):
    """What first phases of all tasks leave: features at the end of each task's, and heads.

    Attributes:
        tasks: of the sequence.
        train: (features, labels) of each task's training images, at its own end.
        test: for each time, those of all test images.
        validation: those at the end.
        heads: weight and bias after each task.
        mflop: operations of inference, in millions for one image.
        trained: weights that learn.
    """

    tasks: Sequence[Task]
    train: Sequence[tuple[Tensor, Tensor]]
    test: Sequence[tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    heads: Sequence[Mapping[str, Tensor]]
    mflop: float
    trained: int


def about(s: Mapping[str, Any]) -> About:
    """Small images through a small transformer, or CIFAR-100 through ViT-B/16."""
    weights = 12 * s["depth"] * s["dim"] ** 2
    if s["data"] == "cifar100":
        return About("45,000 CIFAR-100 images", s["train"], "ViT-B/16, 86M weights, frozen", 86_000_000, 10 / 45)
    names = {"fashion_mnist": "Fashion-MNIST images, 20 classes", "digits": "digits of 8x8 pixels, 20 classes"}
    again = resplit(s["data"], train=s["train"], test=s["test"])
    model = f"ViT, {weights // 1000}k weights, frozen"
    return About(f"{s['train']:,} {names[s['data']]}", s["train"], model, weights, again)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Learn the sequence by one arm, and ask about all classes.

    Raises:
        Unavailable: at paper scale, CIFAR-100 or timm is not there.
    """
    second = round(s["head_share"] * s["epochs"])
    network = tuple((name, s[name]) for name in _NETWORK)
    phase = first_phases(network, s["prompts"], s["lr"], s["batch"], s["epochs"], s["epochs"] - second, seed)
    sampler = {name: s[name] for name in ("k", "select", "noises", "per_class")}
    probe = OutlierSampler(sigma=s["probe_sigma"], **sampler)
    regularizer = VirtualOutlierRegularizer(
        weight=s["weight"],
        thresholds=EnergyQuantile(margin=s["margin"]) if s["thresholds"] is None else s["thresholds"],
        sampler=OutlierSampler(around=s["around"], sigma=s["sigma"], **sampler),
    )
    head = nn.Linear(s["dim"], s["classes"])
    head.load_state_dict(phase.heads[0])
    record, gaps = Forgetting(phase.tasks), []
    for task, train, test, learnt in zip(phase.tasks, phase.train, phase.test, phase.heads, strict=True):
        with torch.no_grad():  # rows of this task as its first phase left them; others as second phases did
            for name, parameter in head.named_parameters():
                parameter[list(task.classes)] = learnt[name][list(task.classes)]
        regularizer.fit_head(
            head,
            *train,
            classes=task.classes,
            epochs=second,
            optimizer=partial(torch.optim.Adam, lr=s["lr"]),
            schedule=epoch_cosine(s["epochs"], start=s["epochs"] - second),
            batch_size=s["head_batch"],
            seed=mix(seed, task.number),
        )
        gaps.append(_gap(head, train[0], task, probe, seed))
        record.tasks = tuple(_only(test, each) for each in phase.tasks)
        record.measure(head, after=task.number)
    with torch.no_grad():
        validation = (head(phase.validation[0]).argmax(dim=1) == phase.validation[1]).double().mean()
    return Measurements(
        metrics={
            "final_accuracy": 100.0 * record.final_accuracy,
            "forgetting": 100.0 * record.global_forgetting,
            "local_forgetting": 100.0 * record.local_forgetting,
            "accuracy_given_task": 100.0 * float(record.given_task[-1].mean()),
            "energy_gap": sum(gaps) / len(gaps),
            "inference_mflop": phase.mflop,
            "trained_weights": float(phase.trained),
            "validation_accuracy": 100.0 * float(validation),
        },
        curves={
            "accuracy_on_tasks_so_far": [
                (i + 1.0, 100.0 * float(record.whole[i, : i + 1].mean())) for i in range(len(phase.tasks))
            ]
        },
        data=data_fingerprint(*(tensor.numpy() for tensor in (*phase.train[0], *phase.test[-1]))),
        curve_unit="task",
    )


_NETWORK = (
    *("data", "train", "validation", "test", "source", "size", "patch", "dim", "depth", "heads", "source_epochs"),
    *("classes", "per_task", "lengths"),
)


def _only(test: tuple[Tensor, Tensor], task: Task) -> Task:
    """A task whose test images are features."""
    rows = torch.isin(test[1], torch.tensor(task.classes))
    return Task(task.number, task.classes, None, (test[0][rows], test[1][rows]))


@torch.no_grad()
def _gap(head: nn.Module, features: Tensor, task: Task, probe: OutlierSampler, seed: int) -> float:
    generator = torch.Generator().manual_seed(mix(seed, task.number, 1))
    fresh = probe.draw(features, num_classes=len(task.classes), generator=generator)
    columns = torch.tensor(task.classes)
    return float(energy_gap(head(features)[:, columns], head(fresh)[:, columns]))


@lru_cache(maxsize=8)
def first_phases(
    network: tuple[tuple[str, Any], ...], prompts: str, lr: float, batch: int, epochs: int, first: int, seed: int
) -> FirstPhase:
    """First phases of all tasks, one after the other, and what they leave behind."""
    s = dict(network)
    images, vit = seed_images(s, seed), copy.deepcopy(transformer(network))
    tasks = class_incremental(
        images.train,
        class_groups(s["classes"], s["per_task"], seed=seed),
        test=images.test,
        batch_size=batch,
        seed=seed,
    )
    model, terms = prompted(vit, s, prompts, len(tasks), seed)
    sequence = TaskSequence(
        model,
        tasks,
        terms=terms,
        optimizer=partial(torch.optim.Adam, lr=lr),
        epochs=first,
        schedule=epoch_cosine(epochs),
        seed=seed,
        compute=Compute(device="auto" if s["data"] == "cifar100" else "cpu"),
    )
    train, test, heads = [], [], []
    for task in tasks:
        sequence.fit(until=task.number + 1)
        train.append(_features(model, task.data))
        test.append(_features(model, images.test))
        heads.append(
            {name: value.detach().cpu().clone() for name, value in model.get_submodule("head").state_dict().items()}
        )
    validation = _features(model, images.validation)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(images.test[0][:1].to(next(model.parameters()).device))
    return FirstPhase(tasks, train, test, validation, heads, counter.get_total_flops() / 1e6, trained)


def _features(model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    source = as_source([data] if isinstance(data, tuple) else data, seed=0)
    features, labels = extract_features(model, source.batches(0))
    return features.cpu(), labels.cpu()


def prompted(
    vit: nn.Module, s: Mapping[str, Any], prompts: str, tasks: int, seed: int
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The transformer with its prompts, and the terms of a first phase."""
    loss: dict[str, nn.Module] = {"task": TaskCrossEntropy(s["classes"])}
    large, lengths = s["data"] == "cifar100", dict(enumerate(s["lengths"]))
    if prompts == "one":
        features = _enlarged if large else None
        return seeded(seed, OnePrompt, vit, s["classes"], layers=lengths, features=features), loss
    pool = seeded(
        seed,
        PromptPool,
        vit,
        s["classes"],
        tasks=tasks,
        layers=lengths,
        shared=(0, 1),
        features=_enlarged if large else None,
    )
    assert isinstance(pool, PromptPool)
    return pool, {**loss, "pool": PoolTasks(pool)}


def _enlarged(vit: nn.Module, images: Tensor) -> Tensor:
    """CIFAR at the size that ViT-B/16 was trained on, in [-1, 1]."""
    return encode(vit, F.interpolate(2.0 * images - 1.0, size=224, mode="bilinear"))


def seed_images(s: Mapping[str, Any], seed: int) -> Images:
    """A seed's own images; each second one upside down, which is another class."""
    sample = draw(s["data"], seed, train=s["train"], validation=s["validation"], test=s["test"])
    parts = (
        (sample.train_x, sample.train_y),
        (sample.validation_x, sample.validation_y),
        (sample.test_x, sample.test_y),
    )
    return Images(*(parts if s["data"] == "cifar100" else (_turned(*part) for part in parts)))


@lru_cache(maxsize=2)
def transformer(network: tuple[tuple[str, Any], ...]) -> nn.Module:
    """The transformer that all seeds start from; it has seen the images of none of them."""
    s = dict(network)
    if s["data"] == "cifar100":
        need_package("timm", "pip install timm")
        timm: Any = import_module("timm")
        vit: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=True)
        return vit
    # Of the rows that are kept for tuning those behind the two tuning seeds'. Digits are too few for that.
    place = TUNING_SEEDS_FROM + 1 if sampling(s["data"]) == "fresh" else 0
    sample = draw(s["data"], place, train=s["source"], validation=0, test=0)
    lying = sample.train_x.rot90(1, (2, 3))
    x, y = torch.cat([lying, lying.rot90(2, (2, 3))]), torch.cat([sample.train_y, sample.train_y + 10])
    options = {name: s[name] for name in ("size", "patch", "dim", "depth", "heads")}
    vit = seeded(0, SmallViT, channels=1, num_classes=20, **options)
    _pretrain(vit, x, y, s["source_epochs"])
    return vit


def _turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each second image upside down, ten classes further on."""
    odd = torch.arange(len(x)) % 2
    return torch.where(odd.bool()[:, None, None, None], x.rot90(2, (2, 3)), x), y + 10 * odd


def _pretrain(vit: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW, the rate rising in the first tenth and falling by a cosine."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2), pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(vit(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
