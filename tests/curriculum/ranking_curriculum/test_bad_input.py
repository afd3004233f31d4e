"""Bad inputs of `ranking_curriculum`: each is answered by what was given, what is allowed, and how to mend it."""

import gzip
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.evaluation import evaluate_ranking
from regularized.curriculum.ranking_curriculum.first_stage import (
    FirstStageDifficulty,
    FirstStageRun,
    kde_score,
    normalised_score,
    read_qrels,
    read_run,
    reciprocal_rank,
)
from regularized.curriculum.ranking_curriculum.loss import (
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
from regularized.curriculum.ranking_curriculum.term import DifficultyWeighted
from regularized.papers.ranking_curriculum.contract import SAMPLES, difficulties, point_data, point_loss, scorer
from regularized.training.data import TensorData
from regularized.training.trainer import Trainer

_HALF, _BEYOND, _NAN = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 1.25]), torch.tensor([0.5, math.nan])


_MSE = nn.MSELoss(reduction="none")


def _curriculum(**settings: Any):
    curriculum = RankingCurriculum(10, **settings)
    curriculum.set_epoch(0)
    return curriculum


def _file(text: str | bytes, *, name: str = "bm25.run", read: Callable[..., Any] = read_run, **settings: Any):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path, **settings)


def _with_outsider(score: float):
    run = FirstStageRun.from_scores({"q": {"a": 2.0, "b": 1.0}})
    return FirstStageDifficulty("normscore")(run, outside={"q": {"z": score}})


def _mean_in_the_loop():
    term = DifficultyWeighted(lambda z, y: (z.squeeze(-1) - y).square().mean(), difficulties())
    return _fit(term)


def _fit(term: nn.Module, **columns: Tensor):
    data = {**point_data(SAMPLES, 0), **columns}
    trainer = Trainer(scorer(), terms={"task": term}, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    trainer.fit(TensorData(data["inputs"], data["targets"], batch_size=8), epochs=1)
    return data["inputs"]


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    constant = FirstStageRun.from_scores({"q1": {"a": 3.0, "b": 3.0}, "q2": {"a": 3.0, "b": 1.0}})
    ranks = FirstStageRun({"q1": {"a": 1}}, {})
    weighted = DifficultyWeightedLoss(_MSE, _curriculum())
    twice = "q1 Q0 d1 1 2.0 x\nq1 Q0 d1 2 1.0 x\n"
    truncated = gzip.compress("".join(f"q1 Q0 d{i} {i} {-i} x\n" for i in range(1, 99)).encode())[:-12]
    return [
        # the sheet's lines
        refused("rank < 1", lambda: reciprocal_rank(torch.tensor([1, 0])), ValueError, ("from 1 on", "0", "add 1")),
        refused("rank not integer", lambda: reciprocal_rank(torch.tensor([1.5])), ValueError, ("whole", "1.5")),
        refused("rank NaN", lambda: reciprocal_rank(_NAN[1:]), ValueError, ("whole", "nan")),
        refused("NaN scores, normscore", lambda: normalised_score(_NAN), ValueError, ("finite", "nan")),
        refused("NaN scores, kdescore", lambda: kde_score(_HALF, of=_NAN), ValueError, ("finite", "nan")),
        refused("NaN scores, list", lambda: FirstStageRun.from_scores({"q": {"a": math.nan}}), ValueError, ("'a'",)),
        refused(
            "label neither 0 nor positive",
            lambda: pointwise_difficulty(_HALF, torch.tensor([1, -2])),
            ValueError,
            ("-999", "-2"),
        ),
        refused(
            "easiness outside [0, 1], pairs",
            lambda: _curriculum().pairwise(_HALF, _BEYOND),
            ValueError,
            ("[0, 1]", "1.25", "clip=True"),
        ),
        refused(
            "easiness outside [0, 1], documents",
            lambda: _curriculum().pointwise(-_BEYOND, torch.tensor([0, 1])),
            ValueError,
            ("[0, 1]", "-1.25", "clip=True"),
        ),
        refused("easiness NaN", lambda: pairwise_difficulty(_NAN, _HALF), ValueError, ("[0, 1]", "nan")),
        refused("difficulty outside [0, 1]", lambda: weighted(_HALF, _HALF, _BEYOND), ValueError, ("[0, 1]", "1.25")),
        refused(
            "difficulty outside [0, 1], the term",
            lambda: DifficultyWeighted(_MSE, _BEYOND),
            ValueError,
            ("difficulty", "[0, 1]", "1.25"),
        ),
        refused(
            "set_epoch never called",
            lambda: RankingCurriculum(10).pairwise(_HALF, _HALF),
            RuntimeError,
            ("set_epoch", "each epoch"),
        ),
        refused(
            "constant score list, normscore",
            lambda: FirstStageDifficulty("normscore")(constant),
            UserWarning,
            ("same score", "1 of 2", "'q1'", "0.5"),
        ),
        refused(
            "constant score list, kdescore",
            lambda: FirstStageDifficulty("kdescore")(constant),
            UserWarning,
            ("same score", "1 of 2", "0.5"),
        ),
        refused(
            "base loss with reduction mean",
            lambda: DifficultyWeightedLoss(nn.MSELoss(), _curriculum()),
            ValueError,
            ("reduction='none'", "'mean'", "MSELoss"),
        ),
        refused(
            "base loss with reduction mean, the term",
            lambda: DifficultyWeighted(nn.MSELoss(), _HALF),
            ValueError,
            ("reduction='none'", "'mean'"),
        ),
        refused(
            "function that returns the mean",
            lambda: DifficultyWeightedLoss(nn.functional.mse_loss, _curriculum())(_HALF, _HALF, _HALF),
            ValueError,
            ("single number", "reduction='none'"),
        ),
        refused("function that returns the mean, the term", _mean_in_the_loop, ValueError, ("reduction='none'",)),
        refused(
            "shapes of easiness and loss differ",
            lambda: weighted(torch.zeros(3), torch.zeros(3), _HALF),
            ValueError,
            ("(2,)", "(3,)"),
        ),
        refused(
            "loss of further dimensions",
            lambda: weighted(torch.zeros(2, 3), torch.zeros(2, 3), _HALF),
            ValueError,
            ("(2, 3)", "mean"),
        ),
        # settings
        refused("end of the curriculum < 0", lambda: RankingCurriculum(-1), ValueError, ("end_epoch", ">= 0", "-1")),
        refused("end < 0, the term", lambda: DifficultyWeighted(_MSE, _HALF, end_epoch=-1), ValueError, ("-1",)),
        refused("smoothing < 0", lambda: RankingCurriculum(smoothing=-1.0), ValueError, ("smoothing", "-1")),
        refused("epoch < 0", lambda: RankingCurriculum().set_epoch(-1), ValueError, ("epoch", "-1")),
        refused(
            "unknown form",
            lambda: DifficultyWeightedLoss(_MSE, _curriculum(), aggregate="mean"),
            ValueError,
            ("per_sample", "batch_mean", "'mean'"),
        ),
        refused(
            "a number in place of the curriculum",
            lambda: DifficultyWeightedLoss(_MSE, 20),
            TypeError,
            ("RankingCurriculum", "int"),
        ),
        refused(
            "unknown heuristic",
            lambda: FirstStageDifficulty("bm25"),
            ValueError,
            ("reciprank", "normscore", "kdescore", "'bm25'"),
        ),
        refused(
            "missing rank 0",
            lambda: FirstStageDifficulty("reciprank", missing_rank=0),
            ValueError,
            ("missing_rank", "0"),
        ),
        # shapes
        refused("easiness of other pairs", lambda: pairwise_difficulty(_HALF, _HALF[:1]), ValueError, ("(2,)", "(1,)")),
        refused(
            "labels of other documents",
            lambda: pointwise_difficulty(_HALF, torch.tensor([1])),
            ValueError,
            ("(2,)", "(1,)"),
        ),
        refused(
            "scores with a last dimension",
            lambda: pairwise_softmax_loss(torch.zeros(2, 1), torch.zeros(2, 1)),
            ValueError,
            ("(B,)", "(2, 1)"),
        ),
        refused(
            "no negative",
            lambda: pairwise_hinge_loss(torch.zeros(2), torch.zeros(2, 0)),
            ValueError,
            ("(B, K)", "(2, 0)"),
        ),
        refused(
            "one output for a two-output loss",
            lambda: two_output_pairwise_loss(torch.zeros(2), torch.zeros(2)),
            ValueError,
            ("(B, 2)", "(2,)"),
        ),
        refused(
            "one output for the two-output cross-entropy",
            lambda: pointwise_cross_entropy_loss(torch.zeros(2), torch.zeros(2)),
            ValueError,
            ("(B, 2)", "(2,)"),
        ),
        refused("two-dimensional list", lambda: kde_score(torch.zeros(2, 2)), ValueError, ("(L,)", "(2, 2)")),
        refused("empty list", lambda: normalised_score(torch.zeros(0)), ValueError, ("empty",)),
        refused(
            "difficulty for part of the samples",
            lambda: _fit(DifficultyWeighted(point_loss, _HALF)),
            IndexError,
            ("2",),
        ),
        refused("integers as easiness", lambda: pairwise_difficulty(_HALF.long(), _HALF), TypeError, ("int64",)),
        # runs and files
        refused("ranks without scores", lambda: FirstStageDifficulty("kdescore")(ranks), ValueError, ("reciprank",)),
        refused("score of an outsider NaN", lambda: _with_outsider(math.nan), ValueError, ("finite", "nan")),
        refused("unknown query", lambda: _with_outsider(1.0)["q9", "a"], KeyError, ("'q9'", "first stage")),
        refused("look-up of no pairs", lambda: _with_outsider(1.0).lookup(["q"], []), ValueError, ("1 ", "0 ")),
        refused("empty run", lambda: FirstStageRun({}, {}), ValueError, ("at least one query",)),
        refused("query without documents", lambda: FirstStageRun.from_scores({"q": {}}), ValueError, ("'q'", "empty")),
        refused(
            "document twice in a score list",
            lambda: FirstStageRun.from_scores({"q": [("a", 1.0), ("a", 2.0)]}),
            ValueError,
            ("'q'", "twice"),
        ),
        refused(
            "two documents of one rank", lambda: FirstStageRun({"q": {"a": 1, "b": 1}}, {}), ValueError, ("same rank",)
        ),
        refused(
            "ranks and scores of other documents",
            lambda: FirstStageRun({"q": {"a": 1}}, {"q": {"b": 1.0}}),
            ValueError,
            ("'a'", "both"),
        ),
        refused("no such file", lambda: read_run("no/such.run"), FileNotFoundError, ("no/such.run",)),
        refused("empty file", lambda: _file("\n"), ValueError, ("bm25.run", "empty", "query Q0 document")),
        refused("wrong columns", lambda: _file("q1 Q0 d1 1 2.0 x\nq1 d2 2\n"), ValueError, ("bm25.run:2", "3", "6")),
        refused("rank 0", lambda: _file("q1 Q0 d1 0 2.0 x\n"), ValueError, ("bm25.run:1", "'0'", 'ranks="scores"')),
        refused("rank 1.5", lambda: _file("q1 Q0 d1 1.5 2.0 x\n"), ValueError, ("bm25.run:1", "'1.5'")),
        refused("score nan", lambda: _file("q1 Q0 d1 1 nan x\n"), ValueError, ("bm25.run:1", "finite", "'nan'")),
        refused("score no number", lambda: _file("q1 Q0 d1 1 high x\n"), ValueError, ("bm25.run:1", "'high'")),
        refused("document twice", lambda: _file(twice), ValueError, ("bm25.run:2", "'d1'", "twice")),
        refused("binary file", lambda: _file(b"\xff\xfe\x00q1"), ValueError, ("bm25.run", "damaged")),
        refused("truncated gz", lambda: _file(truncated, name="bm25.run.gz"), ValueError, ("bm25.run.gz", "damaged")),
        refused("no gz", lambda: _file(twice, name="bm25.run.gz"), ValueError, ("bm25.run.gz", "damaged")),
        refused(
            "ranks against scores",
            lambda: _file("q1 Q0 d1 1 1.0 x\nq1 Q0 d2 2 9.0 x\n"),
            UserWarning,
            ("contradict", "'q1'", 'ranks="scores"'),
        ),
        refused(
            "unknown columns", lambda: _file(twice, columns="csv"), ValueError, ("trec", "scores", "ranks", "'csv'")
        ),
        refused("unknown source of ranks", lambda: _file(twice, ranks="column"), ValueError, ("file", "'column'")),
        refused("label no number", lambda: _file("q1 0 d1 yes\n", read=read_qrels), ValueError, (":1", "'yes'")),
        refused("judged twice", lambda: _file("q1 0 d1 1\nq1 0 d1 0\n", read=read_qrels), ValueError, (":2", "twice")),
        # evaluation
        refused(
            "unknown measure",
            lambda: evaluate_ranking({"q": {"a": 1}}, {}, ["BEST"]),
            ValueError,
            ("'BEST'", "ir-meas"),
        ),
        refused("no measure", lambda: evaluate_ranking({"q": {"a": 1}}, {}, []), ValueError, ("at least one",)),
        refused("nothing judged", lambda: evaluate_ranking({"q": {}}, {}), ValueError, ("nothing is judged",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
