"""Lower problems of denoising: constants against dense Hessians, noise and its measure; a learned weight helps."""

import pytest
import torch
from torch.autograd.functional import hessian

from regularized.evidence.datasets import kodak, photographs
from regularized.evidence.experiment import Unavailable
from regularized.scientific.inexact_bilevel.denoising import (
    FieldsOfExperts,
    SquaredError,
    TotalVariation,
    add_noise,
    psnr,
)
from regularized.scientific.inexact_bilevel.lower_solvers import solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID


def images(n: int = 2, size: int = 5, seed: int = 0):
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvatures(lower, x, theta):
    n = x.numel()
    return torch.linalg.eigvalsh(hessian(lambda flat: lower(flat.view_as(x), theta), x.reshape(-1)).view(n, n))


def test_total_variation_by_hand():
    """Fails when a difference, the half, or the division by the number of images is missing."""
    lower = TotalVariation(torch.zeros(1, 2, 2, dtype=torch.float64))
    x = torch.tensor([[[0.0, 3.0], [4.0, 0.0]]], dtype=torch.float64)
    theta = torch.tensor([2.0, 0.0], dtype=torch.float64).log()  # weight 2, smoothing so small that sizes remain
    theta[1] = -30.0
    assert float(lower(x, theta)) == pytest.approx(0.5 * 25 + 0.5 * 2.0 * (4 + 3 + 3 + 4))
    two = TotalVariation(torch.zeros(2, 2, 2, dtype=torch.float64))
    assert float(two(x.expand(2, 2, 2), theta)) == pytest.approx(float(lower(x, theta)))
    flat = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    theta = torch.tensor([0.0, -1.0], dtype=torch.float64)
    assert float(lower(flat, theta)) == pytest.approx(0.5 + 0.5 * 4 * torch.tensor(-1.0).double().exp())


@pytest.mark.parametrize("kind", ["tv", "foe"])
def test_constants_bound_the_curvature(kind):
    """Fails with the official code's sqrt(8), a forgotten weight, or mu without the number of images."""
    x = images()
    if kind == "tv":
        lower = TotalVariation(x)
        theta = torch.tensor([1.0, -3.0], dtype=torch.float64)
    else:
        lower = FieldsOfExperts(x)
        theta = lower.start(filters=3, size=3, generator=torch.Generator().manual_seed(1))
        theta["weights"] = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        theta["scale"] = torch.tensor(0.3, dtype=torch.float64)
    assert lower.mu == 0.5
    for point in (x, torch.full_like(x, 0.3)):  # flat images have the largest curvature
        found = curvatures(lower, point, theta)
        assert float(found[0]) >= lower.mu * (1 - 1e-9)
        assert float(found[-1]) <= float(lower.L(theta))
    assert float(found[-1]) >= 0.5 * float(lower.L(theta))  # and the bound is no waste
    assert float(curvatures(SquaredErrorOf(x), x, None)[-1]) == pytest.approx(SquaredError(x).lipschitz)


class SquaredErrorOf:
    def __init__(self, clean):
        self.loss = SquaredError(clean)

    def __call__(self, x, theta):
        return self.loss(x)


def test_experts_by_hand():
    """Fails when a weight, a smoothing or the scale enters with another function."""
    x = images(1, 4)
    lower = FieldsOfExperts(torch.zeros_like(x))
    theta = lower.start(filters=2, size=3, generator=torch.Generator().manual_seed(2))
    assert theta["filters"].sum(dim=(-2, -1)).abs().max() < 1e-12
    expected = 0.5 * x.square().sum()
    for i in range(2):
        for row in range(2):
            for column in range(2):
                response = (theta["filters"][i, 0] * x[0, row : row + 3, column : column + 3]).sum()
                size = (response**2 + (2 * theta["smoothing"][i]).exp()).sqrt()
                expected = expected + 0.5 * (theta["scale"] + theta["weights"][i]).exp() * size
    torch.testing.assert_close(lower(x, theta), expected)


def test_noise_and_its_measure():
    """Fails when the logarithm has another base or factor: noise of 0.1 is 20 dB."""
    clean = torch.full((3, 100, 100), 0.5, dtype=torch.float64)
    noisy = add_noise(clean, 0.1, generator=torch.Generator().manual_seed(0))
    assert psnr(noisy, clean).shape == (3,)
    assert float(psnr(noisy, clean).mean()) == pytest.approx(20.0, abs=0.1)
    assert float(psnr(clean + 5.0, clean)[0]) == pytest.approx(6.0206, abs=1e-4)  # clipped: errors of 0.5


def test_learning_denoises():
    """Fails when the hypergradient has another sign: from hardly any smoothing, the learned one gains 3 dB."""
    clean = (images(2, 4).round()).repeat_interleave(4, 1).repeat_interleave(4, 2)
    lower = TotalVariation(add_noise(clean, 0.1, generator=torch.Generator().manual_seed(1)))
    opt = MAID(lower, SquaredError(clean), lower.start(), lower.noisy, mu=lower.mu, L=lower.L, step=1.0)
    log = opt.run(20)
    assert log[-1].loss < 0.6 * log[0].loss
    theta = opt.theta
    x = solve_lower(lower, lower.noisy, theta, mu=lower.mu, L=float(lower.L(theta)), eps=1e-2).x
    assert float(psnr(x, clean).mean()) > float(psnr(lower.noisy, clean).mean()) + 3.0


def test_data(tmp_path, monkeypatch):
    """Fails when photographs are not grey, or a missing set is no Unavailable."""
    assert all(0.0 <= float(photo.min()) < float(photo.max()) <= 1.0 for photo in photographs())
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match="kodim01"):
        kodak()
    from PIL import Image

    (tmp_path / "kodak").mkdir()
    for number in (1, 2):
        Image.new("RGB", (30, 20), (255 * (number - 1),) * 3).save(tmp_path / "kodak" / f"kodim0{number}.png")
    assert kodak(8).mean(dim=(1, 2)).tolist() == [0.0, 1.0]
