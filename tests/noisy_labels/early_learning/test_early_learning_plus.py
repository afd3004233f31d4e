"""ELR+ against its authors' vectors (in the contract suite), a second derivation of the whole procedure, and limits.

Mutations tried. The slow procedure saw: a network's own average as its teacher, the teacher fed with mixed inputs or
in eval mode, averaged buffers, an average updated before the optimizer's step, a share below 1/2, mixed labels with
unmixed history, the other history, one random stream or one order for both networks, an ignored schedule. The resume
test saw: random streams or histories that are not restored, dropout that is not seeded.
"""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from regularized.mechanisms.ema import ramped_decay
from regularized.mechanisms.mixup import Mix, draw_mix
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.plus_loss import EarlyLearningPlusLoss, early_learning_plus_loss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus
from regularized.training.data import TensorData
from regularized.training.progress import Progress, gaussian_ramp, piecewise
from regularized.training.randomness import mix as mix_seeds

N, C = 12, 3
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


class Network(nn.Module):
    """With batch normalisation and dropout, so that modes, buffers and the global random state matter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, C))

    def forward(self, x):
        return self.layers(x)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.randint(C, (N,), generator=generator)


def build(seed=0, dropout=0.0, **settings):
    torch.manual_seed(seed)
    chosen = {"optimizer": SGD, "decay": ramped_decay(0.9, steps=8), "seed": 5, **settings}
    return EarlyLearningPlus(lambda: Network(dropout), num_samples=N, num_classes=C, **chosen)


def batches(size=4):
    x, y = data()
    return TensorData(x, y, batch_size=size, seed=1)


def slow_procedure(plus, epochs, *, strength, momentum, mixup, ramp_steps, decay, drop):
    """Two networks by hand from the sheet's description, starting from the weights of `plus`."""
    nets, averages = copy.deepcopy(plus.networks), [copy.deepcopy(network) for network in plus.networks]
    optimizers = [SGD(network.parameters()) for network in nets]
    histories = [torch.zeros(N, C, dtype=torch.float64) for _ in nets]
    streams = [torch.Generator().manual_seed(mix_seeds(5, k)) for k in range(2)]
    counts = [0, 0]
    for epoch in range(epochs):
        for k in range(2):
            other = averages[1 - k]
            for batch in batches().batches(2 * epoch + k):
                x, y, index = batch.inputs.double(), batch.targets, batch.index
                drawn = draw_mix(len(x), mixup, generator=streams[k])
                share, partner = max(drawn.share, 1 - drawn.share), drawn.partner
                mixed = share * x + (1 - share) * x[partner]
                labels = torch.eye(C, dtype=torch.float64)[y]
                labels = share * labels + (1 - share) * labels[partner]
                z = nets[k](mixed)
                with torch.no_grad():
                    belief = other(x).softmax(1)
                histories[k][index] = momentum * histories[k][index] + (1 - momentum) * belief
                q = share * histories[k][index] + (1 - share) * histories[k][index][partner]
                p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
                ramp = math.exp(-5 * (1 - min(counts[k], ramp_steps) / ramp_steps) ** 2)
                loss = -(labels * z.log_softmax(1)).sum(1).mean()
                loss = loss + ramp * strength * torch.log(1 - (q * p).sum(1)).mean()
                optimizers[k].param_groups[0]["lr"] = 0.1 * (0.1 if counts[k] / (3 * epochs) >= drop else 1.0)
                optimizers[k].zero_grad()
                loss.backward()
                optimizers[k].step()
                counts[k] += 1
                a = decay(counts[k])
                for ours, theirs in zip(averages[k].parameters(), nets[k].parameters()):
                    ours.data = a * ours.data + (1 - a) * theirs.data
    return nets, averages, histories


def test_procedure_second_derivation():
    """Fails when any part of the procedure is changed: see the mutations above."""
    decay = ramped_decay(0.9, steps=8)
    plus = build(
        strength=gaussian_ramp(2.0, steps=6), momentum=0.6, mixup=0.8, schedule=piecewise({0.5: 0.1}), decay=decay
    )
    for part in (*plus.networks, *plus.averages, *plus.losses):
        part.double()
    expected = slow_procedure(plus, 3, strength=2.0, momentum=0.6, mixup=0.8, ramp_steps=6, decay=decay, drop=0.5)
    x, y = data()
    plus.fit(TensorData(x.double(), y, batch_size=4, seed=1), epochs=3)
    for k in range(2):
        for name, tensor in expected[0][k].state_dict().items():
            torch.testing.assert_close(plus.networks[k].state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
        for name, tensor in expected[1][k].state_dict().items():
            torch.testing.assert_close(plus.averages[k].module.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(plus.losses[k].history, expected[2][k], rtol=1e-9, atol=1e-11)


def test_without_mixing_it_is_elr():
    """Fails when identical networks without mixup and ramp differ from ELR, but for the clamp of the target."""
    z, y, index = torch.randn(4, C, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    plus, elr = EarlyLearningPlusLoss(4, C).double(), EarlyLearningLoss(4, C).double()
    identity = draw_mix(4, 0.0, generator=torch.Generator())
    for _ in range(3):
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        a = plus(ours, y, index, teacher_logits=z, mix=identity, strength=3.0)
        b = elr(theirs, y, index)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_ramp():
    """Fails when r(0) is not e^-5, r(S) not 1, or S = 0 not constant."""
    ramp = gaussian_ramp(steps=10)
    assert ramp(Progress(0, 1)) == pytest.approx(math.exp(-5))
    assert ramp(Progress(10, 1)) == ramp(Progress(99, 1)) == 1.0
    assert gaussian_ramp(steps=0)(Progress(0, 1)) == 1.0


def test_refined_labels():
    """Fails when labels are not multiplied by the history and renormalised, or a vanished row gives nan."""
    z = torch.randn(2, 3, dtype=torch.float64)
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.6, 0.0], [0.2, 0.2, 0.0]], dtype=torch.float64)
    loss = early_learning_plus_loss(z, targets, q, strength=0.0, refine_labels=True)
    refined = torch.tensor([0.07, 0.18, 0.0], dtype=torch.float64) / 0.25
    expected = -(refined * z[0].log_softmax(0)).sum() / 2  # the second label has no belief left, and no target
    torch.testing.assert_close(loss, expected)


def test_strength_zero_is_mixup_training():
    """Fails when the regulariser leaks at strength 0."""
    z, y, index = torch.randn(4, C), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    mix = Mix(0.75, torch.tensor([1, 2, 3, 0]))
    loss = EarlyLearningPlusLoss(4, C)(z, y, index, teacher_logits=z, mix=mix, strength=0.0)
    torch.testing.assert_close(loss, 0.75 * F.cross_entropy(z, y) + 0.25 * F.cross_entropy(z, y[mix.partner]))


def test_resume_between_epochs_is_exact(tmp_path):
    """Fails when optimizer, averages, their batch normalisation, histories, mixup or dropout are not restored."""
    whole = build(dropout=0.3)
    whole.fit(batches(), epochs=4)
    first = build(dropout=0.3)
    first.fit(batches(), epochs=4, after_epoch=lambda it: torch.save(it.state_dict(), tmp_path / f"{it.epoch}.pt"))
    torch.manual_seed(99)
    second = build(seed=7, dropout=0.3)
    second.load_state_dict(torch.load(tmp_path / "2.pt", weights_only=True))
    assert second.epoch == 2
    second.fit(batches(), epochs=4)
    for k in range(2):
        for part in ("networks", "averages", "losses"):
            ours, theirs = getattr(second, part)[k].state_dict(), getattr(whole, part)[k].state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (part, k)


@pytest.mark.parametrize("stop", [(1, 0), (3, 2), (4, 3)])
def test_resume_in_the_middle_of_an_epoch_is_exact(stop):
    """Fails when a pass of either network cannot be taken up: its mixup, dropout, history, average or mean."""
    whole, first, second = build(dropout=0.3), build(dropout=0.3), build(seed=7, dropout=0.3)
    expected = whole.fit(batches(), epochs=2)

    def saving(plus):
        if plus.steps == list(stop):
            second.load_state_dict(copy.deepcopy(plus.state_dict()))

    first.fit(batches(), epochs=2, after_step=saving)
    means = second.fit(batches(), epochs=2)
    assert means == expected[-len(means) :]
    for part in ("networks", "averages", "losses"):
        for ours, theirs in zip(getattr(second, part), getattr(whole, part), strict=True):
            assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_networks_differ_and_see_other_orders():
    """Fails when both networks get the same weights, batches or mixing: they would only confirm one another."""
    plus = build()
    seen = {0: [], 1: []}
    original = plus.training_step

    def record(net, batch, **kwargs):
        seen[net].append(batch.index.tolist())
        return original(net, batch, **kwargs)

    plus.training_step = record
    plus.fit(batches(), epochs=1)
    assert seen[0] != seen[1]
    assert sorted(i for rows in seen[0] for i in rows) == list(range(N))
    assert not torch.equal(*(network.layers[0].weight for network in plus.networks))


def test_a_step_touches_its_own_network_alone():
    """Fails when the step of one network trains the other, or writes into the other's history or average."""
    plus = build()
    before = copy.deepcopy(plus.state_dict())
    plus.training_step(0, next(iter(batches().batches(0))))
    after = plus.state_dict()
    for part in ("networks", "losses"):
        assert all(torch.equal(before[part][1][name], tensor) for name, tensor in after[part][1].items())
        assert any(not torch.equal(before[part][0][name], tensor) for name, tensor in after[part][0].items())
    assert plus.steps == [1, 0]
    assert [average.updates for average in plus.averages] == [1, 0]


def test_loader_and_pair_of_loaders():
    """Fails when a DataLoader cannot be used, or the second of a pair is ignored."""
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    losses = build().fit(loader, epochs=2)
    assert len(losses) == 2
    plus = build()
    plus.fit((loader, batches(6)), epochs=1)
    assert plus.steps == [3, 2]


def test_predict_averages_in_eval_mode():
    """Fails when prediction uses one network only, or leaves the networks in eval mode."""
    plus = build(dropout=0.5)
    plus.fit(batches(), epochs=1)
    x, _ = data()
    ours = plus.predict(x)
    assert all(network.training for network in plus.networks)
    logits = [network.eval()(x) for network in plus.networks]
    torch.testing.assert_close(ours, (logits[0] + logits[1]) / 2)


def test_suspected_label_errors_uses_both_histories():
    """Fails when one network's belief decides alone."""
    plus = build()
    plus.losses[0].history[0] = torch.tensor([0.4, 0.1, 0.0])
    plus.losses[1].history[0] = torch.tensor([0.0, 0.6, 0.0])
    suspected = plus.suspected_label_errors(torch.zeros(N, dtype=torch.int64))
    assert suspected.tolist() == [True] + [False] * (N - 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.training_step(2, None), ValueError, "net must be 0 or 1"),
        (
            lambda p: p.training_step(0, (torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, N]))),
            IndexError,
            "12",
        ),
        (lambda p: p.training_step(0, (torch.zeros(2, 4), None, torch.tensor([0, 1]))), ValueError, "labels"),
        (
            lambda p: p.training_step(0, (torch.zeros(2, 4), torch.zeros(2, C), torch.tensor([0, 1]))),
            ValueError,
            "class",
        ),
        (lambda p: p.fit([], epochs=1), ValueError, "no batch"),
        (lambda p: p.fit(([], [], []), epochs=1), ValueError, "pair"),
        (lambda p: p.load_state_dict({"networks": []}), ValueError, "missing"),
        (lambda p: build(strength=-1.0), ValueError, "strength must be >= 0"),
    ],
)
def test_errors(call, error, words):
    """Fails when a mistake goes on to an obscure error, or to none."""
    with pytest.raises(error, match=words):
        call(build())


def test_nan_is_reported():
    """Fails when a training that has diverged goes on silently."""
    x, y = data()
    with pytest.raises(FloatingPointError, match="network 0 is not finite in epoch 0"):
        build().fit(TensorData(x * float("nan"), y, batch_size=4), epochs=1)
