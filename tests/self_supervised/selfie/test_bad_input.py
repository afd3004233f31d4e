"""Bad inputs of `selfie`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.papers.selfie.contract import small_selfie, small_trunk
from regularized.self_supervised.selfie import AttentionPool, Selfie, load_trunk, selection_logits


def _selfie(**settings):
    known = {"dim": 8, "patch_size": 4, "grid": (3, 4), "pool": nn.Identity()}
    return Selfie(small_trunk(), **{**known, **settings})


def _images(height=12, width=16):
    return torch.randn(2, 2, height, width)


def _other_trunk():
    return nn.Sequential(nn.Conv2d(2, 9, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def _tiny_patches():
    Selfie(small_trunk(), dim=8, patch_size=2, grid=(6, 8), pool=AttentionPool(8, heads=2))(_images())


def _twins():
    small_selfie()(torch.zeros(2, 2, 12, 16))


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        refused("side", lambda: _selfie()(_images(13)), ValueError, ("13 x 16", "4 x 4", "multiples of 4")),
        refused("one target", lambda: _selfie(num_targets=1), ValueError, ("num_targets", "at least 2", "choose")),
        refused("no context", lambda: _selfie(num_targets=12), ValueError, ("11", "no context", "12 of 12")),
        refused("few patches", lambda: _selfie(grid=(2, 2)), ValueError, ("num_targets", "1 of 4 patches")),
        refused("another width", lambda: _selfie(dim=9)(_images()), ValueError, ("(n, 9, h, w)", "(24, 8, 2, 2)")),
        refused(
            "tokens of a trunk",
            lambda: Selfie(nn.Flatten(2), dim=2, patch_size=4, grid=(3, 4), pool=nn.Identity())(_images()),
            ValueError,
            ("(n, 2)", "(24, 2, 16)"),
        ),
        refused("another grid", lambda: _selfie()(_images(16)), ValueError, ("grid is 3 x 4", "4 x 4 patches")),
        refused("patches too small", _tiny_patches, UserWarning, ("2 x 2 pixels", "leaves one", "larger patches")),
        refused("twins", _twins, UserWarning, ("100% of the patches", "flat background", "floor")),
        refused(
            "weights of another trunk",
            lambda: load_trunk(_other_trunk(), {**small_trunk().state_dict(), "9.weight": torch.zeros(1)}),
            ValueError,
            ("missing []", "unexpected ['9.weight']", "0.weight (8, 2, 3, 3) for (9, 2, 3, 3)"),
        ),
        refused("weights missing", lambda: load_trunk(small_trunk(), {}), ValueError, ("missing ['0.weight'",)),
        refused("heads", lambda: AttentionPool(10, heads=4), ValueError, ("multiple of heads", "10 and 4")),
        refused("dropout", lambda: AttentionPool(8, heads=2, dropout=1.0), ValueError, ("dropout", "[0, 1)", "1.0")),
        refused(
            "shapes of the quiz",
            lambda: selection_logits(torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)),
            ValueError,
            ("(2, 3)", "(2, 4, 3)", "(2, 5, 3)"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
