"""The linear layer: each product gets its own formats along its own axis, and full precision is plain torch."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.low_precision.blocks import MX, Scaled
from regularized.compression.low_precision.delayed import AmaxHistory, Delayed
from regularized.compression.low_precision.hadamard import hadamard
from regularized.compression.low_precision.layer import LowPrecisionLinear, Observation
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.products import Accumulator, integer_product, why_not_hardware
from regularized.compression.low_precision.recipe import RECIPES, Operand, Product, Recipe, fp8_hybrid, uniform
from regularized.compression.low_precision.rounding import Rounder

IN, OUT, ROWS = 96, 64, 40


def pair(recipe: Recipe, *, bias: bool = True) -> tuple[LowPrecisionLinear, nn.Linear]:
    """The layer and the plain one with the same parameters."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias)
    return LowPrecisionLinear.of(copy.deepcopy(plain), recipe), plain


def data() -> tuple[Tensor, Tensor]:
    """An input that needs a gradient, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, IN, generator=generator, requires_grad=True)
    return x, torch.randn(ROWS, OUT, generator=generator)


def step(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of input and weight."""
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), g)
    return y.detach(), dx, dw


def test_full_precision_is_plain_torch_bit_for_bit() -> None:
    """Fails when the layer of a full recipe computes anything itself."""
    layer, plain = pair(RECIPES["full"])
    x, g = data()
    for ours, theirs in zip(step(layer, x, g), step(plain, x, g)):
        assert torch.equal(ours, theirs)


def test_six_operands_have_six_formats_along_six_axes() -> None:
    """Every operand another format. Fails on a swapped operand, a wrong axis, or a rounding that is used twice."""
    forms = [MX("e4m3"), MX("e5m2"), MX("e3m2"), MX("e2m3"), MX("e2m1"), MX("int8")]
    operands = [Operand(form) for form in forms]
    recipe = Recipe("six", Product(*operands[:2]), Product(*operands[2:4]), Product(*operands[4:]))
    layer, plain = pair(recipe)
    x, g = data()
    with torch.no_grad():  # blocks along one axis must not look like blocks along the other
        for tensor in (layer.weight, x, g):
            tensor.mul_(torch.exp(2 * torch.randn(len(tensor), 1)) * torch.exp(2 * torch.randn(tensor.shape[1])))
        plain.weight.copy_(layer.weight)
    y, dx, dw = step(layer, x, g)
    w, b = plain.weight.detach(), plain.bias.detach()
    a = x.detach()
    assert torch.equal(y, forms[0].quantize(a) @ forms[1].quantize(w).T + b)
    assert torch.equal(dx, forms[2].quantize(g) @ forms[3].quantize(w, axis=0))
    assert torch.equal(dw, forms[4].quantize(g, axis=0).T @ forms[5].quantize(a, axis=0))


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("full",)])
def test_every_recipe_trains(name: str) -> None:
    """Loss goes down in 30 steps. Fails on a recipe whose gradient points elsewhere, or is NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    net[0] = LowPrecisionLinear.of(net[0], RECIPES[name])
    x = torch.randn(64, 32)
    target = x[:, :4].argmax(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("rotation", ["deterministic", "random"])
def test_a_rotation_changes_the_rounding_and_not_the_product(rotation: Any) -> None:
    """In float32 operands the rotated product is the plain one. Fails on two operands with different signs."""
    fine = Operand("fp32")
    recipe = Recipe("rotated", *[Product(fine, fine, rotation, 32)] * 3)
    layer, plain = pair(recipe)
    x, g = data()
    for ours, theirs in zip(step(layer, x, g), step(plain, x, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    coarse = Operand("mxfp4")
    turned, _ = pair(Recipe("turned", Product(coarse, coarse, "deterministic", 32)))
    w, a = turned.weight.detach(), x.detach()
    form = as_format("mxfp4")
    expected = form.quantize(hadamard(a, block=32)) @ form.quantize(hadamard(w, block=32)).T + turned.bias
    torch.testing.assert_close(turned(x), expected, rtol=0, atol=0)


def test_random_signs_are_new_for_every_product_and_none_in_evaluation() -> None:
    """Fails when a draw is kept, or evaluation depends on chance."""
    layer, _ = pair(RECIPES["mxfp4_random"])
    x, g = data()
    first, second = step(layer, x, g)[2], step(layer, x, g)[2]
    assert not torch.equal(first, second)
    layer.eval()
    position = layer.stream.position
    assert torch.equal(step(layer, x, g)[2], step(layer, x, g)[2])
    assert layer.stream.position == position


def test_reuse_takes_the_forward_values() -> None:
    """BitNet: dx = g Q(w) with the forward's own Q(w). Fails when the weight is rounded anew or not at all."""
    layer, plain = pair(RECIPES["bitnet"])
    x, g = data()
    y, dx, dw = step(layer, x, g)
    w = as_format("ternary").quantize(plain.weight.detach())
    a = Scaled("int8", "row").quantize(x.detach())
    assert torch.equal(y, a @ w.T + plain.bias)
    assert torch.equal(dx, g @ w)
    assert torch.equal(dw, g.T @ a)


def test_nothing_is_kept_that_backward_does_not_read() -> None:
    """Where one rounding serves both products the rounded tensor is kept, else the original: never both."""
    for recipe, most in ((RECIPES["fp8_hybrid"], 2), (RECIPES["mxfp8"], 2)):
        layer, _ = pair(recipe)
        x, _ = data()
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        assert len(kept) == most
        assert sum(kept) == ROWS * IN + OUT * IN


def test_one_rounding_serves_both_products_where_it_can() -> None:
    """Counted: six operands, of which a scale a tensor needs three roundings, blocks need six."""
    for recipe, expected in ((RECIPES["fp8_hybrid"], 3), (RECIPES["mxfp8"], 6), (RECIPES["jetfire"], 3)):
        layer, _ = pair(recipe)
        seen: list[Observation] = []
        layer.observer = lambda _, observation, seen=seen: seen.append(observation)  # type: ignore[misc]
        x, g = data()
        step(layer, x, g)
        assert len(seen) == expected


def test_shapes_types_and_empty_batches() -> None:
    """(..., in) of any rank, half precision in and out, no rows at all. Fails on a view of the wrong shape."""
    layer, _ = pair(RECIPES["mxfp8"])
    assert layer(torch.randn(2, 3, IN)).shape == (2, 3, OUT)
    assert layer(torch.randn(IN)).shape == (OUT,)
    for name in ("mxfp8", "fp8_delayed", "mxfp4_random"):
        some, _ = pair(RECIPES[name])
        x = torch.randn(0, IN, requires_grad=True)
        some(x).sum().backward()
        assert some.weight.grad is not None
        assert bool((some.weight.grad == 0).all())
    assert layer(torch.randn(4, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_float64_stays_float64() -> None:
    """Fails when the products go through float32."""
    torch.manual_seed(0)
    layer = LowPrecisionLinear(IN, OUT, recipe=RECIPES["mxfp8"], dtype=torch.float64)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    form = MX("e4m3", scale="rceil")
    assert torch.equal(layer(x), form.quantize(x) @ form.quantize(layer.weight).T + layer.bias)


def test_delayed_scaling_takes_the_past() -> None:
    """The largest magnitude of the last two steps, of this step not yet. Fails when the present decides the scale."""
    history = AmaxHistory(Delayed("e4m3", length=2))
    values = (896.0, 1.0, 500.0, 1.0, 1.0, 500.0)
    outputs = [history(torch.tensor([value]), Rounder()).item() for value in values]
    assert outputs[0] == 448.0  # nothing known: the scale is 1
    assert outputs[1] == 1.0
    assert outputs[2] == 512.0  # 896 is known, and the grid is that of 2
    assert outputs[5] == 1.0  # 896 and 500 have left the history, the largest known is 1
    history.eval()
    before = history.amax.clone()
    history(torch.tensor([9.0]), Rounder())
    assert torch.equal(history.amax, before)


def test_delayed_histories_are_state_and_resume() -> None:
    """Saved and loaded, training goes on bit for bit. Fails when the amax history stays behind."""
    layer, _ = pair(RECIPES["fp8_delayed"])
    x, g = data()
    step(layer, x, g)
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        "histories.forward_left.amax",
        "histories.forward_right.amax",
        "histories.input_gradient_left.amax",
    }
    fresh, _ = pair(RECIPES["fp8_delayed"])
    fresh.load_state_dict(layer.state_dict())
    for ours, theirs in zip(step(layer, x, g), step(fresh, x, g)):
        assert torch.equal(ours, theirs)


def test_draws_resume_from_a_checkpoint() -> None:
    """The layer's state holds how much was drawn. Fails when a resumed run draws the same numbers again."""
    layer, _ = pair(RECIPES["mxfp4_random"])
    x, g = data()
    step(layer, x, g)
    state = copy.deepcopy(layer.state_dict())
    expected = step(layer, x, g)
    fresh, _ = pair(RECIPES["mxfp4_random"])
    fresh.load_state_dict(state)
    for ours, theirs in zip(step(fresh, x, g), expected):
        assert torch.equal(ours, theirs)
    del state["draws"]
    with pytest.raises(RuntimeError, match="draws"):
        fresh.load_state_dict(state)


def test_the_hardware_gives_what_the_emulation_gives() -> None:
    """torch's kernels for FP8 and INT8, on this processor. Fails on transposed scales and on codes that are off."""
    torch.manual_seed(0)
    x, g = torch.randn(48, IN, requires_grad=True), torch.randn(48, OUT)
    for recipe in (fp8_hybrid(), uniform("int8"), uniform("int8_row")):
        layer, _ = pair(recipe)
        real, _ = pair(dataclasses.replace(recipe, hardware=True))
        for ours, theirs in zip(step(real, x, g), step(layer, x, g)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_limit_of_gpus_is_not_named_on_a_processor() -> None:
    """Fails when a processor is told what is a limit of GPUs."""
    assert "E5M2 by E5M2" not in why_not_hardware(Scaled("e5m2"), Scaled("e5m2"), torch.device("cpu"))


def test_integer_products_are_exact() -> None:
    """Against int64. Fails on sums in float32, which are wrong from 2^24 on."""
    a = torch.randint(-128, 128, (33, 4096), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    b = torch.full((4096, 24), 127, dtype=torch.int8)
    a[0] = 127
    expected = (a.long() @ b.long()).int()
    assert torch.equal(integer_product(a, b), expected)
    assert expected.max() > 2**24


def test_an_accumulator_loses_what_its_format_loses() -> None:
    """Fails when the chunks are summed in float32 all the same."""
    x = torch.ones(1, 8192)
    assert Accumulator("fp16", 1).product(x, x.T).item() == 2048.0
    assert Accumulator("fp16", 64).product(x, x.T).item() == 8192.0
    full = Operand()
    layer, plain = pair(Recipe("sums", Product(full, full, accumulator=Accumulator("bf16", 32))))
    y = layer(data()[0])
    assert not torch.allclose(y, plain(data()[0]), atol=1e-4)
    torch.testing.assert_close(y, plain(data()[0]), atol=0.05, rtol=0.05)
