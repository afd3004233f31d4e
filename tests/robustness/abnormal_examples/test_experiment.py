"""The experiment of `abnormal_examples` at smoke scale: arms share what they must, and differ in what they say."""

import pytest
import torch

from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.abnormal_examples import experiment
from regularized.training.progress import Progress
from regularized.training.step import Batch


@pytest.fixture(scope="module")
def runs():
    found = {arm: run_arm(experiment, arm, 0, "smoke") for arm in ("fgsm", "random_start", "random_start_all")}
    return found | {"noisy": run_arm(experiment, "random_start", 0, "smoke", host="n")}


def test_arms_share_the_images_and_differ(runs):
    """Fails when an arm has images of its own, or a penalty or a host changes nothing."""
    assert len({run.data for run in runs.values()}) == 1
    assert len({str(run.curves) for run in runs.values()}) == len(runs)


def test_a_run_is_repeatable(runs):
    """Fails when starting points or the evaluation draw from what a run does not seed."""
    torch.manual_seed(77)
    assert run_arm(experiment, "random_start", 0, "smoke") == runs["random_start"]


def test_the_host_is_the_penalty_of_strength_zero():
    """Fails when the penalty's arm differs from its host in more than the penalty."""
    settings = resolve(experiment, "random_start_regularized", "smoke", {"strength": 0.0})
    off, host = experiment.run(settings, 0), run_arm(experiment, "random_start", 0, "smoke")
    assert off.metrics == host.metrics


def test_the_control_penalises_all_examples():
    """Fails when the control has the mask of abnormal examples too: then it would be the method."""
    settings = resolve(experiment, "random_start_all", "smoke")
    data, threat = experiment.images(0, settings), experiment.Threat(settings["radius"])
    net, batch = experiment.network(settings), Batch(*data.train)
    losses = []
    for penalty in ("none", "all"):
        torch.manual_seed(0)
        training = experiment.Training({**settings, "penalty": penalty, "strength": 0.5}, threat)
        losses.append(training(net, batch))
    torch.manual_seed(0)
    found = experiment.OneStep.rs_fgsm(threat)(net, *data.train)
    moved = (net(found.inputs) - found.logits).square().sum(dim=1).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * moved)


def test_the_rate_is_the_triangle_of_the_authors():
    """Fails when the peak is elsewhere than in the middle, or the ends are not 0."""
    rates = [experiment.cyclic(Progress(step, 8)) for step in range(9)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_paper_scale_says_what_is_missing(monkeypatch):
    """Fails when the large run begins without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="needs a CUDA GPU"):
        run_arm(experiment, "random_start", 0, "paper")
