"""GLAD: the mathematics of both gradients, and an optimizer that takes two passes wherever one was.

The authors' formula is unknown; golden vectors (in the contract suite) are our own, so the tests below derive each part
again. Tried as mutations, and seen: both signs of the readings, the ends of the interpolation, 0 / 0, other dropout
masks, batch statistics that count twice, a lost or late count of steps, settings that are not restored, gradients that
add up over both passes, a second pass in vain, gradients that are views of DDP's buckets, a step downhill, weights
restored by subtraction, terms that remember the second pass.
"""

import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.processes import run_launched
from regularized.fine_tuning.glad.optimizer import GLAD, steer
from regularized.mechanisms.distributed import leave_process_group
from regularized.papers.glad import conformance
from regularized.training import Compute, CrossEntropy, Logging, TensorData, Trainer

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
MODES = ["interpolate", "project", "steer"]
SHAPES = [(3, 4), (5,), (), (2, 1, 3)]


def gradients(seed=0, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def build(dropout=0.0, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)]
    return nn.Sequential(*(layers[:1] + [nn.BatchNorm1d(6)] * norm + layers[1:])).double()


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def closure_of(model, x, y, seen=None):
    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if seen is not None:
            seen.append(loss.detach())
        return loss

    return closure


def weights(model):
    return flat(p.detach() for p in model.parameters()).clone()


# -- combining ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_steering_by_a_slow_loop(seed):
    """Fails for a wrong sign, for |g| in place of |g_s|, for a mean in place of a sum, for one product a tensor."""
    g, ref = gradients(seed), gradients(seed + 10)
    product = sum(float((a * b).sum()) for a, b in zip(g, ref, strict=True))
    square = sum(float((b * b).sum()) for b in ref)
    expected = {
        "interpolate": [0.7 * a + 0.3 * b for a, b in zip(g, ref, strict=True)],
        "project": [a - product / square * b if product < 0 else a for a, b in zip(g, ref, strict=True)],
        "steer": [a + 0.3 * (1 if product >= 0 else -1) * product / square * b for a, b in zip(g, ref, strict=True)],
    }
    for mode, tensors in expected.items():
        for ours, theirs in zip(steer(g, ref, mode=mode, lam=0.3), tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    alone = [steer([a], [b], mode="project")[0] for a, b in zip(g, ref, strict=True)]
    for ours, theirs in zip(steer(g, ref, mode="project", per_tensor=True), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_projection_never_opposes_the_reference():
    """Fails when the sign of the test is turned: what should stay is projected, and conflicts stay."""
    met = set()
    for seed in range(20):
        g, ref = gradients(seed), gradients(seed + 100)
        out = steer(g, ref, mode="project")
        conflict = bool(flat(g) @ flat(ref) < 0)
        met.add(conflict)
        assert flat(out) @ flat(ref) > -1e-12
        assert torch.equal(flat(out), flat(g)) != conflict
        along = steer(g, ref, mode="steer", lam=0.4)
        assert (flat(along) - flat(g)) @ flat(ref) > 0  # the reference direction is always followed
    assert met == {True, False}


@pytest.mark.parametrize("mode", MODES)
def test_scaling_the_loss_scales_the_gradient(mode):
    """Fails when only one gradient is normalised: a gradient scaler would change the direction."""
    g, ref = gradients(1), gradients(2)
    scaled = steer([1024 * t for t in g], [1024 * t for t in ref], mode=mode)
    torch.testing.assert_close(flat(scaled), 1024 * flat(steer(g, ref, mode=mode)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_zero_reference_and_low_precision(mode, per_tensor):
    """Fails when 0 / 0 is computed, or bfloat16 gradients come back as float32."""
    g = gradients(dtype=torch.bfloat16)
    out = steer(g, [torch.zeros_like(t) for t in g], mode=mode, per_tensor=per_tensor)
    assert all(t.dtype == torch.bfloat16 and bool(t.isfinite().all()) for t in out)
    if mode != "interpolate":
        assert all(torch.equal(a, b) for a, b in zip(out, g, strict=True))


def test_ends_of_the_interpolation():
    """Fails when the weight stands at the wrong gradient."""
    g, ref = gradients(1), gradients(2)
    assert torch.equal(flat(steer(g, ref, lam=0.0)), flat(g))
    assert torch.equal(flat(steer(g, ref, lam=1.0)), flat(ref))


@pytest.mark.parametrize("mode", MODES)
def test_steering_compiles_whole(mode):
    """Fails when a value is read on the host: a graph break, and on a GPU a synchronisation."""
    g, ref = gradients(1), gradients(2)
    torch.compiler.reset()
    compiled = torch.compile(partial(steer, mode=mode), fullgraph=True, backend="eager")
    torch.testing.assert_close(flat(compiled(g, ref)), flat(steer(g, ref, mode=mode)))


# -- two gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.05, 0.7])
def test_quadratic_has_the_gradient_norm_penalty(rho):
    """Fails when the step is normalised tensor by tensor, goes downhill, or is not divided by the norm at all.

    For L = theta H theta / 2 + b theta the reference is g + rho H g / |g|, so that interpolation is the gradient of
    L + lam rho |grad L|.
    """
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    curvature, slope = root @ root.T, torch.randn(7, generator=generator, dtype=torch.float64)
    theta = torch.randn(7, generator=generator, dtype=torch.float64)
    parts = [nn.Parameter(t.clone()) for t in theta.split([2, 4, 1])]

    def closure():
        point = torch.cat(parts)
        loss = point @ curvature @ point / 2 + slope @ point
        loss.backward()
        return loss

    GLAD(SGD(parts), rho=rho, lam=0.3).backward(closure)
    point = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(point @ curvature @ point / 2 + slope @ point, point, create_graph=True)
    (penalised,) = torch.autograd.grad(0.3 * rho * g.norm(), point)
    torch.testing.assert_close(flat(p.grad for p in parts), g.detach() + penalised, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [SGD, ADAMW])
def test_interpolation_with_one_is_sam(base):
    """Fails when anything else than the second gradient reaches the base optimizer. Reference: SAM's two steps."""
    ours, theirs, (x, y) = build(), build(), data()
    optimizer, plain = GLAD(base(ours.parameters()), rho=0.1, lam=1.0), base(theirs.parameters())
    for _ in range(5):
        optimizer.step(closure_of(ours, x, y))
        parameters = list(theirs.parameters())
        g = torch.autograd.grad(F.cross_entropy(theirs(x), y), parameters)
        norm = math.sqrt(sum(float(t.square().sum()) for t in g))
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, t in zip(parameters, g, strict=True):
                p += 0.1 * t / norm
        plain.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
        plain.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("off", [{"rho": 0.0}, {"lam": 0.0}])
@pytest.mark.parametrize("mode", MODES)
def test_off_is_the_base_optimizer_bit_for_bit(mode, off):
    """Fails when the second pass is taken in vain, or draws random numbers."""
    ours, theirs, (x, y), seen = build(dropout=0.3), build(dropout=0.3), data(), []
    optimizer, plain = GLAD(ADAMW(ours.parameters()), combine=mode, **off), ADAMW(theirs.parameters())
    torch.manual_seed(3)
    for _ in range(4):
        optimizer.step(closure_of(ours, x, y, seen))
    torch.manual_seed(3)
    for _ in range(4):
        plain.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        plain.step()
    assert len(seen) == 4
    assert torch.equal(weights(ours), weights(theirs))


def test_zero_gradient_moves_nothing():
    """Fails when the zero norm divides: the weights would be nan for ever."""
    model, (x, y) = build(), data()
    before = weights(model)

    def closure():
        loss = F.cross_entropy(model(x), y) * 0
        loss.backward()
        return loss

    GLAD(torch.optim.SGD(model.parameters(), lr=0.1)).step(closure)
    assert torch.equal(weights(model), before)


def test_it_bites():
    """Fails when the weights are put back before the second pass: the two gradients must differ by O(rho)."""
    model, (x, y) = build(), data()
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    distances = []
    for rho in (0.02, 0.04):
        GLAD(SGD(model.parameters()), rho=rho).backward(closure_of(model, x, y))
        distances.append(float((flat(p.grad for p in model.parameters()) - flat(plain)).norm()))
    assert distances[0] > 1e-4
    assert distances[1] / distances[0] == pytest.approx(2.0, rel=0.05)  # first order in rho


# -- what the second pass leaves alone ------------------------------------------------------------


def test_weights_statistics_and_random_numbers_are_those_of_one_forward():
    """Fails when weights are put back by subtraction, batch statistics count twice, or dropout draws twice."""
    model, (x, y) = build(dropout=0.5, norm=True), data()
    model[0].bias.requires_grad_(False)
    reference = copy.deepcopy(model)
    masks = []
    model[3].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GLAD(SGD(p for p in model.parameters() if p.requires_grad), rho=5.0, model=model)
    torch.manual_seed(7)
    loss = optimizer.backward(closure_of(model, x, y))
    state = torch.get_rng_state()
    torch.manual_seed(7)
    expected = F.cross_entropy(reference(x), y)
    assert torch.equal(loss, expected)  # that of the first pass
    assert torch.equal(torch.get_rng_state(), state)
    assert len(masks) == 2
    assert torch.equal(*masks)
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)
    optimizer.step()
    assert torch.equal(model[0].bias, before[1])  # frozen
    assert not torch.equal(model[0].weight, before[0])


def test_random_numbers_go_on_as_after_one_pass_whatever_the_second_draws():
    """Fails when a second pass that draws more (a random layer, an error) shifts all that is drawn later."""
    model, (x, y), seen = build(), data(), []

    def closure():
        torch.rand(3 + 2 * len(seen))
        return closure_of(model, x, y, seen)()

    torch.manual_seed(5)
    GLAD(SGD(model.parameters())).step(closure)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4)[3:], after)


def test_an_error_in_the_second_pass_leaves_the_weights():
    """Fails when an interrupted step leaves perturbed weights behind."""
    model, (x, y), seen = build(), data(), []
    before = weights(model)

    def closure():
        if seen:
            raise KeyboardInterrupt
        return closure_of(model, x, y, seen)()

    with pytest.raises(KeyboardInterrupt):
        GLAD(SGD(model.parameters()), rho=3.0).step(closure)
    assert torch.equal(weights(model), before)


def test_second_pass_at_every_third_step():
    """Fails when the count starts late, drifts, or the steps between are not plain."""
    model, (x, y), seen, calls = build(), data(), [], []
    optimizer = GLAD(SGD(model.parameters()), rho=0.1, every=3)
    for _ in range(7):
        before = len(seen)
        optimizer.step(closure_of(model, x, y, seen))
        calls.append(len(seen) - before)
    assert calls == [2, 1, 1, 2, 1, 1, 2]


def test_micro_batches_are_the_whole_batch():
    """Fails when the step uphill is that of a micro-batch."""
    whole, parts, (x, y) = build(), build(), data()
    one, many = GLAD(SGD(whole.parameters()), rho=0.3), GLAD(SGD(parts.parameters()), rho=0.3)
    for _ in range(4):
        one.step(closure_of(whole, x, y))

        def closure():
            total = 0.0
            for a, b in zip(x.split(5), y.split(5), strict=True):
                loss = F.cross_entropy(parts(a), b, reduction="sum") / len(x)
                loss.backward()
                total += loss.detach()
            return total

        many.step(closure)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-12, atol=1e-12)


# -- an optimizer like any other ------------------------------------------------------------------


def test_schedule_clipping_and_groups_reach_the_base():
    """Fails when the groups are copies, so that a schedule moves nothing, or clipping comes too early."""
    model, (x, y) = build(), data()
    optimizer = GLAD(SGD(model[0].parameters()), rho=0.2)
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.02})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.backward(closure_of(model, x, y))
    unclipped = flat(p.grad for p in model.parameters()).clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    clipped = flat(p.grad for p in model.parameters())
    torch.testing.assert_close(clipped, unclipped * 1e-2 / unclipped.norm(), rtol=1e-3, atol=0)
    before = weights(model)
    optimizer.step()
    first = sum(p.numel() for p in model[0].parameters())
    rates = torch.cat([torch.full((first,), 0.1), torch.full((len(before) - first,), 0.02)]).double()
    torch.testing.assert_close(weights(model), before - rates * clipped)
    schedule.step()
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.05, 0.01]
    assert isinstance(repr(optimizer), str)


@pytest.mark.parametrize("base", [SGD, ADAMW])
def test_state_survives(base):
    """Fails when moments, settings or the count of `every` are lost, or a copy shares them with the original."""
    first, (x, y) = build(), data()
    one = GLAD(base(first.parameters()), rho=0.3, lam=0.8, combine="steer", every=2)
    for _ in range(3):
        one.step(closure_of(first, x, y))
    second = build()
    second.load_state_dict(first.state_dict())
    two = GLAD(base(second.parameters()))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups is two.base.param_groups
    third, three = copy.deepcopy((first, one))
    for _ in range(3):
        for model, optimizer in ((first, one), (second, two), (third, three)):
            optimizer.step(closure_of(model, x, y))
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(first), weights(third))


def test_gradient_scaler():
    """Fails when the two passes have different scales, or a gradient that overflows still moves the weights."""
    plain, scaled, (x, y) = build().float(), build().float(), data()
    x = x.float()
    one, two = (GLAD(SGD(m.parameters()), rho=0.3, combine="steer") for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflow = []

    def closure():
        loss = F.cross_entropy(scaled(x), y)
        scaler.scale(loss * math.inf if overflow else loss).backward()
        return loss

    for _ in range(3):
        one.backward(closure_of(plain, x, y))
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        one.step()
        two.backward(closure)
        scaler.unscale_(two)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(two)
        scaler.update()
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-6, atol=1e-7)
    before = weights(scaled)
    overflow.append(True)
    two.backward(closure)
    scaler.step(two)
    scaler.update()
    assert torch.equal(weights(scaled), before)
    assert scaler.get_scale() == 512.0
    overflow.clear()
    two.backward(closure)
    scaler.step(two)
    assert bool(weights(scaled).isfinite().all())
    assert not torch.equal(weights(scaled), before)


def test_parameter_without_gradient_is_left_out():
    """Fails when an unused parameter breaks the list operations, or is moved."""
    model, (x, y) = build(), data()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    GLAD(SGD([unused, *model.parameters()]), rho=0.2).step(closure_of(model, x, y))
    assert unused.grad is None
    assert torch.equal(unused.detach(), torch.ones(3, dtype=torch.float64))


# -- two processes --------------------------------------------------------------------------------


def _plain_loop(rank, world):
    """DDP with its gradients in buckets, which the second pass overwrites, and two micro-batches a step."""
    model, (x, y) = build(), data()
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    optimizer = GLAD(SGD(model.parameters()), rho=0.4, combine="steer")

    def loss_of(a, b):
        loss = F.cross_entropy(wrapped(a), b) / 2
        loss.backward()
        return loss.detach()

    def closure():
        (a, b), (c, d) = (t[mine].chunk(2) for t in (x, y))
        with wrapped.no_sync() if world > 1 else nullcontext():
            first = loss_of(a, c)
        return first + loss_of(b, d)

    for _ in range(3):
        optimizer.step(closure)
    return weights(model)


def _trainer():
    x, y = data()
    trainer = Trainer(
        build(),
        terms={"task": CrossEntropy()},
        optimizer=lambda groups: GLAD(SGD(groups), rho=0.4),
        accumulate=2,
        compute=Compute(device="cpu"),
        logging=Logging(every=0),
    )
    trainer.fit(TensorData(x, y, batch_size=6, seed=4), epochs=3)
    return weights(trainer.model)


def _two(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({"plain": _plain_loop(rank, 2), "trainer": _trainer()}, f"{folder}/{rank}.pt")
    leave_process_group()


def test_two_processes_end_where_one_does(tmp_path):
    """Fails when a process steps uphill by its own gradient, or keeps a view of a bucket that is overwritten."""
    run_launched(_two, str(tmp_path))
    expected = {"plain": _plain_loop(0, 1), "trainer": _trainer()}
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-7, msg=f"{name} of process {rank}")


# -- conformance ----------------------------------------------------------------------------------


def test_adapter_takes_other_cases():
    """Fails when shapes, counts or tags are read off the one golden file."""
    g, ref = np.array([1.0, 0.0, 2.0]), np.array([-1.0, 0.0, 0.0])
    case = Case("any", {"x/y/g": g, "x/y/ref": ref}, {"lambda": np.array(2.0)})
    out = conformance.compute(case)
    np.testing.assert_allclose(out["x/y/project"], [0.0, 0.0, 2.0])
    np.testing.assert_allclose(out["x/y/steer"], [-1.0, 0.0, 2.0])
    assert conformance.compute(Case("c", {"image": np.ones((1, 2)), "text": np.eye(2)}, {"logit_scale": 3.0}))
    with pytest.raises(UnknownCase):
        conformance.compute(Case("none", {"H": np.eye(2)}))
