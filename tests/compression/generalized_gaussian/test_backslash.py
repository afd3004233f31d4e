"""BackSlash: the rate and its derivative, the decoupled step, and the two terms."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from regularized.compression.generalized_gaussian import (
    BackSlash,
    DecoupledBackSlash,
    Shrinker,
    rate,
    shrink_,
    weight_moments,
)
from regularized.evidence.models import mlp
from regularized.training import CrossEntropy, TensorData, Trainer
from regularized.training.progress import Progress, piecewise
from regularized.training.step import Batch, Step


def weights(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 4), (7,), (2, 3, 2))
    return [(0.3 * torch.randn(s, generator=generator, dtype=dtype)).requires_grad_() for s in shapes]


def by_hand(tensors, shape, eps):
    together = torch.cat([w.flatten() for w in tensors])
    return ((together.abs() + eps) ** shape).mean()


@pytest.mark.parametrize("shape", [None, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_rate_and_gradient_against_autograd(shape, eps):
    """Fails for a wrong formula, and when the derivative goes through the estimate of the shape."""
    ours = weights()
    nu = float(weight_moments(ours).shape) if shape is None else shape
    value, expected = rate(ours, shape=shape, eps=eps), by_hand(ours, nu, eps)
    assert torch.allclose(value, expected, rtol=1e-12)
    found, theirs = (torch.autograd.grad(v, ours) for v in (3.0 * value, 3.0 * expected))
    for a, b in zip(found, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_memory_formats():
    """Fails when weights that do not lie in the usual order are paired with those of another place."""
    w = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = w.clone(memory_format=torch.channels_last).requires_grad_()
    (found,) = torch.autograd.grad(rate([last], shape=0.5), last)
    first = w.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(rate([first], shape=0.5), first)
    assert torch.allclose(found, theirs, rtol=1e-12)


def test_zero_is_left_alone():
    """Fails when a weight of exactly zero is pushed, or a force without bound gives NaN there."""
    for shape in (0.3, 1.0, 2.0):
        w = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(rate([w], shape=shape, eps=0.0), w)
        assert gradient[0] == 0.0
        assert bool(torch.isfinite(gradient).all())
        moved = w.detach().clone()
        shrink_([moved], 0.1, shape=shape, eps=0.0)
        assert moved[0] == 0.0


def test_gradient_has_the_type_of_its_weight():
    """Fails when half-precision weights get float32 gradients, or lose their small values beside eps."""
    half = [w.detach().bfloat16().requires_grad_() for w in weights()]
    exact = [w.detach().float().requires_grad_() for w in half]
    gradients = torch.autograd.grad(rate(half, shape=0.5), half)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3
    for a, b in zip(gradients, torch.autograd.grad(by_hand(exact, 0.5, 1e-3), exact), strict=True):
        assert torch.allclose(a.float(), b, rtol=0.01)


def test_tied_weights_count_once():
    """Fails when a weight that two layers share is paid for, or shrunk, twice."""
    w = weights()
    assert torch.equal(rate([*w, w[0]]), rate(w))
    once, twice = ([t.detach().clone() for t in w] for _ in range(2))
    shrink_(once, 0.1)
    shrink_([*twice, twice[0]], 0.1)
    assert torch.equal(once[0], twice[0])


def test_shape_one_is_soft_shrinkage():
    """Fails when with nu = 1 the step is not strength / N for every weight, whatever eps."""
    for eps in (0.0, 1.0):
        w = [t.detach() for t in weights()]
        before = [t.clone() for t in w]
        shrink_(w, 0.39, shape=1.0, eps=eps)
        for a, b in zip(w, before, strict=True):
            assert torch.allclose(a, b - 0.01 * b.sign(), rtol=1e-12, atol=1e-15)


def test_shape_two_is_weight_decay():
    """Fails when with nu = 2 and eps = 0 the step is not a multiplication by 1 - 2 strength / N."""
    w = [t.detach() for t in weights()]
    before = [t.clone() for t in w]
    shrink_(w, 0.39, shape=2.0, eps=0.0)
    for a, b in zip(w, before, strict=True):
        assert torch.allclose(a, b * (1 - 2 * 0.01), rtol=1e-12, atol=1e-15)


def test_strength_zero_changes_no_bit():
    """Fails when a step of strength 0 rounds, or turns -0 into 0."""
    w = [torch.tensor([-0.0, 1e-30, 3.0])]
    moments = shrink_(w, 0.0)
    assert w[0].view(torch.int32).tolist() == torch.tensor([-0.0, 1e-30, 3.0]).view(torch.int32).tolist()
    assert float(moments.std) == pytest.approx(3.0 / 3**0.5)


def test_the_step_is_the_gradient():
    """Fails when the decoupled step is another than plain gradient descent of rate 1 on the rate."""
    w = weights()
    gradients = torch.autograd.grad(2.0 * rate(w, eps=1.0), w)
    moved = [t.detach().clone() for t in w]
    shrink_(moved, 2.0)
    for a, b, g in zip(moved, w, gradients, strict=True):
        assert torch.allclose(a, b.detach() - g, rtol=1e-12, atol=1e-15)


def test_a_gradient_is_taken_once():
    """Fails when a second backward pass through one graph silently gives gradients that were scaled twice."""
    w = weights()
    value = rate(w)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def trained(terms, seed=0, epochs=2):
    torch.manual_seed(seed)
    model = mlp([6, 12, 4])
    x = torch.randn(64, 6)
    data = TensorData(x, x[:, :4].argmax(1), batch_size=16)
    Trainer(model, terms={"task": CrossEntropy(), **terms}, optimizer=partial(torch.optim.SGD, lr=0.1)).fit(
        data, epochs=epochs
    )
    return model


def test_term_is_the_rate_in_the_loss():
    """Fails when the term's coefficient is divided by something, or samples enter it."""
    torch.manual_seed(0)
    model = mlp([6, 12, 4])
    x = torch.randn(64, 6)
    y = x[:, :4].argmax(1)
    order = TensorData(x, y, batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        for batch in order.batches(epoch):
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets) + 2.0 * rate(model.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    theirs = trained({"rate": BackSlash(weight=2.0)})
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_term_shrinks_after_the_step():
    """Fails when the decoupled term shrinks before the optimizer, twice, or not at all."""
    torch.manual_seed(0)
    model = mlp([6, 12, 4])
    x = torch.randn(64, 6)
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrinker = Shrinker(model.parameters(), 0.2)
    for epoch in range(2):
        for batch in TensorData(x, y, batch_size=16).batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            shrinker.step()
    theirs = trained({"rate": DecoupledBackSlash(strength=0.2)})
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", ["loss", "step"])
def test_last_epochs_can_be_plain(kind):
    """Fails when a schedule that has ended goes on to shrink."""
    off, late = piecewise({0.0: 0.0}), piecewise({0.0: 0.5, 0.5: 0.0}, initial=0.5)

    def term(schedule):
        return BackSlash(weight=schedule) if kind == "loss" else DecoupledBackSlash(strength=schedule)

    plain, never, first_half = trained({}), trained({"rate": term(off)}), trained({"rate": term(late)})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), never.parameters(), strict=True))
    sizes = [sum(p.detach().abs().sum().item() for p in m.parameters()) for m in (plain, first_half)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("kind", ["loss", "step"])
def test_chosen_parameters_alone(kind):
    """Fails when parameters that are not named are pulled at, or those that are named are not."""

    def after_one_step(names):
        torch.manual_seed(0)
        model = mlp([6, 12, 4])
        x = torch.randn(16, 6)
        term = (
            BackSlash(weight=1.0, parameters=names)
            if kind == "loss"
            else DecoupledBackSlash(strength=0.1, parameters=names)
        )
        data = TensorData(x, x[:, :4].argmax(1), batch_size=16)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        Trainer(model, terms={"task": CrossEntropy(), "rate": term}, optimizer=optimizer).fit(data, epochs=1)
        return model

    first, second = after_one_step(["0.weight"]), after_one_step(["2.weight"])
    both = after_one_step(["0.weight", "2.weight"])
    assert torch.equal(first[0].bias, both[0].bias)
    assert not torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[2].weight, second[2].weight)


def test_a_copy_belongs_to_no_model():
    """Fails when a copied term shrinks the weights of the first one's model."""
    term = DecoupledBackSlash(strength=1e-3)
    model = mlp([6, 4])
    term.attach(model)
    step = Step(model, Batch.of(torch.zeros(2, 6)), Progress(0, 1))
    term.after_step(step)
    with pytest.raises(RuntimeError, match="belongs to no model yet"):
        copy.deepcopy(term).after_step(step)


def test_rate_falls():
    """Fails when the penalty pulls the wrong way."""
    plain, ours = trained({}, epochs=10), trained({"rate": BackSlash(weight=30.0)}, epochs=10)
    small, large = (rate(m.parameters(), shape=1.0).item() for m in (ours, plain))
    assert small < 0.8 * large
