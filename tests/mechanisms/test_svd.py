"""Thin decompositions of weights."""

import pytest
import torch
from torch import nn

from regularized.mechanisms.svd import thin_svd, weight_like, weight_matrix


class Conv1D(nn.Module):
    """The form of transformers' layer: the weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5), nn.Conv2d(2, 4, 3)])
def test_the_matrix_is_what_the_layer_multiplies_with(layer):
    """Fails when a stored layout is transposed or reshaped in another order than the layer uses it."""
    matrix = weight_matrix(layer)
    assert torch.equal(weight_like(layer, matrix), layer.weight)
    if isinstance(layer, nn.Conv2d):
        x = torch.randn(1, 2, 3, 3)
        assert torch.allclose(layer(x).flatten() - layer.bias, matrix @ x.flatten(), atol=1e-5)
    else:
        assert matrix.shape == (3, 5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_best_approximation(shape, rank):
    """Fails when triplets are cut off at the wrong end, or left and right are mixed up."""
    matrix = torch.randn(*shape, dtype=torch.float64)
    left, values, right = thin_svd(matrix, rank=rank)
    assert left.dtype == torch.float64
    rest = torch.linalg.matrix_norm(matrix - (left * values) @ right)
    others = torch.linalg.svdvals(matrix)[rank or min(shape) :]
    torch.testing.assert_close(rest, others.norm(), atol=1e-12, rtol=1e-9)


def test_low_precision_is_cast_up():
    """Fails when a bfloat16 weight reaches the decomposition (an error on CPUs), or factors are rounded to it."""
    left, _, _ = thin_svd(torch.randn(8, 6).bfloat16())
    assert left.dtype == torch.float32
    torch.testing.assert_close(left.T @ left, torch.eye(6), atol=1e-5, rtol=0)


def test_randomised_one_finds_a_falling_spectrum_and_leaves_the_random_state():
    """Fails when power iterations are not orthonormalised, or the global generator is used."""
    u, v = torch.linalg.qr(torch.randn(60, 60)).Q, torch.linalg.qr(torch.randn(40, 40)).Q
    matrix = (u[:, :40] * 0.5 ** torch.arange(40)) @ v
    state = torch.get_rng_state()
    near = thin_svd(matrix, rank=5, niter=4)
    assert torch.equal(state, torch.get_rng_state())
    error = torch.linalg.matrix_norm(matrix - (near.left * near.values) @ near.right)
    assert error < 1.001 * torch.linalg.svdvals(matrix)[5:].norm()
    torch.testing.assert_close(near.left.T @ near.left, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(near.right, thin_svd(matrix, rank=5, niter=4).right)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: thin_svd(torch.ones(3, 4), rank=4, name="q_proj"), ValueError, ("q_proj", "[1, 3]", "got 4")),
        (lambda: thin_svd(torch.ones(3, 4), rank=0), ValueError, ("[1, 3]", "got 0")),
        (lambda: thin_svd(torch.ones(3)), ValueError, ("matrix", "(3,)")),
        (lambda: thin_svd(torch.tensor([[1.0, torch.nan]]), name="q_proj"), ValueError, ("q_proj", "NaN")),
        (lambda: thin_svd(torch.ones(3, 4), rank=1, niter=-1), ValueError, ("niter", "-1")),
        (lambda: weight_matrix(nn.Embedding(3, 4), "embed"), TypeError, ("embed", "Embedding", "nn.Linear")),
        (lambda: weight_matrix(nn.Conv2d(4, 4, 3, groups=2)), ValueError, ("groups=2",)),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_quantized_weight_is_refused():
    """Fails when integers of a quantized layer are decomposed as if they were the weight."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"q_proj.*quantized.*int8.*dequantize"):
        weight_matrix(layer, "q_proj")
