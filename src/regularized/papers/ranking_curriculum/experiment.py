"""A re-ranker on top of a coarse first stage, with half of the relevant documents unjudged.

Early in training (test MRR, mean over the first six epochs): ``against_reversed``, ``reversed_hurts``, ``early_gain``,
``official_form_gain``, and ``order_matters`` against a control that has the same weights in every batch, dealt to the
wrong pairs. All of these arms have the same settings, with the learning rate that was best for *no* curriculum.
``final_gain``: the finished ranker, stopped early on validation data as in the paper, both arms tuned with as many
trials. A pilot had seen the early order, and no gain at the end.

Data: query by example on Fashion-MNIST as 8 x 8 pixels, noisy, images of each seed's own; a document is relevant if it
is of the query's class. The first stage compares column sums alone. A relevant document is unjudged, and then counts
as not relevant, with probability 1/2, so false negatives sit at high ranks as in MS MARCO. Seven minutes on one core,
with the trials. A claim is refuted by an interval of the gain that lies below the smallest effect of the card. *Paper*
scale: ANTIQUE with BERT, for a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.evaluation import evaluate_ranking
from regularized.curriculum.ranking_curriculum.first_stage import FirstStageDifficulty, FirstStageRun
from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeightedLoss,
    RankingCurriculum,
    pairwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import pairwise_softmax_loss
from regularized.evidence.datasets import eight_by_eight
from regularized.evidence.datasets.samples import eight_by_eight_name, resplit
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, Unavailable, data_fingerprint
from regularized.evidence.models import mlp, seeded

SEEDS = Seeds(
    20,
    first=200,
    share=1260 / 60_000,
    why="Ten seeds left two claims open. For twenty fresh ones `regularized outlook ranking_curriculum "
    "--share 0.021` said before the first run that order_matters and official_form_gain would rather be "
    "decided than not.",
)

_IMAGES = {"unjudged": 0.5, "batch": 16, "early": 6}
DEFAULTS: Mapping[str, Any] = {
    "lr": 0.002,
    "m": 0,
    "heuristic": "normscore",
    "aggregate": "per_sample",
    "anti": False,
    "shuffled": False,
    "device": "cpu",
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **_IMAGES,
        "data": "digits",
        "noise": 0.35,
        "documents": 300,
        "queries": (20, 20, 20),
        "list": 30,
        "epochs": 3,
        "batches": 4,
    },
    # Ours: queries for training, validation and test; 256 pairs an epoch. Noise in units of a full pixel: with 0.35, as
    # on digits, a ranker without curriculum hardly learned to beat the first stage (validation queries of seed 1000).
    "laptop": {
        **_IMAGES,
        "data": "fashion_mnist",
        "noise": 0.2,
        "documents": 600,
        "queries": (60, 300, 300),
        "list": 60,
        "epochs": 30,
        "batches": 16,
    },
    # Official: "32 batches of 16", BM25 top 100 for training, positives of grade 3 and above, MRR of the top 20 on
    # validation data, Adam 1e-3 with 2e-5 for the encoder (from memory). Ours: 60 epochs, 200 queries for validation.
    "paper": {
        "data": "antique",
        "batch": 16,
        "early": 6,
        "epochs": 60,
        "batches": 32,
        "grade": 3,
        "validation": 200,
        "lr": 1e-3,
        "encoder_lr": 2e-5,
        "device": "cuda",
        "m": 20,
    },
}

LR = 0.0011  # the best of TUNING for no curriculum (regularized tune ranking_curriculum), for all arms but the last
M = 15  # of 30 epochs: the paper's 20 are of twice as many pairs
ARMS: Mapping[str, Mapping[str, Any]] = {
    "no_curriculum": {"lr": LR, "m": 0},
    "shuffled": {"lr": LR, "m": M, "heuristic": "normscore", "shuffled": True},
    "reversed": {"lr": LR, "m": M, "heuristic": "normscore", "anti": True},
    "batch_mean": {"lr": LR, "m": M, "heuristic": "normscore", "aggregate": "batch_mean"},
    "reciprank": {"lr": LR, "m": M, "heuristic": "reciprank"},
    "kdescore": {"lr": LR, "m": M, "heuristic": "kdescore"},
    "curriculum": {"lr": LR, "m": M, "heuristic": "normscore"},
    "curriculum_tuned": {"lr": 0.001, "m": 5, "heuristic": "normscore"},  # the best of TUNING
}

# The laptop's learning rate and length say nothing about BERT.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        arm: {"lr": SCALES["paper"]["lr"], "m": SCALES["paper"]["m"] if own["m"] else 0} for arm, own in ARMS.items()
    }
}

_RATES = (
    *(2e-4, 3e-4, 5e-4, 7e-4, 9e-4, 1e-3, 0.0011, 0.0013, 0.0016, 0.0018, 0.002, 0.0022),
    *(0.0025, 0.003, 0.0035, 0.004, 0.005, 0.006, 0.008, 0.01, 0.012, 0.02),
)
TUNING = Tuning(
    metric="validation_mrr",
    direction="higher",
    grids={
        "no_curriculum": [{"lr": lr} for lr in _RATES],
        "curriculum_tuned": [
            {"lr": lr, "m": m}
            # m = 1000 is a curriculum without end. The last two (and two rates more) since the best lay at m = 5.
            for lr, m in (*product((0.0005, 0.001, 0.003, 0.006, 0.012), (5, 15, 45, 1000)), (0.0005, 2), (0.001, 2))
        ],
    },
    seeds=(1000, 1001, 1002),
)


class Lists(Protocol):
    """Queries with the list of the first stage, a row a query; documents are known by their place in the row."""

    @property
    def run(self) -> FirstStageRun:
        """The first stage's lists."""
        ...

    @property
    def labels(self) -> Mapping[str, Mapping[str, int]]:
        """Judgements of the listed documents."""
        ...

    @property
    def positive(self) -> Tensor:
        """(Q, L) bool: known to be relevant."""
        ...

    @property
    def other(self) -> Tensor:
        """(Q, L) bool: not known to be relevant; neither is set where a list is shorter."""
        ...

    def encode(self, rows: Tensor, columns: Tensor) -> Any:
        """The ranker's input for (n,) pairs of query and document."""
        ...


@dataclass(frozen=True, slots=True)
class ImageLists:
    """Lists of the laptop's data."""

    run: FirstStageRun
    labels: Mapping[str, Mapping[str, int]]
    positive: Tensor
    other: Tensor
    features: Tensor

    def encode(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, 128): absolute difference and product of the two images."""
        return self.features[rows, columns]


class Task(NamedTuple):
    """Lists for training, validation and test, and the ranker; only the labels of the test lists are complete."""

    train: Lists
    validation: Lists
    test: Lists
    net: nn.Module
    parameters: Sequence[Mapping[str, Any]]
    fingerprint: str


def images(seed: int, settings: Mapping[str, Any]) -> Task:
    """Query by example: documents and queries are noisy images; the first stage compares column sums."""
    count = settings["documents"]
    drawn = eight_by_eight(settings["data"], seed, count + sum(settings["queries"]))
    pixels, classes = (part.numpy() for part in drawn)
    draws, judging = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    noisy = pixels + settings["noise"] * draws.standard_normal(pixels.shape)
    documents, splits, start = noisy[:count], [], count
    for number, size in enumerate(settings["queries"]):
        queries = noisy[start : start + size]
        sums = (queries.reshape(-1, 8, 8).sum(axis=1), documents.reshape(-1, 8, 8).sum(axis=1))
        score = -np.linalg.norm(sums[0][:, None] - sums[1], axis=2)
        listed = np.argsort(-score, axis=1, kind="stable")[:, : settings["list"]]
        relevant = classes[listed] == classes[start : start + size, None]
        if number < 2:  # nobody has complete judgements for training and validation
            relevant &= judging.random(relevant.shape) >= settings["unjudged"]
        q, d = queries[:, None], documents[listed]
        splits.append(
            ImageLists(
                FirstStageRun.from_scores(_table(np.take_along_axis(score, listed, axis=1).tolist())),
                _table(relevant.astype(int).tolist()),
                torch.from_numpy(relevant),
                torch.from_numpy(~relevant),
                torch.from_numpy(np.concatenate([np.abs(q - d), q * d], axis=2)).float(),
            )
        )
        start += size
    net = nn.Sequential(seeded(seed, mlp, [128, 64, 1]), nn.Flatten(0))
    train, validation, test = splits
    return Task(train, validation, test, net, [{"params": list(net.parameters())}], data_fingerprint(noisy, classes))


def _table(rows: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    return {str(row): {str(column): value for column, value in enumerate(values)} for row, values in enumerate(rows)}


def task(seed: int, settings: Mapping[str, Any]) -> Task:
    """The task of a scale."""
    if settings["data"] != "antique":
        return images(seed, settings)
    from regularized.papers.ranking_curriculum.antique import antique

    return Task(*antique(seed, settings))


def easiness(lists: Lists, heuristic: str) -> Tensor:
    """(Q, L) easiness of each listed document; 0 where a list is shorter."""
    values = FirstStageDifficulty(heuristic)(lists.run).values  # type: ignore[arg-type]
    table = torch.zeros(lists.positive.shape)
    for row, listed in enumerate(values.values()):
        table[row, [int(place) for place in listed]] = torch.tensor(list(listed.values()))
    return table


def draw(lists: Lists, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns of a relevant and of another document of so many pairs; queries are equally likely."""
    (usable,) = torch.where(lists.positive.any(dim=1) & lists.other.any(dim=1))
    rows = usable[torch.randint(len(usable), (count,), generator=generator)]
    columns = [
        torch.multinomial(mask[rows].float(), 1, generator=generator).squeeze(1)
        for mask in (lists.positive, lists.other)
    ]
    return rows, columns[0], columns[1]


@torch.no_grad()
def mrr(net: nn.Module, lists: Lists, measure: str) -> float:
    """Mean reciprocal rank of the re-ranked lists."""
    net.eval()
    rows, columns = torch.where(lists.positive | lists.other)
    parts = [net(lists.encode(r, c)) for r, c in zip(rows.split(4096), columns.split(4096))]
    scores: dict[str, dict[str, float]] = {}
    for row, column, score in zip(rows.tolist(), columns.tolist(), torch.cat(parts).tolist()):
        scores.setdefault(str(row), {})[str(column)] = score
    net.train()
    return evaluate_ranking(lists.labels, scores, [measure])[measure]


def about(settings: Mapping[str, Any]) -> About:
    """Small images as queries and documents, or ANTIQUE."""
    if settings["data"] == "antique":
        return About("2,426 questions of ANTIQUE", 2426, "BERT, 110M weights", 110_000_000, 200 / 2426)
    train, _, test = settings["queries"]
    samples = settings["epochs"] * settings["batches"] * settings["batch"]
    data = f"{train} queries for {settings['documents']} {eight_by_eight_name(settings['data'])}"
    again = resplit(settings["data"], train=settings["documents"], test=test)
    return About(data, samples, "MLP on pairs, 8k weights", 8321, again)


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm with one seed; all metrics are mean reciprocal ranks, of test queries unless they say otherwise."""
    measure = "RR" if settings["data"] != "antique" else f"RR(rel={settings['grade']})@20"
    problem = task(seed, settings)
    net, train = problem.net, problem.train
    try:
        first_stage = evaluate_ranking(problem.test.labels, problem.test.run.scores, [measure])[measure]
    except ImportError as error:
        raise Unavailable(str(error)) from error

    easy = easiness(train, settings["heuristic"])
    curriculum = RankingCurriculum(settings["m"])
    criterion = DifficultyWeightedLoss(pairwise_softmax_loss, curriculum, aggregate=settings["aggregate"])
    optimizer = torch.optim.Adam([dict(group) for group in problem.parameters], lr=settings["lr"])
    order, shuffle = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(seed + 2)
    test: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    for epoch in range(settings["epochs"]):
        curriculum.set_epoch(epoch)
        for _ in range(settings["batches"]):
            rows, positive, other = draw(train, settings["batch"], order)
            difficulty = pairwise_difficulty(easy[rows, positive], easy[rows, other], anti=settings["anti"])
            if settings["shuffled"]:
                difficulty = difficulty[torch.randperm(len(difficulty), generator=shuffle)]
            both = net(train.encode(rows.repeat(2), torch.cat([positive, other])))
            s_positive, s_other = both.chunk(2)
            optimizer.zero_grad()
            criterion(s_positive, s_other, difficulty.to(both.device)).backward()
            optimizer.step()
        test.append((epoch + 1.0, mrr(net, problem.test, measure)))
        validation.append((epoch + 1.0, mrr(net, problem.validation, measure)))

    values = [value for _, value in test]
    stopped = max(range(len(validation)), key=lambda epoch: validation[epoch][1])
    early = settings["early"]
    metrics = {
        "early_mrr": sum(values[:early]) / len(values[:early]),
        "stopped_mrr": values[stopped],
        "final_mrr": values[-1],
        "best_mrr": max(values),
        "validation_mrr": validation[stopped][1],
        "stopped_epoch": stopped + 1.0,
        "first_stage_mrr": first_stage,
    }
    return Measurements(metrics, {"mrr": test, "validation_mrr": validation}, data=problem.fingerprint)
