"""What the common contract trains and provokes: the term on pairs and on documents, and the sheet's bad inputs."""

import gzip
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.evaluation import evaluate_ranking
from regularized.curriculum.ranking_curriculum.first_stage import (
    Easiness,
    FirstStageDifficulty,
    FirstStageRun,
    kde_score,
    normalised_score,
    read_qrels,
    read_run,
    reciprocal_rank,
)
from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeighted,
    DifficultyWeightedLoss,
    RankingCurriculum,
    pairwise_difficulty,
    pointwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import (
    pairwise_hinge_loss,
    pairwise_softmax_loss,
    pointwise_cross_entropy_loss,
    two_output_pairwise_loss,
)
from regularized.evidence.contract import BadInput, NotApplicable, Subject
from regularized.evidence.models import mlp
from regularized.training.data import TensorData
from regularized.training.terms import Loss
from regularized.training.trainer import Trainer

SAMPLES, FEATURES = 24, 5


def _model() -> nn.Module:
    return mlp([FEATURES, 8, 1])


def _difficulty() -> Tensor:
    return torch.rand(SAMPLES, generator=torch.Generator().manual_seed(4))


def _pair_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return pairwise_softmax_loss(scores[:, 0, 0], scores[:, 1:, 0])


def _plain_pairs() -> Mapping[str, nn.Module]:
    return {"task": Loss(_pair_loss)}


def _pairs() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_pair_loss, _difficulty(), end_epoch=2)}


def _pairs_off() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_pair_loss, _difficulty(), end_epoch=0)}


def _pair_data(n: int, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # A relevant document and two others of a query; the task is to score the first highest.
    return {
        "inputs": torch.randn(n, 3, FEATURES, generator=generator),
        "targets": torch.zeros(n, dtype=torch.int64),
        "index": torch.arange(n),
    }


def _point_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.squeeze(-1) - labels).square()


def _plain_points() -> Mapping[str, nn.Module]:
    return {"task": Loss(_point_loss)}


def _points() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_point_loss, _difficulty())}


def _points_off() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_point_loss, _difficulty(), end_epoch=0)}


def _point_data(n: int, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randn(n, FEATURES, generator=generator),
        "targets": torch.randint(2, (n,), generator=generator).float(),
        "index": torch.arange(n),
    }


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(8, 3, generator=generator).requires_grad_()
    criterion = DifficultyWeightedLoss(pairwise_softmax_loss, RankingCurriculum(10))
    criterion.curriculum.set_epoch(3)

    def part(scores: Tensor, difficulty: Tensor) -> Tensor:
        value: Tensor = criterion(scores[:, 0], scores[:, 1:], difficulty)
        return value

    return part, (scores, _difficulty()[:8])


def subjects() -> list[Subject]:
    """The term on pairs, with several negatives, and on single documents."""
    same_part = NotApplicable("the part is that of pairs")
    return [
        Subject("pairwise", _model, _pairs, _plain_pairs, _pair_data, off=_pairs_off, part=_part),
        Subject("pointwise", _model, _points, _plain_points, _point_data, off=_points_off, part=same_part),
    ]


_HALF, _BEYOND, _NAN = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 1.25]), torch.tensor([0.5, math.nan])
_MSE = nn.MSELoss(reduction="none")


def _curriculum(**settings: Any) -> RankingCurriculum:
    curriculum = RankingCurriculum(10, **settings)
    curriculum.set_epoch(0)
    return curriculum


def _file(text: str | bytes, *, name: str = "bm25.run", read: Callable[..., Any] = read_run, **settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path, **settings)


def _with_outsider(score: float) -> Easiness:
    run = FirstStageRun.from_scores({"q": {"a": 2.0, "b": 1.0}})
    return FirstStageDifficulty("normscore")(run, outside={"q": {"z": score}})


def _mean_in_the_loop() -> Tensor:
    term = DifficultyWeighted(lambda z, y: (z.squeeze(-1) - y).square().mean(), _difficulty())
    return _fit(term)


def _fit(term: nn.Module, **columns: Tensor) -> Tensor:
    data = {**_point_data(SAMPLES, 0), **columns}
    trainer = Trainer(_model(), terms={"task": term}, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    trainer.fit(TensorData(data["inputs"], data["targets"], batch_size=8), epochs=1)
    return data["inputs"]


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    constant = FirstStageRun.from_scores({"q1": {"a": 3.0, "b": 3.0}, "q2": {"a": 3.0, "b": 1.0}})
    ranks = FirstStageRun({"q1": {"a": 1}}, {})
    weighted = DifficultyWeightedLoss(_MSE, _curriculum())
    twice = "q1 Q0 d1 1 2.0 x\nq1 Q0 d1 2 1.0 x\n"
    truncated = gzip.compress("".join(f"q1 Q0 d{i} {i} {-i} x\n" for i in range(1, 99)).encode())[:-12]
    return [
        # the sheet's lines
        BadInput("rank < 1", lambda: reciprocal_rank(torch.tensor([1, 0])), ValueError, ("from 1 on", "0", "add 1")),
        BadInput("rank not integer", lambda: reciprocal_rank(torch.tensor([1.5])), ValueError, ("whole", "1.5")),
        BadInput("rank NaN", lambda: reciprocal_rank(_NAN[1:]), ValueError, ("whole", "nan")),
        BadInput("NaN scores, normscore", lambda: normalised_score(_NAN), ValueError, ("finite", "nan")),
        BadInput("NaN scores, kdescore", lambda: kde_score(_HALF, of=_NAN), ValueError, ("finite", "nan")),
        BadInput("NaN scores, list", lambda: FirstStageRun.from_scores({"q": {"a": math.nan}}), ValueError, ("'a'",)),
        BadInput(
            "label neither 0 nor positive",
            lambda: pointwise_difficulty(_HALF, torch.tensor([1, -2])),
            ValueError,
            ("-999", "-2"),
        ),
        BadInput(
            "easiness outside [0, 1], pairs",
            lambda: _curriculum().pairwise(_HALF, _BEYOND),
            ValueError,
            ("[0, 1]", "1.25", "clip=True"),
        ),
        BadInput(
            "easiness outside [0, 1], documents",
            lambda: _curriculum().pointwise(-_BEYOND, torch.tensor([0, 1])),
            ValueError,
            ("[0, 1]", "-1.25", "clip=True"),
        ),
        BadInput("easiness NaN", lambda: pairwise_difficulty(_NAN, _HALF), ValueError, ("[0, 1]", "nan")),
        BadInput("difficulty outside [0, 1]", lambda: weighted(_HALF, _HALF, _BEYOND), ValueError, ("[0, 1]", "1.25")),
        BadInput(
            "difficulty outside [0, 1], the term",
            lambda: DifficultyWeighted(_MSE, _BEYOND),
            ValueError,
            ("difficulty", "[0, 1]", "1.25"),
        ),
        BadInput(
            "set_epoch never called",
            lambda: RankingCurriculum(10).pairwise(_HALF, _HALF),
            RuntimeError,
            ("set_epoch", "each epoch"),
        ),
        BadInput(
            "constant score list, normscore",
            lambda: FirstStageDifficulty("normscore")(constant),
            UserWarning,
            ("same score", "1 of 2", "'q1'", "0.5"),
        ),
        BadInput(
            "constant score list, kdescore",
            lambda: FirstStageDifficulty("kdescore")(constant),
            UserWarning,
            ("same score", "1 of 2", "0.5"),
        ),
        BadInput(
            "base loss with reduction mean",
            lambda: DifficultyWeightedLoss(nn.MSELoss(), _curriculum()),
            ValueError,
            ("reduction='none'", "'mean'", "MSELoss"),
        ),
        BadInput(
            "base loss with reduction mean, the term",
            lambda: DifficultyWeighted(nn.MSELoss(), _HALF),
            ValueError,
            ("reduction='none'", "'mean'"),
        ),
        BadInput(
            "function that returns the mean",
            lambda: DifficultyWeightedLoss(nn.functional.mse_loss, _curriculum())(_HALF, _HALF, _HALF),
            ValueError,
            ("single number", "reduction='none'"),
        ),
        BadInput("function that returns the mean, the term", _mean_in_the_loop, ValueError, ("reduction='none'",)),
        BadInput(
            "shapes of easiness and loss differ",
            lambda: weighted(torch.zeros(3), torch.zeros(3), _HALF),
            ValueError,
            ("(2,)", "(3,)"),
        ),
        BadInput(
            "loss of further dimensions",
            lambda: weighted(torch.zeros(2, 3), torch.zeros(2, 3), _HALF),
            ValueError,
            ("(2, 3)", "mean"),
        ),
        # settings
        BadInput("end of the curriculum < 0", lambda: RankingCurriculum(-1), ValueError, ("end_epoch", ">= 0", "-1")),
        BadInput("end < 0, the term", lambda: DifficultyWeighted(_MSE, _HALF, end_epoch=-1), ValueError, ("-1",)),
        BadInput("smoothing < 0", lambda: RankingCurriculum(smoothing=-1.0), ValueError, ("smoothing", "-1")),
        BadInput("epoch < 0", lambda: RankingCurriculum().set_epoch(-1), ValueError, ("epoch", "-1")),
        BadInput(
            "unknown form",
            lambda: DifficultyWeightedLoss(_MSE, _curriculum(), aggregate="mean"),  # type: ignore[arg-type]
            ValueError,
            ("per_sample", "batch_mean", "'mean'"),
        ),
        BadInput(
            "a number in place of the curriculum",
            lambda: DifficultyWeightedLoss(_MSE, 20),  # type: ignore[arg-type]
            TypeError,
            ("RankingCurriculum", "int"),
        ),
        BadInput(
            "unknown heuristic",
            lambda: FirstStageDifficulty("bm25"),  # type: ignore[arg-type]
            ValueError,
            ("reciprank", "normscore", "kdescore", "'bm25'"),
        ),
        BadInput(
            "missing rank 0",
            lambda: FirstStageDifficulty("reciprank", missing_rank=0),
            ValueError,
            ("missing_rank", "0"),
        ),
        # shapes
        BadInput(
            "easiness of other pairs", lambda: pairwise_difficulty(_HALF, _HALF[:1]), ValueError, ("(2,)", "(1,)")
        ),
        BadInput(
            "labels of other documents",
            lambda: pointwise_difficulty(_HALF, torch.tensor([1])),
            ValueError,
            ("(2,)", "(1,)"),
        ),
        BadInput(
            "scores with a last dimension",
            lambda: pairwise_softmax_loss(torch.zeros(2, 1), torch.zeros(2, 1)),
            ValueError,
            ("(B,)", "(2, 1)"),
        ),
        BadInput(
            "no negative",
            lambda: pairwise_hinge_loss(torch.zeros(2), torch.zeros(2, 0)),
            ValueError,
            ("(B, K)", "(2, 0)"),
        ),
        BadInput(
            "one output for a two-output loss",
            lambda: two_output_pairwise_loss(torch.zeros(2), torch.zeros(2)),
            ValueError,
            ("(B, 2)", "(2,)"),
        ),
        BadInput(
            "one output for the two-output cross-entropy",
            lambda: pointwise_cross_entropy_loss(torch.zeros(2), torch.zeros(2)),
            ValueError,
            ("(B, 2)", "(2,)"),
        ),
        BadInput("two-dimensional list", lambda: kde_score(torch.zeros(2, 2)), ValueError, ("(L,)", "(2, 2)")),
        BadInput("empty list", lambda: normalised_score(torch.zeros(0)), ValueError, ("empty",)),
        BadInput(
            "difficulty for part of the samples",
            lambda: _fit(DifficultyWeighted(_point_loss, _HALF)),
            IndexError,
            ("2",),
        ),
        BadInput("integers as easiness", lambda: pairwise_difficulty(_HALF.long(), _HALF), TypeError, ("int64",)),
        # runs and files
        BadInput("ranks without scores", lambda: FirstStageDifficulty("kdescore")(ranks), ValueError, ("reciprank",)),
        BadInput("score of an outsider NaN", lambda: _with_outsider(math.nan), ValueError, ("finite", "nan")),
        BadInput("unknown query", lambda: _with_outsider(1.0)["q9", "a"], KeyError, ("'q9'", "first stage")),
        BadInput("look-up of no pairs", lambda: _with_outsider(1.0).lookup(["q"], []), ValueError, ("1 ", "0 ")),
        BadInput("empty run", lambda: FirstStageRun({}, {}), ValueError, ("at least one query",)),
        BadInput("query without documents", lambda: FirstStageRun.from_scores({"q": {}}), ValueError, ("'q'", "empty")),
        BadInput(
            "document twice in a score list",
            lambda: FirstStageRun.from_scores({"q": [("a", 1.0), ("a", 2.0)]}),
            ValueError,
            ("'q'", "twice"),
        ),
        BadInput(
            "two documents of one rank", lambda: FirstStageRun({"q": {"a": 1, "b": 1}}, {}), ValueError, ("same rank",)
        ),
        BadInput(
            "ranks and scores of other documents",
            lambda: FirstStageRun({"q": {"a": 1}}, {"q": {"b": 1.0}}),
            ValueError,
            ("'a'", "both"),
        ),
        BadInput("no such file", lambda: read_run("no/such.run"), FileNotFoundError, ("no/such.run",)),
        BadInput("empty file", lambda: _file("\n"), ValueError, ("bm25.run", "empty", "query Q0 document")),
        BadInput("wrong columns", lambda: _file("q1 Q0 d1 1 2.0 x\nq1 d2 2\n"), ValueError, ("bm25.run:2", "3", "6")),
        BadInput("rank 0", lambda: _file("q1 Q0 d1 0 2.0 x\n"), ValueError, ("bm25.run:1", "'0'", 'ranks="scores"')),
        BadInput("rank 1.5", lambda: _file("q1 Q0 d1 1.5 2.0 x\n"), ValueError, ("bm25.run:1", "'1.5'")),
        BadInput("score nan", lambda: _file("q1 Q0 d1 1 nan x\n"), ValueError, ("bm25.run:1", "finite", "'nan'")),
        BadInput("score no number", lambda: _file("q1 Q0 d1 1 high x\n"), ValueError, ("bm25.run:1", "'high'")),
        BadInput("document twice", lambda: _file(twice), ValueError, ("bm25.run:2", "'d1'", "twice")),
        BadInput("binary file", lambda: _file(b"\xff\xfe\x00q1"), ValueError, ("bm25.run", "damaged")),
        BadInput("truncated gz", lambda: _file(truncated, name="bm25.run.gz"), ValueError, ("bm25.run.gz", "damaged")),
        BadInput("no gz", lambda: _file(twice, name="bm25.run.gz"), ValueError, ("bm25.run.gz", "damaged")),
        BadInput(
            "ranks against scores",
            lambda: _file("q1 Q0 d1 1 1.0 x\nq1 Q0 d2 2 9.0 x\n"),
            UserWarning,
            ("contradict", "'q1'", 'ranks="scores"'),
        ),
        BadInput(
            "unknown columns", lambda: _file(twice, columns="csv"), ValueError, ("trec", "scores", "ranks", "'csv'")
        ),
        BadInput("unknown source of ranks", lambda: _file(twice, ranks="column"), ValueError, ("file", "'column'")),
        BadInput("label no number", lambda: _file("q1 0 d1 yes\n", read=read_qrels), ValueError, (":1", "'yes'")),
        BadInput("judged twice", lambda: _file("q1 0 d1 1\nq1 0 d1 0\n", read=read_qrels), ValueError, (":2", "twice")),
        # evaluation
        BadInput(
            "unknown measure",
            lambda: evaluate_ranking({"q": {"a": 1}}, {}, ["BEST"]),
            ValueError,
            ("'BEST'", "ir-meas"),
        ),
        BadInput("no measure", lambda: evaluate_ranking({"q": {"a": 1}}, {}, []), ValueError, ("at least one",)),
        BadInput("nothing judged", lambda: evaluate_ranking({"q": {}}, {}), ValueError, ("nothing is judged",)),
    ]
