"""Dynamic pruning of a network: what is put in, what the two losses reach, and what is counted."""

import copy
import pickle
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning import (
    DynamicPruning,
    FilterGroup,
    MaskPredictor,
    convolution_macs,
    dynamic_layers,
    find_groups,
    mask_loss,
    mass_mask,
    pruning_param_groups,
)
from regularized.evidence.models import preact_resnet18, resnet18, seeded
from regularized.mechanisms.taps import Taps
from regularized.papers.dynamic_pruning.experiment import shuffled
from regularized.training import CrossEntropy, TensorData, Trainer
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step


def chain():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


def network(seed=0):
    return seeded(seed, chain)


def images(count=7):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 8, 8, generator=draws), torch.arange(count) % 3


def set_bias(net, value):
    for layer in dynamic_layers(net).values():
        nn.init.zeros_(layer.predictor.linear.weight)
        nn.init.constant_(layer.predictor.linear.bias, value)


# -- masks in the forward pass ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_all_on_is_the_dense_network(training):
    """Fails when anything but the mask changes the output: bit for bit the dense network's, and nothing saved."""
    x, _ = images()
    net, dense = network().train(training), network().train(training)
    pruning = DynamicPruning(net, mass=0.8)
    set_bias(net, 20.0)
    assert torch.equal(net(x), dense(x))
    found = pruning.measure([(x,)])
    assert found.reduction == 0.0
    assert found.dense == 6 * 2 * 9 * 36 + 4 * 6 * 9 * 9  # Co Ci K^2 H' W' of both
    assert net.training is training


def test_all_off_is_silence():
    """Fails when a filter that is off speaks: the classifier sees zeros."""
    x, _ = images()
    net = network().eval()
    pruning = DynamicPruning(net, mass=0.8)
    set_bias(net, -20.0)
    assert torch.equal(net(x), net[-1].bias.expand(7, 3))
    with pytest.warns(UserWarning, match=r"without a single filter.*'0' \(100%\)"):
        assert pruning.measure([(x,)]).reduction == 1.0


def test_each_image_has_its_own_filters():
    """Fails when a mask is computed from the whole batch: alone, an image gives the same."""
    x, _ = images()
    net = network().eval()
    predictor = partial(MaskPredictor, pool="max", softmax=False)
    DynamicPruning(net, mass=0.8, predictor=predictor)
    first = dynamic_layers(net)["0"].predictor
    with torch.no_grad():
        first.linear.bias.sub_(first(x).mean(dim=0))  # on for some images, off for others
    torch.testing.assert_close(torch.cat([net(x[i : i + 1]) for i in range(7)]), net(x))
    assert len({tuple(row) for row in first(x).gt(0).tolist()}) > 1


def test_mask_goes_before_or_behind_the_activation():
    """Fails when the mask is applied where the paper's is not: its product with ReLU's output is the same."""
    x, _ = images()
    net = network().eval()
    DynamicPruning(net, mass=0.8, layers=["0"])
    layer = dynamic_layers(net)["0"]
    kept = layer.predictor(x).sigmoid() > 0.5
    by_hand = F.relu(layer.norm(layer.conv(x))) * kept[:, :, None, None]
    assert torch.equal(F.relu(layer(x)), by_hand)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("embedding", "side"), [(None, 1), (18, 3), (1, 1)])
def test_predictor_by_hand(pool, embedding, side):
    """Fails when softmax runs over images, or pooling goes wrong for an embedding of several entries a channel."""
    x, _ = images()
    predictor = MaskPredictor(2, 5, pool=pool, embedding=embedding)
    pooling = {"mean": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[pool]
    entries = pooling(x, side).reshape(7, -1)
    shares = entries.exp() / entries.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(predictor(x), shares @ predictor.linear.weight.T + predictor.linear.bias)


# -- what the losses reach -------------------------------------------------------------------------------


def _gradients(mode, weight, labels=None):
    x, y = images()
    net = network().train()
    torch.manual_seed(3)
    pruning = DynamicPruning(net, mass=0.8, mode=mode, weight=weight)
    pruning.begin_epoch(0, 1)
    (F.cross_entropy(net(x), y if labels is None else labels) + pruning.mask_loss()).backward()
    own = {name: p.grad for name, p in net.named_parameters() if "predictor" in name}
    rest = {name: p.grad for name, p in net.named_parameters() if "predictor" not in name}
    return own, rest


def test_decoupled():
    """Fails when the mask loss reaches the network, or the cross-entropy the predictors."""
    own, rest = _gradients("decoupled", 1.0)
    nothing, alone = _gradients("decoupled", 0.0)
    assert all(torch.equal(rest[name], alone[name]) for name in rest)
    assert all(grad is None for grad in nothing.values())
    others, _ = _gradients("decoupled", 1.0, labels=torch.zeros(7, dtype=torch.long))
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert all(grad.abs().sum() > 0 for grad in own.values())


def test_joint():
    """Fails when the input is detached all the same: the loss of the second layer's mask reaches the first layer."""
    _, rest = _gradients("joint", 1.0)
    _, alone = _gradients("decoupled", 1.0)
    assert not torch.equal(rest["0.conv.weight"], alone["0.conv.weight"])
    assert torch.equal(rest["4.conv.weight"], alone["4.conv.weight"])  # its own predictor sees its input


def test_schedule():
    """Fails when the loss goes on in the second half, or targets are computed for nothing there."""
    x, _ = images()
    net = network().train()
    pruning = DynamicPruning(net, mass=0.8)
    weights = []
    for epoch in range(4):
        pruning.begin_epoch(epoch, 4)
        net(x)
        weights.append(bool(pruning.mask_loss() > 0))
        assert bool(pruning.state.records) is weights[-1]
    assert weights == [True, True, False, False]


def test_predictors_learn_their_targets():
    """Fails when the predictors are not trained: on one batch they must come to agree with their targets."""
    x, y = images()
    net = network().train()
    predictor = partial(MaskPredictor, pool="max", softmax=False)
    pruning = DynamicPruning(net, mass=0.7, predictor=predictor, weight=1.0)
    optimizer = torch.optim.SGD(pruning_param_groups(net, lr=0.0, predictor_lr=0.5), momentum=0.9)
    before = pruning.measure([(x, y)]).accuracy
    for _ in range(150):
        net(x)
        pruning.mask_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruning.measure([(x, y)]).accuracy > before + 0.2


# -- in the Trainer --------------------------------------------------------------------------------------


def test_as_a_term():
    """Fails when the predictors do not get their own rate without decay, or the schedule is not obeyed."""
    x, y = images(12)
    net = network()
    term = DynamicPruning(mass=0.8, predictor_lr=0.3)
    trainer = Trainer(
        net,
        terms={"task": CrossEntropy(), "masks": term},
        optimizer=partial(torch.optim.SGD, lr=0.01, weight_decay=0.1),
    )
    groups = trainer.optimizer.param_groups
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [(7, 0.01, 0.1), (4, 0.3, 0.0)]
    own = [p.detach().clone() for p in groups[1]["params"]]
    trainer.fit(TensorData(x, y, batch_size=6), epochs=1)
    assert all(not torch.equal(a, b) for a, b in zip(own, groups[1]["params"]))
    trainer.fit(TensorData(x, y, batch_size=6), epochs=2)
    assert not term.state.learning  # the second half


def test_another_term_that_calls_the_network():
    """Fails when the masks of another batch are taken for those of this one."""
    x, y = images()
    net = network().train()
    term = DynamicPruning(mass=0.8)
    term.attach(net)
    step = Step(net, Batch.of((x, y)), Progress(0, 1))
    step.logits.sum()
    step.forward(x.flip(0))
    with pytest.raises(RuntimeError, match="another term has made a forward pass"):
        term(step)
    fresh = Step(net, Batch.of((x, y)), Progress(0, 1))
    net(x.flip(0))  # before that of the batch: no harm
    expected = term(fresh)
    records = term.state.records
    alone = mask_loss([r.logits for r in records], [r.wanted for r in records])
    assert float(expected.detach()) == pytest.approx(7 * float(alone.detach()))


def test_off_is_not_there():
    """Fails when -1 leaves predictors behind."""
    net = network()
    before = sorted(net.state_dict())
    pruning = DynamicPruning(net, mass=-1)
    assert sorted(net.state_dict()) == before
    assert float(pruning.mask_loss()) == 0.0


# -- surgery -----------------------------------------------------------------------------------------------


def test_remove_gives_the_network_back():
    """Fails when a name, a mode or a hook is left changed, or what was trained is lost."""
    x, _ = images()
    net, plain = network().eval(), network().eval()
    pruning = DynamicPruning(net, mass=0.5)
    with torch.no_grad():
        dynamic_layers(net)["0"].conv.weight.mul_(2.0)
        plain[0].weight.mul_(2.0)
    with pruning.dense():
        assert torch.equal(net(x), plain(x))
    assert not torch.equal(net(x), plain(x))
    pruning.remove()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net(x), plain(x))
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_a_copy_is_its_own():
    """Fails when a copied or pickled network shares predictors or records with the original."""
    x, _ = images()
    net = network().train()
    pruning = DynamicPruning(net, mass=0.8)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        again = DynamicPruning(other, mass=0.8)
        assert torch.equal(other(x), net(x))
        other(x[:3])
        assert len(again.state.records[0].kept) == 3
        assert len(pruning.state.records[0].kept) == 7
        set_bias(other, -20.0)
    assert not torch.equal(dynamic_layers(net)["0"].predictor.linear.bias, torch.full((6,), -20.0))


def test_state_dict_holds_everything():
    """Fails when predictors are outside of the network's state: loaded into another one, the outputs are the same."""
    x, _ = images()
    nets = network(0).eval(), network(1).eval()
    for net in nets:
        DynamicPruning(net, mass=0.8)
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](x), nets[1](x))


def test_groups_of_a_chain():
    """Fails when what follows a convolution, or what fills its channels, is not seen."""
    groups, left_out, summed = find_groups(network())
    assert list(groups) == ["0", "4"]
    assert (groups["0"].norm, groups["0"].source, type(groups["0"].activation)) == ("1", None, nn.ReLU)
    assert (groups["4"].norm, groups["4"].source, type(groups["4"].activation)) == (None, "0", nn.ReLU6)
    assert not left_out
    assert not summed


def test_groups_of_residual_networks():
    """Fails when a residual sum is taken for the output of the pruned layer before it: it leaves no channel empty."""
    for net in (resnet18(width=2), preact_resnet18(width=2)):
        groups, _, summed = find_groups(net)
        second = [name for name in groups if name.endswith("conv2")]
        assert len(second) == 8
        assert all(groups[name].source == name.replace("conv2", "conv1") for name in second)
        assert all(
            groups[name].source is None for name in groups if name.endswith("conv1") and name != "layers.0.conv1"
        )
        assert set(second) <= summed
    assert find_groups(resnet18(width=2)).groups["layers.0.conv1"].source == "stem"


class Odd(nn.Module):
    """What must be left out, and functional forms of what must be found."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.leaky = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.twice(self.twice(x))
        x = x * torch.sigmoid(self.gate(x))
        x = F.leaky_relu(self.leaky(x), 0.3)
        x = self.norm(self.grouped(F.max_pool2d(x, 2))).relu()
        return self.last(x).mean(dim=(2, 3))


def test_groups_of_an_odd_network():
    """Fails when a layer is pruned that cannot be, or one that can be is missed."""
    groups, left_out, _ = find_groups(Odd())
    assert list(groups) == ["first", "leaky", "grouped"]
    assert groups["leaky"].activation(torch.tensor(-1.0)) == pytest.approx(-0.3)
    assert groups["grouped"].source == "leaky"
    assert "called 2 times" in left_out["twice"]
    assert "does not map 0 to 0" in left_out["gate"]
    assert "last layer" in left_out["last"]
    with pytest.warns(UserWarning, match=r"no activation follows \['grouped'\]"):
        pruning = DynamicPruning(Odd(), mass=0.9)
    assert pruning.left_out == left_out


class Branching(nn.Module):
    """Cannot be traced: which way it goes depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x)) if x.sum() > 0 else F.relu(-self.b(x))
        return self.head(x.mean(dim=(2, 3)))


def test_groups_by_hand():
    """Fails when a network that cannot be traced cannot be pruned at all."""
    x, y = images()
    net = Branching().eval()
    dense = copy.deepcopy(net)
    groups = [FilterGroup("a", norm="norm", activation=F.relu), FilterGroup("b", activation=F.relu, source="a")]
    pruning = DynamicPruning(net, mass=0.6, layers=groups)
    with pruning.dense():
        assert torch.equal(net(x), dense(x))
    assert pruning.estimate([(x, y)]).reduction > 0.3


def blocks(net):
    """Groups of a residual network whose second convolutions are masked behind the sum."""
    found = []
    for group in find_groups(net).groups.values():
        block, _, part = group.conv.rpartition(".")
        number = int(block.split(".")[1]) if part in ("conv1", "conv2") else 0
        if part == "conv2":
            found.append(replace(group, output=block))
        elif part == "conv1":
            before = "stem" if number == 0 else f"layers.{number - 1}.conv2"
            found.append(replace(group, source=before))
        elif part == "stem":
            found.append(group)
    return found


def test_masks_behind_the_residual_sum():
    """Fails when the branch is masked instead of the block, or judged without the sum (an official option)."""
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net = resnet18(width=4).train()
    dense = copy.deepcopy(net)
    pruning = DynamicPruning(net, mass=0.7, layers=blocks(net))
    seen = {}
    with Taps(net, ["layers.0", "layers.1"]) as taps:
        net(x)
        seen.update(taps.states)
    records = {record.name: record for record in pruning.state.records}
    for name, out in seen.items():
        off = ~records[f"{name}.conv2"].kept
        assert off.any()
        assert not out[off].any()
    with pruning.dense(), Taps(dense, ["layers.0"]) as taps:
        net(x)
        dense(x)
        strengths = taps.states["layers.0"].amax(dim=(2, 3))
    wanted = next(r.wanted for r in pruning.state.records if r.name == "layers.0.conv2")
    assert torch.equal(wanted, mass_mask(strengths.detach(), 0.7))
    pruning.remove()
    net.load_state_dict(dense.state_dict())
    assert torch.equal(net(x), dense(x))


def test_a_source_that_is_not_pruned_fills_all_channels():
    """Fails when operations of a layer are counted as if the one before it were pruned, which the user left out."""
    x, _ = images()
    net = network().eval()
    pruning = DynamicPruning(net, mass=0.5, layers=["4"])
    found = pruning.estimate([(x,)])
    assert torch.equal(found.macs, found.kept["4"].sum(dim=1) * 6 * 9 * 9)


# -- operations ------------------------------------------------------------------------------------------


def test_macs_of_grouped_convolutions():
    """Fails with the official count, by which a depthwise layer is free unless all its channels are on."""
    draws = torch.Generator().manual_seed(0)
    kept, given = (torch.rand(5, 6, generator=draws) > 0.4 for _ in range(2))
    assert torch.equal(convolution_macs(kept, given, taps=10, groups=6), (kept & given).sum(dim=1) * 10)
    by_hand = sum(kept[:, g : g + 2].sum(dim=1) * given[:, g : g + 2].sum(dim=1) for g in (0, 2, 4)) * 10
    assert torch.equal(convolution_macs(kept, given, taps=10, groups=3), by_hand)


def test_estimate_is_the_dense_network_with_its_targets():
    """Fails when masks are on while the estimate is made, or another share than the one asked for is used."""
    x, y = images()
    net = network().eval()
    pruning = DynamicPruning(net, mass=0.9)
    set_bias(net, -20.0)
    found = pruning.estimate([(x[:3], y[:3]), (x[3:], y[3:])])
    dense = network().eval()
    first = F.relu(dense[1](dense[0](x)))
    second = dense[5](dense[4](dense[3](first)))
    filters = []
    for out, name in ((first, "0"), (second, "4")):
        shares = out.amax(dim=(2, 3)).sort(descending=True).values
        filters.append((shares.cumsum(1) / shares.sum(1, keepdim=True) <= 0.9 + 1e-5).sum(1).clamp(min=1))
        assert torch.equal(found.kept[name].sum(dim=1), filters[-1])
    assert torch.equal(found.macs, filters[0] * 2 * 9 * 36 + filters[1] * filters[0] * 9 * 9)
    assert pruning.estimate([(x, y)], mass=0.5).reduction > found.reduction > 0
    assert found.accuracy is None


def test_picture():
    """Fails when a layer's filters are out of order, or classes are mixed up."""
    x, y = images()
    net = network().eval()
    found = DynamicPruning(net, mass=0.6).estimate([(x, y)])
    by_class = found.picture(y, height=2)
    assert by_class.shape == (6, 6 + 1 + 4)
    assert by_class[0, 6] == 0.5
    sorted_columns = by_class[:, :6].mean(dim=0)
    assert (sorted_columns[:-1] <= sorted_columns[1:] + 1e-12).all()
    assert found.picture().shape == (7 * 6, 11)
    assert float(by_class[0, :6].sum()) == pytest.approx(float(found.kept["0"][y == 0].double().mean(dim=0).sum()))


def test_random_masks_keep_as_many():
    """Fails when the control of the experiment has another number of filters than the method."""
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    random = shuffled(logits)
    assert torch.equal(random.sum(dim=1), (logits > 0).sum(dim=1))
    assert not torch.equal(random, logits > 0)


def test_no_warning_for_an_ordinary_network():
    """Fails when a residual branch, which has no activation, is complained about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicPruning(resnet18(width=2), mass=0.9)
