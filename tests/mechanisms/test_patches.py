"""Patches of images, and tokens that are hidden."""

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.mechanisms.patches import (
    Split,
    hide_highest,
    join,
    join_vectors,
    patch_grid,
    patch_vectors,
    patchify,
    random_split,
    split_of,
    take,
)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_are_those_of_two_loops(size):
    """Fails when rows and columns change places, on a grid that is not square, or a channel is not the fastest."""
    images = torch.randn(2, 3, 6, 12)
    rows, columns = patch_grid(6, 12, size)
    patches, vectors = patchify(images, size), patch_vectors(images, size)
    assert patches.is_contiguous()
    for i in range(rows):
        for j in range(columns):
            part = images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert torch.equal(patches[:, i * columns + j], part)
            assert torch.equal(vectors[:, i * columns + j], part.permute(0, 2, 3, 1).flatten(1))


def test_what_was_cut_is_joined():
    """Fails when joining is not the inverse of cutting, in values or in gradients."""
    images = torch.randn(2, 3, 6, 12, requires_grad=True)
    for whole in (join(patchify(images, 3), (2, 4)), join_vectors(patch_vectors(images, 3), (2, 4), channels=3)):
        assert torch.equal(whole, images)
        (gradient,) = torch.autograd.grad(whole.square().sum(), images)
        torch.testing.assert_close(gradient, 2 * images.detach())
    channels_last = images.detach().to(memory_format=torch.channels_last)
    assert torch.equal(patchify(channels_last, 3), patchify(images.detach(), 3))


def test_a_random_split_is_a_partition_with_equal_frequencies():
    """Fails when a token is lost or hidden more often than another, or the two parts are not in raster order."""
    split = random_split(4000, 9, hidden=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(split, dim=1).sort(dim=1).values, torch.arange(9).expand(4000, 9))
    assert all(bool((part.diff(dim=1) > 0).all()) for part in split)
    often = split.mask.double().mean(dim=0)
    torch.testing.assert_close(often, torch.full_like(often, 5 / 9), rtol=0, atol=0.04)  # five standard deviations
    pair = (split.mask[:, 0] & split.mask[:, 1]).double().mean()
    torch.testing.assert_close(pair, torch.tensor(5 / 9 * 4 / 8, dtype=torch.float64), rtol=0, atol=0.04)


def test_a_split_is_a_function_of_its_generator():
    """Fails when the global random state is read or moved although a generator was given."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (random_split(3, 8, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(before, torch.get_rng_state())


def test_the_highest_are_hidden_exactly_as_many():
    """Fails when ties change how many tokens are hidden, or the ends (none, all) break."""
    assert hide_highest(torch.zeros(3, 7), 4).hidden.shape == (3, 4)
    priority = torch.tensor([[3.0, 1.0, torch.inf, -torch.inf, 2.0]])
    assert hide_highest(priority, 3).hidden.tolist() == [[0, 2, 4]]
    assert hide_highest(priority, 0).visible.tolist() == [[0, 1, 2, 3, 4]]
    assert hide_highest(priority, 5).visible.shape == (1, 0)


def test_a_mask_and_its_split_say_the_same():
    """Fails when True means visible in one place and hidden in the other."""
    split = random_split(6, 10, 7, generator=torch.Generator().manual_seed(2))
    again = split_of(split.mask)
    assert torch.equal(again.visible, split.visible)
    assert torch.equal(again.hidden, split.hidden)
    assert bool(take(split.mask, split.hidden).all())
    assert not bool(take(split.mask, split.visible).any())


def test_what_is_taken_carries_its_gradient_back():
    """Fails when a gradient lands on another token, or shared tokens do not sum theirs."""
    index = torch.tensor([[2, 0], [1, 1]])
    tokens = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert torch.equal(take(tokens, index)[1, 0], tokens[1, 1])
    shared = torch.randn(1, 3, 4, requires_grad=True)
    take(shared, index).sum().backward()
    assert shared.grad[0, :, 0].tolist() == [1.0, 2.0, 1.0]


def bad_inputs():
    """What cannot be cut, joined, hidden or taken."""
    return [
        refused("side", lambda: patchify(torch.zeros(1, 3, 8, 9), 4), ValueError, ("8 x 9", "4 x 4", "multiples of 4")),
        refused("no batch", lambda: patchify(torch.zeros(3, 8, 8), 4), ValueError, ("(B, C, H, W)", "(3, 8, 8)")),
        refused("patch of 0", lambda: patch_grid(8, 8, 0), ValueError, ("size", "at least 1")),
        refused("grid", lambda: join(torch.zeros(1, 6, 1, 2, 2), (2, 2)), ValueError, ("2 x 2", "4 patches")),
        refused(
            "vector", lambda: join_vectors(torch.zeros(1, 4, 7), (2, 2), channels=3), ValueError, ("length 7", "square")
        ),
        refused("too many", lambda: random_split(2, 4, 5), ValueError, ("hidden", "[0, 4]", "5")),
        refused("priority", lambda: hide_highest(torch.zeros(4), 2), ValueError, ("(B, N)", "(4,)")),
        refused(
            "rows differ",
            lambda: split_of(torch.tensor([[True, False], [True, True]])),
            ValueError,
            ("row 0 hides 1", "row 1 hides 2"),
        ),
        refused("not bool", lambda: split_of(torch.zeros(2, 3)), ValueError, ("bool", "float32")),
        refused("index", lambda: take(torch.zeros(2, 3), torch.zeros(3, 1).long()), ValueError, ("(3, 1)", "(2, 3)")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_a_split_is_a_pair():
    """Fails when the order of the two tables changes: callers unpack it."""
    visible, hidden = Split(torch.zeros(1, 1), torch.ones(1, 1))
    assert (float(visible), float(hidden)) == (0.0, 1.0)
