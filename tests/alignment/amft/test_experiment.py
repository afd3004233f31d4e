"""The experiment: parts of the data that do not meet, arms that differ where they say, and equal budgets."""

import math

import pytest
import torch

from regularized.alignment.amft import MetaWeightController, PointsGame, ScheduledWeight, Sums
from regularized.alignment.amft.puzzles import decode
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.amft import experiment
from regularized.training.progress import Progress


@pytest.mark.parametrize("task", ["sums", "points"])
def test_parts_do_not_meet(task):
    """Fails when a prompt of the test was trained on or tuned on, or the shift was seen before."""
    s = resolve(experiment, "sft", "laptop", {"task": task})
    data = experiment.load(task, 0, s["train"], s["held_out"], s["test"], s["wrong"])
    seen, held, test = (set(decode(t)) for t in (data.train.prompts, data.held_out.prompts, data.test))
    assert seen.isdisjoint(held | test)
    assert held.isdisjoint(test)
    game = Sums(3, digits=1) if task == "sums" else PointsGame(cards=3)
    assert game.reward(*data.held_out).all()
    assert game.reward(*data.train).mean().item() == pytest.approx(0.6, abs=0.06)
    assert game.reward(*data.notation).mean().item() < 0.1
    if task == "sums":
        assert {len(set(text[::2])) for text in decode(data.shifted)} == {1, 2}
        assert {len(set(text[::2])) for text in seen | held | test} == {3}


def test_weights_of_the_arms():
    """Fails when an arm mixes otherwise than its name says: at the start, in the middle, and at the end."""
    places = [Progress(step, 192) for step in (0, 100, 191)]
    wanted = {"sft": [1, 1, 1], "rl": [0, 0, 0], "scheduled_weight": None, "sft_then_rl": None}
    for arm, shares in wanted.items():
        mixer = experiment.mixer(resolve(experiment, arm, "laptop"))
        assert isinstance(mixer, ScheduledWeight)
        found = [mixer.share_at(place) for place in places]
        assert shares is None or found == shares
        assert shares is not None or found[0] != found[2]
    for arm, rules in {"adaptive_weight": (1, 1), "entropy_rule": (0, 1), "meta_only": (1, 0)}.items():
        controller = experiment.mixer(resolve(experiment, arm, "laptop"))
        assert isinstance(controller, MetaWeightController)
        assert (bool(controller.meta_lr), bool(controller.entropy_lr)) == tuple(map(bool, rules))


@pytest.mark.parametrize("arm", ["adaptive_weight", "points_sft_then_rl", "random_rewards"])
def test_a_run(arm):
    """Fails when a run breaks, does not repeat, or what a claim names is not measured."""
    first, second = (run_arm(experiment, arm, 3, "smoke") for _ in range(2))
    assert first == second
    needed = {"test_accuracy", "shifted_accuracy", "mean_accuracy", "imitation_weight", "mean_weight", "meta_share"}
    assert needed <= set(first.metrics)
    assert all(math.isfinite(value) for value in first.metrics.values())


def test_the_paper_s_scale_says_what_it_lacks():
    """Fails when it starts to load anything."""
    before = torch.get_rng_state()
    with pytest.raises(Unavailable, match=r"Qwen2.5-Math-7B.*four A100"):
        run_arm(experiment, "adaptive_weight", 0, "paper")
    assert torch.equal(torch.get_rng_state(), before)
