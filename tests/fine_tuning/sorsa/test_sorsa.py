"""SORSA against its authors' vectors (in the contract suite), second derivations, limits, and what it is for.

Mutations tried, and what saw them. The gradient by autograd: the norm squared, the factor 2 missing, sum for mean, the
product over the long side, a gradient of tall factors not turned back. Limits: NaN at orthonormal factors, no dead
zone, a dead zone without sqrt(r). Step 0 at alpha != r: the scale left out of the residual. The order of clip and
penalty: a clipped penalty. Accumulation: a penalty in the loss. Merging: dropout in evaluation, the scale left out.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.experiment import run_arm
from regularized.evidence.models import mlp
from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa, merge_sorsa
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty, orthonormal_gradient, orthonormal_penalty
from regularized.fine_tuning.sorsa.report import spectral_drift
from regularized.fine_tuning.sorsa.term import Sorsa
from regularized.mechanisms.svd import thin_svd
from regularized.papers.sorsa import conformance, experiment
from regularized.training.data import TensorData
from regularized.training.progress import linear
from regularized.training.terms import CrossEntropy
from regularized.training.trainer import Trainer


def slow_penalty(factors, reduction):
    """The sheet's formula, factor by factor and entry by entry: ``A A^T`` of a wide, ``B^T B`` of a tall one."""
    total = 0.0
    for factor in factors:
        rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
        square = 0.0
        for j in range(len(rows)):
            for k in range(len(rows)):
                square = square + ((rows[j] * rows[k]).sum() - float(j == k)) ** 2
        total = total + square.sqrt()
    return total / len(factors) if reduction == "mean" else total


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_penalty_and_gradient_by_a_slow_loop(shapes, reduction, seed):
    """Fails on a squared norm, another reduction, the product over the long side, or batches that mix up factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in [*shapes, shapes[0]]
    ]
    expected = slow_penalty(factors, reduction)
    torch.testing.assert_close(orthonormal_penalty(factors, reduction=reduction), expected)
    gradients = torch.autograd.grad(expected, factors)
    for ours, theirs in zip(orthonormal_gradient(factors, eps=0.0, reduction=reduction), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_by_finite_differences():
    """Fails when closed form and penalty are changed alike."""
    factors = [torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)]
    gradients = orthonormal_gradient(factors)
    h = 1e-6
    for which, (row, column) in ((0, (1, 4)), (0, (0, 0)), (1, (5, 1)), (1, (2, 0))):
        values = []
        for sign in (1, -1):
            moved = [f.clone() for f in factors]
            moved[which][row, column] += sign * h
            values.append(float(orthonormal_penalty(moved)))
        assert gradients[which][row, column].item() == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-8)


def test_known_values():
    """Fails when ``2 x orthonormal`` does not give 3 sqrt(r), or the kink at 0 gives NaN."""
    rows = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64)).Q.T
    assert orthonormal_penalty([2 * rows, 2 * rows.T]).item() == pytest.approx(3 * math.sqrt(4))
    eye = torch.eye(3, 5, requires_grad=True)
    value = orthonormal_penalty([eye])
    (by_autograd,) = torch.autograd.grad(value, eye)
    assert value.item() == 0.0
    assert torch.equal(by_autograd, torch.zeros(3, 5))
    for eps in (0.0, 1e-6):
        assert torch.equal(orthonormal_gradient([eye], eps=eps)[0], torch.zeros(3, 5))


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_dead_zone_holds_the_rounding_of_a_decomposition(rank):
    """At step 0 rounding must not decide on a direction; fails when the zone does not grow with sqrt(r)."""
    left, _, right = thin_svd(torch.randn(96, 128), rank=rank)
    factors = [left, right]
    assert orthonormal_penalty(factors) < 1e-6 * math.sqrt(rank) * 2
    assert all(torch.count_nonzero(g) == 0 for g in orthonormal_gradient(factors))
    loud = orthonormal_gradient(factors, eps=0.0)
    assert rank == 1 or max(float(g.norm()) for g in loud) > 0.5, "the official code follows the rounding"


@pytest.mark.parametrize("alpha", [None, 1.0, 7.0])
@pytest.mark.parametrize(("o", "i", "r"), [(5, 8, 2), (8, 5, 5), (6, 6, 1)])
def test_step_zero_is_the_original(alpha, o, i, r):
    """Fails when the scale is left out of the residual, or the residual's spectrum is not the rest's."""
    linear, x = nn.Linear(i, o).double(), torch.randn(4, i, dtype=torch.float64)
    layer = SorsaLinear.of(linear, r=r, alpha=alpha)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-12)
    if alpha is None:
        rest = torch.linalg.svdvals(linear.weight)[r:]
        expected = torch.cat([rest, torch.zeros(r, dtype=torch.float64)])
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight), expected, rtol=0, atol=1e-12)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"left", "values", "right", "bias"}


def test_a_randomised_start_is_exact_too():
    """Fails when the residual is made of other factors than those that are trained."""
    linear, x = nn.Linear(60, 50), torch.randn(4, 60)
    torch.testing.assert_close(SorsaLinear.of(linear, r=4, niter=1)(x), linear(x), rtol=0, atol=1e-5)


def test_a_bfloat16_layer():
    """Fails when factors are rounded to the dtype of the base, or the output is not in it."""
    linear, x = nn.Linear(24, 20).bfloat16(), torch.randn(4, 24).bfloat16()
    layer = SorsaLinear.of(linear, r=3)
    assert layer.left.dtype == torch.float32
    assert layer.weight.dtype == layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=3e-2)


def perturbed(layer, size=0.3):
    with torch.no_grad():
        for p in (layer.left, layer.values, layer.right):
            p.add_(size * torch.randn_like(p))
    return layer


def test_gradients_of_the_thin_products():
    """Fails when the forward pass is not ``x (R + c B diag(S) A)^T + b``, dense, by autograd."""
    layer = perturbed(SorsaLinear.of(nn.Linear(7, 5).double(), r=3, alpha=1.5))
    x = torch.randn(4, 7, dtype=torch.float64)
    names = ["left", "values", "right"]
    layer(x).square().sum().backward()
    copies = [getattr(layer, name).detach().clone().requires_grad_() for name in names]
    dense = layer.weight + 0.5 * copies[0] @ torch.diag(copies[1]) @ copies[2]
    nn.functional.linear(x, dense, layer.bias).square().sum().backward()
    for name, theirs in zip(names, copies, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, theirs.grad)
    assert layer.weight.grad is None


def test_signs_of_triplets_mean_nothing():
    """Fails when the pairing of left and right is broken anywhere: outputs, penalty, gradients."""
    layer = perturbed(SorsaLinear.of(nn.Linear(7, 5).double(), r=3))
    flipped, x = copy.deepcopy(layer), torch.randn(4, 7, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        flipped.left.mul_(signs)
        flipped.right.mul_(signs[:, None])
    for one in (layer, flipped):
        one(x).square().sum().backward()
        OrthonormalPenalty(one, gamma=0.3, lr=0.1).add_gradient()
    torch.testing.assert_close(layer(x), flipped(x))
    torch.testing.assert_close(orthonormal_penalty([layer.left]), orthonormal_penalty([flipped.left]))
    torch.testing.assert_close(layer.left.grad * signs, flipped.left.grad)
    torch.testing.assert_close(layer.right.grad * signs[:, None], flipped.right.grad)
    torch.testing.assert_close(layer.values.grad, flipped.values.grad)


def test_pissa_is_the_same_function_in_other_coordinates():
    """Fails when the start is not PiSSA's: ``B' = B sqrt(S)``, ``A' = sqrt(S) A``, and the same residual."""
    linear = nn.Linear(7, 5).double()
    layer = SorsaLinear.of(linear, r=3)
    left, values, right = thin_svd(linear.weight, rank=3)
    b, a = left * values.sqrt(), values.sqrt()[:, None] * right
    torch.testing.assert_close(linear.weight - b @ a, layer.weight.detach())
    torch.testing.assert_close(b @ a, ((layer.left * layer.values) @ layer.right).detach())


def test_merge_and_unmerge():
    """Fails when merging leaves the scale out, is not undone exactly, or evaluation differs from what is merged."""
    layer = perturbed(SorsaLinear.of(nn.Linear(7, 5), r=3, alpha=6.0, dropout=0.5)).eval()
    many, few = torch.randn(40, 7), torch.randn(2, 7)
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        before, rest = layer(many), layer(few)
        layer.merge()
        assert torch.equal(layer(many), before), "more rows than o i / (o + i): the same product, bit for bit"
        torch.testing.assert_close(layer(few), rest)
        assert layer.state_dict().keys() == state.keys()
        layer.unmerge()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    model = nn.Sequential(layer)
    merge_sorsa(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(many), before)


def test_dropout_is_for_training():
    """Fails when the rest of the weight is dropped from as well, or evaluation drops."""
    layer = perturbed(SorsaLinear.of(nn.Linear(7, 5), r=3, dropout=0.5))
    x = torch.randn(6, 7)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.values.zero_()
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)), "the residual sees all of x"
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_state_is_complete():
    """Fails when a checkpoint lacks the residual: a fresh split of another weight must come out equal."""
    model, other = mlp([6, 8, 4]), mlp([6, 8, 4])
    for net in (model, other):
        inject_sorsa(net, r=2)
    perturbed(model[0])
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(model(x), other(x))


def test_what_is_trained():
    """Fails when anything but the factors of the chosen layers stays trainable, or names are matched inside."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "my_q_proj": nn.Linear(4, 4), "sorsa_A": nn.Linear(4, 4)})
    assert inject_sorsa(model, r=2, target_modules=["q_proj"]) == ["q_proj"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj.left", "q_proj.values", "q_proj.right"}
    penalty = OrthonormalPenalty(model, lr=0.1)
    assert [id(f) for f in penalty.factors()] == [id(model["q_proj"].left), id(model["q_proj"].right)]


def test_an_error_leaves_the_model_as_it_was():
    """Fails when layers are replaced before all of them were looked at."""
    model = mlp([6, 8, 4])
    with pytest.raises(ValueError, match=r"weight of 2.*\[1, 4\]"):
        inject_sorsa(model, r=5)
    assert all(type(layer) is nn.Linear for layer in model if not isinstance(layer, nn.ReLU))
    assert all(p.requires_grad for p in model.parameters())


# -- the penalty in a loop ----------------------------------------------------------------------


def injected(seed=0):
    torch.manual_seed(seed)
    model = mlp([6, 8, 4])
    inject_sorsa(model, r=3)
    for layer in (model[0], model[2]):
        perturbed(layer, 0.1)
    return model


def backward(model, x, y, parts=1):
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (nn.functional.cross_entropy(model(a), b) / parts).backward()


X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(5)), torch.arange(16) % 4


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gamma_zero_changes_nothing():
    """Fails when gamma 0 still writes to the gradients (a -0.0, a None that becomes zeros)."""
    model = injected()
    backward(model, X, Y)
    before = grads(model)
    OrthonormalPenalty(model, gamma=0.0, lr=0.1).add_gradient()
    assert before.keys() == grads(model).keys()
    assert all(torch.equal(before[name], g) for name, g in grads(model).items())
    OrthonormalPenalty(injected(), gamma=0.0, lr=0.0).add_gradient()  # nor does it ask for gradients, or a rate


def test_penalty_is_added_after_the_clip_and_divided_by_the_rate():
    """Fails when the penalty is clipped with the rest, or enters as gamma, or to the values as well."""
    model, gamma, lr = injected(), 0.02, 0.1
    backward(model, X, Y)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3)
    before, penalty = grads(model), OrthonormalPenalty(model, gamma=gamma, lr=lr)
    pulls = torch.autograd.grad(penalty.value(), penalty.factors())
    penalty.add_gradient()
    after = grads(model)
    names = [f"{k}.{side}" for k in (0, 2) for side in ("left", "right")]
    for name, pull in zip(names, pulls, strict=True):
        torch.testing.assert_close(after[name], before[name] + gamma / lr * pull)
    assert torch.equal(after["0.values"], before["0.values"])


@pytest.mark.parametrize("parts", [2, 16])
def test_accumulation_does_not_change_the_share(parts):
    """1 x 16 and 16 x 1 micro-batches give the same step; fails when the penalty counts once a micro-batch."""
    results = []
    for n in (1, parts):
        model = injected()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        penalty = OrthonormalPenalty(model, gamma=0.05, lr=0.1, optimizer=optimizer)
        backward(model, X, Y, n)
        penalty.add_gradient()
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6)


def test_autocast_does_not_reach_the_defect():
    """Fails when Gram matrices are taken in bfloat16, where 1 + 1e-3 is 1."""
    factors = [(1 + 1e-3) * torch.eye(4, 6)]
    exact = orthonormal_penalty(factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthonormal_penalty(factors), exact)


def test_an_unscaled_gradient_is_accepted():
    """Fails when the check takes every enabled scaler for one that has not unscaled."""
    model = injected()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
    scaler.unscale_(optimizer)
    before = grads(model)
    OrthonormalPenalty(model, lr=0.1).add_gradient(scaler=scaler)
    assert any(not torch.equal(before[name], g) for name, g in grads(model).items())


def test_factors_of_another_adapter():
    """The penalty alone, for a LoRA of one's own; fails when it needs our layers."""
    a, b = (nn.Parameter(torch.randn(*shape)) for shape in ((2, 6), (5, 2)))
    (b @ a).square().sum().backward()
    before = a.grad.clone()
    OrthonormalPenalty([a, b], gamma=0.1, lr=1.0, reduction="sum").add_gradient()
    torch.testing.assert_close(a.grad - before, 0.1 * orthonormal_gradient([a], reduction="sum")[0])


def test_penalty_keeps_factors_orthonormal():
    """What it is for: the defect stays small with the penalty, grows without it, and more with its sign turned."""

    def defect_after_training(sign):
        torch.manual_seed(0)
        model = mlp([6, 16, 4])
        inject_sorsa(model, r=4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        penalty = OrthonormalPenalty(model, gamma=0.04, lr=0.1)
        for _ in range(60):
            backward(model, X, Y)
            before = [f.grad.clone() for f in penalty.factors()]
            penalty.add_gradient()
            for factor, old in zip(penalty.factors(), before, strict=True):
                factor.grad.copy_(old + sign * (factor.grad - old))
            optimizer.step()
            optimizer.zero_grad()
        return penalty.value().item()

    penalised, plain, turned = (defect_after_training(sign) for sign in (1, 0, -1))
    assert penalised < 0.1 * plain, (penalised, plain)
    assert turned > plain, (turned, plain)


def test_term_with_a_schedule():
    """Fails when the schedule of gamma is not asked, or a merged model is not a plain one."""
    states = []
    for gamma in (linear(0.0, 0.0), linear(0.0, 0.1), 0.0):
        torch.manual_seed(0)
        model, term = mlp([6, 8, 4]), Sorsa(r=3, lr=0.1, gamma=gamma, target_modules=["0"])
        trainer = Trainer(
            model,
            terms={"task": CrossEntropy(), "sorsa": term},
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        )
        trainer.fit(TensorData(X, Y, batch_size=8), epochs=3)
        states.append(copy.deepcopy(model.state_dict()))
        term.merge(model)
        assert set(model.state_dict()) == set(mlp([6, 8, 4]).state_dict())
    off, ramp, never = states
    assert all(torch.equal(off[name], never[name]) for name in off)
    assert not torch.equal(off["0.left"], ramp["0.left"])


# -- drift --------------------------------------------------------------------------------------


def test_drift_of_known_changes():
    """Fails when triplets are paired wrongly, signs count, or left and right are not both looked at."""
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (6, 5))
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    before = (u[:, :5] * values) @ v
    same = spectral_drift(before, (-u[:, :5] * values) @ -v)
    assert same.values < 1e-12
    assert same.vectors.abs() < 1e-12
    torch.testing.assert_close(spectral_drift(before, (u[:, :5] * (values + 0.25)) @ v).values.item(), 0.25)
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.eye(5, dtype=torch.float64)
    turn[:2, :2] = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = spectral_drift(before, (u[:, :5] * values) @ turn @ v)
    # two of five right vectors turn by the angle, all left ones stay
    torch.testing.assert_close(turned.vectors.item(), 0.5 * 0.4 * (1 - math.cos(0.3)))
    lead = spectral_drift(before, (u[:, :5] * values) @ turn @ v, rank=2)
    torch.testing.assert_close(lead.vectors.item(), 0.5 * (1 - math.cos(0.3)))


def test_drift_by_a_slow_loop():
    """Fails when changes of opposite sign cancel, of values or of inner products."""
    for seed in range(3):
        torch.manual_seed(seed)
        before, after = torch.randn(2, 5, 4, dtype=torch.float64)
        (u0, s0, v0), (u1, s1, v1) = (torch.linalg.svd(w, full_matrices=False) for w in (before, after))
        values = sum(abs(float(s1[j] - s0[j])) for j in range(4)) / 4
        turns = [abs(float(u1[:, j] @ u0[:, j])) + abs(float(v1[j] @ v0[j])) for j in range(4)]
        drift = spectral_drift(before, after)
        assert drift.values.item() == pytest.approx(values)
        assert drift.vectors.item() == pytest.approx(1 - sum(turns) / 8)


# -- conformance and experiment -----------------------------------------------------------------


def test_cases_with_less_in_them():
    """Fails when the adapter needs the factors, the outputs' gradient or a bias, or passes an unknown case."""
    full = {"weight": torch.randn(5, 4).numpy(), "x": torch.randn(2, 4).numpy()}
    hp = {"r": torch.tensor(2).numpy()}
    assert set(conformance.compute(Case("any", full, hp, {}))) == {"S0", "principal0", "residual", "y0"}
    assert conformance.tolerance(Case("any", full, hp, {}), "y0") == 1e-5
    with pytest.raises(UnknownCase):
        conformance.compute(Case("any", {"x": full["x"]}, hp, {}))


def test_arms_of_a_seed_see_the_same_data():
    """Fails when an arm draws other batches or other test samples: the comparison is paired."""
    runs = [run_arm(experiment, arm, 1, "smoke") for arm in ("pissa", "sorsa")]
    assert runs[0].data == runs[1].data
