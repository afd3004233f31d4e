"""Interval bounds: sound in any network, closed forms, batch normalisation, equal to an independent derivation."""

import copy
import operator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from regularized.robustness.certified_training import Interval, IntervalBounds, interval_rule, linf_box
from regularized.robustness.certified_training.batch_norm import is_batch_norm

MODULES = {
    "relu": lambda c: nn.ReLU(),
    "inplace": lambda c: nn.ReLU(inplace=True),
    "leaky": lambda c: nn.LeakyReLU(0.2, inplace=True),
    "hard": lambda c: nn.ReLU6(inplace=True),
    "elu": lambda c: nn.ELU(0.5),
    "tanh": lambda c: nn.Tanh(),
    "conv": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=1),
    "grouped": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
    "circular": lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="circular"),
    "transposed": lambda c: nn.ConvTranspose2d(c, c, 3, padding=1),
    "norm": lambda c: nn.BatchNorm2d(c),
    "plain_norm": lambda c: nn.BatchNorm2d(c, affine=False),
    "conv_norm": lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)),
    "average": lambda c: nn.AvgPool2d(3, 1, 1),
    "maximum": lambda c: nn.MaxPool2d(3, 1, 1),
}


class Residual(nn.Module):
    """Functions, methods and operators around a branch, as a network of one's own has them."""

    def __init__(self, branch: nn.Module, kind: str) -> None:
        super().__init__()
        self.branch, self.kind = branch, kind
        self.scale = nn.Parameter(torch.tensor(-1.5))

    def forward(self, x):
        h = self.branch(x)
        if self.kind == "add":
            return F.relu(x + h)
        if self.kind == "sub":
            return (self.scale * x - h / 2).relu()
        if self.kind == "product":
            return torch.cat([x * h, h], dim=1).mean(dim=1, keepdim=True).expand(-1, x.shape[1], -1, -1) - 0.5
        if self.kind == "iadd":
            h += x
            return torch.clamp(F.hardtanh(h, -2.0, 2.0, True), -1.0, 1.0)
        if self.kind == "pool":
            return F.avg_pool2d(F.pad(h, (1, 1, 1, 1), value=0.3), 3, 1) + F.max_pool2d(x, 3, 1, 1)
        return torch.maximum(x, h).permute(0, 1, 3, 2).contiguous()


def network(names, kinds, seed):
    torch.manual_seed(seed)
    blocks = [MODULES[name](3) for name in names]
    blocks += [Residual(nn.Sequential(MODULES["conv_norm"](3), nn.ReLU()), kind) for kind in kinds]
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), *blocks, nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    model = model.double()
    for module in model.modules():
        if is_batch_norm(module):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2.0)
            if module.affine:
                module.weight.data.normal_()  # of both signs
                module.bias.data.normal_()
    return model


architectures = st.builds(
    network,
    st.lists(st.sampled_from(sorted(MODULES)), max_size=5),
    st.lists(st.sampled_from(["add", "sub", "product", "iadd", "pool", "other"]), max_size=2),
    st.integers(0, 1000),
)


class States(fx.Interpreter):
    """What every operation computes for one input; an in-place change reaches earlier names, as in the bounds."""

    def __init__(self, graph, found):
        super().__init__(fx.GraphModule(graph.root, graph.nodes[0].graph))
        self.found = found

    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "get_attr":
            self.found[n.name] = value
        return value


def states_at(bounds, x):
    found = {}
    with torch.no_grad():
        States(bounds.graph(), found).run(x)
    return found


@torch.no_grad()
def assert_inside(found, box, name, slack=1e-9):
    scale = 1.0 + max(float(box.lower.abs().max()), float(box.upper.abs().max()))
    assert float((box.lower - found).max()) <= slack * scale, f"{name} falls below its bounds"
    assert float((found - box.upper).max()) <= slack * scale, f"{name} rises above its bounds"


@settings(max_examples=20, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(architectures, st.floats(0.0, 0.5), st.booleans())
def test_no_point_of_the_box_leaves_the_bounds(model, radius, clipped):
    """Fails when a rule is unsound: a sign of a scale lost, a radius by the weight instead of its absolute value."""
    model.eval()
    bounds = IntervalBounds(model)
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    box = linf_box(x, radius, data_range=(0.0, 1.0) if clipped else None)
    with torch.no_grad():
        kept, folded = bounds(box, states=True), bounds(box)
    torch.testing.assert_close(folded.output.lower, kept.output.lower)
    torch.testing.assert_close(folded.output.upper, kept.output.upper)
    corners = [box.lower, box.upper, x]
    inner = [box.lower + (box.upper - box.lower) * torch.rand_like(x) for _ in range(3)]
    signs = [torch.where(torch.rand_like(x) < 0.5, box.lower, box.upper) for _ in range(3)]
    for point in [*corners, *inner, *signs]:
        for name, value in states_at(bounds, point).items():
            if name in kept.states:
                assert_inside(value, kept.states[name], name)
        with torch.no_grad():
            assert_inside(model(point), folded.output, "the output")
            targets = torch.tensor([0, 1, 3])
            logits = model(point)
            differences = logits.gather(1, targets[:, None]) - logits
            assert float((folded.margins(targets) - differences).max()) <= 1e-9 * (1.0 + float(logits.abs().max()))


@settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(architectures)
def test_a_box_without_extent_is_the_forward_pass(model):
    """Fails when a rule moves the centre: bounds at radius 0 must be what the network computes, in both modes."""
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        model.train(mode)
        bounds = IntervalBounds(model)
        logits = model(x)
        found = bounds(linf_box(x, 0.0)).output
        torch.testing.assert_close(found.lower, logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.upper, logits, rtol=1e-9, atol=1e-9)


def test_in_training_the_box_is_normalised_as_the_clean_batch():
    """Fails when running statistics, or those of the box itself, normalise it: points of a network frozen at the
    statistics of the clean batch lie inside, and the bounds are those of that network."""
    model = network(["conv_norm", "relu", "norm"], ["add"], 0).train()
    x = torch.rand(6, 2, 8, 8, dtype=torch.float64)
    bounds = IntervalBounds(model)
    model(x)
    box = linf_box(x, 0.05)
    found = bounds(box).output
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if is_batch_norm(module):
            module.momentum = 1.0
    frozen(x)
    for module in frozen.modules():
        if is_batch_norm(module):  # torch keeps the unbiased variance
            n = 6 * 16
            module.running_var *= (n - 1) / n
    frozen.eval()
    reference = IntervalBounds(frozen)(box).output
    torch.testing.assert_close(found.lower, reference.lower)
    torch.testing.assert_close(found.upper, reference.upper)
    for _ in range(20):
        point = box.lower + (box.upper - box.lower) * torch.rand_like(x)
        assert_inside(frozen(point).detach(), found, "the output")


def test_running_statistics_move_once():
    """Fails when the bounds pass through the batch normalisations themselves, and move the running statistics."""
    model = network(["conv_norm", "relu"], [], 0).train()
    alone = copy.deepcopy(model)
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    bounds = IntervalBounds(model)
    model(x)
    bounds(linf_box(x, 0.1))
    alone(x)
    for ours, theirs in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_flows_through_the_batch_statistics():
    """Fails when mean or variance is detached: the gradient then differs from that of finite differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().train()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    bounds = IntervalBounds(model)

    def loss():
        model(x)
        return bounds(linf_box(x, 0.1)).margins(y).sum()

    weight = model[0].weight
    (gradient,) = torch.autograd.grad(loss(), weight)
    for row, column in ((0, 0), (2, 1), (3, 2)):
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight[row, column] += sign * 1e-6
                values.append(float(loss()))
                weight[row, column] -= sign * 1e-6
        assert abs((values[0] - values[1]) / 2e-6 - float(gradient[row, column])) < 1e-6


def test_second_derivatives():
    """Fails when a hand-written backward pass has no derivative of its own, or a wrong one."""
    from regularized.robustness.certified_training.batch_norm import _MeanAndVariance
    from regularized.robustness.certified_training.interval import _ReLU
    from regularized.robustness.certified_training.penalty import _Moments

    torch.manual_seed(0)
    centre = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    radius = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((_ReLU, (centre, radius)), (_Moments, (centre, radius)), (_MeanAndVariance, (centre,))):
        assert torch.autograd.gradcheck(function.apply, inputs)
        assert torch.autograd.gradgradcheck(function.apply, inputs)


def test_one_linear_layer_in_closed_form():
    """Fails when the margins are differences of bounds: merged, they are z_y - z_j - eps ||W_y - W_j||_1 exactly."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    margins = IntervalBounds(layer)(linf_box(x, 0.3)).margins(y)
    logits, weight = layer(x), layer.weight
    expected = logits.gather(1, y[:, None]) - logits - 0.3 * (weight[y][:, None] - weight).abs().sum(2)
    torch.testing.assert_close(margins, expected)
    assert bool((margins.gather(1, y[:, None]) == 0).all())


def test_bounds_by_signs_of_weights():
    """Fails when centre and radius part from the derivation by positive and negative weights."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    model = model.double()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            up, down = copy.deepcopy(layer), copy.deepcopy(layer)
            up.weight.data.clamp_(min=0)
            down.weight.data.clamp_(max=0)
            down.bias.data.zero_()
            low, high = up(low) + down(high), up(high) + down(low)
        else:
            low, high = layer(low), layer(high)
    found = IntervalBounds(model)(linf_box(x, 0.1, data_range=(0.0, 1.0))).output
    torch.testing.assert_close(found.lower, low)
    torch.testing.assert_close(found.upper, high)


def test_std_and_range_for_each_channel():
    """Fails when eps is not divided by the std of its channel, or the box is clipped at another channel's range."""
    x = torch.zeros(1, 2, 1, 1)
    box = linf_box(x, 0.1, std=(0.5, 0.1), data_range=((-0.1, -9.0), (9.0, 0.5)))
    torch.testing.assert_close(box.lower.flatten(), torch.tensor([-0.1, -1.0]))
    torch.testing.assert_close(box.upper.flatten(), torch.tensor([0.2, 0.5]))


def test_a_radius_that_is_the_same_for_the_batch_is_computed_once():
    """Fails when the first layer's radius is computed for each sample where no clipping makes them differ."""
    seen = []

    class Counting(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            seen.append(len(x))
            return super()._conv_forward(x, weight, bias)

    model = nn.Sequential(Counting(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    bounds = IntervalBounds(model)
    x = torch.rand(7, 1, 8, 8)
    bounds(linf_box(x, 0.1))
    assert sorted(seen) == [1, 7]
    bounds(linf_box(x, 0.1, data_range=(0.0, 1.0)))
    assert sorted(seen) == [1, 7, 7, 7]


def test_in_place_changes_reach_earlier_names():
    """Fails when a shortcut that in truth carries the output of an in-place ReLU is bounded by its input."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            h = 2.0 * x
            return h - self.relu(h)  # 0, as the ReLU has changed h

    with pytest.warns(UserWarning, match="no linear layer"):
        bounds = IntervalBounds(Shared())
    found = bounds(linf_box(torch.full((1, 2), -1.0), 0.0)).output
    assert torch.equal(found.lower, torch.zeros(1, 2))


def test_a_layer_that_is_called_twice_has_statistics_of_each_call():
    """Fails when the second call of a batch normalisation is bounded by the statistics of the first, or the last."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.norm(torch.tanh(self.norm(x)) + x))

    model = Twice().double().train()
    x = torch.rand(5, 3, dtype=torch.float64)
    bounds = IntervalBounds(model)
    logits = model(x)
    torch.testing.assert_close(bounds(linf_box(x, 0.0)).output.lower, logits)


def test_modes_have_graphs_of_their_own():
    """Fails when what a network does in training is bounded in evaluation: its flags are looked at while tracing."""

    class Flag(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(2, 2)

        def forward(self, x):
            return self.out(x + 1.0 if self.training else x)

    model = Flag()
    bounds = IntervalBounds(model)
    x = torch.rand(3, 2)
    for mode in (True, False, True):
        model.train(mode)
        torch.testing.assert_close(bounds(linf_box(x, 0.0)).output.lower, model(x))


def test_a_rule_of_ones_own():
    """Fails when a registered layer is traced through, or its rule is not asked."""

    class Squared(nn.Module):
        def forward(self, x):
            if x.min() > 1e9:  # cannot be traced
                return x
            return x**2

    @interval_rule(Squared)
    def _squared(module, box):
        high = torch.maximum(box.lower.abs(), box.upper.abs())
        low = torch.where((box.lower <= 0) & (box.upper >= 0), 0.0, torch.minimum(box.lower.abs(), box.upper.abs()))
        return Interval.between(low**2, high**2)

    model = nn.Sequential(nn.Linear(2, 3), Squared(), nn.Linear(3, 2))
    x = torch.rand(4, 2)
    box = linf_box(x, 0.2)
    found = IntervalBounds(model)(box).output
    for point in (box.lower, box.upper, x):
        assert_inside(model(point), found, "the output", slack=1e-6)


def test_a_copied_network_carries_no_graph():
    """Fails when a deep copy of a network between forward and backward pass fails at tensors that have a graph."""
    model = network(["conv_norm", "relu"], [], 0).train()
    IntervalBounds(model)
    model(torch.rand(4, 2, 8, 8, dtype=torch.float64))
    copied = copy.deepcopy(model)
    IntervalBounds(copied)
    copied(torch.rand(4, 2, 8, 8, dtype=torch.float64))


def test_the_network_is_left_as_it_was():
    """Fails when tracing leaves constants in the network, or removing leaves hooks."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(operator.add(self.norm(x), torch.ones(2)))

    model = Constant()
    before = set(vars(model))
    bounds = IntervalBounds(model)
    assert set(vars(model)) == before
    bounds.remove()
    assert not model._forward_pre_hooks
    assert not model.norm._forward_pre_hooks


def test_bounds_ignore_autocast():
    """Fails when bounds are computed in bfloat16, which rounds by more than a margin."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    bounds, x = IntervalBounds(model), torch.rand(5, 4)
    exact = bounds(linf_box(x, 0.1)).output.lower
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bounds(linf_box(x, 0.1)).output.lower, exact)


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (lambda x: x / -2.0, (-1.0, 0.5)),
        (lambda x: 3.0 - x, (1.0, 4.0)),
        (lambda x: torch.sub(x, x * 0.0, alpha=2.0), (-1.0, 2.0)),
        (lambda x: -x * 2.0, (-4.0, 2.0)),
        (lambda x: x + torch.ones(1, 1), (0.0, 3.0)),
        (lambda x: torch.stack([x, x], dim=1).sum(dim=1), (-2.0, 4.0)),
        (lambda x: F.hardtanh(x, 0.0, 1.0), (0.0, 1.0)),
        (lambda x: torch.minimum(x, x - 1.0).view(x.size(0), -1), (-2.0, 1.0)),
    ],
)
def test_arithmetic_is_as_tight_as_can_be(function, ends):
    """Fails when a rule is sound, but wider than the function: a radius that is not divided, say."""

    class Calls(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.warns(UserWarning, match="looser"):
        bounds = IntervalBounds(Calls())
    found = bounds(Interval.between(torch.full((1, 1), -1.0), torch.full((1, 1), 2.0))).output
    assert (found.lower.item(), found.upper.item()) == ends
