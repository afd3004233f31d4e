"""The experiment's own parts: what SST is compared with, its graphs, and the loop of the paper's scale."""

import numpy as np
import pytest
import torch
from torch import nn

from regularized.evidence.experiment import Unavailable, resolve
from regularized.papers.sst import experiment
from regularized.papers.sst.graphs import HyperbolicGraphNetwork, hierarchy
from regularized.papers.sst.language import pretrain
from regularized.papers.sst.low_rank import LowRankUpdate, add_updates, restart_every


def stepped(model, optimizer, steps):
    for x in torch.randn(steps, 4, 6, generator=torch.Generator().manual_seed(0)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_relora_folds_forgets_and_begins_anew():
    """Fails when a restart changes what the layer computes, keeps moments, or leaves the product of before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    updates = add_updates(model, 2, ["0", "2"])
    start = updates[0].weight.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    restart_every(3, optimizer, updates, warm_up=2)
    stepped(model, optimizer, 2)
    assert torch.equal(updates[0].weight, start)
    x = torch.randn(5, 6)
    with torch.no_grad():
        before = model(x)
        updates[0].fold()
        torch.testing.assert_close(model(x), before)
    stepped(model, optimizer, 1)
    for update in updates:
        assert not update.up.any()
        assert update.down not in optimizer.state
        assert update.bias in optimizer.state
    assert int(torch.linalg.matrix_rank(updates[0].weight - start, atol=1e-5)) == 4


def test_lora_begins_as_the_plain_layer():
    """Fails when the untrained product is not zero, or the frozen weight is trained."""
    plain = nn.Linear(6, 3)
    update = LowRankUpdate(plain, 2)
    x = torch.randn(4, 6)
    assert torch.equal(update(x), plain(x))
    assert {name for name, p in update.named_parameters() if p.requires_grad} == {"bias", "down", "up"}


def test_hierarchy_is_a_tree_with_balanced_branches():
    """Fails when a node hangs on none or several, or a branch mixes with another."""
    graph = hierarchy(3, 200)
    assert int(graph.adjacency.sum()) == 2 * 199 + 200
    assert torch.equal(graph.adjacency, graph.adjacency.T)
    assert int(graph.labels.bincount().min()) > 10
    near = graph.adjacency.clone()
    near[0], near[:, 0] = 0.0, 0.0  # without the root the branches fall apart
    assert not (near * (graph.labels[:, None] != graph.labels[None, :])).any()
    assert sorted(torch.cat(graph.parts).tolist()) == list(range(200))


def test_the_graph_network_sees_neighbours_alone():
    """Fails when a node's logits hang on nodes that are further away than the network has layers."""
    torch.manual_seed(0)
    chain = torch.eye(5) + torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
    network = HyperbolicGraphNetwork(3, 5, 2)
    x = torch.randn(5, 3)
    other = x.clone()
    other[4] += 1.0
    changed = (network(x, chain) - network(other, chain)).abs().amax(1) > 0
    assert changed.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("arm", ["full_rank", "relora", "sst"])
def test_the_paper_scale_would_run(arm, tmp_path):
    """Fails when the loop of the paper's scale cannot train: here a tiny OPT on random tokens, on the processor."""
    transformers = pytest.importorskip("transformers")
    file = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 50, 2000).astype("uint16").tofile(file)
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    small = {"steps": 4, "batch": 4, "rank": 3, "lr": 1e-2, "iteration": 2, "warm_up": 1}
    settings = {**resolve(experiment, arm, "paper"), **small}
    measured = pretrain(model, file, settings, 0, experiment.prepare, context=8, micro_batch=2, held_out=200)
    assert 20 < measured.metrics["perplexity"] < 100
    assert (measured.metrics["trained_percent"] == 100.0) == (arm == "full_rank")


@pytest.mark.parametrize("arm", ["sst", "graph_sst"])
def test_the_paper_scale_says_what_is_missing(arm, tmp_path, monkeypatch):
    """Fails when a scale that cannot run here ends in something else than a sentence on what to put where."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"not here: .*(openwebtext|disease)"):
        experiment.run(resolve(experiment, arm, "paper"), 0)
