from dataclasses import replace
from types import SimpleNamespace

import pytest

from regularized.evidence.experiment import (
    About,
    Seeds,
    Tuning,
    block_of,
    describe_arms,
    resolve,
    undeclared_differences,
)
from regularized.evidence.results import outcomes
from regularized.evidence.store import Run


@pytest.fixture
def experiment():
    """Settings of two arms, each level of which says its own name."""
    return SimpleNamespace(
        __name__="an_experiment",
        DEFAULTS={"a": "default", "b": "default", "c": "default", "d": "default", "e": "default"},
        SCALES={"laptop": {"size": 3}, "paper": dict.fromkeys("bcde", "scale") | {"size": 300}},
        ARMS={"plain": {}, "ours": dict.fromkeys("cde", "arm")},
        PUBLISHED={"paper": {"ours": dict.fromkeys("de", "published")}},
        about=lambda s: About("numbers", s["size"] * 1000, "a net", 10**6),
    )


def test_one_rule_for_settings(experiment):
    """Fails when two levels change places, or one is left out."""
    assert resolve(experiment, "ours", "paper", {"e": "override"}) == {
        "a": "default",
        "b": "scale",
        "c": "arm",
        "d": "published",
        "e": "override",
        "size": 300,
    }
    assert resolve(experiment, "plain", "laptop") == {**experiment.DEFAULTS, "size": 3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("best", "laptop"), "has no 'best'; it has"),
        (("ours", "huge"), "has no 'huge'; it has"),
        (("ours", "laptop", {"lr": 1.0}), r"sets \['lr'\], which has no default"),
    ],
)
def test_misspelt_settings_change_nothing_silently(experiment, arguments, says):
    """Fails when a setting that nobody reads is stored as if it mattered."""
    with pytest.raises(ValueError, match=says):
        resolve(experiment, *arguments)


def test_undeclared_differences_are_found(experiment, claim):
    """Fails when a control may differ in more than its claim says: one weight of five went unnoticed so."""
    compared = replace(claim, baseline="plain", method="ours", differs=("c",))
    assert undeclared_differences(experiment, compared) == ["d", "e"]
    assert undeclared_differences(experiment, replace(compared, differs=("c", "d", "e"))) == []
    experiment.DISPLAY = {"d"}
    assert undeclared_differences(experiment, compared) == ["e"]


def test_what_was_tuned_over_equal_grids_may_differ(experiment, claim):
    """Fails when a setting that only one arm could choose, or chose from more, passes as tuned."""
    compared = replace(claim, baseline="plain", method="ours", differs=("c", "d"))

    def tuned(plain, ours):
        grids = {"plain": [{"e": value} for value in plain], "ours": [{"e": value} for value in ours]}
        experiment.TUNING = Tuning("m", "higher", grids)
        return undeclared_differences(experiment, compared)

    assert tuned(("default", "arm"), ("arm", "default")) == []
    assert tuned(("default", "arm"), ("arm", "more")) == ["e"]
    assert tuned(("arm",), ("arm",)) == ["e"], "one trial is no choice"


def test_toys_are_computed(experiment):
    """Fails when three thousand samples beside three hundred thousand are no toy, or a small paper's are."""
    assert describe_arms(experiment, "laptop")["ours"]["toy"]
    assert not describe_arms(experiment, "paper")["ours"]["toy"]
    assert not About("d", 300, "m", 10**6).is_toy_beside(About("d", 2000, "m", 10**6))
    assert About("d", 10**6, "m", 10**4).is_toy_beside(About("d", 10**6, "m", 10**5))
    assert About("d", 300, "m", 10**6).is_toy_beside(None)


def test_a_block_for_another_attempt_is_as_long_as_the_declared():
    """Fails when an attempt can have more seeds, start anywhere, or take those that chose the settings."""
    experiment = SimpleNamespace(
        SEEDS=Seeds(12, first=50, why="x"), TUNING=Tuning("m", "higher", {}, seeds=(205, 1000))
    )
    assert block_of(experiment, 50) is experiment.SEEDS
    assert block_of(experiment, 300).numbers == tuple(range(300, 312))
    for first in (7, 1000, -100):
        with pytest.raises(ValueError, match="starts at 50, as declared, or at one of"):
            block_of(experiment, first)
    with pytest.raises(ValueError, match=r"seeds \[205\] were used to choose the settings"):
        block_of(experiment, 200)


def test_another_block_of_seeds_needs_a_reason():
    """Fails when seeds can be moved until they please."""
    assert Seeds().numbers == tuple(range(10))
    with pytest.raises(ValueError, match="say why the seeds start at 100"):
        Seeds(first=100)
    with pytest.raises(ValueError, match="at least 1"):
        Seeds(0)
    with pytest.raises(ValueError, match="share is that of one seed"):
        Seeds(20, share=3000)


def test_arms_tell_what_seeds_have_in_common(experiment):
    """Fails when a verdict could not know of it, or when ledgers of ten seeds would change."""
    assert "share" not in describe_arms(experiment, "laptop")["ours"]
    experiment.SEEDS = Seeds(20, share=0.05)
    assert describe_arms(experiment, "laptop")["ours"]["share"] == 0.05
    assert block_of(experiment, 300).share == 0.05


def test_verdicts_count_what_seeds_of_two_blocks_have_in_common(claim):
    """Fails when the interval of twenty seeds is that of twenty independent ones, or that of ten is widened."""
    runs = [
        Run("paper", "laptop", arm, seed, "key", {}, {claim.metric: gain + 0.1 * ((7 * seed) % 11)})
        for seed in range(20)
        for arm, gain in ((claim.baseline, 70.0), (claim.method, 75.0 + 0.05 * seed))
    ]

    def judged(seeds, **about):
        (outcome,) = outcomes([claim], runs, seeds=range(seeds), scale="laptop", about={claim.method: about})
        return outcome

    alone, common = judged(20, sampling="fresh"), judged(20, sampling="fresh", share=0.2)
    assert (alone.about["sampling"], common.about["sampling"]) == ("fresh", "blocks")
    assert common.interval[0] < alone.interval[0] < alone.interval[1] < common.interval[1]
    assert judged(10, sampling="fresh", share=0.2).interval == judged(10, sampling="fresh").interval


def test_tuning_needs_two_seeds_and_equal_budgets():
    """Fails when settings can be chosen on one lucky seed, or one arm gets more trials."""
    with pytest.raises(ValueError, match="at least two seeds"):
        Tuning("m", "higher", {}, seeds=(1000,))
    with pytest.raises(ValueError, match="same tuning budget"):
        Tuning("m", "higher", {"plain": [{"e": 1}], "ours": []})
