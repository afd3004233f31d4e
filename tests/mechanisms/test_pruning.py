"""Magnitude pruning with rewinding."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from regularized.mechanisms.pruning import density, iterative_magnitude_pruning, magnitude_masks, pruned


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def fit(model, steps=5, optimizer=torch.optim.AdamW):
    x, y = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3
    built = optimizer(model.parameters(), lr=0.05)
    model.train()
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        built.step()
        built.zero_grad()


def test_the_largest_stay_over_all_layers_together():
    """Fails when each layer is pruned by itself, or the smallest are kept; ties keep the exact number."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3))
    model[0].weight.data = torch.tensor([[9.0, -8.0, 7.0]])
    model[1].weight.data = torch.tensor([[0.5], [6.0], [-0.5]])
    masks = magnitude_masks(model, 4 / 6)
    assert masks["0.weight"].tolist() == [[True, True, True]]
    assert masks["1.weight"].tolist() == [[False], [True], [False]]
    assert set(masks) == {"0.weight", "1.weight"}
    for p in model.parameters():
        p.data.fill_(1.0)
    assert density(magnitude_masks(model, 0.5)) == 0.5


def test_what_is_pruned_stays_pruned():
    """Fails when a weight that grew after it was pruned comes back."""
    model = nn.Linear(4, 1)
    model.weight.data = torch.tensor([[5.0, 1.0, 2.0, 3.0]])
    masks = magnitude_masks(model, 0.5, masks={"weight": torch.tensor([[False, True, True, True]])})
    assert masks["weight"].tolist() == [[False, False, True, True]]
    again = magnitude_masks(model, 1.0, masks=masks)
    assert again["weight"].tolist() == masks["weight"].tolist()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_leaves_pruned_weights_at_zero(optimizer):
    """Fails when the gradient is not masked, or the hooks stay after the block."""
    model = network()
    masks = magnitude_masks(model, 0.3)
    with pruned(model, masks):
        fit(model, optimizer=optimizer)
        before = model[0].weight.detach().clone()
        fit(model, optimizer=optimizer)
        for name, mask in masks.items():
            weight = dict(model.named_parameters())[name]
            assert not weight[~mask].any()
            assert weight[mask].all()
        assert not torch.equal(model[0].weight, before)
    fit(model, optimizer=optimizer)
    assert model[0].weight[~masks["0.weight"]].any()
    with pytest.raises(KeyError, match="typo"), pruned(model, {"typo": torch.ones(1)}):
        pass


def test_a_pruned_network_trains_like_torchs():
    """An independent implementation by reparametrisation; fails when a mask is on the wrong weight."""
    from torch.nn.utils import prune

    ours, theirs = network(), network()
    masks = magnitude_masks(ours, 0.4)
    for name, mask in masks.items():
        prune.custom_from_mask(theirs.get_submodule(name.split(".")[0]), "weight", mask)
    with pruned(ours, masks):
        fit(ours, optimizer=torch.optim.SGD)
    fit(theirs, optimizer=torch.optim.SGD)
    # Of torch's, `weight` is that of the last forward pass.
    torch.testing.assert_close(ours[0].weight, theirs[0].weight_orig * masks["0.weight"])
    torch.testing.assert_close(ours[3].bias, theirs[3].bias)


def test_rounds_rewind_to_the_checkpoint():
    """Fails when a round goes on from the trained weights, the density compounds wrongly, or buffers stay."""
    model = network()
    fit(model, steps=2)
    checkpoint = copy.deepcopy(model.state_dict())
    seen = []

    def train(net):
        seen.append(copy.deepcopy(net.state_dict()))
        fit(net)

    found = iterative_magnitude_pruning(model, train, rounds=3, rate=0.5, evaluate=lambda net: float(len(seen)))
    assert [r.density for r in found] == pytest.approx([1.0, 0.5, 0.25, 0.125])
    assert [r.score for r in found] == [1.0, 2.0, 3.0, 4.0]
    for state, r in zip(seen, found, strict=True):
        for name, tensor in state.items():
            start = checkpoint[name] * r.masks[name] if name in r.masks else checkpoint[name]
            assert torch.equal(tensor, start), name
    last = found[-1].masks["0.weight"]
    assert not model[0].weight[~last].any()
    for earlier, later in pairwise(found):
        assert all(bool((earlier.masks[n] | ~later.masks[n]).all()) for n in later.masks)


def test_another_checkpoint_and_the_official_choice_of_weights():
    """Fails when rewind_to is ignored, or prunable does not reach every round."""
    model, other = network(), network().double().float()
    nn.init.constant_(other[0].weight, 0.25)
    starts = []
    iterative_magnitude_pruning(
        model,
        lambda net: starts.append(net[0].weight.detach().clone()),
        rounds=0,
        rewind_to=other.state_dict(),
    )
    assert torch.equal(starts[0], other[0].weight)
    found = iterative_magnitude_pruning(network(), fit, rounds=1, rate=0.2, prunable=lambda name, p: True)
    assert set(found[1].masks) == {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="rounds"):
        iterative_magnitude_pruning(model, fit, rounds=-1)
