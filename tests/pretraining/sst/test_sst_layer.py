"""The spectral layer: equal to the dense one, its gradients, its projection, its decomposition, and what it keeps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.pretraining.sst.layer import SpectralLinear, _weight_is_cheaper, factors_of

SHAPES = [(6, 9, 3), (10, 5, 2), (8, 8, 8)]
FEW, MANY = 3, 60  # rows with which products go through the factors, and through the weight


def layer_of(o, i, r, *, dtype=torch.float64, gradient="enhanced", bias=True, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(i, o, bias=bias, dtype=dtype)
    active = torch.randperm(min(o, i))[:r].sort().values
    return plain, SpectralLinear.of(plain, active=active, gradient=gradient)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize(("o", "i", "r"), SHAPES)
def test_conversion_is_exact(o, i, r, rows):
    """Fails when a factor is transposed, a sign fixed in one factor only, or the bias lost."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        plain, layer = layer_of(o, i, r, dtype=dtype)
        x = torch.randn(2, rows, i, dtype=dtype)
        torch.testing.assert_close(layer(x), plain(x), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(layer.merged()(x), plain(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize(("o", "i", "r"), SHAPES)
def test_gradients_against_autograd(o, i, r, rows):
    """Fails when a gradient is of another direction, has the factor Sigma too often, or dx is not the dense one."""
    assert _weight_is_cheaper(MANY, o, i, min(o, i), r)
    assert not _weight_is_cheaper(FEW, o, i, min(o, i), r)
    for gradient in ("enhanced", "default"):
        plain, layer = layer_of(o, i, r, gradient=gradient)
        x, target = torch.randn(rows, i, dtype=torch.float64), torch.randn(rows, o, dtype=torch.float64)
        ours, theirs, dense = (x.clone().requires_grad_() for _ in range(3))
        left, right = layer.left.clone().requires_grad_(), layer.right.clone().requires_grad_()
        values = layer.values.detach().clone().requires_grad_()
        (layer(ours) * target).sum().backward()
        (F.linear(theirs, (left * values[:, None]).T @ right, plain.bias.detach()) * target).sum().backward()
        (plain(dense) * target).sum().backward()
        factor = values.detach()[layer.active][:, None] if gradient == "enhanced" else 1.0
        close = {"atol": 1e-12, "rtol": 1e-12}
        torch.testing.assert_close(layer.active_left.grad * factor, left.grad[layer.active], **close)
        torch.testing.assert_close(layer.active_right.grad * factor, right.grad[layer.active], **close)
        torch.testing.assert_close(layer.values.grad, values.grad, **close)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **close)
        torch.testing.assert_close(ours.grad, dense.grad, **close)


def test_one_step_with_all_directions_in_closed_form():
    """Fails when the layer with r = m takes another step than Sigma, U and V each by its own gradient, projected."""
    plain, layer = layer_of(5, 7, 5, bias=False)
    x, g = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    left, values, right = layer.left.clone(), layer.values.detach().clone(), layer.right.clone()
    grad = g.T @ x
    (layer(x) * g).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.project()
    new_left, new_right = left - 0.1 * (grad @ right.T).T, right - 0.1 * left @ grad
    torch.testing.assert_close(layer.left, F.normalize(new_left, dim=1))
    torch.testing.assert_close(layer.right, F.normalize(new_right, dim=1))
    new_values = (values - 0.1 * ((left @ grad) * right).sum(1)).clamp(min=0)
    torch.testing.assert_close(layer.values.detach(), new_values)
    assert plain.weight.grad is None


def test_projection():
    """Fails when values may stay negative, a column of length zero becomes NaN, or NaN is hidden as an old column."""
    _, layer = layer_of(6, 6, 2)
    before = layer.left[layer.active].clone()
    with torch.no_grad():
        layer.values[0] = -1.0
        layer.active_left[0] = 0.0
        layer.active_right.mul_(3.0)
    layer.project()
    assert layer.values.min() == 0.0
    torch.testing.assert_close(layer.active_left[0], before[0])
    torch.testing.assert_close(layer.right.norm(dim=1), torch.ones(6, dtype=torch.float64))
    with torch.no_grad():
        layer.active_left[1, 0] = float("nan")
    layer.project()
    assert layer.left.isnan().any()


def test_decomposition_keeps_the_weight():
    """Fails when a new decomposition changes outputs, is not orthogonal, or its active vectors are the old ones."""
    _, layer = layer_of(6, 9, 3)
    with torch.no_grad():
        layer.active_left.add_(0.3 * torch.randn_like(layer.active_left))
        layer.values.mul_(torch.rand_like(layer.values))
    layer.project()
    x = torch.randn(5, 9, dtype=torch.float64)
    before = layer(x).detach()
    assert not torch.allclose(layer.left @ layer.left.T, torch.eye(6, dtype=torch.float64), atol=1e-3)
    layer.decompose()
    torch.testing.assert_close(layer(x).detach(), before, atol=1e-12, rtol=1e-12)
    for part, active in ((layer.left, layer.active_left), (layer.right, layer.active_right)):
        torch.testing.assert_close(part @ part.T, torch.eye(6, dtype=torch.float64))
        assert torch.equal(part[layer.active], active.detach())
    assert bool((layer.values.diff() <= 0).all())


def test_signs_are_chosen():
    """Fails when signs are those that the library gives: the largest entry of a left vector is positive."""
    left, _, _ = factors_of(-torch.eye(4) + 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    assert bool((left.gather(1, left.abs().argmax(1, keepdim=True)) > 0).all())


def test_half_precision_is_decomposed_in_float32():
    """Fails when a bfloat16 weight reaches the library (which refuses it), or its factors are of another type."""
    _, layer = layer_of(8, 8, 2, dtype=torch.bfloat16)
    layer.decompose()
    assert {p.dtype for p in (*layer.parameters(), layer.left, layer.right)} == {torch.bfloat16}


def test_active_vectors_count_however_they_were_set():
    """Fails when the layer computes with a stale copy of its parameters: others write into `.data`, or load a state."""
    _, layer = layer_of(6, 6, 2, dtype=torch.float32)
    x = torch.randn(4, 6)
    before = layer(x)
    layer.active_left.data.mul_(2.0)
    assert not torch.allclose(layer(x), before)
    other = copy.deepcopy(layer)
    other.active_left.data.mul_(0.5)
    torch.testing.assert_close(other(x), before)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), before)


def test_called_twice_before_a_backward_pass():
    """Fails when the second call invalidates what the first keeps for its backward pass."""
    plain, layer = layer_of(6, 6, 6, bias=False)
    x, dense = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dense.data.copy_(x)
    layer(layer(x)).sum().backward()
    plain(plain(dense)).sum().backward()
    torch.testing.assert_close(x.grad, dense.grad)


def test_a_graph_of_before_the_step_is_refused():
    """Fails when a backward pass through vectors that an optimizer has moved since gives gradients without a word."""
    _, layer = layer_of(6, 6, 2)
    y = layer(torch.randn(4, 6, dtype=torch.float64)).sum()
    y.backward(retain_graph=True)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_no_weight_is_kept_for_the_backward_pass(rows):
    """Fails when a tensor of the weight's shape, or with as many numbers, is saved."""
    _, layer = layer_of(12, 10, 2)
    kept = []

    def look(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(rows, 10, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        layer(x)
    assert kept
    assert (12, 10) not in kept
    assert (10, 12) not in kept
    assert (rows, 10) in kept
    assert max(len(shape) for shape in kept) == 2


def test_evaluation_is_that_of_the_merged_layer():
    """Fails when validation goes through other products than the layer that is left in the end: equal, bit for bit."""
    _, layer = layer_of(6, 9, 3, dtype=torch.float32)
    layer.eval()
    x = torch.randn(2, 9)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.merged()(x))


def test_low_rank_is_the_best_approximation():
    """Fails when the pruned layer keeps other directions than the largest, or loses the bias."""
    plain, layer = layer_of(6, 9, 3)
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(layer.low_rank(6)(x), plain(x))
    thin = layer.low_rank(2)
    error = torch.linalg.matrix_norm(plain.weight - thin[1].weight @ thin[0].weight)
    torch.testing.assert_close(error, torch.linalg.svdvals(plain.weight)[2:].norm())


def test_autocast():
    """Fails when a product under autocast is in float32, or gradients come back in half precision."""
    _, layer = layer_of(8, 8, 2, dtype=torch.float32)
    for rows in (FEW, MANY):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(rows, 8))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
