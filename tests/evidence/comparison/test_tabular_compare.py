"""The table over real data sets: what it counts, which way is better, and that its last judge has seen no answer."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regularized.evidence.comparison import Problem

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "tabular_compare.py"


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def record(metric, differences, *, recommended=None, leads=None, pair=None):
    """Of an outer split, made up."""
    arms = {"plain": 0.0, "boosted_trees": 0.0, **differences}
    return {
        "sizes": {"train": 10, "test": 5, "columns": 2},
        "metric": metric,
        "arms": {n: {"score": 80.0 + d, "difference": d, "interval": [d - 1.0, d + 1.0]} for n, d in arms.items()},
        "recommended": recommended,
        "leads": leads,
        "combination": None,
        "pair": pair,
        "with_trees": {"recommended": None, "leads": None},
    }


@pytest.fixture(scope="module")
def results():
    """One better, one worse, one equal, one that stays plain; a regression; a table that failed; another metric."""
    accuracy = {"a": 2.0, "b": -1.0, "c": 0.0}
    found = {
        f"{name} | 0 | accuracy": record("accuracy", {"mixup": d}, recommended="mixup", leads="mixup")
        for name, d in accuracy.items()
    }
    found["d | 0 | accuracy"] = record("accuracy", {"mixup": 5.0}, leads="mixup")
    found["a | 1 | accuracy"] = record("accuracy", {"mixup": 4.0}, leads="mixup")
    found["e | 0 | rmse"] = record("rmse", {"mixup": 7.0, "dropout + mixup": 1.0}, pair="dropout + mixup")
    found["f | 0 | accuracy"] = {"error": "ValueError: no such table"}
    found["a | 0 | nll"] = record("nll", {"mixup": -9.0}, recommended="mixup")
    return found


def test_tables_are_counted_once(script, results):
    """Fails when ties count as wins, a table that failed or stays plain enters the sign test, or a split is a table."""
    tables = script.by_table(results, ["accuracy", "rmse"])
    assert sorted(tables) == ["a", "b", "c", "d", "e"]
    told = script.tally(tables, "recommended")
    assert (told.better, told.worse, told.equal, told.kept) == (1, 1, 1, 2)
    assert told.p_value == 1.0
    # (2 + 0) / 2 of a, whose second split stays plain; -1, 0; 0 where it stays plain
    assert told.means["accuracy"][0] == pytest.approx(0.0)
    assert told.means["rmse"] == (0.0, None)  # one table has no interval
    assert script.gain(tables["a"], "recommended").names == ("mixup", "plain")
    lead = script.tally(tables, "leads")
    assert (lead.better, lead.worse, lead.equal, lead.kept) == (2, 1, 1, 1)
    assert script.tally(tables, "boosted_trees").p_value is None  # nothing differs
    pair = script.tally(tables, "pair")
    assert (pair.better, pair.worse, pair.kept) == (1, 0, 0)  # where there is none, there is nothing to count
    assert script.tally(tables, "combination").means == {}


def test_what_failed_is_shown(script, results):
    """Fails when a table disappears from the report because its comparison failed."""
    text = script.report(results, ["accuracy", "rmse"])
    assert "Failed: f | 0 | accuracy: ValueError: no such table." in text
    assert "5 tables, 6 outer splits. `compare` recommended something in 3 of them: 1 table became better" in text
    assert script.report({}, ["nll"]).startswith("*Nothing")


def test_what_is_missing_is_said(script):
    """Fails when a table that the machine did not get to is left out without a word."""
    done = {f"{table.name} | {split} | {metric}": {} for table, split, metric in script.planned(script.SETS, 2)}
    assert len(done) == 2 * (14 + 10)
    assert script.unfinished(done, ["accuracy", "rmse"]) == ""
    del done["ames, Sale_Price | 0 | rmse"], done["ames, Sale_Price | 1 | rmse"], done["Chile, vote | 1 | nll"]
    told = script.unfinished(done, ["accuracy", "rmse"])
    assert told == "2 of 28 outer splits that were planned; nothing yet of ames, Sale_Price"
    assert script.unfinished(done, ["nll"]) == "1 of 20 outer splits that were planned"


@pytest.mark.parametrize(
    ("metric", "ours", "plain", "better"),
    [("accuracy", 90.0, 88.0, 2.0), ("nll", 0.5, 0.7, 0.2), ("rmse", 3.0, 4.0, 25.0), ("rmse", 5.0, 4.0, -25.0)],
)
def test_positive_is_better(script, metric, ours, plain, better):
    """Fails when a smaller error counts as worse."""
    assert script.difference(metric, np.array(ours), np.array(plain)) == pytest.approx(better)


def test_scores_are_of_the_metric(script):
    """Fails when the root is taken before the mean, or resamples are of other rows than those of the score."""
    output, truth = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 7.0])
    rows = script.by_row("rmse", output, truth)
    score, drawn = script.scores("rmse", torch.stack([rows, torch.zeros(3).double()]))
    assert score == pytest.approx((16 / 3) ** 0.5 / 2)
    assert abs(drawn.mean() - score) < 0.3
    assert drawn.min() == 0.0  # a resample without the row that errs
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert script.by_row("accuracy", logits, torch.tensor([1, 0])).tolist() == [100.0, 0.0]
    assert script.by_row("nll", logits, torch.tensor([1, 0])).diff().item() == pytest.approx(2.0)


def test_the_judge_has_rows_of_its_own(script):
    """Fails when `compare` is given a row of the outer test, or classes are not in the same shares in both."""
    ids = torch.arange(700.0)
    given, test, truth = script.deal(Problem(ids[:, None], (ids % 7 == 0).long(), ("a", "b")), 3)
    assert len(given.inputs) == script.TRAIN
    assert given.test_inputs is None
    both = torch.cat([given.inputs, test]).flatten()
    assert torch.equal(both.sort().values, ids)
    assert torch.equal(truth, (test.flatten() % 7 == 0).long())
    assert truth.double().mean() == pytest.approx(1 / 7, abs=0.01)
    again = script.deal(Problem(ids[:, None], (ids % 7 == 0).long(), ("a", "b")), 4)
    assert not torch.equal(again[1], test)


@pytest.mark.parametrize(
    ("effects", "pair"),
    [
        ({"plain": None, "mixup": 1.0, "label_smoothing": 3.0, "dropout": 2.0}, "label_smoothing + dropout"),
        ({"plain": None, "label_smoothing": 3.0, "mixup": 2.0, "dropout": 1.0}, "label_smoothing + dropout"),
        ({"plain": None, "mixup": 1.0, "dropout": -1.0}, None),
        ({"plain": None, "dropout": -1.0}, None),
    ],
)
def test_the_best_two_fit_together(script, effects, pair):
    """Fails when the pair is not the best by the selection part, or both would be the loss of the task."""
    arms = [
        SimpleNamespace(name=name, judged=None if effect is None else SimpleNamespace(selection_effect=effect))
        for name, effect in effects.items()
    ]
    assert script.best_pair(SimpleNamespace(arms=arms)) == pair


def test_a_training_that_diverges_predicts_nothing(script):
    """Fails when NaN reaches the scores, or a prediction of a regression is not in the units of the target."""
    settings = {"lr": 1e8, "weight_decay": 0.0, "own": {"plain": {}}}
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    told = script.outputs(Problem(x, 100.0 + 10.0 * x[:, 0]), x[:5], "plain", settings, 0)
    assert told.tolist() == pytest.approx([100.0 + 10.0 * float(x[:, 0].mean())] * 5, rel=1e-4)


def test_the_page_shows_this_design(script):
    """Fails when the numbers of the documentation are of other settings, or of tables that were not planned."""
    saved = json.loads((SCRIPT.parents[1] / "docs" / "examples" / "tabular.json").read_text(encoding="utf-8"))
    assert saved["design"] == script.DESIGN
    plan = {f"{table.name} | {split} | {metric}" for table, split, metric in script.planned(script.SETS, script.OUTER)}
    assert set(saved["results"]) <= plan
