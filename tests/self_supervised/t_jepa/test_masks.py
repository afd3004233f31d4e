"""Which columns are seen and which are predicted."""

import pytest
import torch

from regularized.self_supervised.t_jepa import MaskSizes, draw_masks


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def one(row):
    """The entries of a row, each once."""
    return set(row.tolist())


@pytest.mark.parametrize("num_targets", [1, 4])
def test_context_and_targets_never_share_a_column(num_targets):
    """Fails when a target is drawn from all columns instead of those that are left, or holds one twice."""
    context, targets = draw_masks(200, 9, (3, 4), num_targets=num_targets, generator=draws())
    assert context.shape == (200, 3)
    assert targets.shape == (num_targets, 200, 4)
    for row in range(200):
        seen = one(context[row])
        assert len(seen) == 3
        for k in range(num_targets):
            asked = one(targets[k, row])
            assert len(asked) == 4
            assert not seen & asked
            assert seen | asked <= set(range(9))


def test_targets_of_a_row_overlap_as_independent_sets_do():
    """Fails when the targets are one set, as in the official collator, or a partition: n_t^2 / (D - n_c) are shared."""
    _, targets = draw_masks(4000, 12, (2, 4), num_targets=3, generator=draws())
    for a, b in ((0, 1), (0, 2), (1, 2)):
        shared = (targets[a][:, :, None] == targets[b][:, None, :]).sum(dim=(1, 2)).double()
        # 1.6 expected; a row's number of shared columns has a deviation below 1, so the mean's is below 0.016.
        assert abs(shared.mean().item() - 16 / 10) < 0.08


def test_repeated_targets_are_those_of_the_released_runs():
    """Fails when the flag of the released runs still draws several sets."""
    _, targets = draw_masks(50, 9, (3, 4), num_targets=4, generator=draws(), repeat_targets=True)
    assert all(torch.equal(targets[0], other) for other in targets[1:])


def test_every_column_is_drawn_equally_often():
    """Fails when some columns are preferred, as by sorting ties or a noise that is too coarse."""
    context, targets = draw_masks(6000, 6, (2, 2), num_targets=2, generator=draws())
    for drawn in (context, targets[0], targets[1]):
        shares = torch.bincount(drawn.flatten(), minlength=6) / 6000
        assert (shares - 2 / 6).abs().max() < 0.04  # six standard deviations


def test_sizes_reach_both_ends_and_fit_into_a_row():
    """Fails when the largest size is never drawn, or context and target exceed the row."""
    sizes, generator = MaskSizes(10, 2, 6, 3, 7), draws()
    drawn = [sizes.draw(generator) for _ in range(400)]
    assert {context for context, _ in drawn} == {2, 3, 4, 5, 6}
    assert {target for _, target in drawn} == {3, 4, 5, 6, 7}
    assert max(context + target for context, target in drawn) == 10


@pytest.mark.parametrize("columns", range(2, 40))
def test_sizes_of_any_table_can_be_drawn(columns):
    """Fails when a narrow table has no sizes, or loops for ever in looking for some."""
    context, target = MaskSizes.any_table(columns).draw(draws())
    assert 1 <= context < columns
    assert 1 <= target <= columns - context
