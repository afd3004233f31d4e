"""The sparse plus low-rank layer: its mathematics, its memory, and models that are made of it."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.language_models import small_lm
from regularized.mechanisms.surgery import check_optimizer_is_current
from regularized.pretraining.sltrain import SLTrain, SparseLowRankLinear, convert, init_from_dense, merge
from regularized.pretraining.sltrain.product import sparse_low_rank_linear


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def a_layer(
    inputs=12, outputs=10, *, rank=3, density=0.1, trained_scale=False, bias=True, dtype=torch.float64, **settings
):
    """One whose factors are all away from zero."""
    layer = SparseLowRankLinear(
        inputs,
        outputs,
        bias,
        rank=rank,
        density=density,
        trained_scale=trained_scale,
        generator=draws(),
        dtype=dtype,
        **settings,
    )
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype, generator=draws(number + 1)))
    return layer


def by_hand(layer):
    """The dense weight, entry by entry."""
    product = torch.zeros(layer.shape, dtype=torch.float64)
    if layer.rank:
        product = layer.left.detach() @ layer.right.detach()
        product = product * (
            math.tanh(layer.trained_scale.item()) if layer.trained_scale is not None else layer.alpha / layer.rank
        )
    for number in range(0 if layer.values is None else len(layer.values)):
        row, column = divmod(int(layer.positions[number]), layer.in_features)
        product[row, column] += layer.values[number].item()
    return product


LAYERS = [
    pytest.param({}, id="both"),
    pytest.param({"bias": False}, id="no bias"),
    pytest.param({"rank": 0}, id="entries alone"),
    pytest.param({"density": 0.0}, id="factors alone"),
    pytest.param({"trained_scale": True}, id="trained scale"),
]


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12), (2, 0, 12)])
def test_it_is_the_dense_layer_of_its_weight(settings, shape):
    """Fails when scale, positions or bias enter wrongly, or other numbers of leading dimensions, or none at all."""
    layer, x = a_layer(**settings), torch.randn(shape, dtype=torch.float64, generator=draws(9))
    weight = by_hand(layer)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", LAYERS)
def test_gradients_first_and_second(settings):
    """Fails when a gradient is wrong, or may not be differentiated again (penalties on gradients)."""
    layer = a_layer(4, 3, rank=settings.pop("rank", 2), density=settings.pop("density", 0.3), **settings)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=draws(9), requires_grad=True)

    def of(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (x, *parameters))
    assert torch.autograd.gradgradcheck(of, (x, *parameters))


def test_closed_forms_of_the_gradients():
    """Fails when a gradient is not the sheet's: dB = s G A^T, dA = s B^T G, dv = G at the positions, and tanh's."""
    layer = a_layer(trained_scale=True)
    x, g = (
        torch.randn(7, 12, dtype=torch.float64, generator=draws(8)),
        torch.randn(7, 10, dtype=torch.float64, generator=draws(9)),
    )
    layer(x).backward(g)
    dense, s = g.T @ x, layer.trained_scale.detach().tanh()
    product = layer.left.detach() @ layer.right.detach()
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(layer.left.grad, s * dense @ layer.right.detach().T)
    close(layer.right.grad, s * layer.left.detach().T @ dense)
    close(layer.values.grad, dense.flatten()[layer.positions.long()])
    close(layer.bias.grad, g.sum(0))
    close(layer.trained_scale.grad, (1 - s**2) * (dense * product).sum())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("settings", LAYERS)
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(settings, autocast):
    """Fails when autograd keeps the dense weight, the dense product or a mask between forward and backward pass."""
    layer = a_layer(40, 30, dtype=torch.float32, **settings)
    x = torch.randn(2, 40, requires_grad=True)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = layer(x)
    assert sizes
    assert max(sizes) < 40 * 30 / 2
    out.float().sum().backward()
    # The watch itself works: a parametrised dense weight is seen.
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.linear(x, layer.weight)
    assert 40 * 30 in sizes


def test_positions():
    """Fails when positions repeat, lie outside, are unsorted or too wide, or their number is rounded up."""
    layer = SparseLowRankLinear(50, 41, rank=2, density=0.03, generator=draws())
    found = layer.positions
    assert found.dtype == torch.int32
    assert len(found) == len(set(found.tolist())) == math.floor(0.03 * 50 * 41) == 61
    assert found.tolist() == sorted(found.tolist())
    assert 0 <= int(found[0]) <= int(found[-1]) < 50 * 41
    with torch.no_grad():
        layer.left.normal_(generator=draws(1))
        rest = layer.weight - 8.0 * layer.left @ layer.right
    rest[rest.abs() < 1e-5] = 0
    assert rest.flatten().nonzero().flatten().tolist() == found.tolist()


def test_positions_of_weights_beyond_32_bits(monkeypatch):
    """Fails when positions of a huge weight overflow; nothing of its size is made here."""
    monkeypatch.setattr("regularized.pretraining.sltrain.layer._INT32", 100)
    assert SparseLowRankLinear(11, 10, rank=2, density=0.1).positions.dtype == torch.int64
    layer = SparseLowRankLinear(2**16, 2**15, rank=1, density=1e-6, device="meta")
    assert layer.positions.shape == (2147,)


def test_positions_are_the_generators():
    """Fails when layers of one shape share positions, processes draw different ones, or the global state moves."""

    def positions(seed):
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        convert(model, rank=1, density=0.1, include=[""], generator=draws(seed))
        return [layer.positions.tolist() for layer in model]

    torch.manual_seed(3)
    nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    after = torch.rand(1)
    torch.manual_seed(3)
    one = positions(0)
    assert torch.equal(torch.rand(1), after)
    assert one == positions(0) != positions(1)
    assert one[0] != one[1]


def test_start():
    """Fails when the start is not the paper's (left factor zero, only entries act), or the first step is none."""
    layer = SparseLowRankLinear(100, 80, rank=8, density=0.05, generator=draws())
    x = torch.randn(30, 100, generator=draws(1))
    alone = SparseLowRankLinear(100, 80, rank=0, density=0.05)
    alone.load_state_dict({name: layer.state_dict()[name] for name in ("values", "positions", "bias")})
    assert torch.equal(layer(x), alone(x))
    layer(x).square().sum().backward()
    assert not layer.right.grad.any()
    assert layer.left.grad.any()
    for parameter, bound in ((layer.right, 0.1), (layer.values, 0.1), (layer.bias, 80**-0.5)):
        assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound


def test_start_without_entries():
    """Fails when factors alone start at zero, where all gradients are zero, or at another size than nn.Linear."""
    layer = SparseLowRankLinear(400, 300, rank=50, density=0.0, alpha=7.0, generator=draws())
    assert float(layer.weight.std()) == pytest.approx(float(nn.Linear(400, 300).weight.std()), rel=0.03)
    model = small_lm(0, 16, width=32, layers=1, heads=1)
    convert(model, rank=8, density=0.0, generator=draws())
    model(torch.arange(16)[None]).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


def test_all_entries_and_no_factors_is_a_dense_layer():
    """Fails when training by entries is not training by weights: SGD must take the same way."""
    dense = nn.Linear(6, 5, dtype=torch.float64)
    sparse = SparseLowRankLinear(6, 5, rank=0, density=1.0, dtype=torch.float64)
    with pytest.warns(UserWarning, match="30 trained numbers"):
        SparseLowRankLinear(6, 5, rank=0, density=1.0)
    sparse.load_state_dict(
        {"values": dense.weight.detach().flatten(), "positions": torch.arange(30), "bias": dense.bias.detach()}
    )
    x = torch.randn(9, 6, dtype=torch.float64, generator=draws())
    for layer in (dense, sparse):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            layer(x).tanh().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(sparse.bias, dense.bias, rtol=0, atol=1e-12)


def test_number_of_trained_numbers():
    """Fails when anything dense is left, or positions are trained."""
    model = small_lm(0, 64, width=32, layers=2, heads=2)
    before = sum(p.numel() for p in model.parameters())
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    names = convert(model, rank=4, density=0.05)
    assert len(names) == len(linears) == 14
    assert all(".attention." in name or ".mlp." in name for name in names)
    saved = sum(m.weight.numel() - 4 * sum(m.weight.shape) - math.floor(0.05 * m.weight.numel()) for m in linears)
    assert sum(p.numel() for p in model.parameters()) == before - saved


def test_bfloat16_rounds_as_the_authors_code():
    """Fails when the sum is formed in another type than theirs: a bfloat16 product, to which entries are added."""
    layer, wide = a_layer(40, 30, dtype=torch.bfloat16), a_layer(40, 30, dtype=torch.float32)
    layer.load_state_dict(wide.state_dict())
    expected = layer.left @ (layer.right * (16.0 / 3))
    expected.view(-1)[layer.positions.long()] += layer.values
    assert torch.equal(layer.weight, expected)
    x = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()))
    out.sum().backward()
    assert wide.values.grad.dtype == torch.float32


# -- models ----------------------------------------------------------------------------------------


def test_merge_leaves_a_plain_model_that_does_the_same():
    """Fails when merging changes outputs, names, mode or type."""
    model = small_lm(0, 64, width=32, layers=1, heads=2).eval()
    names = list(model.state_dict())
    convert(model, rank=4, density=0.05, generator=draws())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=draws(1))
    tokens = torch.arange(20)[None]
    before = model(tokens)
    assert len(merge(model)) == 7
    assert not any(isinstance(m, SparseLowRankLinear) for m in model.modules())
    assert list(model.state_dict()) == names
    assert not model.blocks[0].mlp.up.training
    torch.testing.assert_close(model(tokens), before, rtol=1e-6, atol=1e-6)


def test_a_state_brings_its_positions():
    """Fails when positions are not in the state, do not survive a change of type, or are not copied."""
    one = a_layer()
    state = one.to(torch.float32).state_dict()
    assert state["positions"].dtype == torch.int32
    other = SparseLowRankLinear(12, 10, rank=3, density=0.1, generator=draws(5))
    assert not torch.equal(other.positions, one.positions)
    other.load_state_dict(state)
    assert torch.equal(other.weight, one.weight)
    copied = copy.deepcopy(one)
    assert torch.equal(copied.positions, one.positions)
    copied.positions.zero_()
    copied.left.data.zero_()
    assert one.positions.any()
    assert one.left.any()


def test_meta_device():
    """Fails when building without memory draws or needs some, or the start there is not that of a usual one."""
    with torch.device("meta"):
        model = small_lm(0, 64, width=32, layers=1, heads=2)
        convert(model, rank=4, density=0.05)
    assert all(t.is_meta for t in model.state_dict().values())
    layer = model.blocks[0].mlp.up.to_empty(device="cpu")
    layer.reset_parameters(draws())
    usual = SparseLowRankLinear(32, layer.out_features, False, rank=4, density=0.05, generator=draws())
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in usual.state_dict().items())
    # Or the state of a model that is there.
    other = SparseLowRankLinear(32, layer.out_features, False, rank=4, density=0.05, device="meta")
    other.load_state_dict(usual.state_dict(), assign=True)
    assert torch.equal(other.weight, usual.weight)


def test_init_from_dense():
    """Fails when the start is not the best of rank r with the rest's entries, or what stays dense is not loaded."""
    dense = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    model = copy.deepcopy(dense)
    convert(model, rank=5, density=0.2, include=["0"], generator=draws())
    nn.init.zeros_(model[2].weight)
    lost = init_from_dense(model, dense.state_dict())
    assert torch.equal(model[2].weight, dense[2].weight)
    assert torch.equal(model[0].bias, dense[0].bias)
    u, sigma, v = torch.linalg.svd(dense[0].weight.detach(), full_matrices=False)
    best = u[:, :5] * sigma[:5] @ v[:5]
    expected = best.flatten()
    at = model[0].positions.long()
    expected[at] = dense[0].weight.detach().flatten()[at]
    torch.testing.assert_close(model[0].weight.flatten(), expected, rtol=1e-5, atol=1e-5)
    missing = (dense[0].weight - model[0].weight).norm() / dense[0].weight.norm()
    assert lost == {"0": pytest.approx(missing.item(), rel=1e-4)}
    # All of the rank, and nothing is lost.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = SparseLowRankLinear(20, 16, rank=18, density=0.0, trained_scale=True)
    assert whole.set_weight(dense[0].weight) < 1e-5
    torch.testing.assert_close(whole.weight, dense[0].weight, rtol=1e-5, atol=1e-5)


def test_an_optimizer_from_before_is_found_out():
    """Fails when training what is no longer in the model passes in silence."""
    model = nn.Sequential(nn.Linear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, rank=2, density=0.1, include=[""])
    with pytest.raises(ValueError, match="built before the model was changed"):
        check_optimizer_is_current(model, optimizer)


def test_a_step_per_parameter_within_the_backward_pass():
    """Fails when a parameter gets its gradient twice or never: the authors' updates per layer rest on hooks."""
    whole, layerwise = (a_layer(dtype=torch.float64) for _ in range(2))
    x = torch.randn(6, 12, dtype=torch.float64, generator=draws(2))
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.1)
    whole(x).square().sum().backward()
    optimizer.step()
    for parameter in layerwise.parameters():
        own = torch.optim.Adam([parameter], lr=0.1)

        def step(p, own=own):
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    layerwise(x).square().sum().backward()
    for ours, theirs in zip(layerwise.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert ours.grad is None


def test_the_term_is_the_function():
    """Fails when a setting of the term is lost on its way, or attaching twice draws anew."""
    model, other = (nn.ModuleDict({"mlp": nn.Linear(20, 20), "head": nn.Linear(20, 20)}) for _ in range(2))
    term = SLTrain(rank=2, density=0.1, alpha=3.0, trained_scale=True, exclude=["head"], include=[""], seed=4)
    term.attach(model)
    convert(other, rank=2, density=0.1, alpha=3.0, trained_scale=True, include=["mlp"], generator=draws(4))
    once = {name: tensor.clone() for name, tensor in model["mlp"].state_dict().items()}
    assert all(torch.equal(tensor, once[name]) for name, tensor in other["mlp"].state_dict().items())
    term.attach(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model["mlp"].state_dict().items())
    assert isinstance(model["head"], nn.Linear)


def test_the_function_without_a_module():
    """Fails when an input that needs no gradient costs one, or a frozen factor gets one."""
    left = torch.randn(4, 2, requires_grad=True)
    right, values = torch.randn(2, 6), torch.randn(3, requires_grad=True)
    x = torch.randn(5, 6)
    sparse_low_rank_linear(x, (4, 6), left, right, values, torch.tensor([0, 5, 7]), None, 0.5).sum().backward()
    assert x.grad is right.grad is None
    assert left.grad is not None
    assert values.grad is not None
