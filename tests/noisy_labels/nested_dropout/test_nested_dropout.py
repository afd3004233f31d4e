"""The nested layers. Golden vectors, contract and bad input are checked in tests/test_contract.py.

Mutations that were tried, each caught: a factor 1/2 in the exponent, k off by one in the draw, in the slice and in the
mask, rescaled channels, the last columns instead of the first, training widths in evaluation mode, `keep` left out of
the state, one shared generator instead of equal ones, a copied classifier weight.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.evidence.datasets import digits, flip_labels
from regularized.evidence.models import seeded
from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    draw_together,
    nest_classifier,
    nested_layers,
    width_distribution,
)

sizes = st.integers(1, 40)
sigmas = st.floats(0.3, 50.0)


@given(features=sizes, sigma=sigmas, mu=st.floats(-5.0, 45.0))
@settings(max_examples=40)
def test_distribution(features, sigma, mu):
    """Fails for a density with another exponent (a factor 1/2, say), or widths counted from 0."""
    weights = [math.exp(-(((k - mu) / sigma) ** 2)) for k in range(1, features + 1)]
    if sum(weights) == 0.0:
        with pytest.raises(ValueError, match="probability 0"):
            width_distribution(features, sigma=sigma, mu=mu)
        return
    p = width_distribution(features, sigma=sigma, mu=mu)
    torch.testing.assert_close(p, torch.tensor(weights, dtype=torch.float64) / sum(weights), rtol=1e-12, atol=1e-300)
    assert float(p.sum()) == pytest.approx(1.0, rel=1e-12)


@given(features=st.integers(2, 40), sigma=st.floats(1.0, 50.0))
@settings(max_examples=20)
def test_half_gaussian(features, sigma):
    """The sheet's invariants for mu = 0: decreasing, P(1) / P(2) = exp(3 / sigma^2)."""
    p = width_distribution(features, sigma=sigma)
    assert (p.diff() <= 0).all()
    assert float(p[0] / p[1]) == pytest.approx(math.exp(3 / sigma**2), rel=1e-12)


def test_limits_of_sigma():
    """Fails when an infinite sigma is not uniform, or a tiny one around D leaves any other width."""
    torch.testing.assert_close(width_distribution(7, sigma=math.inf), torch.full((7,), 1 / 7, dtype=torch.float64))
    layer = NestedDropout(9, sigma=1e-6, mu=9)
    x = torch.randn(4, 9)
    assert all(layer.draw() == 9 for _ in range(200))
    assert torch.equal(layer(x), x)


@given(width=st.integers(1, 6), dim=st.sampled_from([1, 2, -1, -2]), rows=st.integers(0, 3))
@settings(max_examples=40)
def test_prefix(width, dim, rows):
    """Fails when kept channels are rescaled, others not exactly 0 (nan included), or get a gradient."""
    x = torch.randn(rows, 6, 6, generator=torch.Generator().manual_seed(width)).requires_grad_()
    layer = NestedDropout(6, sigma=2.0, dim=dim)
    layer.hold(width)
    poisoned = x.detach().clone()
    poisoned.narrow(dim, width, 6 - width).fill_(float("nan"))
    out = layer(x)
    assert torch.equal(out.narrow(dim, 0, width), x.narrow(dim, 0, width))
    assert not out.narrow(dim, width, 6 - width).any()
    assert torch.equal(layer(poisoned), out)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(grad.narrow(dim, 0, width), 2 * x.detach().narrow(dim, 0, width))
    assert not grad.narrow(dim, width, 6 - width).any()
    assert torch.equal(layer.masked(x, dim % 3), out)


@given(width=st.integers(1, 8), bias=st.booleans())
@settings(max_examples=20)
def test_slicing_is_masking(width, bias):
    """Fails when the classifier that reads columns differs in value or gradient from mask and plain classifier."""
    sliced = NestedLinear(8, 3, sigma=2.0, bias=bias).double()
    plain, mask = nn.Linear(8, 3, bias=bias).double(), NestedDropout(8, sigma=2.0)
    plain.load_state_dict({k: v for k, v in sliced.state_dict().items() if not k.startswith("nested")})
    sliced.nested.hold(width)
    mask.hold(width)
    x = torch.randn(5, 8, dtype=torch.float64)
    results = []
    for function, weight in ((sliced, sliced.weight), (lambda x: plain(mask(x)), plain.weight)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_expected_mask():
    """P(kept_j) = P(k >= j): fails for a draw that is off by one, or does not follow the table."""
    layer = NestedDropout(20, sigma=6.0, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([layer.draw() for _ in range(40_000)])
    expected = 1 - torch.cat([torch.zeros(1), layer_probabilities(layer).cumsum(0)[:-1].float()])
    seen = (draws[:, None] >= torch.arange(1, 21)).float().mean(0)
    error = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((seen - expected).abs() <= 4 * error + 1e-12).all()
    assert seen[0] == 1.0


def layer_probabilities(layer):
    return width_distribution(layer.features, sigma=layer.sigma, mu=layer.mu)


def test_one_width_for_the_batch():
    """Fails when each sample gets a width of its own, or equal seeds give other widths."""
    sequences = []
    for _ in range(2):
        torch.manual_seed(5)
        layer = NestedDropout(30, sigma=15.0)
        outputs = [layer(torch.ones(6, 30)) for _ in range(20)]
        assert all(torch.equal(out, out[:1].expand(6, -1)) for out in outputs)
        sequences.append([int(out[0].sum()) for out in outputs])
    assert sequences[0] == sequences[1]
    assert len(set(sequences[0])) > 5


def test_half_precision_leaves_the_distribution():
    """Fails when the table of widths is a floating-point buffer: bfloat16 has 8 bits, so most widths would vanish."""
    layer = NestedDropout(512, sigma=100.0, generator=torch.Generator().manual_seed(0))
    low = copy.deepcopy(layer).bfloat16()
    assert [layer.draw() for _ in range(50)] == [low.draw() for _ in range(50)]
    assert torch.equal(layer.thresholds, low.thresholds)
    assert low(torch.ones(2, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_evaluation_uses_keep_and_draws_nothing():
    """Fails when evaluation is random, moves the generator, or takes the width that is held for training."""
    layer = NestedDropout(10, sigma=3.0, generator=torch.Generator().manual_seed(0))
    layer.keep = 4
    layer.hold(2)
    before = layer.generator.get_state()
    x = torch.ones(1, 10)
    assert float(layer(x).sum()) == 2
    assert float(layer.eval()(x).sum()) == 4
    assert torch.equal(layer.generator.get_state(), before)


def test_state_holds_keep_alone():
    """Fails when a checkpoint forgets the chosen width, or is full of tables."""
    head = NestedLinear(10, 3, sigma=3.0)
    head.nested.keep = 4
    state = head.state_dict()
    assert set(state) == {"weight", "nested._extra_state"}
    fresh = NestedLinear(10, 3, sigma=3.0)
    fresh.load_state_dict(state)
    assert fresh.nested.keep == 4
    fresh.load_state_dict(NestedLinear(10, 3, sigma=3.0).state_dict())
    assert fresh.nested.keep is None
    assert copy.deepcopy(head).nested.keep == 4


def test_compiled_draws_follow_the_distribution():
    """Fails when a compiled graph has baked in one width, or draws from another distribution."""
    layer = NestedDropout(6, sigma=4.0)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    widths = torch.tensor([int(compiled(torch.ones(1, 6)).sum()) for _ in range(2000)])
    seen = torch.bincount(widths, minlength=7)[1:] / len(widths)
    assert float((seen - layer_probabilities(layer)).abs().max()) < 0.04
    layer.hold(3)
    assert int(compiled(torch.ones(1, 6)).sum()) == 3
    layer.hold(5)
    assert int(compiled(torch.ones(1, 6)).sum()) == 5
    layer.keep = 2
    assert int(torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")(torch.ones(1, 6)).sum()) == 2


def test_compiled_with_a_generator_says_so():
    """Fails when a generator is silently ignored in a compiled graph."""
    torch.compiler.reset()
    layer = NestedDropout(6, sigma=4.0, generator=torch.Generator())
    with pytest.raises(Exception, match="hold"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, 6))


def test_nest_classifier_keeps_parameters():
    """Fails when an optimizer built before would train dead parameters, or a second call starts anew."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))
    weight, bias = model[1][1].weight, model[1][1].bias
    head = nest_classifier(model, "1.1", sigma=2.0)
    assert model[1][1] is head
    assert head.weight is weight
    assert head.bias is bias
    assert nest_classifier(model, "1.1", sigma=2.0) is head
    with pytest.raises(ValueError, match=r"nested already, with sigma=2\.0"):
        nest_classifier(model, "1.1", sigma=3.0)
    assert list(nested_layers(model)) == ["1.1"]


def test_nested_layers_by_name():
    """Fails when a classifier's own layer is listed twice, or a bare layer is missed."""
    model = nn.ModuleDict({"drop": NestedDropout(4, sigma=1.0), "head": NestedLinear(4, 2, sigma=1.0)})
    found = nested_layers(model)
    assert found == {"drop": model["drop"], "head": model["head"].nested}
    assert list(nested_layers(model["head"])) == [""]


def test_drawn_together():
    """Fails when one generator is shared (the models would take turns), or the seed does not decide."""
    models = [nn.Sequential(NestedLinear(50, 50, sigma=25.0), NestedLinear(50, 2, sigma=25.0)) for _ in range(3)]
    draw_together(*models[:2], seed=0)
    draw_together(models[2], seed=1)
    sequences = [[layer.draw() for _ in range(20) for layer in nested_layers(m).values()] for m in models]
    assert sequences[0] == sequences[1] != sequences[2]
    assert sequences[0][::2] != sequences[0][1::2]  # layers of one model differ


def test_linear_autoencoder_finds_principal_components():
    """Rippel et al.: with nested dropout a linear autoencoder learns PCA in order. Any rotation solves it without."""
    torch.manual_seed(0)
    x = torch.randn(400, 5) * torch.tensor([3.0, 2.0, 1.2, 0.7, 0.3])
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    x = x @ rotation
    encoder, decoder = nn.Linear(5, 4, bias=False), NestedLinear(4, 5, sigma=math.inf)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        F.mse_loss(decoder(encoder(x)), x).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    principal = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    decoded = F.normalize(decoder.weight.detach().T[:3], dim=1)
    cosines = (decoded * principal).sum(1).abs()
    assert (cosines > 0.97).all(), cosines


def test_it_bites():
    """The mechanism: what generalises is in the first channels, and fewer wrong labels are fitted than without."""
    split = digits(400)
    noisy = flip_labels(split.train_y, 0.4, num_classes=10, generator=torch.Generator().manual_seed(0))
    wrong = noisy != split.train_y

    def train(head):
        net = seeded(0, lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), head()))
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(60):
            for rows in torch.randperm(400).split(50):
                F.cross_entropy(net(split.train_x[rows]), noisy[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return net.eval()

    plain = train(lambda: nn.Linear(64, 10, bias=False))
    nested = train(lambda: NestedLinear(64, 10, sigma=8.0))
    nested[4].nested.keep = 8
    with torch.no_grad():
        memorised = [float((net(split.train_x).argmax(1) == noisy)[wrong].float().mean()) for net in (plain, nested)]
        hidden = nested[:4](split.test_x)
        first = (nested(split.test_x).argmax(1) == split.test_y).float().mean()
        last = ((hidden[:, -8:] @ nested[4].weight.T[-8:]).argmax(1) == split.test_y).float().mean()
    assert memorised[1] < memorised[0] - 0.2, memorised
    assert first > last + 0.3
