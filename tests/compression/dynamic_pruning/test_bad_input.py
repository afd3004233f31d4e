"""Bad inputs of `dynamic_pruning`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning import (
    DynamicPruning,
    FilterGroup,
    MaskPredictor,
    dynamic_layers,
    mask_loss,
    mass_mask,
    pruning_param_groups,
    sparse_inference,
    top_mask,
)
from regularized.compression.dynamic_pruning.masks import predicted_mask


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )


def _x():
    return torch.randn(3, 1, 8, 8)


class _Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def _loss_in_evaluation():
    net = _net().eval()
    pruning = DynamicPruning(net, mass=0.9)
    net(_x())
    return pruning.mask_loss()


def _loss_of_the_pass_before():
    net = _net().train()
    pruning = DynamicPruning(net, mass=0.9)
    net(_x())
    with torch.no_grad():
        net(_x())
    return pruning.mask_loss()


def _decayed():
    net = _net()
    DynamicPruning(net, mass=0.9).check_optimizer(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=5e-4))


def _other_mass():
    net = _net()
    DynamicPruning(net, mass=0.9)
    return DynamicPruning(net, mass=0.5)


def _depthwise():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return DynamicPruning(net, mass=0.9)


def _without_activation():
    return DynamicPruning(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten()), mass=0.9)


def _never_on():
    net = _net().eval()
    pruning = DynamicPruning(net, mass=0.9)
    nn.init.constant_(dynamic_layers(net)["3"].predictor.linear.bias, -20.0)
    return pruning.measure([(_x(),)])


def _other_masks():
    net = _net()
    DynamicPruning(net, mass=0.9)
    dynamic_layers(net)["0"].choose = lambda logits: predicted_mask(-logits)
    return sparse_inference(net)


ROWS = [
    refused(
        "mass above 1", lambda: DynamicPruning(_net(), mass=90), ValueError, ("(0, 1]", "kept", "0.9 keeps 90 %", "90")
    ),
    refused("mass of 0", lambda: DynamicPruning(_net(), mass=0.0), ValueError, ("mass", "(0, 1]", "-1 switches")),
    refused("a mass that is negative", lambda: DynamicPruning(_net(), mass=-0.5), ValueError, ("mass", "-0.5")),
    refused("mass mask above 1", lambda: mass_mask(torch.ones(1, 2), 1.5), ValueError, ("mass", "1.5")),
    refused(
        "prune_ratio of 1", lambda: DynamicPruning(_net(), prune_ratio=1.0), ValueError, ("[0, 1)", "pruned", "mass is")
    ),
    refused("top mask of 1", lambda: top_mask(torch.ones(1, 2), 1.0), ValueError, ("prune_ratio", "1.0")),
    refused(
        "both", lambda: DynamicPruning(_net(), mass=0.9, prune_ratio=0.1), ValueError, ("one of mass", "0.9", "0.1")
    ),
    refused("neither", lambda: DynamicPruning(_net()), ValueError, ("one of mass", "prune_ratio")),
    refused("another mode", lambda: DynamicPruning(_net(), mass=0.9, mode="both"), ValueError, ("decoupled", "joint")),
    refused("min_keep", lambda: DynamicPruning(_net(), mass=0.9, min_keep=-1), ValueError, ("min_keep", "-1")),
    refused(
        "rate", lambda: DynamicPruning(_net(), mass=0.9, predictor_lr=0.0), ValueError, ("predictor_lr", "positive")
    ),
    refused("a name for a list", lambda: DynamicPruning(_net(), mass=0.9, layers="0"), ValueError, ("list", "['0']")),
    refused("no such layer", lambda: DynamicPruning(_net(), mass=0.9, layers=["7"]), ValueError, ("'7'", "there are")),
    refused(
        "no such output",
        lambda: DynamicPruning(_net(), mass=0.9, layers=[FilterGroup("0", output="block")]),
        ValueError,
        ("'block'", "there are"),
    ),
    refused("no convolution", lambda: DynamicPruning(_net(), mass=0.9, layers=["6"]), ValueError, ("'6'", "Linear")),
    refused(
        "the last layer",
        lambda: DynamicPruning(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), mass=0.9, layers=["0"]),
        ValueError,
        ("'0'", "last layer"),
    ),
    refused(
        "nothing to prune", lambda: DynamicPruning(nn.Linear(2, 2), mass=0.9), ValueError, ("Linear", "no convolution")
    ),
    refused("not traceable", lambda: DynamicPruning(_Branching(), mass=0.9), ValueError, ("_Branching", "FilterGroup")),
    refused(
        "a norm over all filters",
        lambda: DynamicPruning(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), mass=0.9, layers=[FilterGroup("0", "1", F.relu)]
        ),
        ValueError,
        ("GroupNorm", "'0'", "BatchNorm2d"),
    ),
    refused(
        "lazy",
        lambda: DynamicPruning(
            nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), mass=0.9, layers=["0"]
        ),
        ValueError,
        ("lazy", "'0'"),
    ),
    refused("pruned with another mass", _other_mass, ValueError, ("already", "mass=0.9", "remove()")),
    refused(
        "loss before a pass", lambda: DynamicPruning(_net(), mass=0.9).mask_loss(), RuntimeError, ("training mode",)
    ),
    refused("loss in evaluation", _loss_in_evaluation, RuntimeError, ("training mode",)),
    refused("loss after a pass without gradient", _loss_of_the_pass_before, RuntimeError, ("with gradients",)),
    refused("nothing to estimate", lambda: DynamicPruning(mass=0.9).estimate([]), ValueError, ("nothing is pruned",)),
    refused(
        "nothing to measure", lambda: DynamicPruning(_net(), mass=-1).measure([]), ValueError, ("nothing is pruned",)
    ),
    refused("decayed predictors", _decayed, UserWarning, ("weight decay 0.0005", "pruning_param_groups")),
    refused("pruned twice", _depthwise, UserWarning, ("'2'", "twice")),
    refused("no activation", _without_activation, UserWarning, ("no activation follows ['0']",)),
    refused("a layer that is never on", _never_on, UserWarning, ("'3' (100%)", "Raise mass")),
    refused("pooling", lambda: MaskPredictor(2, 3, pool="median"), ValueError, ("'mean' or 'max'", "'median'")),
    refused("embedding", lambda: MaskPredictor(2, 3, embedding=0), ValueError, ("embedding", "at least 1")),
    refused("no target for a layer", lambda: mask_loss([torch.zeros(1, 2)], []), ValueError, ("1 layers", "0 targets")),
    refused("sparse without masks", lambda: sparse_inference(_net()), ValueError, ("DynamicPruning",)),
    refused("sparse with other masks", _other_masks, ValueError, ("'0'", "predictors")),
    refused(
        "dense_above", lambda: sparse_inference(_net(), dense_above=2.0), ValueError, ("dense_above", "[0, 1]", "2.0")
    ),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_refused(call, error, says):
    """Fails when one of these is taken silently, or the message does not help."""
    assert_refused(call, error, says)


def test_good_optimizer_is_not_mentioned(recwarn):
    """Fails when parameter groups as they should be are complained about."""
    net = _net()
    pruning = DynamicPruning(net, mass=0.9)
    pruning.check_optimizer(torch.optim.SGD(pruning_param_groups(net, lr=0.1, weight_decay=5e-4)))
    assert not recwarn.list
