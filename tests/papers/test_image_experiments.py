"""Experiments on small images: what their baselines do. What their arms share: tests/test_contract.py."""

import importlib

import pytest
from tests.contracts import is_of_small_images

from regularized.evidence.experiment import run_arm
from regularized.papers.catalogue import load_catalogue

SEED = 1003


def experiment(slug):
    return importlib.import_module(f"regularized.papers.{slug}.experiment")


SLUGS = [entry.slug for entry in load_catalogue() if entry.implemented and is_of_small_images(entry)]


def test_the_kit_is_in_use():
    """Fails when the tests below run on nothing."""
    assert len(SLUGS) >= 4


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
            first, again = (run_arm(module, arm, SEED, "smoke") for _ in range(2))
            assert first == again, arm
