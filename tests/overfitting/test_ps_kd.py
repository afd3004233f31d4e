"""PS-KD. Golden vectors, contract and bad input are checked in tests/test_contract.py.

Mutations that were tried, and the test that saw each: epoch / T for (epoch + 1) / T (schedule); the history written
before it is read (only_last_epochs_prediction); the sign of the change, or alpha without the mass (slow_loop); a sum
for a mean (slow_loop); labels or history not blended under mixup (mixup_blends); the prediction for a blend filed under
the first sample always (mixup_remembers); recording in eval mode (eval); progress left out of the state (checkpoint);
visits never counted (without_an_epoch).
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import mlp, seeded
from regularized.mechanisms.mixup import Mix
from regularized.mechanisms.prediction_store import DenseStore, TopKStore
from regularized.overfitting.ps_kd import (
    ProgressiveDistillation,
    ProgressiveDistillationLoss,
    progressive_loss,
    progressive_targets,
)
from regularized.training.progress import Progress, linear
from regularized.training.step import Batch, Step

sizes = st.tuples(st.integers(1, 9), st.integers(2, 7), st.integers(0, 999))
alphas = st.floats(0.0, 1.0)


def problem(batch: int, classes: int, seed: int, dtype: torch.dtype = torch.float64):
    draws = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=draws, dtype=dtype)
    past = (2 * torch.randn(batch, classes, generator=draws, dtype=dtype)).softmax(dim=1)
    return logits.requires_grad_(), torch.randint(classes, (batch,), generator=draws), past


def slow_loss(logits, labels, past, alpha: float) -> float:
    """Equation by equation, one sample and one class at a time, with Python numbers."""
    total = 0.0
    for z, y, h in zip(logits.tolist(), labels.tolist(), past.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(v) for v in z))
        for c, v in enumerate(z):
            target = (1 - alpha) * (c == y) + alpha * h[c] if any(h) else float(c == y)
            total -= target * (v - log_sum)
    return total / len(logits)


@given(sizes, alphas)
@settings(max_examples=60)
def test_slow_loop(size, alpha):
    """A second derivation: fails for a wrong sign, a mean over the classes, or targets that are off."""
    logits, labels, past = problem(*size)
    past[::3] = 0.0  # never visited: the one-hot label
    ours = progressive_loss(logits.log_softmax(dim=1), labels, past, alpha)
    assert ours.item() == pytest.approx(slow_loss(logits, labels, past, alpha), rel=1e-12)
    targets = progressive_targets(labels, past, alpha)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(labels)).double(), rtol=0, atol=1e-14)
    summed = progressive_loss(logits.log_softmax(dim=1), labels, past, alpha, reduction="sum")
    torch.testing.assert_close(summed, ours * len(labels), rtol=1e-12, atol=1e-12)


@given(sizes, alphas)
@settings(max_examples=20)
def test_gradient_by_differences(size, alpha):
    """Fails when a gradient flows into the history, or is not that of the value."""
    logits, labels, past = problem(*size)

    def loss(z):
        return progressive_loss(z.log_softmax(dim=1), labels, past, alpha)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@given(sizes, alphas)
@settings(max_examples=60)
def test_gradient_identities(size, alpha):
    """dL/dz = (p - q) / B, sum 0; for the true class that of cross-entropy times 1 - alpha (1 - H_y) / (1 - p_y)."""
    logits, labels, past = problem(*size)
    (grad,) = torch.autograd.grad(progressive_loss(logits.log_softmax(dim=1), labels, past, alpha), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    p = logits.detach().softmax(dim=1)
    expected = (p - progressive_targets(labels, past, alpha)) / len(labels)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(len(labels)).double(), rtol=0, atol=1e-12)
    true = labels[:, None]
    factor = 1 - alpha * (1 - past.gather(1, true)) / (1 - p.gather(1, true))
    torch.testing.assert_close(grad.gather(1, true), plain.gather(1, true) * factor, rtol=1e-10, atol=1e-12)


def test_fixed_point():
    """alpha 1 and an unchanged prediction: no gradient, and the loss is the entropy of the prediction."""
    logits, labels, _ = problem(7, 5, 0)
    p = logits.detach().softmax(dim=1)
    loss = progressive_loss(logits.log_softmax(dim=1), labels, p, 1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum(dim=1).mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (7, 3), (100, 10), (128, 1000)])
def test_first_visits_are_cross_entropy(batch, classes, dtype):
    """Bit for bit, value and gradient, at any epoch: fails when unseen rows enter the loss with alpha or 1 - alpha."""
    logits, labels, _ = problem(batch, classes, 1, dtype)
    criterion = ProgressiveDistillationLoss(2 * batch, classes, epochs=2)
    criterion.set_epoch(1)
    plain = F.cross_entropy(logits, labels)
    ours = criterion(logits, labels, torch.arange(batch) + batch)
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)))


def test_alpha_zero_is_cross_entropy():
    """Bit for bit in every epoch, although the history is recorded."""
    logits, labels, _ = problem(6, 4, 2, torch.float32)
    criterion = ProgressiveDistillationLoss(6, 4, epochs=3, alpha=0.0)
    for epoch in range(3):
        criterion.set_epoch(epoch)
        ours, plain = criterion(logits, labels, torch.arange(6)), F.cross_entropy(logits, labels)
        assert torch.equal(ours, plain)
        assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)))
    assert bool(criterion.store.seen().all())


def test_schedule():
    """(e + 1) / T of the last alpha: fails for e / T, which would never reach it."""
    criterion = ProgressiveDistillationLoss(2, 2, epochs=3, alpha=0.8)
    assert criterion.current_alpha == 0.0
    seen = []
    for epoch in range(3):
        criterion.set_epoch(epoch)
        seen.append(criterion.current_alpha)
    assert seen == pytest.approx([0.8 / 3, 1.6 / 3, 0.8], rel=1e-15)
    criterion.set_progress(0.5)
    assert criterion.current_alpha == 0.4
    term = ProgressiveDistillation(2, 2)
    assert [term.alpha(Progress(0, 1, epoch, 3)) for epoch in range(3)] == pytest.approx(seen, rel=1e-15)
    other = ProgressiveDistillation(2, 2, alpha=linear(0.0, 0.5))
    assert other.alpha(Progress(5, 10)) == 0.25
    with pytest.raises(ValueError, match=r"must stay in \[0, 1\], got 1.5"):
        ProgressiveDistillation(2, 2, alpha=lambda progress: 1.5).alpha(Progress(0, 1))


@given(st.integers(0, 999), st.integers(1, 8))
@settings(max_examples=25)
def test_only_last_epochs_prediction(seed, batch):
    """However the samples are put into batches, each meets its prediction of the epoch before, and no other."""
    draws = torch.Generator().manual_seed(seed)
    samples, classes, epochs = 8, 3, 4
    predictions = torch.randn(epochs, samples, classes, generator=draws, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=draws)
    criterion = ProgressiveDistillationLoss(
        samples, classes, epochs=epochs, store=DenseStore(samples, classes, torch.float64)
    )
    for epoch in range(epochs):
        criterion.set_epoch(epoch)
        past = predictions[epoch - 1].softmax(dim=1) if epoch else torch.zeros(samples, classes).double()
        for index in torch.randperm(samples, generator=draws).split(batch):
            z = predictions[epoch, index].requires_grad_()
            loss = criterion(z, labels[index], index).item()
            expected = slow_loss(z, labels[index], past[index], 0.8 * (epoch + 1) / epochs)
            assert loss == pytest.approx(expected, rel=1e-12)


def test_remembers_the_prediction_before_the_update():
    """With a real step of the optimizer in between; rows of samples that are not in the batch stay bit for bit."""
    net = seeded(0, mlp, [5, 8, 3])
    x, y = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    criterion = ProgressiveDistillationLoss(9, 3, epochs=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    criterion.set_epoch(0)
    criterion(net(x), y, torch.arange(9))
    before, index = criterion.store.read(torch.arange(9)), torch.tensor([7, 2, 4])
    logits = net(x[index])
    criterion(logits, y[index], index).backward()
    optimizer.step()
    after = criterion.store.read(torch.arange(9))
    torch.testing.assert_close(after[index], logits.detach().softmax(dim=1))
    assert not torch.allclose(after[index], net(x[index]).softmax(dim=1))
    rest = torch.tensor([0, 1, 3, 5, 6, 8])
    assert torch.equal(after[rest], before[rest])


def test_repeated_sample():
    """Both copies meet the old row, and the last one is remembered."""
    criterion = ProgressiveDistillationLoss(3, 2, epochs=1)
    criterion.set_epoch(0)
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0]], requires_grad=True)
    with pytest.warns(UserWarning, match="more than once"):
        criterion(logits, torch.tensor([0, 0]), torch.tensor([1, 1]))
    torch.testing.assert_close(criterion.store.read(torch.tensor([1])), logits[1:].detach().softmax(dim=1))


def test_eval_is_cross_entropy_and_records_nothing():
    """Fails when validation data would overwrite the rows of training samples."""
    logits, labels, past = problem(4, 3, 3, torch.float32)
    criterion = ProgressiveDistillationLoss(4, 3, epochs=1)
    criterion.store.write(torch.arange(4), past)
    state = copy.deepcopy(criterion.store.state_dict())
    criterion.eval()
    with torch.no_grad():
        assert torch.equal(criterion(logits, labels), F.cross_entropy(logits, labels))
    term = ProgressiveDistillation(4, 3, store=criterion.store).eval()
    step = Step(nn.Identity(), Batch(logits, labels), Progress(0, 1))
    assert torch.equal(term(step), F.cross_entropy(logits, labels, reduction="sum"))
    for name, tensor in criterion.store.state_dict().items():
        assert torch.equal(tensor, state[name])


@given(sizes, st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_mixup_blends_labels_and_history(size, share):
    """The target of a blended input is the blend of both samples' targets: fails when only labels are blended."""
    batch, classes, seed = size
    logits, labels, past = problem(batch, classes, seed)
    past[1::2] = 0.0
    partner = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    mix = Mix(share, partner)
    store = DenseStore(batch, classes, torch.float64)
    store.write(torch.arange(batch), past)
    criterion = ProgressiveDistillationLoss(batch, classes, epochs=2, store=store)
    criterion.set_epoch(0)
    targets = mix(progressive_targets(labels, past, 0.4))
    ours = criterion(logits, labels, torch.arange(batch), mix=mix)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets), rtol=1e-12, atol=1e-12)
    validation = criterion.eval()(logits, labels, mix=mix)
    hard = mix(F.one_hot(labels, classes).double())
    torch.testing.assert_close(validation, F.cross_entropy(logits, hard), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("share", "owner"), [(0.7, [0, 1, 2]), (0.3, [2, 0, 1])])
def test_mixup_remembers_for_the_larger_share(share, owner):
    """The prediction for a blend is filed under the sample that it mostly shows."""
    logits, labels, _ = problem(3, 4, 5, torch.float32)
    criterion = ProgressiveDistillationLoss(3, 4, epochs=1)
    criterion.set_epoch(0)
    criterion(logits, labels, torch.arange(3), mix=Mix(share, torch.tensor([2, 0, 1])))
    torch.testing.assert_close(criterion.store.read(torch.tensor(owner)), logits.detach().softmax(dim=1))


def test_checkpoint():
    """Saved in the middle of an epoch and loaded into a fresh loss: the next losses are the same bit for bit."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 3, generator=draws).requires_grad_()
    labels = torch.randint(3, (4,), generator=draws)
    first = ProgressiveDistillationLoss(4, 3, epochs=2)
    first.set_epoch(0)
    first(logits[0], labels, torch.arange(4))
    first.set_epoch(1)
    first(logits[1, :2], labels[:2], torch.arange(2))
    second = ProgressiveDistillationLoss(4, 3, epochs=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = (logits[1, 2:], labels[2:], torch.tensor([2, 3]))
    assert torch.equal(first(*rest), second(*rest))
    assert torch.equal(first(logits[2], labels, torch.arange(4)), second(logits[2], labels, torch.arange(4)))
    fresh = ProgressiveDistillationLoss(4, 3, epochs=2)
    fresh.load_state_dict(ProgressiveDistillationLoss(4, 3, epochs=2).state_dict())
    assert fresh.current_alpha == 0.0  # never told survives, too


def test_term_is_the_loss():
    """The term gives the sum of what the loss gives as a mean, over epochs and uneven batches."""
    draws = torch.Generator().manual_seed(1)
    criterion, term = ProgressiveDistillationLoss(5, 3, epochs=3), ProgressiveDistillation(5, 3)
    for epoch in range(3):
        criterion.set_epoch(epoch)
        for index in torch.randperm(5, generator=draws).split(2):
            logits = torch.randn(len(index), 3, generator=draws).requires_grad_()
            labels = torch.randint(3, (len(index),), generator=draws)
            batch = Batch(logits, labels, index)
            value = term(Step(nn.Identity(), batch, Progress(0, 1, epoch, 3))) / term.count(batch)
            torch.testing.assert_close(value, criterion(logits, labels, index))


def test_without_an_epoch_visits_are_counted_off_the_cpu():
    """Where rows cannot be read without a wait, more visits than samples must raise the same error."""
    criterion = ProgressiveDistillationLoss(4, 3, epochs=2).to("meta")
    batch = (torch.zeros(4, 3, device="meta", requires_grad=True), torch.zeros(4, dtype=torch.int64, device="meta"))
    index = torch.arange(4, device="meta")
    criterion(*batch, index)
    with pytest.raises(RuntimeError, match="second time"):
        criterion(*batch, index)


@pytest.mark.parametrize(
    "store", [DenseStore(8, 20, torch.float16), DenseStore(8, 20, torch.bfloat16), TopKStore(8, 20, k=5)]
)
def test_lean_stores_change_the_loss_little(store):
    """The targets differ by the store's error, and still sum to 1, so that the gradient still sums to 0."""
    logits, labels, past = problem(8, 20, 4, torch.float32)
    store.write(torch.arange(8), past)
    row = store.read(torch.arange(8)).float()
    assert float((row - past).abs().max()) <= store.max_error
    (grad,) = torch.autograd.grad(progressive_loss(logits.log_softmax(dim=1), labels, row, 0.8), logits)
    (exact,) = torch.autograd.grad(progressive_loss(logits.log_softmax(dim=1), labels, past, 0.8), logits)
    assert float((grad - exact).abs().max()) <= 0.8 * 2 * store.max_error / 8
    assert float(grad.sum(dim=1).abs().max()) < 1e-6


def test_it_bites():
    """Two overlapping clusters that the net memorises: PS-KD is surer of what it should be sure of.

    The control forgets its history before every epoch, and must then be cross-entropy bit for bit.
    """
    draws = torch.Generator().manual_seed(0)

    def sample(count):
        y = torch.arange(count) % 2
        return torch.randn(count, 10, generator=draws) + 0.35 * (2.0 * y[:, None] - 1), y

    x, y = sample(120)
    test_x, test_y = sample(2000)

    def test_loss(method: str) -> float:
        net = seeded(0, mlp, [10, 64, 2])
        criterion = ProgressiveDistillationLoss(120, 2, epochs=60) if method != "plain" else nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        order = torch.Generator().manual_seed(1)
        for epoch in range(60):
            if method != "plain":
                criterion.set_epoch(epoch)
            if method == "forgetful":
                criterion.store.reset()
            for index in torch.randperm(120, generator=order).split(30):
                logits = net(x[index] + 0.3 * torch.randn(len(index), 10, generator=order))
                loss = criterion(logits, y[index]) if method == "plain" else criterion(logits, y[index], index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return float(F.cross_entropy(net(test_x), test_y))

    plain = test_loss("plain")
    assert test_loss("forgetful") == plain
    assert test_loss("ps_kd") < 0.8 * plain


def test_labels_and_index_of_smaller_integer_types():
    """Fails with torch's raw messages where labels are int32 or the index is int16."""
    losses = []
    for labels, index in ((torch.int64, torch.int64), (torch.int32, torch.int16)):
        criterion = ProgressiveDistillationLoss(4, 3, epochs=2)
        criterion.set_epoch(1)
        z, y, at = torch.eye(3).requires_grad_(), torch.tensor([0, 2, 1]), torch.tensor([3, 0, 1])
        losses += [[criterion(z, y.to(labels), at.to(index)) for _ in range(2)]]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]  # the history was read


def test_labels_that_are_ignored_are_refused():
    """Fails with "index -100 is out of bounds" from inside, which names neither label nor remedy."""
    criterion = ProgressiveDistillationLoss(4, 3, epochs=2)
    criterion.set_epoch(0)
    z, y, index = torch.randn(2, 3), torch.tensor([1, -100]), torch.arange(2)
    with pytest.raises(ValueError, match=r"label -100.*leave it out"):
        criterion(z.requires_grad_(), y, index)
    step = Step(nn.Identity(), Batch(z, y, index), Progress(0, 1))
    with pytest.raises(ValueError, match=r"label -100.*leave it out"):
        ProgressiveDistillation(4, 3)(step)
    assert not criterion.store.seen().any()
    assert criterion.eval()(z, y) == F.cross_entropy(z, y)


def test_an_empty_batch_costs_nothing():
    """Fails when the mean over no samples is NaN, which would poison the weights."""
    criterion = ProgressiveDistillationLoss(4, 3, epochs=2)
    criterion.set_epoch(1)
    z, none = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = criterion(z, none, none)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, z)[0].shape == (0, 3)


def test_an_epoch_that_is_told_once_only():
    """Fails when `set_epoch` in front of the loop keeps alpha where it is for the whole training, without a word."""
    criterion = ProgressiveDistillationLoss(num_samples=4, num_classes=3, epochs=5)
    logits, labels, index = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    criterion.set_epoch(0)
    criterion(logits, labels, index)
    criterion(logits, labels, index)  # a sampler that draws with replacement may show some of them twice
    with pytest.raises(RuntimeError, match=r"has seen 12 samples of 4.*inside the loop.*set_progress\(share\) instead"):
        criterion(logits, labels, index)
    for epoch in range(5):  # told in each
        criterion.set_epoch(epoch)
        criterion(logits, labels, index)
    criterion.set_progress(0.5)  # told as it is wanted: nobody counts
    for _ in range(5):
        criterion(logits, labels, index)
