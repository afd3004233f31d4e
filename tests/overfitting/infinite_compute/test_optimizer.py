"""Decay inside a run."""

import pytest
import torch
from torch import nn

from regularized.evidence.language_models import small_lm
from regularized.overfitting.infinite_compute.optimizer import decay_groups, warmup_then_cosine
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Progress


class _OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def test_decay_multiplies_weights_and_leaves_the_rest():
    """Fails when decay is coupled, uses the rate before the schedule, or reaches norms, embeddings, biases."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "norm": nn.LayerNorm(4), "rms": _OwnNorm(), "head": nn.Linear(4, 6)}
    ).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers([torch.optim.AdamW(decay_groups(model, 1.6), lr=0.1)], schedule=warmup_then_cosine(0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(progress=Progress(1, 4))  # half-way up: rate 0.05
    for name, p in model.named_parameters():
        wanted = before[name] * (1 - 0.05 * 1.6) if name == "head.weight" else before[name]
        assert torch.equal(p, wanted) if name != "head.weight" else torch.allclose(p, wanted, rtol=1e-15)


def test_groups_of_a_language_model():
    """Fails when a matrix of the blocks, or the head, is spared."""
    model = small_lm(0, 50, width=16, layers=2, heads=2)
    decayed, spared = decay_groups(model, 0.8)
    ids = {id(p) for p in decayed["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in ids}
    assert names == {"embedding.weight", "norm.weight"} | {
        f"blocks.{i}.{part}_norm.weight" for i in (0, 1) for part in ("attention", "mlp")
    }
    assert spared["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.8


def test_a_tied_head_is_an_embedding():
    """Fails when a shared weight is in both groups, or frozen ones are trained."""
    model = small_lm(0, 50, width=16, layers=1, heads=2, tied=True)
    model.blocks.requires_grad_(False)
    groups = decay_groups(model, 0.8)
    assert [len(group["params"]) for group in groups] == [2]
    assert groups[0]["weight_decay"] == 0.0


def test_schedule():
    """Fails when the cosine begins at step 0, under the line, or does not end at the floor."""
    rate = warmup_then_cosine(0.2, 0.1)
    values = [rate(Progress(step, 10)) for step in range(11)]
    assert values[:3] == [0.0, 0.5, 1.0]
    assert values[6] == pytest.approx(0.55)
    assert values[10] == pytest.approx(0.1)
    assert warmup_then_cosine(0.0)(Progress(0, 10)) == 1.0
