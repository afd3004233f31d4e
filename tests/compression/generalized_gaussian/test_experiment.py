"""The experiment of `generalized_gaussian`: what arms share, which file is taken, and what the large scale needs."""

import copy

import pytest
import torch
from torch import nn

from regularized.compression.generalized_gaussian import quantize, rf8, save_compressed
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.evidence.models import mlp
from regularized.papers.generalized_gaussian import experiment


def test_the_cheapest_file_is_taken(tmp_path):
    """Fails when another step than the one of least cost is taken, or the network is not the one of the file."""
    torch.manual_seed(0)
    net = mlp([20, 30, 10])

    def distortion(read):  # only what is rounded to 1 / 16 or finer is good enough
        coarse = quantize(net[0].weight, 2.0**-4)
        return 0.0 if torch.equal(quantize(read[0].weight, 2.0**-4), coarse) else 100.0

    read, size, cost = experiment.cheapest_file(net, distortion, 1.0)
    assert torch.equal(read[0].weight, quantize(net[0].weight, 2.0**-4))
    assert size == save_compressed(tmp_path, net, step=2.0**-4, name="3")
    assert cost == pytest.approx(torch.tensor(size.bits).log2().item())


def test_the_last_fifth_is_plain():
    """Fails when the penalty goes on to the end, or an arm without strength pays anything."""
    torch.manual_seed(0)
    net, loss = mlp([3, 4]), torch.ones((), requires_grad=True)
    settings = resolve(experiment, "l1", "smoke")
    pull = experiment.Pull(net, settings, 10)
    paid = []
    for _ in range(10):
        paid.append(pull.added_to(loss).item() > 1.0)
        pull.after_step()
    assert paid == [True] * 8 + [False] * 2
    assert experiment.Pull(net, resolve(experiment, "plain", "smoke"), 10).added_to(loss) is loss


def test_the_decoupled_arm_shrinks_after_the_step():
    """Fails when the arm pays in the loss as well, or does not shrink."""
    torch.manual_seed(0)
    net, loss = mlp([3, 4]), torch.ones(())
    before = copy.deepcopy(net)
    pull = experiment.Pull(net, resolve(experiment, "decoupled", "smoke", {"strength": 0.01}), 10)
    assert pull.added_to(loss) is loss
    pull.after_step()
    assert float(net[0].weight.detach().abs().sum()) < float(before[0].weight.detach().abs().sum())


@pytest.mark.parametrize("kind", ["rf8", "e4m3"])
def test_casts(kind):
    """Fails when vectors are rounded, or matrices have more than eight bits' worth of values."""
    torch.manual_seed(0)
    net = nn.Linear(100, 100)
    bias, weight = net.bias.detach().clone(), net.weight.detach().clone()
    experiment.cast_weights(net, kind)
    assert torch.equal(net.bias, bias)
    assert len(net.weight.unique()) <= 255
    assert ((net.weight - weight).abs().max() / weight.abs().max()).item() < 0.11
    if kind == "rf8":
        assert torch.equal(net.weight, rf8(weight))


def test_initial_weights_differ_in_shape_alone():
    """Fails when the two initialisations have other variances, or one of them keeps the network's own weights."""
    settings = resolve(experiment, "text_plain", "laptop")
    gauss, laplace = (experiment.language_model(0, {**settings, "init_shape": shape}) for shape in (2.0, 1.0))
    for one, other in zip(gauss.blocks[0].mlp.children(), laplace.blocks[0].mlp.children(), strict=True):
        assert not torch.equal(one.weight, other.weight)
        assert (one.weight.std() / other.weight.std()).item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(gauss.embedding.weight, laplace.embedding.weight)


@pytest.mark.parametrize(("arm", "says"), [("plain", "fine-tunes BERT-base"), ("text_plain", "124 million weights")])
def test_paper_scale_says_what_it_needs(arm, says):
    """Fails when the large run begins without a GPU or its data."""
    with pytest.raises(Unavailable, match=f"{says}|not here"):
        run_arm(experiment, arm, 0, "paper")


def test_without_the_coder(monkeypatch):
    """Fails when an arm dies of an ImportError after it has been trained."""
    monkeypatch.setattr("regularized.evidence.requirements.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"regularized\[compression\]"):
        experiment.cheapest_file(mlp([3, 4]), lambda net: 0.0, 1.0)
