"""Weights and states in few bits around any optimizer; loss scaling; error feedback."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regularized.compression.low_precision.codebook import dynamic_tree, evenly_above_zero
from regularized.compression.low_precision.elements import FixedPoint
from regularized.compression.low_precision.feedback import ErrorFeedback, qsgd
from regularized.compression.low_precision.formats import Encoded
from regularized.compression.low_precision.loss_scaling import LossScaler
from regularized.compression.low_precision.optimizer import (
    STATE_FORMATS,
    LowPrecisionOptimizer,
    join_float32,
    split_float32,
)

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A regression and its loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    x, y = torch.randn(64, 16), torch.randn(64, 8)
    return net, lambda: (net(x.to(dtype)).float() - y).square().mean()


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> float:
    """The last loss."""
    value = loss()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item()


@pytest.mark.parametrize("kind", list(INNER))
def test_without_formats_it_is_the_optimizer_bit_for_bit(kind: str) -> None:
    """Fails when the portions lose a group's options or a step's count."""
    (one, loss_one), (two, loss_two) = problem(), problem()
    train(INNER[kind](one.parameters()), loss_one, 5)
    train(LowPrecisionOptimizer(INNER[kind](two.parameters())), loss_two, 5)
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", list(INNER))
@pytest.mark.parametrize("states", ["8bit", "fp8"])
def test_states_in_eight_bits_train_as_well(kind: str, states: Any) -> None:
    """Fails on second moments coded with a sign, or a scale that belongs to another block."""
    (one, loss_one), (two, loss_two) = problem(), problem()
    plain = train(INNER[kind](one.parameters()), loss_one, 60)
    optimizer = LowPrecisionOptimizer(INNER[kind](two.parameters()), states=states, smallest=64)
    few = train(optimizer, loss_two, 60)
    assert abs(few - plain) < 0.05
    state = optimizer.state[next(two.parameters())]
    assert all(v.dtype == torch.uint8 for k, v in state.items() if k.endswith(".codes"))


def test_four_bits_are_packed_and_never_divide_by_zero() -> None:
    """Fails when second moments may become 0, which makes a step infinite; or a byte holds one code."""
    net, loss = problem()
    optimizer = LowPrecisionOptimizer(INNER["adamw"](net.parameters()), states="4bit", smallest=64)
    assert train(optimizer, loss, 60) < 0.9
    weight = next(net.parameters())
    state = optimizer.state[weight]
    assert state["exp_avg_sq.codes"].numel() == weight.numel() / 2
    form = STATE_FORMATS["4bit"]
    encoded = Encoded(state["exp_avg_sq.codes"], (state["exp_avg_sq.scale"],))
    values = form.decode(encoded, "exp_avg_sq", weight.shape)
    assert bool((values > 0).all())


@pytest.mark.parametrize("name", list(STATE_FORMATS))
def test_a_state_is_within_half_a_step_of_its_block(name: str) -> None:
    """Fails on blocks that are taken along rows, and on an odd tail."""
    form = STATE_FORMATS[name]
    m = torch.randn(37, 29, generator=torch.Generator().manual_seed(0))
    for key, state in (("exp_avg", m), ("exp_avg_sq", m.square())):
        back = form.decode(form.encode(state, key), key, state.shape)
        flat, restored = state.flatten(), back.flatten()
        for start in range(0, flat.numel(), form.block):
            block = flat[start : start + form.block]
            worst = (restored[start : start + form.block] - block).abs().max() / block.abs().max()
            # Half the widest gap: 0.9 / 64 and 0.9 / 4 in the last decade, 32 / 448 in the last binade.
            assert worst <= {"8bit": 0.00704, "4bit": 0.11251, "fp8": 0.0358}[name]


def test_the_codebooks_are_those_of_the_papers() -> None:
    """256 and 128 in a block, and no zero where there must be none."""
    assert STATE_FORMATS["8bit"].signed == dynamic_tree(8)
    assert STATE_FORMATS["8bit"].block == 256
    assert STATE_FORMATS["4bit"].unsigned == evenly_above_zero(4)
    assert STATE_FORMATS["4bit"].block == 128


def test_stochastic_weights_move_where_nearest_ones_stay() -> None:
    """A gradient of a hundredth of a step. Fails when rounding is to nearest, or away from zero always."""
    form = FixedPoint(16, 8)
    moved = {}
    for rounding in ("nearest_even", "stochastic"):
        weight = nn.Parameter(torch.zeros(100, 100))
        optimizer = LowPrecisionOptimizer(torch.optim.SGD([weight], lr=1.0), weights=form, rounding=rounding)  # type: ignore[arg-type]
        for _ in range(50):
            weight.grad = torch.full_like(weight, -0.01 * form.step)
            optimizer.step()
        assert bool((weight / form.step == (weight / form.step).round()).all())
        moved[rounding] = weight.mean().item() / form.step
        stayed = (weight == 0).double().mean().item()
    assert moved["nearest_even"] == 0.0
    assert abs(moved["stochastic"] - 0.5) < 4 * math.sqrt(0.5 / 10_000)
    assert abs(stayed - 0.99**50) < 0.03  # every step draws anew, or the same few would move each time


def test_bfloat16_parameters_are_stepped_in_float32() -> None:
    """Moments of real bfloat16 weights are float32, their residue makes them exact. Fails on a step in bfloat16."""
    net, loss = problem(torch.bfloat16)
    optimizer = LowPrecisionOptimizer(INNER["adamw"](net.parameters()), weights="bf16", seed=1)
    before = loss().item()
    assert train(optimizer, loss, 60) < 0.75 * before
    weight = next(net.parameters())
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    exact, rounded = nn.Parameter(torch.randn(50, 50)), None
    rounded = nn.Parameter(split_float32(exact.detach())[0])
    one, two = torch.optim.SGD([exact], lr=0.01), torch.optim.SGD([rounded], lr=0.01)
    both = LowPrecisionOptimizer(two, weights="bf16_residual")
    with torch.no_grad():
        exact.copy_(rounded)
    for i in range(20):
        g = torch.randn(50, 50, generator=torch.Generator().manual_seed(i)).bfloat16()
        exact.grad, rounded.grad = g.float(), g
        one.step()
        both.step()
    assert torch.equal(join_float32(rounded.detach(), both.state[rounded]["residual"]), exact.detach())


def test_a_split_float_is_whole_again() -> None:
    """All patterns of finite numbers. Fails on the tie, and on negative halves."""
    draws = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    x = draws.view(torch.float32)
    x = x[torch.isfinite(x) & (x.abs() < 3e38)]
    high, rest = split_float32(x)
    assert torch.equal(join_float32(high, rest).view(torch.int32), x.view(torch.int32))
    assert float(((high.float() - x).abs() / x.abs().clamp(min=1e-30)).max()) <= 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    """Codes, scales, residues and draws. Fails on torch's casting of codes to the parameter's type."""

    def fresh() -> tuple[nn.Module, Callable[[], Tensor], LowPrecisionOptimizer]:
        net, loss = problem(dtype)
        inner = INNER["adamw"](net.parameters())
        return net, loss, LowPrecisionOptimizer(inner, weights="bf16", states="8bit", smallest=64, seed=3)

    whole, loss, optimizer = fresh()
    train(optimizer, loss, 4)
    saved, model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(whole.state_dict())
    train(optimizer, loss, 4)
    resumed, loss, again = fresh()
    resumed.load_state_dict(model)
    again.load_state_dict(saved)
    train(again, loss, 4)
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_schedulers_closures_and_groups_work_as_ever() -> None:
    """Fails when the wrapper's groups are not the optimizer's."""
    net, loss = problem()
    inner = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
    optimizer = LowPrecisionOptimizer(inner, weights="bf16")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    assert optimizer.step(closure) > 0
    schedule.step()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(inner.param_groups) == 5


def test_a_group_may_stay_in_full_precision() -> None:
    """Fails when a bias that is left out is refused, or rounded, all the same."""
    bias = nn.Parameter(torch.full((3,), 0.3))
    bias.grad = torch.zeros(3)
    LowPrecisionOptimizer(torch.optim.SGD([{"params": [bias], "weights": None}], lr=1.0), weights="int4").step()
    assert torch.equal(bias, torch.full((3,), 0.3))


# -- loss scaling ---------------------------------------------------------------------------------


def test_a_scaled_step_is_the_plain_step_bit_for_bit() -> None:
    """Powers of two go in and out exactly. Fails when gradients are divided before they are summed up."""
    (one, loss_one), (two, loss_two) = problem(), problem()
    plain, scaled, scaler = INNER["adamw"](one.parameters()), INNER["adamw"](two.parameters()), LossScaler()
    for _ in range(5):
        plain.zero_grad()
        loss_one().backward()
        plain.step()
        scaled.zero_grad()
        scaler(loss_two()).backward()
        assert scaler.step(scaled)
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)


def test_a_step_with_infinity_is_left_out() -> None:
    """Fails when weights or moments change, or the scale stays."""
    net, loss = problem()
    optimizer, scaler = INNER["adamw"](net.parameters()), LossScaler(scale=8.0)
    loss().backward()
    first = next(net.parameters())
    assert first.grad is not None
    first.grad[0, 0] = math.inf
    before = [p.detach().clone() for p in net.parameters()]
    assert not scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    assert (scaler.scale, scaler.skipped, len(optimizer.state)) == (4.0, 1, 0)


def test_it_is_gradscaler_over_five_thousand_events() -> None:
    """The same scale and the same steps, event by event. Fails on a count that is not set back."""
    ours, theirs = LossScaler(interval=7), torch.amp.GradScaler("cpu", growth_interval=7)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=1.0) for w in weights]
    theirs.scale(torch.zeros(1))
    bad = torch.rand(5000, generator=torch.Generator().manual_seed(0)) < 0.09  # halvings and doublings in balance
    for event in bad.tolist():
        for w in weights:
            w.grad = torch.full((1,), math.nan if event else 1.0)
        ours.step(optimizers[0])
        theirs.step(optimizers[1])
        theirs.update()
        assert ours.scale == theirs.get_scale()
        assert torch.equal(weights[0], weights[1])
    again = LossScaler()
    again.load_state_dict(ours.state_dict())
    assert again.state_dict() == ours.state_dict()


def test_a_static_scale_and_bad_gradients() -> None:
    """Fails when half-precision gradients are divided silently."""
    scaler = LossScaler(scale=4.0, interval=None)
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.inf, 0.0])
    assert not scaler.step(torch.optim.SGD([weight], lr=1.0))
    assert scaler.scale == 4.0
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="a gradient is float16"):
        scaler.step(torch.optim.SGD([half], lr=1.0))
    brain = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    brain.grad = torch.ones_like(brain)
    with pytest.warns(UserWarning, match="loss scaling does nothing for bfloat16"):
        scaler.step(torch.optim.SGD([brain], lr=1.0))
    with pytest.raises(ValueError, match="scale must be positive"):
        LossScaler(scale=0.0)


# -- communication --------------------------------------------------------------------------------


def test_error_feedback_loses_nothing_in_the_long_run() -> None:
    """The sum of what is sent is the sum of what was to be sent, but for the last error. Fails without the memory."""
    feedback = ErrorFeedback("binary")
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 9, generator=generator) for _ in range(50)]
    sent = [feedback("w", g) for g in gradients]
    torch.testing.assert_close(sum(sent) + feedback.errors["w"], sum(gradients))
    again = ErrorFeedback("binary")
    again.load_state_dict(feedback.state_dict())
    assert torch.equal(again("w", gradients[0]), feedback("w", gradients[0]))


def test_qsgd_is_unbiased_and_on_its_levels() -> None:
    """Fails on rounding to nearest, and on a zero gradient divided by its norm."""
    g = torch.tensor([3.0, -4.0, 0.1])
    drawn = torch.stack([qsgd(g, 4, generator=torch.Generator().manual_seed(i)) for i in range(4000)])
    levels = drawn / g.norm() * 4
    torch.testing.assert_close(levels, levels.round())
    spread = g.norm() / 4 / 2 / math.sqrt(4000)
    assert bool(((drawn.mean(0) - g).abs() < 4 * spread).all())
    assert torch.equal(qsgd(torch.zeros(3), 4), torch.zeros(3))
    with pytest.raises(ValueError, match="levels must be"):
        qsgd(g, 0)
