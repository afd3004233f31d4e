"""The experiment of the robust agent at smoke scale: arms share what they see, and differ in what they seek."""

import pytest

from regularized.evidence.experiment import resolve, run_arm
from regularized.papers.robust_policy import experiment


@pytest.fixture(scope="module")
def runs():
    return {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS}


def test_arms_share_their_problem(runs):
    """Fails when two arms of one seed play in different worlds; or two seeds in the same one."""
    for problem in ("linear", "put"):
        arms = [arm for arm in runs if resolve(experiment, arm, "smoke")["problem"] == problem]
        assert len({runs[arm].data for arm in arms}) == 1
        assert len({runs[arm].metrics["own_return"] for arm in arms}) > 1
        assert run_arm(experiment, arms[0], 1, "smoke").data != runs[arms[0]].data


def test_each_seeks_its_own_return(runs):
    """Fails when a robust arm is judged without its adversary, or the other one with it."""
    for arm, run in runs.items():
        robust = resolve(experiment, arm, "smoke")["robust"]
        assert run.metrics["own_return"] == run.metrics["robust_return" if robust else "nominal_return"]
        assert run.metrics["robust_return"] <= run.metrics["nominal_return"] + 1e-12


def test_regret_is_none_of_the_best(runs):
    """Fails when the optimum that regret is measured by is that of another objective: none is negative."""
    for arm, run in runs.items():
        if "mean_regret" in run.metrics:
            assert run.metrics["mean_regret"] >= -1e-9, arm
            assert run.metrics["mean_suboptimality"] >= -1e-9, arm


def test_a_run_repeats(runs):
    """Fails when something is drawn that the seed does not decide."""
    assert run_arm(experiment, "robust", 0, "smoke") == runs["robust"]
