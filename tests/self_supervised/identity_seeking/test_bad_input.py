"""Bad inputs of identity seeking: each is answered by what was given, what is allowed, and how to mend it."""

import math

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.self_supervised.identity_seeking import (
    FramePairs,
    InterFrameContrastive,
    max_weight_matching,
    reliability_loss,
    retrieval_scores,
)


def contrast(a=None, b=None, *groups, **options):
    a = torch.randn(3, 4) if a is None else a
    return InterFrameContrastive(**options)(a, torch.randn(3, 4) if b is None else b, *groups)


def _nan():
    features = torch.randn(4, 4)
    features[3, 0] = math.nan
    video = torch.tensor([5, 5, 7, 7])
    contrast(features, torch.randn(4, 4), video, video)


def frames(**options):
    settings = {"crops": torch.zeros(4, 2), "video": torch.tensor([0, 0, 1, 1]), "frame": torch.tensor([0, 1, 0, 1])}
    settings = {**settings, "videos_per_batch": 1, "max_gap": 1, **options}
    return FramePairs(settings.pop("crops"), settings.pop("video"), settings.pop("frame"), **settings)


def bad_inputs():
    same = torch.randn(3, 4)
    ids = torch.arange(3)
    return [
        refused(
            "videos of one side", lambda: contrast(None, None, ids), ValueError, ("group_a and group_b", "neither")
        ),
        refused(
            "videos of another length",
            lambda: contrast(None, None, ids[:2], ids),
            ValueError,
            ("group_a", "3 crops", "(2,)"),
        ),
        refused("features of one crop", lambda: contrast(torch.zeros(4)), ValueError, ("(crops, d)", "(4,)")),
        refused("features of images", lambda: contrast(torch.zeros(3, 4, 2, 2)), ValueError, ("pool or flatten",)),
        refused("another width", lambda: contrast(torch.zeros(3, 5)), ValueError, ("same d", "(3, 5)")),
        refused("NaN in a crop", _nan, ValueError, ("not finite", "[7]")),
        refused(
            "NaN in similarities",
            lambda: max_weight_matching(torch.full((2, 2), math.nan)),
            ValueError,
            ("finite", "NaN"),
        ),
        refused("similarities of one row", lambda: max_weight_matching(torch.zeros(3)), ValueError, ("(3,)",)),
        refused("temperature 0", lambda: contrast(tau=0.0), ValueError, ("tau", "positive")),
        refused("q above 1", lambda: contrast(q=1.5), ValueError, ("q", "[0, 1]")),
        refused("q below 0", lambda: reliability_loss(torch.zeros(1), -0.1), ValueError, ("q", "[0, 1]")),
        refused(
            "no video in both frames",
            lambda: contrast(None, None, ids, ids + 3),
            UserWarning,
            ("no video", "loss", "0"),
        ),
        refused("no negatives", lambda: contrast(same[:1], same[1:2]), UserWarning, ("no negative",)),
        refused("the same frame twice", lambda: contrast(same, same), UserWarning, ("same images", "gap of 0")),
        refused(
            "too many crops",
            lambda: max_weight_matching(torch.zeros(2001, 1), solver=lambda cost: ([0], [0])),
            UserWarning,
            ("2001", "third power"),
        ),
        refused("a gap of 0", lambda: frames(max_gap=0), ValueError, ("max_gap", "at least 1", "one image")),
        refused("crops without frames", lambda: frames(frame=torch.zeros(3)), ValueError, ("4 crops", "3 frames")),
        refused(
            "frames too far apart",
            lambda: frames(frame=torch.tensor([0, 9, 0, 9])),
            ValueError,
            ("max_gap=1", "larger"),
        ),
        refused(
            "cameras of one side",
            lambda: retrieval_scores(same, same, ids, ids, query_cameras=ids),
            ValueError,
            ("both sides",),
        ),
        refused(
            "individuals of others", lambda: retrieval_scores(same, same, ids, ids + 3), ValueError, ("counterpart",)
        ),
        refused(
            "too few individuals",
            lambda: retrieval_scores(same, same, ids[:2], ids),
            ValueError,
            ("query_ids", "3 rows"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when a bad input passes, or is answered with something that does not help."""
    assert_refused(call, error, says)
