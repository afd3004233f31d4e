"""The experiment at its smallest: what arms share, what claims and tuning look for."""

import pytest
import torch

from regularized.evidence.experiment import resolve, run_arm
from regularized.papers.catalogue import load_catalogue
from regularized.papers.score_forgetting import experiment
from regularized.papers.score_forgetting.networks import UNet

pytest.importorskip("torchmetrics", reason="torchmetrics computes the Fréchet distance; the extra lightning brings it")


@pytest.fixture(scope="module")
def measured():
    return {arm: run_arm(experiment, arm, 1000, "smoke") for arm in ("teacher", "distillation", "score_forgetting")}


def test_arms_share_data_and_noise(measured):
    """Fails when arms of a seed see other images, or are judged by other draws, and so are no pairs."""
    assert len({one.data for one in measured.values()}) == 1
    again = run_arm(experiment, "score_forgetting", 1000, "smoke").metrics
    before = measured["score_forgetting"].metrics
    assert {name: value for name, value in again.items() if name not in experiment.UNREPEATABLE} == {
        name: value for name, value in before.items() if name not in experiment.UNREPEATABLE
    }


def test_claims_and_tuning_find_their_metrics(measured):
    """Fails when a claim asks for a metric or an arm that there is not."""
    (entry,) = (one for one in load_catalogue() if one.slug == "score_forgetting")
    for claim in entry.card.claims:
        assert {claim.baseline, claim.method} <= set(experiment.ARMS)
        assert all(claim.metric in one.metrics for one in measured.values())
    assert experiment.TUNING.metric in measured["distillation"].metrics


def test_controls_differ_by_the_idea_alone():
    """Fails when a control has other settings than the method beside the one that it is named for."""
    method = resolve(experiment, "score_forgetting", "laptop")
    for arm, name in (("whole_batch", "forget_share"), ("forget_only", "kept_weight")):
        control = resolve(experiment, arm, "laptop")
        assert {key for key in method if method[key] != control[key]} == {name}


def test_evidence_seeds_have_images_of_their_own():
    """Fails when the laptop's sizes do not leave ten disjoint shares of the five classes, 7,000 images each."""
    sizes = sum(resolve(experiment, "teacher", "laptop")[part] for part in ("train", "judge", "test"))
    assert 10 * sizes <= 35_000 * 6 // 7
    assert 2 * sizes <= 35_000 // 7


def test_unet_is_told_step_and_label():
    """Fails when step or label does not reach the output, or a size is odd on the way."""
    torch.manual_seed(0)
    net = UNet(3, 16, 4, width=32, factors=(1, 2), attention=(8,), blocks=1, dropout=0.0)
    x = torch.randn(1, 3, 16, 16)
    first = net(x, torch.tensor([5.0]), torch.tensor([0]))
    assert first.shape == x.shape
    assert not torch.allclose(first, net(x, torch.tensor([500.0]), torch.tensor([0])))
    assert not torch.allclose(first, net(x, torch.tensor([5.0]), torch.tensor([1])))
