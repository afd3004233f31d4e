"""The Fréchet distance between sets of features."""

import pytest
import torch
from tests.bad_input import assert_refused, refused

pytest.importorskip("torchmetrics", reason='the extra "lightning" brings torchmetrics')

from regularized.unlearning.frechet import frechet_distance


def gaussians(seed, shift=0.0, count=200, width=5):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + shift


def test_equals_a_second_derivation():
    """Fails when covariances are divided by n, the means or the root are left out, or features lose precision.

    Second derivation: the trace of the root from the symmetric matrix S^(1/2) S' S^(1/2).
    """
    one, other = gaussians(0), gaussians(1, shift=0.7, count=300)
    values, vectors = torch.linalg.eigh(one.T.cov())
    root = vectors * values.sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other.T.cov() @ root).clamp_min(0.0).sqrt().sum()
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    expected = means + one.T.cov().trace() + other.T.cov().trace() - 2.0 * cross
    torch.testing.assert_close(frechet_distance(one, other), expected, rtol=1e-9, atol=1e-9)


def test_symmetric_and_blind_to_order():
    """Fails when real and generated are treated differently, or samples are compared one by one."""
    one, other = gaussians(0), gaussians(1)
    torch.testing.assert_close(frechet_distance(one, other), frechet_distance(other, one))
    torch.testing.assert_close(frechet_distance(one, other.flip(0)), frechet_distance(one, other))
    assert abs(frechet_distance(one, one.flip(0)).item()) < 1e-9


def test_constant_features():
    """Fails when features that never vary, such as dead units, give NaN or a complex number."""
    one, other = gaussians(0), gaussians(1)
    one[:, 2] = other[:, 2] = 0.0
    assert frechet_distance(one.float(), other.float()).isfinite()


ROWS = [
    refused(
        "images",
        lambda: frechet_distance(torch.zeros(4, 1, 2, 2), torch.zeros(4, 4)),
        ValueError,
        ("real", "(4, 1, 2, 2)", "flatten"),
    ),
    refused(
        "one sample",
        lambda: frechet_distance(torch.zeros(4, 2), torch.zeros(1, 2)),
        ValueError,
        ("generated", "at least two"),
    ),
    refused(
        "other widths",
        lambda: frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3)),
        ValueError,
        ("2 and 3", "same network"),
    ),
    refused(
        "NaN",
        lambda: frechet_distance(torch.full((4, 2), float("nan")), torch.zeros(4, 2)),
        ValueError,
        ("real features are not finite",),
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)
