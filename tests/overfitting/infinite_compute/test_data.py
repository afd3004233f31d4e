"""How often samples are seen, and text that is drawn."""

from collections import Counter

import pytest
import torch
from torch import nn

from regularized.overfitting.infinite_compute.mixture import MixtureLoader, mixture_steps
from regularized.overfitting.infinite_compute.procedure import MemberBatches
from regularized.overfitting.infinite_compute.sampling import sample_text
from regularized.training.data import TensorData


def numbers(count, start=0, batch_size=4):
    values = torch.arange(start, start + count)
    return TensorData(values[:, None], values[:, None], batch_size=batch_size)


def test_papers_steps():
    """Fails when 1 - 0.9 in binary loses or gains a step."""
    assert mixture_steps(800, 16, 0.75) == 51_200
    assert mixture_steps(800, 16, 0.9) == 128_000
    assert mixture_steps(7, 3) == 21
    assert mixture_steps(3, 1, 0.3) == 4
    assert all(mixture_steps(n, 7, 0.9) == 70 * n for n in range(1, 200))


def test_each_sample_once_an_epoch_in_orders_of_their_own():
    """Fails when members share an order, an epoch repeats one, or a sample is drawn with replacement."""
    source = MemberBatches(numbers(10), seeds=[0, 1])
    orders = [torch.cat([b.index for b in source.batches(epoch)], dim=1) for epoch in range(3)]
    for order in orders:
        assert all(sorted(row.tolist()) == list(range(10)) for row in order)
        assert not torch.equal(order[0], order[1])
    assert not torch.equal(orders[0][0], orders[1][0])
    assert torch.equal(torch.cat([b.targets for b in source.batches(0)], dim=1)[..., 0], orders[0])


def test_mixture():
    """Fails when real samples are seen more or less than once an epoch, or the teacher's not in turn."""
    loader = MixtureLoader(numbers(8), numbers(30, start=100), teacher_weight=0.75)
    seen, first = Counter(), []
    for epoch in range(5):
        values = torch.cat([batch.inputs for batch in loader.batches(epoch)]).flatten().tolist()
        assert len(values) == 32
        assert sorted(v for v in values if v < 100) == list(range(8))
        seen.update(v for v in values if v >= 100)
        first.append(any(v >= 100 for v in values[:4]))
    assert len(seen) == 30
    assert set(seen.values()) == {4}
    assert any(first)  # mixed in time, not one after the other
    assert len(loader) == 8


def test_mixture_resumes():
    """Fails when an order depends on what was read before."""
    loader = MixtureLoader(numbers(8), numbers(30, start=100), teacher_weight=0.5)
    whole = [batch.index.tolist() for batch in loader.batches(3)]
    assert [batch.index.tolist() for batch in loader.batches(3, start=2)] == whole[2:]
    parts = [[b.index.tolist() for b in loader.batches(3, rank=r, world=2)] for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_no_teacher():
    """Fails when a weight of zero still draws from the teacher."""
    loader = MixtureLoader(numbers(8), numbers(30, start=100), teacher_weight=0.0)
    assert sorted(v for b in loader.batches(0) for v in b.inputs.flatten().tolist()) == list(range(8))


class Chain(nn.Module):
    """The next token's logits depend on the last one alone."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.lengths = []

    def forward(self, tokens):
        assert not self.training
        self.lengths.append(tokens.shape[1])
        return self.logits[tokens]


def test_sampling_follows_the_distribution():
    """Fails when logits are not normalised, the wrong position is read, or the temperature multiplies."""
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    model = Chain(logits).train()
    start = torch.zeros(20_000, 1, dtype=torch.int64)
    text = sample_text(model, start, 2, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert model.training
    assert text[:, 1].float().mean().item() == pytest.approx((2 * logits[0]).softmax(0)[1].item(), abs=0.01)
    from_one = text[text[:, 1] == 1, 2].float().mean().item()
    assert from_one == pytest.approx((2 * logits[1]).softmax(0)[1].item(), abs=0.01)


def test_sampling_shows_the_context():
    """Fails when more than the context is shown, or the beginning is lost."""
    model = Chain(torch.zeros(3, 3))
    text = sample_text(model, torch.tensor([[2, 1]]), 5, context=3)
    assert model.lengths == [2, 3, 3, 3, 3]
    assert text[0, :2].tolist() == [2, 1]
