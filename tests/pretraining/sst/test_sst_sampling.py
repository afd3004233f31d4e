"""The draws: probabilities, distinctness, distribution, and that they depend on the seed alone."""

import pytest
import torch

from regularized.pretraining.sst.sampling import draw_directions, sampling_probabilities


def test_probabilities():
    """Fails when the mixture has other halves, does not sum to 1, or divides by a sum of zero."""
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    p = sampling_probabilities(values)
    torch.testing.assert_close(p, 0.5 * (0.2 + values / 10))
    assert p.min() >= 1 / 10
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    torch.testing.assert_close(sampling_probabilities(torch.full((7,), 0.3)), torch.full((7,), 1 / 7))
    torch.testing.assert_close(sampling_probabilities(torch.zeros(4)), torch.full((4,), 0.25))
    torch.testing.assert_close(sampling_probabilities(values, sampling="proportional"), values / 10)


@pytest.mark.parametrize("sampling", ["mixed", "proportional", "largest"])
def test_distinct_and_ascending(sampling):
    """Fails when a direction is drawn twice, or r = m leaves one out."""
    values = torch.rand(9, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        drawn = draw_directions(values, 4, sampling=sampling, seed=(seed,))
        assert len(set(drawn.tolist())) == 4
        assert bool((drawn.diff() > 0).all())
    assert draw_directions(values, 9, sampling=sampling).tolist() == list(range(9))


def test_frequencies():
    """Fails when single draws do not follow p (chi-square), or pairs are not successive draws without replacement."""
    values = torch.tensor([3.0, 1.0, 0.5, 0.5])
    p = sampling_probabilities(values).double()
    n = 2500
    single, pairs = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(n):
        single[draw_directions(values, 1, seed=(seed,))] += 1
        a, b = draw_directions(values, 2, seed=(1, seed))
        pairs[a, b] += 1
    assert float(((single - n * p) ** 2 / (n * p)).sum()) < 16.3  # 0.999 quantile of chi-square with 3 degrees
    both = p[:, None] * p[None, :] / (1 - p)[:, None]
    expected = n * (both + both.T).triu(1)[torch.ones(4, 4, dtype=torch.bool).triu(1)]
    seen = pairs[torch.ones(4, 4, dtype=torch.bool).triu(1)]
    assert float(((seen - expected) ** 2 / expected).sum()) < 20.6  # 5 degrees


def test_a_draw_is_a_function_of_its_seed():
    """Fails when a draw takes from, or leaves a trace in, the global random state."""
    values = torch.ones(50)
    torch.manual_seed(0)
    first = draw_directions(values, 5, seed=(3, 4))
    state = torch.get_rng_state()
    assert torch.equal(first, draw_directions(values, 5, seed=(3, 4)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, draw_directions(values, 5, seed=(4, 3)))
