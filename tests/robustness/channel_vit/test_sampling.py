"""Hierarchical channel sampling, as a module and as a term."""

import copy
import math
import random
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from regularized.papers.channel_vit.contract import convolutional, data, transformer
from regularized.robustness.channel_vit import (
    HierarchicalChannelSampling,
    SampleChannels,
    draw_channels,
    mask_channels,
)
from regularized.training import CrossEntropy, TensorData, Trainer
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

X = torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand(2, 4, 3, 3)


@pytest.mark.parametrize("rng", [torch.Generator().manual_seed(0), random.Random(0)], ids=["torch", "python"])
def test_numbers_and_channels_are_uniform(rng):
    """Fails when a coin decides on each channel, a number of channels is left out, or a place is preferred."""
    draws, planes = 20_000, 4
    drawn = [draw_channels(planes, rng) for _ in range(draws)]
    within = 3 * math.sqrt(draws * 0.25 * 0.75)
    for many in range(1, planes + 1):
        assert abs(sum(len(kept) == many for kept in drawn) - draws / planes) < within
    share = (planes + 1) / (2 * planes)
    for channel in range(planes):
        times = sum(channel in kept for kept in drawn)
        assert abs(times - draws * share) < 3 * math.sqrt(draws * share * (1 - share))
        first = sum(kept[0] == channel for kept in drawn)
        assert abs(first - draws / planes) < within  # in random order
    assert all(len(set(kept)) == len(kept) for kept in drawn)


@pytest.mark.parametrize("mode", ["select", "mask"])
def test_evaluation_is_the_identity(mode):
    """Fails when evaluation draws, scales, or copies."""
    sampling = HierarchicalChannelSampling(mode).eval()
    before = sampling.generator.get_state()
    x, channels = sampling(X, [5, 0, 2, 1])
    assert x is X
    assert channels.tolist() == [5, 0, 2, 1]
    assert sampling.draw(X) == [0, 1, 2, 3]
    assert torch.equal(sampling.generator.get_state(), before)


@pytest.mark.parametrize("mode", ["select", "mask"])
def test_one_channel_is_the_identity(mode):
    """Fails when the only channel is dropped or scaled."""
    x, channels = HierarchicalChannelSampling(mode)(X[:, :1], [3])
    assert torch.equal(x, X[:, :1])
    assert channels.tolist() == [3]


def test_selected_channels_are_not_scaled():
    """Fails when tokens of channels are scaled as a sum would be, or ids do not go with their planes."""
    sampling = HierarchicalChannelSampling(seed=3)
    for _ in range(20):
        x, channels = sampling(X, [7, 5, 6, 4])
        values = {7: 1.0, 5: 2.0, 6: 3.0, 4: 4.0}
        assert x[0, :, 0, 0].tolist() == [values[number] for number in channels.tolist()]


def test_masked_channels_are_scaled_and_the_input_stays():
    """Fails when the scale is another than n / m, or zeros are written into the caller's images."""
    x = X.clone()
    out, channels = HierarchicalChannelSampling("mask")(x, kept=[1, 2, 3])
    assert out[0, :, 0, 0].tolist() == [0.0, *(pytest.approx(v * 4 / 3) for v in (2.0, 3.0, 4.0))]
    assert torch.equal(x, X)
    assert channels.tolist() == [0, 1, 2, 3]


def test_only_channels_that_are_there_count():
    """Fails when planes that hold nothing enter n, or are chosen."""
    sampling, present = HierarchicalChannelSampling("mask", seed=1), [True, False, True, True]
    sizes = set()
    for _ in range(40):
        out, _ = sampling(X, present=present)
        kept = [k for k in range(4) if out[0, k, 0, 0] != 0]
        assert 1 not in kept
        torch.testing.assert_close(out[0, kept, 0, 0], X[0, kept, 0, 0] * 3 / len(kept))
        sizes.add(len(kept))
    assert sizes == {1, 2, 3}


def test_masking_keeps_the_mean():
    """Fails when few channels are scaled too much or too little: over all draws each has the factor 1."""
    # Exactly: m uniform, and each subset of m of n channels alike, so a channel is there in m / n of them.
    factors = [float(mask_channels(torch.ones(1, 5), list(range(m)))[0].sum()) / 5 for m in range(1, 6)]
    assert factors == pytest.approx([1.0] * 5)
    sampling = HierarchicalChannelSampling("mask", seed=0)
    mean = torch.stack([sampling(torch.ones(1, 4, 1, 1))[0] for _ in range(8000)]).mean(0).flatten()
    torch.testing.assert_close(mean, torch.ones(4), rtol=0, atol=0.05)


def test_the_generator_is_its_own_and_goes_on():
    """Fails when draws depend on the global state, or a restored generator draws anew."""
    sampling = HierarchicalChannelSampling(seed=5)
    torch.manual_seed(0)
    first = [sampling(X)[1].tolist() for _ in range(5)]
    state = sampling.generator.get_state()
    later = [sampling(X)[1].tolist() for _ in range(5)]
    torch.manual_seed(1)
    again = HierarchicalChannelSampling(seed=5)
    assert [again(X)[1].tolist() for _ in range(5)] == first
    again.generator.set_state(state)
    assert [again(X)[1].tolist() for _ in range(5)] == later
    copied = copy.deepcopy(again)
    assert copied(X)[1].tolist() == again(X)[1].tolist()


def test_a_choice_for_several_micro_batches():
    """Fails when a choice that is given is not made."""
    sampling = HierarchicalChannelSampling(seed=2)
    kept = sampling.draw(X)
    assert sampling(X, kept=kept)[1].tolist() == kept == sampling(X[:1], kept=kept)[1].tolist()


def test_different_channels_in_a_batch_are_told():
    """Fails when images with different channels are cut by position in silence, or equal ones are told of."""
    ids = torch.tensor([[0, 1, 2, 3], [3, 1, 2, 0]])
    with pytest.warns(UserWarning, match="by position"):
        _, left = HierarchicalChannelSampling()(X, ids, kept=[0, 2])
    assert left.tolist() == [[0, 2], [3, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HierarchicalChannelSampling()(X, ids[:1].expand(2, 4), kept=[0])


def changed(term, inputs):
    return term.transform(Batch.of({"inputs": inputs, "targets": torch.zeros(2, dtype=torch.long)})).inputs


def test_term_draws_once_a_step():
    """Fails when the micro-batches of a step keep different channels, or the next step keeps the same for ever."""
    term = SampleChannels(seed=1)
    choices = []
    for _ in range(12):
        a, b = (changed(term, X)[1].tolist() for _ in range(2))
        assert a == b
        choices.append(tuple(a))
        term.after_step(Step(nn.Identity(), Batch.of(X), Progress(0, 1)))
    assert len(set(choices)) > 4
    assert changed(term.eval(), X) is X


def test_term_takes_the_forms_of_inputs():
    """Fails when ids are lost on the way to the network."""
    ids = torch.tensor([4, 3, 2, 1])
    pair = changed(SampleChannels(seed=1), (X, ids))
    named = changed(SampleChannels(seed=1), {"x": X, "channels": ids, "more": 1})
    assert torch.equal(pair[0], named["x"])
    assert torch.equal(pair[1], named["channels"])
    assert named["more"] == 1
    assert set(pair[1].tolist()) < set(ids.tolist())
    masked = changed(SampleChannels("mask", seed=1), X)
    assert isinstance(masked, torch.Tensor)
    assert masked.shape == X.shape


@pytest.mark.parametrize(("mode", "build"), [("select", transformer), ("mask", convolutional)])
def test_in_the_trainer(mode, build):
    """Fails when the trainer feeds the network something that it does not take."""
    some, net = data(24, 0), build()
    before = [p.detach().clone() for p in net.parameters()]
    trainer = Trainer(
        net,
        terms={"task": CrossEntropy(), "channels": SampleChannels(mode)},
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    trainer.fit(TensorData(some["inputs"], some["targets"], batch_size=8), epochs=2)
    assert not any(torch.equal(p, was) for p, was in zip(net.parameters(), before))


def test_sampling_makes_a_missing_channel_bearable():
    """Fails when sampling does nothing: without it, a network that adds channels up relies on all of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=generator)
    # The channel that says most is the one that will be missing.
    noise = torch.tensor([0.05, 0.8, 0.8, 0.8]).view(4, 1, 1) * torch.randn(400, 4, 1, 1, generator=generator)
    x = (labels * 2.0 - 1)[:, None, None, None] + noise

    def error(sampled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
        sampling = HierarchicalChannelSampling("mask", seed=0).train(sampled)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        for _ in range(300):
            loss = (net(sampling(x)[0]).squeeze(1) - (labels * 2.0 - 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            missing = mask_channels(x, [1, 2, 3])
            return float((net(missing).squeeze(1) - (labels * 2.0 - 1)).square().mean())

    assert error(True) < 0.6 * error(False)
