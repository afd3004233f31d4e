"""The task, its networks, the exact solution. Golden vectors and bad inputs are in the contract suite.

Each test names the fault that makes it fail.
"""

import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
    analytic_weights,
    modular_optimizer,
    one_hot_mse,
)


@given(st.sampled_from([5, 11, 23]), st.floats(0.1, 1.0), st.floats(0.0, 1.0), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=25)
def test_draws_are_those_of_the_official_code(p, frac, noise, pair_seed, label_seed):
    """A second derivation with the global generators; fails for another order of draws, rounding, or shuffle."""
    pairs = [(i, j) for i in range(p) for j in range(p)]
    state = random.getstate()
    random.seed(pair_seed)
    order = list(range(len(pairs)))
    random.shuffle(order)
    random.setstate(state)
    n = int(frac * len(pairs))
    labels = torch.tensor([(i + j) % p for i, j in (pairs[k] for k in order)])
    with torch.random.fork_rng():
        torch.manual_seed(label_seed)
        labels[: int(noise * n)] = torch.randint(0, p, (int(noise * n),))
    before = torch.get_rng_state(), random.getstate()
    task = ModularArithmetic(p, frac=frac, noise=noise, pair_seed=pair_seed, label_seed=label_seed)
    assert torch.equal(before[0], torch.get_rng_state()), "the task drew from the global generator"
    assert before[1] == random.getstate(), "the task drew from Python's global generator"
    assert task.pairs.tolist() == [list(pairs[k]) for k in order]
    assert torch.equal(task.labels, labels)
    assert task.num_train == n
    assert int(task.corrupted.sum()) == int(noise * n)


def test_split_covers_all_pairs_once():
    """Fails when the parts overlap, a pair is lost, or test labels are corrupted."""
    task = ModularArithmetic(13, frac=0.3, noise=0.9)
    both = torch.cat([task.train.tensors[0], task.test.tensors[0]])
    assert len({tuple(pair) for pair in both.tolist()}) == len(both) == 169
    pairs, labels = task.test.tensors
    assert torch.equal(labels, pairs.sum(dim=1) % 13)


def test_without_noise_labels_are_right():
    task = ModularArithmetic(13)
    assert torch.equal(task.labels, task.clean)
    assert not task.wrong.any()
    assert not task.corrupted.any()


def test_replaced_labels_may_be_right_by_chance():
    """A share 1/p stays right: fails when the last class is never drawn, or only wrong ones are."""
    tasks = [ModularArithmetic(5, frac=1.0, noise=1.0, label_seed=seed) for seed in range(200)]
    share = torch.stack([(task.corrupted & ~task.wrong).double().mean() for task in tasks]).mean()
    assert float(share) == pytest.approx(1 / 5, abs=0.02)
    drawn = torch.cat([task.labels for task in tasks]).bincount(minlength=5).double() / 5000
    torch.testing.assert_close(drawn, torch.full((5,), 0.2).double(), atol=0.02, rtol=0.0)


@pytest.mark.parametrize("p", [2, 7, 11])
def test_operations(p):
    """Fails for a wrong sign, a wrong inverse, or a division by zero that is kept."""
    for op, rule in {
        "add": lambda i, j: (i + j) % p,
        "subtract": lambda i, j: (i - j) % p,
        "multiply": lambda i, j: i * j % p,
    }.items():
        task = ModularArithmetic(p, op)
        assert [rule(i, j) for i, j in task.pairs.tolist()] == task.clean.tolist()
    task = ModularArithmetic(p, "divide")
    assert len(task.pairs) == p * (p - 1)
    assert all(c * j % p == i for (i, j), c in zip(task.pairs.tolist(), task.clean.tolist(), strict=True))


def test_division_by_what_has_no_inverse_is_left_out():
    """With a modulus that is no prime only the divisors with an inverse stay."""
    with pytest.warns(UserWarning, match="not a prime"):
        task = ModularArithmetic(6, "divide")
    assert set(task.pairs[:, 1].tolist()) == {1, 5}
    assert all(c * j % 6 == i for (i, j), c in zip(task.pairs.tolist(), task.clean.tolist(), strict=True))


def test_the_cycle_turns_products_into_sums():
    """Fails for a root that is not primitive, or powers out of order."""
    for p in (5, 7, 11, 23):
        cycle = ModularArithmetic(p, "multiply").cycle
        assert sorted(cycle.tolist()) == list(range(1, p))
        place = {value: k for k, value in enumerate(cycle.tolist())}
        for a in range(1, p):
            for b in range(1, p):
                assert place[a * b % p] == (place[a] + place[b]) % (p - 1)
    assert ModularArithmetic(7).cycle is None


# -- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "batch"), [(None, 0), (None, 1), (None, 40), ("layer", 0), ("layer", 1), ("layer", 40), ("batch", 40)]
)
def test_gathered_rows_are_the_product_with_one_hot_vectors(norm, batch):
    """Values and gradients; fails when V's rows are looked up in U, or repeated pairs overwrite one another."""
    torch.manual_seed(0)
    net = QuadraticMLP(7, width=9, norm=norm).double()
    pairs = torch.randint(7, (batch, 2))
    one_hot = F.one_hot(pairs, 7).double()
    wanted = torch.randn(batch, 7).double()
    grads = []
    for x in (pairs, one_hot, one_hot.flatten(1)):
        net.zero_grad()
        out = net(x)
        (out * wanted).sum().backward()
        grads.append((out.detach(), net.fc1.weight.grad.clone(), net.fc2.weight.grad.clone()))
    for other in grads[1:]:
        for ours, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_formula():
    """``W (U[i] + V[j])²`` by a loop; fails for a missing square or a sum of squares."""
    torch.manual_seed(0)
    net = QuadraticMLP(5, width=3).double()
    first, w = (weight.detach() for weight in net.neuron_maps())
    u, v = first[:, :5], first[:, 5:]
    for i in range(5):
        for j in range(5):
            logits = [sum(float(w[n, k] * (u[k, i] + v[k, j]) ** 2) for k in range(3)) for n in range(5)]
            torch.testing.assert_close(net(torch.tensor([[i, j]]))[0].detach(), torch.tensor(logits).double())


def test_start():
    """Standard deviation ``0.5 / (2 N)^(1/3)`` of both layers; fails for torch's own start."""
    torch.manual_seed(0)
    net = QuadraticMLP(97, width=500)
    for layer in (net.fc1, net.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(0.5 / 10.0, rel=0.02)


def test_dropout_comes_before_the_square_and_normalisation_after():
    """Fails when dropout acts on squares (scaled by 2, not 4), or the normalisation sees sums."""
    torch.manual_seed(0)
    net = QuadraticMLP(7, width=50, dropout=0.5, norm="batch").train()
    seen = []
    net.norm1.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    pairs = torch.randint(7, (30, 2))
    net(pairs)
    sums = net.sums(pairs)
    kept = seen[0] != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(seen[0][kept], 4 * sums.square()[kept])
    net.eval()
    net(pairs)
    torch.testing.assert_close(seen[1], sums.square())


def test_compiles_whole():
    """Fails when the check of values breaks the graph."""
    net = QuadraticMLP(7, width=9)
    pairs = torch.randint(7, (12, 2))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pairs), net(pairs))


def test_loss_is_the_mean_over_all_entries():
    """By a loop; fails for a sum over classes."""
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 2, 2, 1])
    total = sum((float(logits[b, c]) - (c == int(labels[b]))) ** 2 for b in range(4) for c in range(3))
    assert float(one_hot_mse(logits, labels)) == pytest.approx(total / 12)
    assert float(one_hot_mse(logits, labels, reduction="none").mean()) == pytest.approx(total / 12)


# -- the exact solution -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [23, 12])
def test_analytic_weights_add_without_training(p):
    """100 % on all pairs, outputs about one-hot; fails for a wrong sign of a phase, or U and V with one phase."""
    task = ModularArithmetic(p)
    net = QuadraticMLP(p, width=2048).double()
    first, second = analytic_weights(p, 2048, dtype=torch.float64)
    net.load_state_dict({"fc1.weight": first, "fc2.weight": second})
    with torch.no_grad():
        logits = net(task.pairs)
    assert torch.equal(logits.argmax(dim=1), task.clean)
    right = logits.gather(1, task.clean[:, None])
    assert float(right.mean()) == pytest.approx(1.0, abs=0.05)


def test_analytic_weights_are_a_function_of_their_seed():
    a, b, c = (analytic_weights(11, 8, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# -- the transformer ----------------------------------------------------------------------------


def test_transformer_by_a_slow_loop():
    """Head by head from the formula; fails for scaling by the root of the head's width, or a read-out of place 0."""
    torch.manual_seed(0)
    net = ModularTransformer(7, width=8, heads=2).double().eval()
    pair = torch.tensor([2, 5])
    x = net.tokens.weight[pair] + net.places.weight
    seen = []
    for h in range(2):
        rows = slice(4 * h, 4 * h + 4)
        q = net.query.weight[rows] @ x[1]
        scores = torch.stack([q @ (net.key.weight[rows] @ x[t]) / 4 for t in range(2)])
        shares = scores.softmax(dim=0)
        seen.append(sum(shares[t] * (net.value.weight[rows] @ x[t]) for t in range(2)))
    y = x[1] + net.out.weight @ torch.cat(seen)
    y = y + net.proj.weight @ (net.fc.weight @ y).relu()
    torch.testing.assert_close(net(pair[None])[0], net.head.weight @ y / 8)


def test_what_a_transformers_neurons_read_and_say():
    """``neuron_maps`` against unit vectors; fails for a transposed factor."""
    net = ModularTransformer(7, width=8, heads=2, neurons=5)
    first, second = net.neuron_maps()
    assert first.shape == (5, 7)
    assert second.shape == (7, 5)
    torch.testing.assert_close(first[:, 3], net.fc(net.tokens(torch.tensor(3))))
    torch.testing.assert_close(second[:, 2], net.head(net.proj(F.one_hot(torch.tensor(2), 5).float())))


# -- the optimizer ------------------------------------------------------------------------------


def test_decay_is_decoupled():
    """With zero gradient a step multiplies weights by ``1 - lr * decay``; fails for a decay through Adam's moments."""
    p = nn.Parameter(torch.randn(5).double())
    before = p.detach().clone()
    optimizer = modular_optimizer([p], weight_decay=15.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.01 * 15.0), rtol=1e-14, atol=0.0)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)


def test_rate_of_small_batches():
    """``lr sqrt(b / 256)`` below 256, ``lr`` from there on."""
    for batch, factor in ((8, math.sqrt(8 / 256)), (256, 1.0), (1000, 1.0), (None, 1.0)):
        optimizer = modular_optimizer([nn.Parameter(torch.zeros(1))], batch_size=batch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor)


def test_no_warning_where_nothing_is_coupled():
    """Fails when AdamW, a subclass of Adam, is warned of, or Adam without decay."""
    p = [nn.Parameter(torch.zeros(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modular_optimizer(p, weight_decay=5.0)
        modular_optimizer(p, optimizer=torch.optim.Adam)
        modular_optimizer(
            p, weight_decay=5.0, optimizer=lambda q, **k: torch.optim.Adam(q, decoupled_weight_decay=True, **k)
        )
