"""The experiment of identity seeking: videos are what they claim to be, and arms differ by their pairs alone."""

import pytest
import torch

from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.identity_seeking import experiment


def test_true_pairs_show_the_same_individual():
    """Fails when a stranger counts as the one who left, or the order of frame b is lost."""
    images = torch.arange(40.0)[:, None, None, None].expand(-1, 1, 4, 4)
    settings = {"videos": 3, "people": 5, "leave": 0.4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "warped", lambda images, generator, **options: images)
        frames = experiment.film(images, settings, seed=0)
    first, second = frames.first[:, 0, 0, 0], frames.second[:, 0, 0, 0]
    same = (first[:, None] == second).nonzero()
    assert same.equal(frames.true_pairs)
    assert 0 < len(same) < 15
    assert frames.video[same[:, 0]].equal(frames.video[same[:, 1]])
    assert len(set(second.tolist())) == 15  # strangers are nobody else
    assert not frames.true_pairs[:, 0].equal(frames.true_pairs[:, 1])


@pytest.fixture(scope="module")
def runs():
    return {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS}


def test_arms_differ_by_what_they_learn(runs):
    """Fails when two arms are one run, or see other images."""
    assert len({run.data for run in runs.values()}) == 1
    assert len({(run.metrics["rank_1"], run.metrics["weight_of_true_pairs"]) for run in runs.values()}) == len(runs)
    assert run_arm(experiment, "reliability", 0, "smoke") == runs["reliability"]


def test_nobody_leaves_where_all_stay(runs):
    """Fails when the share of true pairs is counted where there are none to find."""
    assert resolve(experiment, "matching_all_stay", "laptop")["leave"] == 0.0
    for run in runs.values():
        assert 0 <= run.metrics["true_pair_share"] <= 100


def test_full_size_says_what_is_missing():
    """Fails when the paper scale dies of something else than what is missing, or trains an arm that nobody can."""
    with pytest.raises(Unavailable, match=r"GPU|timm|crops"):
        run_arm(experiment, "reliability", 0, "paper")
    with pytest.raises(Unavailable, match="only matched pairs"):
        run_arm(experiment, "true_pairs", 0, "paper")
