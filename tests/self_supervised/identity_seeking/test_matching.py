"""Matching against all permutations, and its symmetries."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from regularized.self_supervised.identity_seeking import max_weight_matching


def drawn(n, m, seed=0):
    return 2 * torch.rand(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def weight(similarity, pairs):
    return float(similarity[pairs[:, 0], pairs[:, 1]].sum())


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (5, 5), (6, 4), (7, 7)])
def test_all_permutations(n, m):
    """Fails when another matching weighs more, or a crop is used twice."""
    for seed in range(5):
        similarity = drawn(n, m, seed)
        wide = similarity if n <= m else similarity.T
        best = max(
            itertools.permutations(range(wide.shape[1]), len(wide)),
            key=lambda columns: sum(float(wide[i, j]) for i, j in enumerate(columns)),
        )
        expected = torch.tensor(list(enumerate(best)))
        expected = expected if n <= m else expected.flip(1)
        pairs = max_weight_matching(similarity)
        assert pairs.equal(expected[expected[:, 0].argsort()])


@pytest.mark.parametrize(("n", "m"), [(30, 30), (25, 40), (40, 25)])
def test_the_solver_of_scipy_agrees(n, m):
    """Fails when the plain algorithm loses its way on larger frames, or another solver is misunderstood."""
    similarity = drawn(n, m)
    ours, theirs = (max_weight_matching(similarity, solver=solver) for solver in (None, linear_sum_assignment))
    assert ours.equal(theirs)
    assert len(ours) == min(n, m)


def test_symmetries():
    """Fails when the order of crops, or which frame is which, decides."""
    similarity = drawn(5, 6)
    pairs = max_weight_matching(similarity)
    flipped = max_weight_matching(similarity.T).flip(1)
    assert flipped[flipped[:, 0].argsort()].equal(pairs)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = max_weight_matching(similarity[order])
    back = torch.stack([order[moved[:, 0]], moved[:, 1]], dim=1)
    assert back[back[:, 0].argsort()].equal(pairs)
    assert max_weight_matching(torch.eye(4)).equal(torch.arange(4)[:, None].expand(4, 2))


def test_unlike_pairs_can_be_left_out():
    """Fails when a threshold drops pairs behind the matching in place of changing it."""
    similarity = torch.tensor([[0.9, 0.8], [0.7, -0.5]])
    assert max_weight_matching(similarity).tolist() == [[0, 1], [1, 0]]  # 1.5 together, 0.4 the other way
    assert max_weight_matching(torch.tensor([[0.9, 0.1], [0.1, -0.5]]), min_similarity=0.0).tolist() == [[0, 0]]
    assert max_weight_matching(-torch.ones(2, 2), min_similarity=0.0).shape == (0, 2)


def test_empty_frames():
    """Fails when a frame without crops breaks the search."""
    assert max_weight_matching(torch.zeros(0, 3)).shape == (0, 2)


def test_no_gradient():
    """Fails when features are pulled through the matching."""
    assert not max_weight_matching(drawn(3, 3).requires_grad_()).requires_grad
