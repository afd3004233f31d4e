"""Sparse inference: the outputs of the masked network, and not a multiplication more than was counted."""

import pytest
import torch
from tests.compression.dynamic_pruning.test_dynamic_pruning import blocks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regularized.compression.dynamic_pruning import DynamicPruning, dynamic_layers, sparse_inference
from regularized.compression.dynamic_pruning.sparse import SparseConv2d
from regularized.evidence.models import resnet18, seeded


def mobile():
    """Depthwise, grouped, strided, dilated, and padded in other ways."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.SiLU(),
        nn.Conv2d(12, 12, 3, groups=3, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def keep(net, share, seed=0):
    """Random masks with a share of the filters: the same for all images, so that they can be counted."""
    draws = torch.Generator().manual_seed(seed)
    for layer in dynamic_layers(net).values():
        linear = layer.predictor.linear
        nn.init.zeros_(linear.weight)
        order = torch.randperm(linear.out_features, generator=draws)
        linear.bias.data = torch.where(order < round(share * linear.out_features), 20.0, -20.0)


def settle(net):
    """Statistics and gains that normalisation does not have at the start."""
    draws = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=draws))
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*depthwise")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("build", [mobile, lambda: resnet18(width=4)])
def test_outputs_are_those_of_the_masked_network(build, share):
    """Fails when a row, a column or a bias is gathered wrongly, or normalisation is folded wrongly."""
    net = settle(seeded(0, build))
    DynamicPruning(net, mass=0.9)
    if share:
        keep(net, share)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    for dense_above in (1.0, 0.5, 0.0):
        sparse = sparse_inference(net, dense_above=dense_above)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), net(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sparse(x[:1]), net(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*depthwise")
def test_silence_everywhere():
    """Fails where no filter of a layer is on, or no channel of its input: the network must still answer."""
    net = settle(seeded(0, mobile))
    DynamicPruning(net, mass=0.9)
    keep(net, 0.0)
    x = torch.randn(2, 3, 16, 16)
    sparse = sparse_inference(net, dense_above=1.0)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), net(x))
        nn.init.constant_(dynamic_layers(net)["12"].predictor.linear.bias, 20.0)  # behind silence, the bias alone
        torch.testing.assert_close(sparse_inference(net, dense_above=1.0)(x), net(x))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_masks_behind_the_residual_sum(share):
    """Fails when the sum of a block is not masked in the sparse copy, or channels behind it are taken for filled."""
    net = settle(seeded(0, resnet18, width=4))
    pruning = DynamicPruning(net, mass=0.9, layers=blocks(net))
    keep(net, share)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    sparse = sparse_inference(net, dense_above=1.0)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), net(x), rtol=1e-4, atol=1e-4)
        with FlopCounterMode(display=False) as counter:
            sparse(x[:1])
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2
    shortcuts = 4 * 8 * 16 * 16 + 8 * 16 * 8 * 8 + 16 * 32 * 4 * 4
    if share:
        assert counted - int(pruning.measure([(x[:1],)]).macs) == shortcuts


def test_it_computes_what_was_counted():
    """Fails when masked filters are computed all the same: the convolutions' operations are those of the report."""
    net = seeded(0, resnet18, width=8).eval()
    pruning = DynamicPruning(net, mass=0.9)
    keep(net, 0.25)
    x = torch.randn(1, 3, 32, 32)
    counts = []
    for network in (net, sparse_inference(net, dense_above=1.0)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(x)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2)
    found = pruning.measure([(x,)])
    assert counts[0] == found.dense
    assert counts[1] == int(found.macs)
    assert counts[1] < 0.2 * counts[0]


def test_dense_where_that_is_cheaper():
    """Fails when layers that keep nearly everything are gathered."""
    net = seeded(0, resnet18, width=4).eval()
    DynamicPruning(net, mass=0.9)
    keep(net, 0.9)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sparse_inference(net)(x)
    assert (
        counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2
        == DynamicPruning(net, mass=0.9).measure([(x,)]).dense
    )


def test_the_network_stays():
    """Fails when the sparse copy shares weights with the network, or leaves it without its masks."""
    net = seeded(0, resnet18, width=4).train()
    DynamicPruning(net, mass=0.9)
    x = torch.randn(2, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    sparse = sparse_inference(net)
    assert any(isinstance(module, SparseConv2d) for module in sparse.modules())
    with torch.no_grad():
        for p in sparse.parameters():
            p.zero_()
    sparse(x)
    assert net.training
    assert dynamic_layers(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
