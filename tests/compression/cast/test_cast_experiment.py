"""What the evidence of CAST rests on: its controls, and that every arm ends with the weights that it is judged by."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from regularized.compression.cast import follows_pattern, semi_structured_mask
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.evidence.language_models import fit, next_token_loss, small_lm
from regularized.papers.cast import experiment
from regularized.papers.cast.controls import quantised, sr_ste

pytestmark = pytest.mark.filterwarnings("ignore:even at a constant rate")


def test_sr_ste():
    """Fails when the forward pass is dense, or the decay reaches kept weights or has another sign than a decay."""
    layer = nn.Linear(8, 3, bias=False)
    dense, x = layer.weight.detach().clone(), torch.randn(5, 8)
    mask = semi_structured_mask(dense)
    sr_ste(nn.Sequential(layer), ["0"], (2, 4), 0.1)
    out = layer(x)
    torch.testing.assert_close(out, x @ (dense * mask).T)
    out.sum().backward()
    straight = x.sum(0).expand(3, -1)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, straight + 0.1 * dense * ~mask)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, dense * mask)


def test_quantised_weights_come_back():
    """Fails when rounding stays, or fills the zeros of a sparse weight."""
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data.mul_(semi_structured_mask(model[0].weight))
    before = model[0].weight.detach().clone()
    with quantised(model, ["0"], 4):
        inside = model[0].weight.detach().clone()
    assert torch.equal(model[0].weight, before)
    assert follows_pattern(inside)
    assert all(len(row.unique()) <= 15 for row in inside)
    assert (inside - before).abs().max() <= before.abs().max() / 7 / 2 + 1e-6


@pytest.mark.parametrize("arm", list(experiment.ARMS))
def test_every_arm_ends_as_it_says(arm):
    """Fails when a sparse arm is judged by dense weights, the dense one by cut ones, or a head is cut."""
    s = {**resolve(experiment, arm, "smoke"), "steps": 3}
    model = small_lm(0, 24, width=16, layers=1, heads=2)
    names = experiment._linear(model)
    start = copy.deepcopy(model)
    with experiment._trained(model, names, s) as (optimizer, loss):
        text = torch.arange(24).repeat(10)
        if s["train"] != "cut":
            fit(model, text, optimizer, steps=3, batch=2, context=8, loss=loss)
    assert len(names) == 7
    assert all(follows_pattern(model.get_parameter(f"{name}.weight")) == (arm != "dense") for name in names)
    assert not follows_pattern(model.head.weight)
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in start.named_modules()}
    assert (arm == "one_shot") == torch.equal(model.embedding.weight, start.embedding.weight)
    assert next_token_loss(model, text[None, :9]).isfinite()


def test_arms_begin_at_one_dense_start():
    """Fails when an arm trains the start that the next one is given."""
    first = run_arm(experiment, "cast", 0, "smoke").metrics
    run_arm(experiment, "fixed_mask", 0, "smoke")
    assert run_arm(experiment, "cast", 0, "smoke").metrics == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="not applicable: there may be the GPU that it needs")
def test_paper_scale_says_what_it_needs():
    """Fails when the paper's run breaks down instead of naming what the machine lacks."""
    with pytest.raises(Unavailable, match=r"LLaMA2-7B on 7\.9 billion tokens.*GPU of 145 GB"):
        run_arm(experiment, "cast", 0, "paper")
