import pytest
import torch

from regularized.mechanisms.mixup import Mix, draw_mix, one_hot


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_blend():
    """Fails when share and partner are exchanged."""
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    mix = Mix(0.7, torch.tensor([1, 2, 3, 4, 0]))
    torch.testing.assert_close(mix(x), 0.7 * x + 0.3 * x[mix.partner])


def test_partners_are_a_permutation_so_the_sum_stays():
    """Fails when partners are drawn with replacement: the batch would change its mean."""
    x = torch.randn(64, 3, dtype=torch.float64)
    mix = draw_mix(64, 1.0, generator=stream())
    torch.testing.assert_close(mix(x).sum(0), x.sum(0))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.5])
def test_share_is_beta(alpha):
    """Fails on another distribution: mean 1/2 and variance 1 / (4 (2 alpha + 1)) over 4000 draws, within 5 sigma."""
    generator = stream()
    shares = torch.tensor([draw_mix(1, alpha, generator=generator).share for _ in range(4000)])
    assert abs(shares.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.var() / variance - 1) < 5 * (2 / 4000) ** 0.5


def test_keep_larger_folds_the_share():
    """Fails when a sample can be outweighed by its partner, whose label it does not have."""
    one, two = stream(), stream()
    for _ in range(50):
        share = draw_mix(4, 1.0, generator=one).share
        assert draw_mix(4, 1.0, generator=two, keep_larger=True).share == max(share, 1 - share)


def test_generator_decides_alone():
    """Fails when global random state is read or moved, or a restored generator draws something else."""
    generator = stream(3)
    draw_mix(8, 1.0, generator=generator)
    state, before = generator.get_state(), torch.get_rng_state()
    first = draw_mix(8, 1.0, generator=generator)
    torch.manual_seed(123)
    generator.set_state(state)
    second = draw_mix(8, 1.0, generator=generator)
    assert first.share == second.share
    assert torch.equal(first.partner, second.partner)
    torch.set_rng_state(before)
    draw_mix(8, 1.0, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_alpha_zero_changes_nothing():
    """Fails when switching mixup off still blends, or draws."""
    x, generator = torch.randn(4, 2), stream()
    before = generator.get_state()
    assert torch.equal(draw_mix(4, 0.0, generator=generator)(x), x)
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        draw_mix(4, -1.0, generator=generator)


def test_one_hot_can_be_blended():
    """Fails when labels stay integers, which cannot be blended."""
    rows = Mix(0.75, torch.tensor([1, 0]))(one_hot(torch.tensor([0, 2]), 3))
    assert rows.tolist() == [[0.75, 0.0, 0.25], [0.25, 0.0, 0.75]]
