"""The laptop experiment measures what it says."""

import pytest
import torch

from regularized.evidence.experiment import Audible, Unavailable, resolve, run_arm
from regularized.generation.dreamid_omni import SynRoPE, TalkingGlyphs
from regularized.papers.dreamid_omni import experiment
from regularized.papers.dreamid_omni.probe import FRAMES, STEPS, draw


def distances(arm):
    """From each picture to the first token of its own voice, over layouts of many lengths."""
    s = resolve(experiment, arm, "laptop")
    rope, found = SynRoPE(margin=s["margin"], placing=s["placing"]), []
    for seed in range(20):
        at = draw(s, 2, torch.eye(6, s["dim"]), torch.Generator().manual_seed(seed)).at
        frames, steps = rope.times(at)
        starts = [STEPS, STEPS + at.voices[0][1]]
        found.append([float(steps[start] - frames[FRAMES + k]) for k, start in enumerate(starts)])
    return torch.tensor(found)


def test_what_the_arms_of_the_probe_differ_in():
    """Fails when the control shares slots after all, or fixed lengths leave anything that varies."""
    assert (distances("shared_slots") == 0).all()
    assert (distances("separate_slots") == 300).all()
    assert len(distances("consecutive_positions")[:, 1].unique()) > 3
    assert len(distances("consecutive_positions_fixed").unique(dim=0)) == 1


def test_arms_of_the_world_take_as_many_steps():
    """Fails when a plan rounds to other steps, or the stages are not 1 : 2 : 2."""
    for scale, steps in (("laptop", 200), ("smoke", 5)):
        for arm, settings in experiment.ARMS.items():
            if settings.get("task") == "world":
                assert len(experiment.plan_of(resolve(experiment, arm, scale), 0)) == steps
    stages = experiment.plan_of(resolve(experiment, "three_stages", "laptop"), 0).stages
    assert [stage.steps for stage in stages] == [40, 80, 80]
    assert [len(stage.tasks) for stage in stages] == [1, 1, 3]


def test_a_run_of_the_world_can_be_seen_and_heard():
    """Fails when frames or sound do not reach the report."""
    measured = run_arm(experiment, "three_stages", 0, "smoke")
    assert isinstance(measured, Audible)
    assert measured.images["frames"].shape == (32, 4 * 64 + 6, 3)
    assert measured.sounds["sound"].shape == (32_000,)
    again = run_arm(experiment, "three_stages", 0, "smoke")
    assert again.metrics == measured.metrics


def test_brightness_of_references():
    """Fails when the copy rate compares with another's picture, or with the target's own brightness."""
    world = TalkingGlyphs(noise=0.0)
    batch, scene = world.batch(20, "r2av", "in_pair", torch.Generator().manual_seed(0))
    assert torch.allclose(experiment._gain_of(batch.given.pictures, scene.hue), scene.gain, atol=1e-5)


def test_paper_scale_says_what_is_missing():
    """Fails when it starts, or says nothing."""
    with pytest.raises(Unavailable, match="not public"):
        run_arm(experiment, "three_stages", 0, "paper")
