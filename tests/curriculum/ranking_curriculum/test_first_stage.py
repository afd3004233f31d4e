"""First-stage lists: heuristics against a second derivation and SciPy, and run files, well-formed and not.

Mutations tried and seen: bandwidth with the population's deviation, Silverman's factor, rank counted from 0, ties in
reverse, minimum for maximum, no clipping outside the list, the listed score overruled by an outside one.
"""

import gzip
import math
import random
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

from regularized.curriculum.ranking_curriculum.first_stage import (
    FirstStageDifficulty,
    FirstStageRun,
    kde_score,
    normalised_score,
    read_qrels,
    read_run,
    reciprocal_rank,
)

HEURISTICS = ("reciprank", "normscore", "kdescore")
SCORES = st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=2, max_size=30)


@given(SCORES, st.lists(st.floats(-80, 80), max_size=5))
def test_kde_is_scipys(scores, others):
    """Fails on any other bandwidth, kernel or bound of the integral."""
    assume(len(set(scores)) > 1)
    at = [*scores, *others]
    density = gaussian_kde(scores)
    expected = [density.integrate_box_1d(-math.inf, x) for x in at]
    ours = kde_score(torch.tensor(at, dtype=torch.float64), of=torch.tensor(scores, dtype=torch.float64))
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


@given(SCORES)
def test_normscore_by_hand(scores):
    """Fails when minimum and maximum are not of the list."""
    assume(max(scores) > min(scores))
    expected = [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]
    assert normalised_score(torch.tensor(scores, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("heuristic", HEURISTICS)
@given(scores=SCORES)
def test_monotone_in_the_score(heuristic, scores):
    """Fails when a document of higher score is less easy (check 6 of the sheet)."""
    assume(len(set(scores)) == len(scores))
    run = FirstStageRun.from_scores({"q": {str(i): s for i, s in enumerate(scores)}})
    easy = FirstStageDifficulty(heuristic)(run)
    ordered = [easy["q", str(i)] for i in sorted(range(len(scores)), key=scores.__getitem__)]
    assert all(low <= high for low, high in pairwise(ordered))
    assert 0.0 <= ordered[0] < ordered[-1] <= 1.0


@pytest.mark.parametrize("function", [normalised_score, kde_score])
@given(scores=SCORES, scale=st.sampled_from([1e-6, 0.5, 3.0, 1e6]), shift=st.floats(-100, 100))
def test_affine_changes_do_not_matter(function, scores, scale, shift):
    """Fails when the result depends on unit or zero of the scores (check 6)."""
    assume(max(scores) - min(scores) > 0.1)
    base = torch.tensor(scores, dtype=torch.float64)
    torch.testing.assert_close(function(scale * (base + shift)), function(base), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=12))
def test_centre_of_a_symmetric_list(halves):
    """Fails when the middle of a symmetric list is not at half the density (check 7)."""
    centred = torch.tensor([3.0 + s * x for x in halves for s in (-1, 1)], dtype=torch.float64)
    middle = kde_score(torch.tensor([3.0], dtype=torch.float64), of=centred)
    assert middle.item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("function", [normalised_score, kde_score])
@pytest.mark.parametrize("scores", [[2.0], [0.1] * 7, [1e308] * 3])
def test_nothing_to_tell_apart_is_one_half(function, scores):
    """Fails on division by zero, also where the sum of equal numbers rounds."""
    assert function(torch.tensor(scores, dtype=torch.float64)).tolist() == [0.5] * len(scores)


@pytest.mark.parametrize("function", [normalised_score, kde_score])
def test_extreme_scores_stay_finite(function):
    """Fails when the range of the scores overflows or underflows."""
    for scores in ([1.7e308, -1.7e308, 0.0], [5e-324, 0.0, 0.0], [1e300, 1e300 + 1e285, -1.0]):
        values = function(torch.tensor(scores, dtype=torch.float64))
        assert bool(((values >= 0) & (values <= 1)).all()), scores


def test_long_lists_in_parts():
    """Fails when the table of differences is cut and put together wrongly."""
    scores = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = torch.randperm(5000)[:20]
    torch.testing.assert_close(kde_score(scores)[some], kde_score(scores[some], of=scores))


def test_reciprocal_rank():
    """Fails when ranks are counted from 0."""
    assert reciprocal_rank(torch.tensor([1, 2, 1000])).tolist() == [1.0, 0.5, 0.001]


# -- difficulty of documents --------------------------------------------------------------------


def test_documents_outside_the_list():
    """Fails when an outsider gets another rank than the constant, leaves [0, 1], or is easier than the last listed."""
    run = FirstStageRun.from_scores({"q": {"a": 9.0, "b": 8.0, "c": 5.0}})
    outside = {"q": {"low": 1.0, "high": 99.0, "middle": 7.0, "b": 0.0}}
    assert FirstStageDifficulty("reciprank")(run)["q", "z"] == 0.001
    assert FirstStageDifficulty("reciprank", missing_rank=4)(run, outside=outside)["q", "high"] == 0.25
    easy = FirstStageDifficulty("normscore")(run, outside=outside)
    assert [easy["q", d] for d in ("low", "high", "middle", "b", "z")] == [0.0, 1.0, 0.5, 0.75, 0.0]
    easy = FirstStageDifficulty("kdescore")(run, outside=outside)
    assert easy["q", "low"] < easy["q", "c"] < easy["q", "middle"] < easy["q", "b"] < easy["q", "a"] < easy["q", "high"]
    assert easy["q", "z"] == easy["q", "c"]


@pytest.mark.parametrize("heuristic", HEURISTICS)
def test_queries_do_not_mix(heuristic):
    """Fails when a heuristic looks beyond the query's own list."""
    one, two = {"a": 3.0, "b": 1.0, "c": 0.5}, {"a": 300.0, "d": 120.0, "e": -5.0}
    both = FirstStageDifficulty(heuristic)(FirstStageRun.from_scores({"1": one, "2": two}))
    alone = FirstStageDifficulty(heuristic)(FirstStageRun.from_scores({"2": two}))
    assert both.values["2"] == alone.values["2"]


def test_one_warning_for_many_constant_lists():
    """Fails when each of thousands of constant lists warns, or none does."""
    run = FirstStageRun.from_scores({str(q): {"a": 1.0, "b": 1.0} for q in range(5)} | {"x": {"a": 2.0, "b": 1.0}})
    with pytest.warns(UserWarning, match="5 of 6 queries") as caught:
        easy = FirstStageDifficulty("normscore")(run)
    assert len(caught) == 1
    assert easy["3", "b"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FirstStageDifficulty("reciprank")(run)  # ranks tell them apart


def test_ties_keep_the_order_given():
    """Fails when equal scores are ordered by anything but the first stage's own order."""
    run = FirstStageRun.from_scores({"q": [("z", 1.0), ("a", 1.0), ("m", 2.0)]})
    assert run.ranks["q"] == {"m": 1, "z": 2, "a": 3}


# -- files --------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 20), min_size=1, max_size=6), min_size=1))
def test_run_file_round_trip(tmp_path_factory, lists):
    """Fails when lines in any order, with tabs, blank lines or Windows ends, do not give the same lists."""
    scores = {q: {f"d{d}": d / 7 for d in documents} for q, documents in lists.items()}
    expected = FirstStageRun.from_scores({q: dict(sorted(t.items(), key=lambda x: -x[1])) for q, t in scores.items()})
    lines = [
        f"{q}\tQ0 {d} {expected.ranks[q][d]}  {score!r} bm25\r\n\n" for q, t in scores.items() for d, score in t.items()
    ]
    random.Random(0).shuffle(lines)
    folder = tmp_path_factory.mktemp("runs")
    plain, packed = folder / "a.run", folder / "a.run.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    packed.write_bytes(gzip.compress("".join(lines).encode()))
    for path in (plain, packed):
        for ranks in ("file", "scores"):
            run = read_run(path, ranks=ranks)
            assert run.scores == expected.scores
            assert run.ranks == expected.ranks


def test_ranks_from_zero(tmp_path):
    """Fails when a file of ranks from 0, as some engines write it, cannot be read at all."""
    file = tmp_path / "terrier.run"
    file.write_text("q1 Q0 d1 0 9.5 t\nq1 Q0 d2 1 9.0 t\n")
    assert read_run(file, ranks="scores").ranks == {"q1": {"d1": 1, "d2": 2}}


def test_three_columns(tmp_path):
    """Fails when MS MARCO's ranks or a plain score list are read into the wrong column."""
    file = tmp_path / "three.tsv"
    file.write_text("q1\td1\t2\nq1\td2\t1\n")
    ranks, scores = read_run(file, columns="ranks"), read_run(file, columns="scores")
    assert (ranks.ranks, ranks.scores) == ({"q1": {"d1": 2, "d2": 1}}, {})
    assert (scores.ranks, scores.scores) == ({"q1": {"d1": 1, "d2": 2}}, {"q1": {"d1": 2.0, "d2": 1.0}})


def test_contradiction_warns_and_keeps_the_column(tmp_path):
    """Fails when ranks of the file are silently replaced; equal scores contradict nothing."""
    file = tmp_path / "a.run"
    file.write_text("q1 Q0 d1 2 9.5 t\nq1 Q0 d2 1 9.0 t\n")
    with pytest.warns(UserWarning, match="contradict"):
        assert read_run(file).ranks["q1"] == {"d1": 2, "d2": 1}
    file.write_text("q1 Q0 d1 2 9.0 t\nq1 Q0 d2 1 9.0 t\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_run(file)


def test_qrels(tmp_path):
    """Fails when a column is taken for another; labels are passed on as they are, below 0 included."""
    file = tmp_path / "qrels"
    file.write_text("q1 0 d1 1\nq1 0 d2 -2\nq2 Q0 d1 3\n")
    assert read_qrels(file) == {"q1": {"d1": 1, "d2": -2}, "q2": {"d1": 3}}
