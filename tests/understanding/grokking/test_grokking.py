"""Scores of neurons, pruning, accuracies by subset, and what regularisers do to memorised labels.

Golden vectors and bad inputs are in the contract suite. Each test names the fault that makes it fail.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.mechanisms.pruning import pruned
from regularized.papers.grokking import experiment
from regularized.training import Evaluation, Loss, TensorData, Trainer
from regularized.training.data import IndexedDataset
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
    analytic_weights,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.phase_diagram import phase_diagram
from regularized.understanding.grokking.pruning import neuron_masks, prune_by_score_, pruning_sweep
from regularized.understanding.grokking.report import MemorizationProbe, subset_accuracies
from regularized.understanding.grokking.scores import gini, inverse_participation_ratio, neuron_ipr, score_correlation

# -- scores -------------------------------------------------------------------------------------


def cosines(p: int, frequencies, phases=None) -> torch.Tensor:
    n = torch.arange(p, dtype=torch.float64)
    phases = phases or [0.3 * k for k in range(len(frequencies))]
    return sum(torch.cos(2 * math.pi * s * n / p + a) for s, a in zip(frequencies, phases, strict=True))


@pytest.mark.parametrize("p", [5, 7, 23, 53])
def test_a_cosine_has_ratio_one(p):
    """For every frequency and phase; fails for the full transform, where it is 1/2."""
    rows = torch.stack([cosines(p, [s], [0.7 * s]) for s in range(1, (p - 1) // 2 + 1)])
    torch.testing.assert_close(inverse_participation_ratio(rows), torch.ones(len(rows)).double())


def test_equal_frequencies_share():
    """m of them give 1/m; fails for a missing normalisation, or r in place of 2 r."""
    for m in (2, 3, 5):
        rows = cosines(23, list(range(1, m + 1)))
        assert float(inverse_participation_ratio(rows)) == pytest.approx(1 / m)
        assert float(inverse_participation_ratio(rows, r=3)) == pytest.approx(1 / m**2)


def test_constant_and_zero_rows():
    """A constant is one frequency, the mean; zeros give 0 and no nan."""
    rows = torch.stack([torch.ones(7), torch.zeros(7), torch.full((7,), 1e-30)])
    assert inverse_participation_ratio(rows).tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert gini(torch.zeros(4)) == 0.0


@given(st.integers(2, 30), st.integers(0, 1000), st.floats(-25.0, 25.0))
@settings(max_examples=40)
def test_ratio_by_a_slow_transform(p, seed, exponent):
    """Sums of complex exponentials, at any scale; fails when squares of small weights underflow."""
    row = torch.randn(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = torch.arange(p, dtype=torch.float64)
    power = [
        float(
            (row * torch.cos(2 * math.pi * k * n / p)).sum() ** 2
            + (row * torch.sin(2 * math.pi * k * n / p)).sum() ** 2
        )
        for k in range(p // 2 + 1)
    ]
    expected = sum((a / sum(power)) ** 2 for a in power)
    assert float(inverse_participation_ratio(row)) == pytest.approx(expected, rel=1e-9)
    scaled = (row * 10**exponent).float()
    assert float(inverse_participation_ratio(scaled)) == pytest.approx(expected, rel=1e-4)
    assert 1 / (p // 2 + 1) - 1e-9 <= expected <= 1 + 1e-9


def test_axis_and_precision():
    """The axis of an embedding; half precision is widened, not refused."""
    weights = torch.randn(7, 4)
    torch.testing.assert_close(inverse_participation_ratio(weights, dim=0), inverse_participation_ratio(weights.t()))
    low = inverse_participation_ratio(weights.bfloat16(), dim=0)
    torch.testing.assert_close(low, inverse_participation_ratio(weights, dim=0), atol=0.02, rtol=0.0)


def test_the_order_of_the_numbers_matters():
    """Without cyclic order the ratio is another number, and means nothing."""
    row = cosines(23, [3])
    mixed = row[torch.randperm(23, generator=torch.Generator().manual_seed(0))]
    assert float(inverse_participation_ratio(mixed)) < 0.5


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=20))
@settings(max_examples=40)
def test_gini_by_all_pairs(values):
    """Mean absolute difference over twice the mean; fails when sorted the other way or without the factor 2."""
    x = torch.tensor(values, dtype=torch.float64)
    if float(x.sum()) == 0.0:
        return
    slow = (x[:, None] - x[None]).abs().mean() / x.mean() / 2
    assert float(gini(x)) == pytest.approx(float(slow), abs=1e-9)


def test_score_of_a_neuron_is_the_mean_of_three():
    """By a loop over neurons; fails when U and V are transformed as one row, or W by rows."""
    net = QuadraticMLP(11, width=5).double()
    w1, w2 = net.neuron_maps()
    slow = [
        (
            inverse_participation_ratio(w1[k, :11])
            + inverse_participation_ratio(w1[k, 11:])
            + inverse_participation_ratio(w2[:, k])
        )
        / 3
        for k in range(5)
    ]
    torch.testing.assert_close(neuron_ipr(w1, w2, p=11), torch.stack(slow))


def test_neurons_that_multiply_are_periodic_in_the_logarithm():
    """Fails when the order of powers is not used: then the same neurons score low."""
    task = ModularArithmetic(11, "multiply")
    shifted, out = analytic_weights(10, 6, dtype=torch.float64)  # adds exponents modulo 10
    first, second = torch.zeros(6, 22).double(), torch.zeros(11, 6).double()
    first[:, task.cycle], first[:, 11 + task.cycle], second[task.cycle] = shifted[:, :10], shifted[:, 10:], out
    torch.testing.assert_close(neuron_ipr(first, second, p=11, cycle=task.cycle), torch.ones(6).double())
    assert float(neuron_ipr(first, second, p=11).max()) < 0.8


def test_correlation():
    """Against torch's own, with the size of the gains; a constant correlates with nothing."""
    scores, gains = torch.rand(20).double(), torch.randn(20).double()
    expected = torch.corrcoef(torch.stack([scores, gains.abs()]))[0, 1]
    torch.testing.assert_close(score_correlation(scores, gains), expected)
    assert score_correlation(scores, torch.ones(20).double()) == 0.0


# -- pruning ------------------------------------------------------------------------------------

PAIRS = torch.cartesian_prod(torch.arange(7), torch.arange(7))


def test_pruning_nothing_and_everything():
    """Nothing is the identity bit for bit, everything gives zero logits."""
    net = QuadraticMLP(7, width=10)
    before = net(PAIRS)
    assert prune_by_score_(net, torch.rand(10), fraction=0.0) == 0
    assert torch.equal(net(PAIRS), before)
    assert prune_by_score_(net, torch.rand(10), fraction=1.0) == 10
    assert not net(PAIRS).any()


@pytest.mark.parametrize("norm", [None, "batch"])
def test_pruning_is_a_mask_on_the_neurons(norm):
    """The same logits as with the lowest scores masked out; fails when the highest go, or one layer is left."""
    torch.manual_seed(0)
    net = QuadraticMLP(7, width=10, norm=norm).eval()
    if norm:
        nn.init.normal_(net.norm1.bias)
    scores = torch.rand(10)
    mask = (scores > scores.sort().values[3]).float()
    with torch.no_grad():
        masked = (net.norm1(net.sums(PAIRS).square()) * mask) @ net.fc2.weight.t()
    assert prune_by_score_(net, scores, fraction=0.4, norm="norm1" if norm else None) == 4
    torch.testing.assert_close(net(PAIRS), masked)
    assert not net.fc1.weight[mask == 0].any()
    assert not net.fc2.weight[:, mask == 0].any()
    if norm:
        assert not net.norm1.bias[mask == 0].any()


def test_pruned_neurons_stay_pruned_in_training():
    """With decay, bias and normalisation; fails when a shift or a bias keeps a neuron alive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    nn.init.normal_(model[2].bias)
    masks = neuron_masks(model, torch.arange(8.0), fraction=0.5, first="0", second="3", norm="2")
    assert set(masks) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}
    with pruned(model, masks):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any(), name
        assert model.get_parameter(name)[mask].all(), name


def test_equal_scores_go_in_their_order():
    """Fails for an unstable order, which would differ between machines."""
    masks = neuron_masks(QuadraticMLP(7, width=4), torch.zeros(4), fraction=0.5)
    assert masks["fc1.weight"][:, 0].tolist() == [False, False, True, True]


def test_sweep_leaves_the_network_alone():
    net, task = QuadraticMLP(7, width=10), ModularArithmetic(7, noise=0.4)
    before, probe = copy.deepcopy(net.state_dict()), MemorizationProbe(task)
    records = pruning_sweep(net, probe, torch.rand(10))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [round(record["fraction"], 1) for record in records] == [k / 10 for k in range(10)]
    assert {name: records[0][name] for name in ("train", "test")} == {
        name: probe(net)[name] for name in ("train", "test")
    }


# -- accuracies ---------------------------------------------------------------------------------


def test_subset_accuracies_by_hand():
    """Eight samples in three batches out of order; fails when the mask is read by place in the batch."""
    predicted = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0])
    clean = torch.tensor([0, 1, 2, 0, 1, 1, 0, 1])
    corrupted = torch.tensor([False, True, True, False, False, True, True, True])
    x = F.one_hot(predicted, 3).float()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    batches = [(x[rows], labels[rows], rows) for rows in order.split(3)]
    found = subset_accuracies(nn.Identity(), batches, corrupted, clean=clean)
    assert found == {"train": 0.5, "memorized": 0.2, "clean_train": 1.0, "restored": 0.8}
    assert math.isnan(subset_accuracies(nn.Identity(), batches, torch.zeros(8, dtype=torch.bool))["memorized"])


def test_subset_accuracies_with_a_loader_and_dropout():
    """Any classifier, in evaluation mode; fails when dropout is active or the mode is left changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    x = torch.randn(30, 4)
    y = model[0](x).argmax(dim=1)
    data = DataLoader(IndexedDataset(torch.utils.data.TensorDataset(x, y)), batch_size=8, shuffle=True)
    batches = ((*pair, index) for pair, index in _in_parts(data))
    assert subset_accuracies(model, batches, torch.arange(30) < 9)["train"] == 1.0
    assert model.training
    assert model[1].training


def _in_parts(loader):
    for batch in loader:
        values = list(batch.values()) if isinstance(batch, dict) else list(batch)
        yield values[:2], values[2]


def test_probe_by_a_loop():
    """Every number by counting; fails when test pairs count as training, or the right labels as those given."""
    torch.manual_seed(0)
    task = ModularArithmetic(7, frac=0.6, noise=0.5)
    net = QuadraticMLP(7, width=12, dropout=0.5).train()
    found = MemorizationProbe(task)(net)
    net.eval()
    says = [int(net(pair[None]).argmax()) for pair in task.pairs]
    n, k = task.num_train, int(task.corrupted.sum())
    labels, clean = task.labels.tolist(), task.clean.tolist()

    def share(wanted, rows):
        return sum(says[row] == wanted[row] for row in rows) / len(rows)

    expected = {
        "train": share(labels, range(n)),
        "memorized": share(labels, range(k)),
        "restored": share(clean, range(k)),
        "clean_train": share(labels, range(k, n)),
        "test": share(clean, range(n, 49)),
        "ipr": float(neuron_ipr(*net.neuron_maps(), p=7).mean()),
    }
    assert found == pytest.approx(expected)


def test_probe_of_networks_of_other_kinds():
    """One-hot inputs and unreadable neurons; own maps; the transformer."""
    task = ModularArithmetic(7, noise=0.3)
    plain = nn.Sequential(nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 7))
    one_hot = lambda pairs: F.one_hot(pairs, 7).flatten(1).float()  # noqa: E731
    assert "ipr" not in MemorizationProbe(task, inputs=one_hot)(plain)
    mapped = MemorizationProbe(task, inputs=one_hot, maps=lambda m: (m[0].weight, m[2].weight))
    assert mapped(plain)["ipr"] == pytest.approx(float(neuron_ipr(plain[0].weight, plain[2].weight, p=7).mean()))
    assert MemorizationProbe(task)(ModularTransformer(7, width=8))["ipr"] > 0


def test_probe_in_the_trainer_equals_the_probe_in_a_loop():
    """The same records from ``Trainer(evaluate=probe)`` as from a loop of one's own."""
    task = ModularArithmetic(7, frac=0.6, noise=0.3)
    x, y = task.train.tensors
    torch.manual_seed(0)
    ours = QuadraticMLP(7, width=12)
    theirs, probe = copy.deepcopy(ours), MemorizationProbe(task)
    optimizer = modular_optimizer(ours.parameters(), weight_decay=5.0)
    log = []
    for step in range(1, 7):
        optimizer.zero_grad()
        one_hot_mse(ours(x), y).backward()
        optimizer.step()
        if step % 2 == 0:
            log.append({"step": float(step), **probe(ours)})
    trainer = Trainer(
        theirs,
        terms={"task": Loss(lambda logits, labels: one_hot_mse(logits, labels, reduction="none"))},
        optimizer=lambda parameters: modular_optimizer(parameters, weight_decay=5.0),
        evaluate=Evaluation(probe, every=2),
    )
    trainer.fit(TensorData(x, y, batch_size=len(x), shuffle=False), epochs=6)
    for record, expected in zip(trainer.history, log, strict=True):
        assert {name: record[name] for name in expected} == pytest.approx(expected, abs=1e-6)


# -- what it is for -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """The fast setting of the sheet, with decay 0, 5 and 10: about three seconds each."""
    task, nets = ModularArithmetic(53, frac=0.6, noise=0.3), {}
    x, y = task.train.tensors
    for decay in (0.0, 5.0, 10.0):
        torch.manual_seed(0)
        net = QuadraticMLP(53, width=256)
        optimizer = modular_optimizer(net.parameters(), weight_decay=decay)
        target = F.one_hot(y, 53).float()
        for _ in range(500):
            optimizer.zero_grad()
            F.mse_loss(net(x), target).backward()
            optimizer.step()
        nets[decay] = net
    return task, nets, MemorizationProbe(task)


@pytest.mark.slow
def test_decay_drops_what_was_memorised(trained):
    """The control is the same without decay; fails when the decay does not reach the weights, or the wrong way."""
    task, nets, probe = trained
    free, mild, strong = (probe(nets[decay]) for decay in (0.0, 5.0, 10.0))
    assert free["memorized"] > 0.9
    assert mild["memorized"] > 0.9
    assert mild["test"] > 0.95
    assert strong["memorized"] < 0.1
    assert strong["test"] > 0.99
    assert strong["train"] == pytest.approx(1 - float(task.wrong.double().mean()), abs=0.01)
    assert free["ipr"] < mild["ipr"] < strong["ipr"]


@pytest.mark.slow
def test_low_scores_hold_the_noise_and_high_scores_the_rule(trained):
    """Pruning from below drops memorised labels, from above the rule; fails for scores turned round."""
    _task, nets, probe = trained
    net = nets[5.0]
    scores = probe.scores(net)
    below, above = (pruning_sweep(net, probe, s, fractions=(0.4,))[0] for s in (scores, -scores))
    assert below["memorized"] < 0.5
    assert below["test"] > 0.95
    assert above["test"] < 0.5


# -- the paper's scale --------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="not applicable: with a GPU here nothing is refused")
def test_paper_scale_needs_a_gpu():
    """It says so, and what else there is, instead of taking a night."""
    with pytest.raises(Unavailable, match=r"17 x 17 networks .* CUDA GPU"):
        run_arm(experiment, "no_decay", 0, "paper")


@pytest.mark.parametrize("arm", ["strong_decay", "dropout", "batch_norm", "pruned"])
def test_paper_scale_runs(arm, monkeypatch):
    """The very code at a small size with 2 x 2 cells: shares of the phases come out where a diagram belongs."""
    full = resolve(experiment, arm, "paper")
    assert len(full["cells"]) == 17
    assert [len(diagrams) for diagrams in experiment._DIAGRAMS.values()] == [1, 1, 2, 3, 4]
    small = {"p": 7, "width": 8, "frac": 0.7, "noise": 0.3, "steps": 3}
    small |= {"records": 2, "cells": (0.6, 0.8), "device": "cpu"}
    small |= {"batch_size": 8} if full["batch_size"] else {}
    monkeypatch.setattr(experiment, "phase_diagram", lambda _p, **s: phase_diagram(23, **{**s, "width": 8, "steps": 3}))
    shares = [v for name, v in run_arm(experiment, arm, 0, "paper", **small).metrics.items() if "_share_of_" in name]
    assert sum(shares) == pytest.approx(len(full["diagrams"]))
