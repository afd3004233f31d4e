"""Experiments on small images: what their arms share, and what their baselines do."""

import importlib
from collections import defaultdict
from functools import cache

import pytest

from regularized.evidence.experiment import resolve, run_arm
from regularized.papers.catalogue import load_catalogue

SEED = 1003


def experiment(slug):
    return importlib.import_module(f"regularized.papers.{slug}.experiment")


# The papers whose experiments are made of the kit for small images.
SLUGS = [
    entry.slug
    for entry in load_catalogue()
    if entry.implemented
    and any("regularized.evidence.classification" in file.read_text("utf-8") for file in entry.folder.glob("*.py"))
]


def test_the_kit_is_in_use():
    """Fails when the tests below run on nothing."""
    assert len(SLUGS) >= 4


@cache
def measured(slug):
    """All arms of a paper at smoke scale, 0.1 s each."""
    return {arm: run_arm(experiment(slug), arm, SEED, "smoke") for arm in experiment(slug).ARMS}


@pytest.mark.parametrize("slug", SLUGS)
def test_arms_see_the_same_images_and_are_tuned_by_what_they_measure(slug):
    """Fails when an arm draws other images than its baseline, so that nothing is paired, or trials have no judge."""
    seen = defaultdict(set)
    for arm, run in measured(slug).items():
        settings = resolve(experiment(slug), arm, "smoke")
        seen[settings.get("problem", settings.get("task"))].add(run.data)
    assert all(len(fingerprints) == 1 for fingerprints in seen.values()), seen
    tuning = experiment(slug).TUNING
    assert all(tuning.metric in measured(slug)[arm].metrics for arm in tuning.grids)


@pytest.mark.parametrize(
    ("slug", "plain", "metric"),
    [
        ("early_learning", "cross_entropy", "test_accuracy"),
        ("nested_dropout", "cross_entropy", "test_accuracy"),
        ("ps_kd", "cross_entropy", "error"),
        ("weight_compander", "noisy_plain", "test_accuracy"),
    ],
)
def test_early_stopping_is_a_point_of_the_same_training(slug, plain, metric):
    """Fails when the arm that stops early trains otherwise, or reports another epoch than its validation chose."""
    module = experiment(slug)
    longer = {"epochs": 8, "lr": 0.2}
    to_the_end = run_arm(module, plain, SEED, "smoke", **longer)
    stopped = run_arm(module, plain, SEED, "smoke", **longer, early_stopping=True)
    assert stopped.curves == to_the_end.curves
    assert stopped.metrics[metric] == dict(to_the_end.curves[metric])[stopped.metrics["stopped_at"]]


@pytest.mark.parametrize("slug", SLUGS)
def test_a_run_repeats(slug):
    """Fails when a run draws from a generator that its seed does not decide."""
    module = experiment(slug)
    for arm in ("mixup", "elr_plus", "nested_co_teaching", "ps_kd_shuffled", "noisy_mixup", "random_subset_tuned"):
        if arm in module.ARMS:
            assert run_arm(module, arm, SEED, "smoke") == measured(slug)[arm], arm
