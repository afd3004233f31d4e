"""Pairs, operators, loss and probes: against closed forms, and for what each must not see.

Golden vectors, bad inputs, accumulation, two processes and resume are in the contract suite. Each test names the fault
that makes it fail.
"""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.understanding.homomorphism_error.command_language import MODIFIERS, VOCABULARY, WORDS, commands, encode
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss, find_pairs
from regularized.understanding.homomorphism_error.pool import PairPool
from regularized.understanding.homomorphism_error.probes import (
    CompositionProbe,
    homomorphism_error,
    modifier_triples,
    segment_triples,
)
from regularized.understanding.homomorphism_error.term import Compositionality

D = 5
AT = (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 3, 1, 2]), torch.tensor([1, 4, 2, 3]))
WHICH = torch.tensor([0, 1, 0, 0])


def states(seed=0, layers=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 6, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(layers)]


def operators(modifiers=(7, 9), hidden=6):
    torch.manual_seed(0)
    return CompositionOperators(D, modifiers, hidden=hidden).double()


def test_pairs_by_a_loop():
    """Fails for a pair across a gap, the wrong neighbour, or a modifier that is counted from another place."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (20, 9), generator=g)
    found, which = find_pairs(tokens, [1, 2], [4, 3])
    for row in range(20):
        for t in range(8):
            is_pair = int(tokens[row, t]) in (1, 2) and int(tokens[row, t + 1]) in (3, 4)
            assert bool(found[row, t]) == is_pair
            assert int(which[row, t]) == ([4, 3].index(int(tokens[row, t + 1])) if is_pair else 0)


def test_loss_by_a_loop():
    """A second derivation: layers, modifiers, pairs and dimensions averaged one after the other."""
    hidden, ops = states(layers=2), operators()
    expected = 0.0
    for h in hidden:
        of_modifier = []
        for w in (0, 1):
            errors = []
            for row, i, j, which in zip(*AT, WHICH, strict=True):
                if which == w:
                    a, m = h[row, i], h[row, j]
                    errors.append(((ops.ops[str((7, 9)[w])](torch.cat([a, m])) - (a + m) / 2) ** 2).mean())
            of_modifier.append(sum(errors) / len(errors))
        expected = expected + sum(of_modifier) / 2
    torch.testing.assert_close(composition_loss(hidden, AT, WHICH, ops), expected / 2)


def averaging(modifiers=(7, 9)):
    """Operators that average exactly: ReLU(x) - ReLU(-x) = x."""
    ops = operators(modifiers, hidden=4 * D)
    eye = torch.eye(2 * D, dtype=torch.float64)
    with torch.no_grad():
        for op in ops.ops.values():
            op[0].weight.copy_(torch.cat([eye, -eye]))
            op[0].bias.zero_()
            half = torch.cat([torch.eye(D), torch.eye(D)], dim=1).double() / 2
            op[2].weight.copy_(torch.cat([half, -half], dim=1))
            op[2].bias.zero_()
    return ops


def test_operators_that_average_have_no_error():
    """The mean of the parts is linear in them: loss 0, and no gradient to the states."""
    (hidden,) = states()
    loss = composition_loss([hidden], AT, WHICH, averaging())
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() < 1e-30
    assert float(gradient.abs().max()) < 1e-15


def test_zero_operators_give_the_mean_square():
    (hidden,) = states()
    ops = operators((7,))
    for p in ops.parameters():
        torch.nn.init.zeros_(p)
    loss = composition_loss([hidden], AT, torch.zeros(4, dtype=torch.long), ops)
    mean = (hidden[AT[0], AT[1]] + hidden[AT[0], AT[2]]) / 2
    torch.testing.assert_close(loss, mean.square().mean())


def test_only_the_pairs_get_a_gradient():
    """Fails when another position, or an absent modifier's operator, is reached."""
    (hidden,) = states()
    ops = operators((7, 8, 9))
    loss = composition_loss([hidden], AT, torch.zeros(4, dtype=torch.long), ops)
    loss.backward()
    touched = torch.zeros(3, 6, dtype=torch.bool)
    touched[AT[0], AT[1]] = touched[AT[0], AT[2]] = True
    assert bool((hidden.grad.abs().sum(-1) > 0).eq(touched).all())
    assert all(not p.grad.any() for name in ("8", "9") for p in ops.ops[name].parameters())


def test_order_of_pairs_does_not_matter():
    hidden, ops = states(), operators()
    order = torch.tensor([2, 0, 3, 1])
    again = composition_loss(hidden, tuple(p[order] for p in AT), WHICH[order], ops)
    torch.testing.assert_close(again, composition_loss(hidden, AT, WHICH, ops))


def test_detached_target():
    """The value stays, the gradient loses the part that comes through the target."""
    (hidden,), ops = states(), operators()
    one, other = (composition_loss([hidden], AT, WHICH, ops, detach_target=detach) for detach in (False, True))
    assert torch.equal(one, other)
    full, part = (torch.autograd.grad(loss, hidden)[0] for loss in (one, other))
    assert float((full - part).abs().max()) > 1e-3


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(VOCABULARY), D)
        self.mix = torch.nn.Linear(2 * D, D)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.mix(torch.cat([x, x.roll(1, dims=1)], dim=-1))


def words_and_modifiers():
    return [VOCABULARY.index(w) for w in WORDS], [VOCABULARY.index(m) for m in MODIFIERS]


def test_term_is_the_mean_over_the_batchs_pairs():
    """Fails when positions without a pair leak in, or pairs are counted wrongly."""
    torch.manual_seed(0)
    tokens = encode([command for command, _ in commands(2, noise=1, largest=12)])
    words, modifiers = words_and_modifiers()
    net = Tagger()
    term = Compositionality(D, words=words, modifiers=modifiers, layers=["mix"], hidden=6)
    batch = Batch.of({"inputs": tokens, "targets": tokens})
    step = Step(net, batch, Progress(0, 1), {"mix": net(tokens)})
    found, which = find_pairs(tokens, words, modifiers)
    rows, first = found.nonzero(as_tuple=True)
    h = net(tokens)
    a, m = h[rows, first], h[rows, first + 1]
    errors = (term.operators(torch.cat([a, m], -1), which[rows, first]) - (a + m) / 2).square().mean(-1)
    assert int(term.count(batch)) == len(rows) > 0
    torch.testing.assert_close(term(step), errors.sum())


@pytest.mark.parametrize("everywhere", [False, True], ids=["pairs", "all positions"])
def test_term_of_several_layers_by_a_loop(monkeypatch, everywhere):
    """Value and gradients to states and operators, pair by pair. Fails when the end of one sequence is paired with the
    start of the next, when a modifier or a layer is mixed up, or when a position without a pair gets a gradient. What a
    GPU does, which may not ask where the pairs are, gives the same."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: everywhere)
    tokens = torch.tensor([[7, 1, 9, 2, 1], [9, 1, 7, 0, 2], [9, 0, 0, 0, 0]])
    term = Compositionality(D, words=[1, 2], modifiers=[7, 9], layers=["one", "two"], hidden=6).double()
    hidden = dict(zip(("one", "two"), states(layers=2), strict=True))
    hidden = {name: h[:, :5].detach().requires_grad_() for name, h in hidden.items()}
    step = Step(torch.nn.Identity(), Batch(tokens), Progress(0, 1), hidden)
    expected = 0.0
    for h in hidden.values():
        for row, first, modifier in ((0, 1, "9"), (1, 1, "7")):
            a, m = h[row, first], h[row, first + 1]
            expected = expected + (term.operators.ops[modifier](torch.cat([a, m])) - (a + m) / 2).square().mean() / 2
    value, leaves = term(step), [*hidden.values(), *term.parameters()]
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operators_see_pairs_alone():
    """Fails when they run on every position of the batch, or when a batch without a pair loses its graph."""
    term = Compositionality(D, words=[1], modifiers=[3], layers=["net"], hidden=6)
    sizes = []
    term.operators.ops["3"].register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    for tokens in (torch.tensor([[1, 3, 1, 0], [0, 0, 1, 3]]), torch.zeros(2, 4).long(), torch.zeros(0, 4).long()):
        hidden = torch.ones(*tokens.shape, D, requires_grad=True)
        step = Step(torch.nn.Identity(), Batch(tokens), Progress(0, 1), {"net": hidden})
        term(step).backward()
    assert sizes == [2, 0, 0]
    assert all(p.grad.isfinite().all() for p in term.parameters())


@pytest.mark.parametrize("target", ["mean", "composed"])
def test_pool(target):
    """The pool's loss is that of its pairs; a phrase is encoded in context, its parts alone. Bites: it falls."""
    torch.manual_seed(0)
    tokens = encode([command for command, _ in commands(2, largest=30)])
    words, modifiers = words_and_modifiers()
    net, ops = Tagger(), CompositionOperators(D, modifiers, hidden=16)
    pool = PairPool.mine(tokens, words, modifiers, largest=20)
    rows = torch.arange(len(pool.first))
    h = net(pool.tokens)
    if target == "mean":
        expected = composition_loss([h], (rows, pool.first, pool.first + 1), pool.which, ops)
    else:
        parts = [net(pool.tokens[rows, pool.first + k][:, None])[:, 0] for k in (0, 1)]
        phrase = h[rows, pool.first + 1]
        errors = (ops(torch.cat(parts, -1), pool.which) - phrase).square().mean(-1)
        expected = torch.stack([errors[pool.which == w].mean() for w in (0, 1)]).mean()
    torch.testing.assert_close(pool.loss(net, ["mix"], ops, target=target), expected)
    optimizer = torch.optim.Adam(ops.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        pool.loss(net, ["mix"], ops, target=target).backward()
        optimizer.step()
    assert pool.loss(net, ["mix"], ops, target=target).item() < 0.3 * expected.item()


def test_pool_draws_from_its_own_generator():
    pool = PairPool.mine(torch.randint(1, 4, (30, 6)), [1], [2, 3])
    before = torch.get_rng_state()
    one, other = (pool.sample(50, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.tokens, other.tokens)
    assert len(one.first) == 50


def test_segments_by_a_loop():
    """Leading noise is a segment of its own, padding belongs to none."""
    tokens = encode([command for command, _ in commands(3, noise=4, largest=20)])
    hidden = torch.randn(*tokens.shape, D, dtype=torch.float64)
    words, _ = words_and_modifiers()
    expected = []
    for row in range(len(tokens)):
        segments: list[list[int]] = []
        for t in range(tokens.shape[1]):
            if int(tokens[row, t]) == 0:
                break
            if int(tokens[row, t]) in words or not segments:
                segments.append([])
            segments[-1].append(t)
        means = [hidden[row, s].mean(0) for s in segments]
        expected += [torch.stack([a, b, (a + b) / 2]) for a, b in pairwise(means)]
    torch.testing.assert_close(segment_triples(tokens, hidden, words), torch.stack(expected))


def test_linear_probe_against_least_squares():
    """Trained long enough it comes near the closed form on its own data, and never below; fails for a wrong target."""
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(300, 2, 3, generator=g)
    whole = parts[:, :1] * parts[:, 1:] + 0.5 * parts[:, :1]
    triples = torch.cat([parts, whole], dim=1)
    report = homomorphism_error(triples, epochs=150, lr=0.02)
    x = torch.cat([parts.flatten(1), torch.ones(300, 1)], dim=1)[:240]
    best = (x @ torch.linalg.lstsq(x, whole[:240, 0]).solution - whole[:240, 0]).square().mean()
    assert 0.7 * float(best) < report.mse["linear"] < 1.6 * float(best)
    # The product of the parts is what the bilinear family can express, and the linear one cannot.
    assert report.mse["bilinear"] < 0.1 * report.mse["linear"]
    assert report.relative == pytest.approx(report.mean / report.variance)


def test_probes_leave_the_random_state_alone():
    before = torch.get_rng_state()
    homomorphism_error(torch.ones(20, 3, 2), epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_modifier_triples_are_in_the_order_of_the_text():
    tokens = torch.tensor([[1, 3, 5, 1, 3], [5, 1, 3, 0, 0]])
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    triples = modifier_triples(tokens, hidden, [1], [3])
    assert triples[:, :, 0].tolist() == [[0.0, 1.0, 0.5], [3.0, 4.0, 3.5], [6.0, 7.0, 6.5]]


@pytest.mark.parametrize("family", ["linear", "bilinear", "mlp"])
def test_probe_families(family):
    """Fails for another activation or a missing product."""
    probe = CompositionProbe(3, family)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    both = torch.cat([a, b], -1)
    if family == "mlp":
        expected = F.linear(F.gelu(probe.fc1(both)), probe.fc2.weight, probe.fc2.bias)
        assert probe.fc1.out_features == 128
    else:
        x = both if family == "linear" else torch.cat([both, a * b], -1)
        expected = F.linear(x, probe.lin.weight, probe.lin.bias)
    torch.testing.assert_close(probe(a, b), expected)


def test_meaning_of_commands():
    """Fails when a modifier repeats wrongly, noise changes the meaning, or commands repeat."""
    pairs = commands(3, noise=2, largest=50, seed=4)
    assert len({command for command, _ in pairs}) == len(pairs) == 50
    for command, meaning in pairs:
        expected: list[str] = []
        for part in " ".join(w for w in command if w not in ("foo", "bar", "baz")).split(" then "):
            word, *modifier = part.split()
            expected += [word.upper()] * {"": 1, "twice": 2, "thrice": 3}[modifier[0] if modifier else ""]
        assert tuple(expected) == meaning
