"""The experiment of `hestia` at smoke scale: every arm trains, and all begin with the same model."""

import pytest
import torch

from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.hestia import experiment, quantized_training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("torchao", reason="needs torchao, which is in the extra for tests")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("models")
        patch.setenv("REGULARIZED_MODELS", str(folder))
        first = {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS}
        again = run_arm(experiment, "hestia", 0, "smoke")
        kept = len(list(folder.iterdir()))
        patch.setenv("REGULARIZED_MODELS", str(tmp_path_factory.mktemp("other")))
        afresh = run_arm(experiment, "hestia", 0, "smoke")
    return first, again, afresh, kept


def test_arms_share_the_model_and_differ(runs):
    """Fails when an arm trains a start of its own, or two arms are the same run."""
    first, _, _, kept = runs
    assert len({run.metrics["nll_in_full_precision"] for run in first.values()}) == 1
    assert len({run.metrics["test_nll"] for run in first.values()}) == len(first)
    assert kept == 1


def test_what_was_kept_gives_the_same_run(runs):
    """Fails when a run that loads the model in full precision differs in a bit from one that trains it."""
    first, again, afresh, _ = runs
    assert first["hestia"] == again == afresh


def test_hard_arms_have_no_gap(runs):
    """Fails when an arm is judged soft: straight-through and PARQ are hard in the last step already."""
    first, *_ = runs
    for arm in ("straight_through", "parq", "hard_pressure"):
        assert first[arm].metrics["soft_test_nll"] == first[arm].metrics["test_nll"]


def test_parq_without_torchao_is_refused_with_the_command(monkeypatch):
    """Fails when the arm dies of an ImportError."""
    monkeypatch.setattr("regularized.evidence.requirements.find_spec", lambda name: None)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(Unavailable, match="pip install --no-deps torchao"):
        quantized_training.quantized_training(
            model, resolve(experiment, "parq", "smoke"), traces={"0": 1.0}, head="", group_size=-1
        )


def test_paper_scale_says_all_that_is_missing(monkeypatch, tmp_path):
    """Fails when the large run begins without its model and text."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"llama-3\.2-1b") as refusal:
        run_arm(experiment, "hestia", 0, "paper")
    assert "ultra-fineweb.bin" in str(refusal.value)
