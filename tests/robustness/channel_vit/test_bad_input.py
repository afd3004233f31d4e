"""Bad inputs of `channel_vit`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from tests.robustness.channel_vit.test_pretrained import Vit
from torch import nn

from regularized.papers.channel_vit.contract import transformer
from regularized.robustness.channel_vit import (
    ChannelPatchEmbed,
    ChannelViT,
    HierarchicalChannelSampling,
    SampleChannels,
    convert_vit,
    draw_channels,
)
from regularized.training.step import Batch

X = torch.ones(2, 3, 4, 4)
SMALL = {"num_classes": 2, "img_size": 4, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2}


def _vit(**form):
    return Vit(**form)


def _overlapping():
    vit = _vit()
    vit.patch_embed.proj = nn.Conv2d(3, 16, 4, stride=2)
    convert_vit(vit, 4)


def _without_table():
    vit = _vit()
    vit.pos_embed = None
    convert_vit(vit, 4)


def _hybrid():
    vit = _vit()
    vit.patch_embed.backbone = nn.ReLU()
    convert_vit(vit, 4)


def _two_sizes_in_a_step():
    term = SampleChannels()
    for channels in (3, 2):
        term.transform(Batch.of((X[:, :channels], torch.zeros(2))))


def _in_evaluation():
    HierarchicalChannelSampling().eval()(X, kept=[0])


def bad_inputs():
    net = transformer()
    differing = torch.tensor([[0, 1, 2], [2, 1, 0]])
    return [
        refused("unknown id", lambda: net(X[:, :2], channels=[0, 3]), ValueError, ("[3]", "in_channels=3", "0 to 2")),
        refused("negative id", lambda: net(X[:, :2], channels=[-1, 0]), ValueError, ("[-1]", "0 to 2")),
        refused("ids repeated", lambda: net(X, channels=[1, 1, 0]), ValueError, ("[1]", "twice")),
        refused(
            "ids repeated in one image",
            lambda: net(X[:, :2], channels=torch.tensor([[0, 1], [2, 2]])),
            ValueError,
            ("[2]", "twice"),
        ),
        refused("too few ids", lambda: net(X, channels=[0, 1]), ValueError, ("3 channels", "(3,)", "(2,)")),
        refused("ids of too few images", lambda: net(X, channels=[[0, 1, 2]]), ValueError, ("(2, 3)", "(1, 3)")),
        refused("ids that are no numbers", lambda: net(X, channels=[0.0, 1.0, 2.0]), TypeError, ("whole", "float32")),
        refused("ids that are a mask", lambda: net(X, channels=[True, True, False]), TypeError, ("whole", "bool")),
        refused(
            "more channels than known, and no ids",
            lambda: net(torch.ones(2, 5, 4, 4)),
            ValueError,
            ("5 channels", "knows 3", "channels=[0, 1, 2]"),
        ),
        refused(
            "fewer channels than known, and no ids",
            lambda: net(X[:, :2]),
            ValueError,
            ("2 channels", "knows 3", "channels=[0, 1]"),
        ),
        refused("no channel", lambda: net(X[:, :0], channels=[]), ValueError, ("no channel present", "(2, 0, 4, 4)")),
        refused("one image without a batch", lambda: net(X[0]), ValueError, ("(B, n, H, W)", "(3, 4, 4)")),
        refused(
            "height that no patch divides", lambda: net(torch.ones(1, 3, 5, 4)), ValueError, ("5 x 4", "multiples of 2")
        ),
        refused(
            "width that no patch divides", lambda: net(torch.ones(1, 3, 4, 7)), ValueError, ("4 x 7", "multiples of 2")
        ),
        refused(
            "image size that no patch divides",
            lambda: ChannelViT(3, **{**SMALL, "img_size": 5}),
            ValueError,
            ("5 x 5",),
        ),
        refused("no channels to know", lambda: ChannelPatchEmbed(0), ValueError, ("in_channels", "at least 1")),
        refused("patches of no size", lambda: ChannelPatchEmbed(2, patch_size=0), ValueError, ("patch_size",)),
        refused(
            "heads that do not divide",
            lambda: ChannelViT(3, **{**SMALL, "num_heads": 3}),
            ValueError,
            ("8", "3", "multiple"),
        ),
        refused("no blocks", lambda: ChannelViT(3, **{**SMALL, "depth": 0}), ValueError, ("depth", "at least 1")),
        refused(
            "branches that are never there",
            lambda: ChannelViT(3, **SMALL, drop_path=1.0),
            ValueError,
            ("drop_path", "[0, 1)"),
        ),
        refused(
            "unknown positions", lambda: ChannelViT(3, **SMALL, positions="sine"), ValueError, ("'exact'", "'official'")
        ),
        refused(
            "official positions of a rectangle",
            lambda: ChannelViT(3, **{**SMALL, "img_size": (4, 8)}, positions="official"),
            ValueError,
            ("4 x 8", "'exact'"),
        ),
        refused(
            "unknown mode", lambda: HierarchicalChannelSampling("drop"), ValueError, ("'select'", "'mask'", "drop")
        ),
        refused("unknown mode of the term", lambda: SampleChannels("drop"), ValueError, ("'select'", "drop")),
        refused("draw from nothing", lambda: draw_channels(0, torch.Generator()), ValueError, ("planes", "at least 1")),
        refused(
            "sample no channel", lambda: HierarchicalChannelSampling()(X[:, :0]), ValueError, ("no channel present",)
        ),
        refused(
            "all channels are zero",
            lambda: HierarchicalChannelSampling("mask")(torch.zeros(2, 3, 4, 4)),
            ValueError,
            ("no channel present", "3 channels"),
        ),
        refused(
            "no channel holds anything",
            lambda: HierarchicalChannelSampling("mask")(X, present=[False] * 3),
            ValueError,
            ("no channel present", "3 channels"),
        ),
        refused(
            "present of another length",
            lambda: HierarchicalChannelSampling("mask")(X, present=[True]),
            ValueError,
            ("3 channels", "1"),
        ),
        refused(
            "sample with too few ids", lambda: HierarchicalChannelSampling()(X, [0]), ValueError, ("3 channels", "(1,)")
        ),
        refused("sampling in evaluation", _in_evaluation, UserWarning, ("evaluation", "train()")),
        refused(
            "ids that differ between images",
            lambda: HierarchicalChannelSampling()(X, differing),
            UserWarning,
            ("by position",),
        ),
        refused("micro-batches of two kinds", _two_sizes_in_a_step, ValueError, ("3 and 2 channels",)),
        refused(
            "inputs without images",
            lambda: SampleChannels().transform(Batch.of({"pixels": X, "targets": torch.zeros(2)})),
            TypeError,
            ("'x'", "pixels"),
        ),
        refused("convert a CNN", lambda: convert_vit(nn.Conv2d(3, 4, 3), 4), TypeError, ("Conv2d", "mode='mask'")),
        refused("convert without a table", _without_table, ValueError, ("pos_embed", "rotary")),
        refused("convert overlapping patches", _overlapping, ValueError, ("(4, 4)", "(2, 2)", "overlap")),
        refused("convert a hybrid", _hybrid, ValueError, ("ReLU", "filter")),
        refused(
            "convert normalised patches",
            lambda: convert_vit(_vit(norm=nn.LayerNorm(16)), 4),
            ValueError,
            ("LayerNorm",),
        ),
        refused("convert for no channels", lambda: convert_vit(_vit(), 0), ValueError, ("in_channels", "at least 1")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_refusals(call, error, says):
    """Fails when an input that cannot work is taken, or its message does not help."""
    assert_refused(call, error, says)
