"""SST in a loop: what is trained when, what the optimizer forgets, rounds, rates, resumed runs, rank, and merging."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.pretraining.sst.layer import SpectralLinear
from regularized.pretraining.sst.term import SST


def network(width=12, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).to(
        dtype
    )


def batches(steps, seed=1, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 6, generator=draw).to(dtype), torch.randint(3, (16,), generator=draw)) for _ in range(steps)
    ]


def train(model, optimizer, data):
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


SMALL = {"rank": 2, "steps_per_iteration": 3, "iterations_per_round": 2, "warmup_steps": 1}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True, weight_decay=0.0),
    "adamw fused": partial(torch.optim.AdamW, lr=0.01, fused=True, weight_decay=0.0),
    "adam amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, foreach=False),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_forgets_the_vectors_and_them_alone(name):
    """Fails when moments or step counts of other directions survive a draw, or those of Sigma and the biases do not.

    What it goes on with must be what a new optimizer would do with the vectors.
    """
    model = network()
    sst = SST(model, **SMALL)
    optimizer = sst.bind(OPTIMIZERS[name](model.parameters()))
    train(model, optimizer, batches(3))
    for vector in sst.vectors():
        assert not any(bool(torch.as_tensor(value).any()) for value in optimizer.state.get(vector, {}).values())
    kept = [layer.values for layer in sst.layers.values()]
    assert all(any(bool(torch.as_tensor(v).any()) for v in optimizer.state[p].values()) for p in kept)
    fresh_model = copy.deepcopy(model)
    (x, y), fresh = batches(1)[0], OPTIMIZERS[name](fresh_model.parameters())
    for one in (model, fresh_model):
        F.cross_entropy(one(x), y).backward()
    optimizer_rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == optimizer_rate
    fresh.step()
    for layer, other in zip(
        sst.layers.values(), [m for m in fresh_model if isinstance(m, SpectralLinear)], strict=True
    ):
        other.project()
        torch.testing.assert_close(layer.active_left, other.active_left)


def test_frozen_vectors_keep_their_bits_within_an_iteration():
    """Fails when a step moves, or a projection touches, a vector that is not active; or units are lost."""
    model = network()
    sst = SST(model, rank=2, steps_per_iteration=4, iterations_per_round=9, warmup_steps=0)
    optimizer = sst.bind(torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0))
    for _ in range(3):
        before = {name: (layer.left.clone(), layer.active.clone()) for name, layer in sst.layers.items()}
        for batch in batches(3):
            train(model, optimizer, [batch])
            for name, layer in sst.layers.items():
                frozen = torch.ones(len(layer.values), dtype=torch.bool).index_fill(0, before[name][1], False)
                assert torch.equal(layer.left[frozen], before[name][0][frozen])
                assert not torch.equal(layer.left[~frozen], before[name][0][~frozen])
                assert bool((layer.values >= 0).all())
                torch.testing.assert_close(layer.left.norm(dim=1), torch.ones(len(layer.values)))
                torch.testing.assert_close(layer.right.norm(dim=1), torch.ones(len(layer.values)))
        train(model, optimizer, batches(1))
        drawn = [(layer.active, before[name][1]) for name, layer in sst.layers.items()]
        assert any(not torch.equal(now, then) for now, then in drawn)


def test_draws_and_rounds_leave_the_weights_alone():
    """Fails when something but a gradient changes a weight: writing back, drawing, decomposing anew."""
    model = network(dtype=torch.float64)
    plain = copy.deepcopy(model)
    sst = SST(model, **SMALL)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(13):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert sst.iteration == 4
    for name, layer in sst.layers.items():
        torch.testing.assert_close(layer.weight(), plain.get_submodule(name).weight, atol=1e-12, rtol=1e-12)


def test_a_round_ends_with_orthogonal_directions():
    """Fails when the decomposition is not renewed at the end of a round, or is within one."""
    model = network(dtype=torch.float64)
    sst = SST(model, **SMALL)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.5))

    def distance():
        layer = sst.layers["2"]
        return float((layer.left @ layer.left.T - torch.eye(12, dtype=torch.float64)).abs().max())

    train(model, optimizer, batches(5, dtype=torch.float64))
    assert distance() > 1e-4
    train(model, optimizer, batches(1, seed=2, dtype=torch.float64))
    assert distance() < 1e-12


def test_rank_of_the_change_grows_beyond_r():
    """Fails when all iterations train the same directions: the change of the weight would keep rank 2 r at most.

    Sigma trains all directions, so they are held to see what the vectors do.
    """
    model = network(dtype=torch.float64)
    start = model[2].weight.detach().clone()
    sst = SST(model, rank=1, steps_per_iteration=2, warmup_steps=0, target_modules=["2"])
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    values = sst.layers["2"].values
    ranks = []
    for batch in batches(24, dtype=torch.float64):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        values.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
        ranks.append(int(torch.linalg.matrix_rank(sst.layers["2"].weight() - start, atol=1e-8)))
    assert max(ranks[:2]) <= 2
    assert ranks[-1] > 6


def test_without_draws_the_same_directions_are_trained_for_good():
    """Fails when `steps_per_iteration=None` draws, decomposes or forgets."""
    model = network()
    sst = SST(model, rank=2, steps_per_iteration=None, sampling="largest", warmup_steps=2)
    assert all(layer.active.tolist() == [0, 1] for layer in sst.layers.values())
    optimizer = sst.bind(torch.optim.Adam(model.parameters()))
    train(model, optimizer, batches(7))
    assert all(layer.active.tolist() == [0, 1] for layer in sst.layers.values())
    assert all(optimizer.state[vector]["step"] == 7 for vector in sst.vectors())


def test_the_rate_warms_up_in_each_iteration_and_follows_a_schedule():
    """Fails when a warm-up compounds, outlives its step, or fights with a scheduler."""
    model = network()
    sst = SST(model, rank=2, steps_per_iteration=5, warmup_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    sst.bind(optimizer).register_step_pre_hook(lambda one, args, kwargs: seen.append(one.param_groups[0]["lr"]))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    for batch in batches(10):
        train(model, optimizer, [batch])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 if len(seen) <= 5 else 0.01)
        scheduler.step()
    ramp = [0.025, 0.05, 0.075, 0.1, 0.1]
    assert seen == pytest.approx([*ramp, *(rate / 10 for rate in ramp)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("at", [1, 4, 6, 8])
def test_resumed_within_an_iteration_or_between_two(at, tmp_path):
    """Fails when a draw depends on how a process came to its step, or a state lacks something: equal, bit for bit."""

    def build():
        model = network()
        sst = SST(model, **SMALL)
        return model, sst, sst.bind(torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0))

    data = batches(12)
    whole, _, optimizer = build()
    train(whole, optimizer, data)
    model, sst, optimizer = build()
    train(model, optimizer, data[:at])
    torch.save([model.state_dict(), sst.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    torch.manual_seed(99)
    torch.randn(7)
    resumed, sst, optimizer = build()
    for part, state in zip(
        (resumed, sst, optimizer), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(resumed, optimizer, data[at:])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_gradients_of_other_directions_are_dropped():
    """Fails when one who never clears gradients adds those of the former directions to those of the next."""
    model = network()
    sst = SST(model, **SMALL)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    for x, y in batches(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(vector.grad is None for vector in sst.vectors())
    assert model[0].values.grad is not None


def test_an_optimizer_that_nobody_bound_is_found():
    """Fails when a user who forgets `bind` trains without projection and without draws."""
    model = network()
    sst = SST(model, **SMALL)
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).step()  # of something else
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, batches(4))
    assert (sst.steps, sst.iteration) == (4, 1)


def test_half_of_an_interrupted_step_is_undone():
    """Fails when an error within a step leaves the warm-up's rate behind."""
    model = network()
    sst = SST(model, rank=2, warmup_steps=10)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=1.0))

    def fail(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    sst.reset()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_trained_numbers_and_optimizer_state():
    """Fails when the optimizer keeps state for more than r (o + i) + m numbers of a layer and the biases."""
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    sst = SST(model, rank=3)
    optimizer = sst.bind(torch.optim.Adam(model.parameters()))
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    trained = 3 * (32 + 48) + 32
    assert sum(p.numel() for p in model.parameters()) == trained
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == trained


def test_names_and_containers():
    """Fails when a container named as target or excluded does not stand for what is in it."""
    model = nn.ModuleDict({"attn": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "mlp": nn.Linear(4, 4)})
    assert list(SST(copy.deepcopy(model), rank=1, target_modules=["attn"]).layers) == ["attn.0", "attn.1"]
    assert list(SST(copy.deepcopy(model), rank=1, exclude=["attn"]).layers) == ["mlp"]


def test_merging_and_pruning():
    """Fails when merging changes outputs or leaves a converted layer, or pruning to full rank changes outputs."""
    model = network()
    sst = SST(model, **SMALL)
    train(model, sst.bind(torch.optim.SGD(model.parameters(), lr=0.1)), batches(4))
    model.eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        before, pruned = model(x), copy.deepcopy(model)
        sst.prune(pruned, rank=3)
        sst.merge(model)
        assert torch.equal(model(x), before)
        assert set(model.state_dict()) == set(network().state_dict())
        assert isinstance(pruned[2], nn.Sequential)
        assert pruned[2][0].out_features == 3
        assert not torch.allclose(pruned(x), before, atol=1e-4)


def test_a_refused_model_stays_as_it_was():
    """Fails when layers before the one that is refused are converted already."""
    model = network()
    model[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'4' holds values"):
        SST(model, rank=2)
    assert all(type(layer) is nn.Linear for layer in model[::2])
