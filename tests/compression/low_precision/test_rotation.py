"""Hadamard rotations: orthogonal, invisible to a product, and good against outliers."""

import pytest
import torch

from regularized.compression.low_precision.blocks import Scaled
from regularized.compression.low_precision.hadamard import hadamard, random_signs


@pytest.mark.parametrize("block", [1, 2, 16, 64, 256, 512, 1024])
def test_it_is_orthogonal_and_its_own_inverse(block: int) -> None:
    """Fails on a missing 1 / sqrt(n), and on the two-step transform of large blocks taken in the wrong order."""
    x = torch.randn(3, 1024, dtype=torch.float64)
    turned = hadamard(x, block=block)
    torch.testing.assert_close(hadamard(turned, block=block), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    matrix = hadamard(torch.eye(block, dtype=torch.float64), block=block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_product_does_not_notice(axis: int) -> None:
    """(x D H)(D H w) = x w, the axis padded where it must be. Fails on signs behind H in one operand only."""
    x, w = torch.randn(5, 100, dtype=torch.float64), torch.randn(100, 7, dtype=torch.float64)
    signs = random_signs(16, torch.Generator().manual_seed(0))
    if axis == 1:
        got = hadamard(x, block=16, signs=signs) @ hadamard(w, block=16, axis=0, signs=signs)
    else:
        got = hadamard(x.T.contiguous(), block=16, axis=0, signs=signs).T @ hadamard(w, block=16, axis=0, signs=signs)
    torch.testing.assert_close(got, x @ w, rtol=1e-12, atol=1e-12)


def test_signs_come_before_the_transform() -> None:
    """Behind it they would only turn signs. Fails on x H D, which spreads no outlier that x H does not."""
    x = torch.ones(1, 16)
    signs = random_signs(16, torch.Generator().manual_seed(0))
    assert hadamard(x, block=16).abs().max() == 4.0  # the worst case: all in one entry
    assert hadamard(x, block=16, signs=signs).abs().max() < 4.0


def test_an_outlier_costs_less() -> None:
    """Fails when the rotation does not reach the rounding."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50.0
    form = Scaled("int4", "row")

    def error(turned: bool) -> float:
        z = hadamard(x, block=64) if turned else x
        quantized = form.quantize(z)
        back = hadamard(quantized, block=64) if turned else quantized
        others = [i for i in range(64) if i != 3]
        return float((back - x)[:, others].square().mean() / x[:, others].square().mean())

    assert error(True) < 0.5 * error(False)
