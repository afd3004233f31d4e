"""ELR against its authors' vectors (in the contract suite), a second derivation, limits, and what it is for.

Mutations tried. The second derivation saw: no clamp, a clamp at one end, a clamp in cross-entropy too, no
renormalisation, the history used before its update, a gradient through the history, momentum the wrong way round, the
sign turned, rows that are not read again after equal samples. The closed form's tests saw: no clamp in the gradient,
a mean over labels that are ignored, a gradient kept constant under `create_graph`. The bounds at extreme
logits saw half precision.
"""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.datasets import digits, flip_labels
from regularized.evidence.models import mlp, seeded
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.penalty import early_learning_penalty
from regularized.noisy_labels.early_learning.term import EarlyLearning
from regularized.papers.early_learning import conformance
from regularized.training.data import TensorData
from regularized.training.objective import Objective
from regularized.training.progress import Progress, linear
from regularized.training.step import Batch, Step
from regularized.training.terms import CrossEntropy


def slow_reference(steps, n, classes, strength, momentum, eps):
    """The sheet's formulas, entry by entry, in plain Python; returns losses and the history."""
    history = [[0.0] * classes for _ in range(n)]
    losses = []
    for logits, labels, index in steps:
        clamped = []
        for row in logits:
            top = max(row)
            powers = [math.exp(z - top) for z in row]
            p = [min(max(w / sum(powers), eps), 1 - eps) for w in powers]
            clamped.append(p)
        before = copy.deepcopy(history)  # a repeated sample starts from the row before the batch; the last one stays
        for p, i in zip(clamped, index):
            history[i] = [momentum * t + (1 - momentum) * v / sum(p) for t, v in zip(before[i], p)]
        total = 0.0
        for row, y, p, i in zip(logits, labels, clamped, index):
            top = max(row)
            total += top + math.log(sum(math.exp(z - top) for z in row)) - row[y]
            total += strength * math.log(1 - sum(t * v for t, v in zip(history[i], p)))
        losses.append(total / len(index))
    return losses, history


@st.composite
def problems(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, classes, batch = draw(st.integers(1, 9)), draw(st.integers(2, 12)), draw(st.integers(1, 6))
    spread = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    steps = [
        (
            generator.normal(scale=spread, size=(batch, classes)),
            generator.integers(classes, size=batch),
            generator.integers(n, size=batch),
        )
        for _ in range(3)
    ]
    hyper = {
        "strength": draw(st.floats(0, 10)),
        "momentum": draw(st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0])),
        "eps": draw(st.sampled_from([1e-4, 1e-2, 0.07])),
    }
    return steps, n, classes, hyper


@given(problems())
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:.*more than once")
def test_second_derivation(problem):
    """Fails on any changed term of loss or history, and when another than the last of equal samples is remembered."""
    steps, n, classes, hyper = problem
    expected, history = slow_reference([tuple(a.tolist() for a in step) for step in steps], n, classes, **hyper)
    criterion = EarlyLearningLoss(n, classes, **hyper).double()
    for (logits, labels, index), value in zip(steps, expected):
        loss = criterion(torch.tensor(logits, requires_grad=True), torch.tensor(labels), torch.tensor(index))
        assert loss.item() == pytest.approx(value, rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(criterion.history.numpy(), history, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("batch", "classes", "spread"), [(1, 2, 1.0), (5, 7, 1.0), (4, 3, 6.0)])
def test_gradient_by_finite_differences(batch, classes, spread):
    """Fails when the history carries a gradient, or when entries beyond the clamp keep one."""
    generator = torch.Generator().manual_seed(batch)
    logits = spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    before = torch.rand(batch, classes, generator=generator, dtype=torch.float64) / classes
    frozen = EarlyLearningLoss(batch, classes, momentum=1.0, eps=0.01).double()  # momentum 1: the history is constant
    frozen.history.copy_(before)

    def value(z):
        return frozen(z.requires_grad_(), labels, torch.arange(batch))

    leaf = logits.clone()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-6
    for b in range(batch):
        for c in range(classes):
            up, down = logits.clone(), logits.clone()
            up[b, c] += step
            down[b, c] -= step
            slope = (value(up) - value(down)).item() / (2 * step)
            assert gradient[b, c].item() == pytest.approx(slope, abs=2e-8)


def test_gradient_formula():
    """Fails when the gradient is not p_c (<t,p> - t_c) / (1 - <t,p>), or does not sum to 0 over the classes."""
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    term = EarlyLearning(6, 5, weight=1.0).double()
    term.history.copy_(torch.rand(6, 5) / 5)
    step = Step(nn.Identity(), Batch(z, index=torch.arange(6)), Progress(0, 1))
    (gradient,) = torch.autograd.grad(term(step), z)
    p, t = z.detach().softmax(1), term.history
    inner = (t * p).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, p * (inner - t) / (1 - inner), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    best = t.argmax(1)
    assert (gradient[torch.arange(6), best] < 0).all(), "the favoured class must be pulled up"


def plain_loss(logits, labels, t, *, strength, eps):
    """The loss by autograd from its definition."""
    p = logits.softmax(1).clamp(eps, 1 - eps)
    return F.cross_entropy(logits, labels) + strength * torch.log(1 - (t * p).sum(1)).mean()


@pytest.mark.parametrize(("batch", "classes", "spread"), [(1, 2, 1.0), (5, 7, 1.0), (6, 4, 6.0), (64, 10, 3.0)])
def test_closed_form_gradient_is_that_of_autograd(batch, classes, spread):
    """Fails when the closed form misses a factor, the clamp, a label that is ignored, or the gradient that comes in."""
    generator = torch.Generator().manual_seed(classes)
    z = (spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[1:2] = -100
    criterion = EarlyLearningLoss(batch, classes, strength=2.0, eps=0.01).double()
    criterion.history.copy_(torch.rand(batch, classes, generator=generator, dtype=torch.float64) / classes)
    loss = criterion(z, labels, torch.arange(batch))
    expected = plain_loss(z, labels, criterion.history.clone(), strength=2.0, eps=0.01)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    (ours,), (theirs,) = torch.autograd.grad(3 * loss, z), torch.autograd.grad(3 * expected, z)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_gradients_of_first_and_second_order():
    """Fails when the stored gradient is taken for a constant in a second backward pass."""
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels, index = torch.tensor([0, 4, -100, 2]), torch.arange(4)
    frozen = EarlyLearningLoss(4, 5, momentum=1.0).double()  # momentum 1: the history is constant
    frozen.history.copy_(torch.rand(4, 5) / 5)
    assert torch.autograd.gradcheck(lambda x: frozen(x, labels, index), z)
    assert torch.autograd.gradgradcheck(lambda x: frozen(x, labels, index), z)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_nothing_to_learn_from(strength):
    """Fails when an empty batch, or one in which every label is ignored, makes the weights NaN."""
    criterion = EarlyLearningLoss(4, 3, strength=strength)
    z = torch.zeros(0, 3, requires_grad=True)
    loss = criterion(z, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0.0
    assert gradient.shape == (0, 3)
    if strength:
        z = torch.zeros(2, 3, requires_grad=True)
        loss = criterion(z, torch.full((2,), -100), torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(strength * math.log(1 - 0.3 / 3))
        assert gradient.isfinite().all()


def test_labels_of_a_smaller_integer_type():
    """Fails with torch's raw "expected scalar type Long" where labels come as int32, as NumPy gives them on Windows."""
    z, labels, index = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, 1]), torch.arange(3)
    losses = [EarlyLearningLoss(3, 4)(z, labels.to(dtype), index) for dtype in (torch.int64, torch.int32, torch.uint8)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strength_zero_is_cross_entropy_bit_for_bit(dtype):
    """Fails when cross-entropy is computed another way, or a 0 times the regulariser stays in the graph."""
    z = (5 * torch.randn(7, 4)).to(dtype)
    y, index = torch.randint(4, (7,)), torch.arange(7)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    criterion = EarlyLearningLoss(7, 4, strength=0.0)
    loss, plain = criterion(ours, y, index), F.cross_entropy(theirs, y)
    loss.backward()
    plain.backward()
    assert torch.equal(loss, plain)
    assert torch.equal(ours.grad, theirs.grad)
    assert (criterion.history.sum(1) > 0).all(), "the history must be recorded all the same"


def test_momentum_one_never_learns():
    """Fails when momentum weighs the new prediction: the history must stay 0 and the regulariser log 1 = 0."""
    z, y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 0])
    criterion = EarlyLearningLoss(4, 3, momentum=1.0).double()
    (ours,) = torch.autograd.grad(criterion(z, y, torch.arange(4)), z)
    (plain,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert not criterion.history.any()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-15)


def test_momentum_zero_uses_the_present_prediction():
    """Fails when the history is used before its update; the gradient goes through one factor only."""
    z, y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 0])
    criterion = EarlyLearningLoss(4, 3, strength=1.0, momentum=0.0).double()
    regulariser = criterion(z, y, torch.arange(4)) - F.cross_entropy(z, y)
    p = z.softmax(1)
    torch.testing.assert_close(regulariser, torch.log(1 - p.square().sum(1)).mean())
    (ours,) = torch.autograd.grad(regulariser, z)
    (expected,) = torch.autograd.grad(torch.log(1 - (p.detach() * p).sum(1)).mean(), z)
    torch.testing.assert_close(ours, expected)


def test_first_visits():
    """Fails on a bias correction, a missing renormalisation, or momentum the wrong way round."""
    criterion = EarlyLearningLoss(1, 3, momentum=0.7).double()
    z, y, index = torch.tensor([[20.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0]), torch.tensor([0])
    p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
    criterion(z.requires_grad_(), y, index)
    torch.testing.assert_close(criterion.history, 0.3 * p.detach() / p.detach().sum(), rtol=1e-12, atol=0)
    for visits in range(2, 8):
        criterion(torch.randn(1, 3, dtype=torch.float64, requires_grad=True), y, index)
        assert criterion.history.sum().item() == pytest.approx(1 - 0.7**visits, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_uniform_prediction(classes):
    """Fails when the regulariser of the first visit is not log(1 - (1 - momentum) / C)."""
    criterion = EarlyLearningLoss(1, classes, strength=1.0, momentum=0.9).double()
    z = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    loss = criterion(z, torch.tensor([0]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(classes) + math.log(1 - 0.1 / classes), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bounded_at_extreme_logits(dtype):
    """Fails when probabilities saturate (1 - <t,p> = 0) or the inner product is taken in half precision."""
    z = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0], [0.0, 1000.0]], dtype=dtype, requires_grad=True)
    criterion = EarlyLearningLoss(3, 2, strength=1.0, momentum=0.0)
    criterion = criterion.double() if dtype == torch.float64 else criterion
    y = torch.tensor([0, 1, 1])
    for _ in range(3):
        z.grad = None
        loss = criterion(z, y, torch.arange(3))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(z.grad).all()
        assert math.log(1e-4) - 1e-2 <= loss.item() <= 0
    assert not z.grad.any(), "clamped entries get no gradient from the regulariser"


def test_rows_outside_the_batch_stay():
    """Fails when an update touches other rows."""
    criterion = EarlyLearningLoss(6, 3)
    criterion.history.copy_(torch.rand(6, 3))
    before = criterion.history.clone()
    criterion(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.tensor([4, 1]))
    assert torch.equal(criterion.history[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert not torch.equal(criterion.history[[4, 1]], before[[4, 1]])


@pytest.mark.parametrize("index", [None, torch.arange(4)])
def test_eval_is_cross_entropy_and_touches_nothing(index):
    """Fails when an evaluation writes into the history, or adds the regulariser."""
    criterion = EarlyLearningLoss(4, 3).eval()
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        assert torch.equal(criterion(z, y, index), F.cross_entropy(z, y))
    assert not criterion.history.any()


def test_order_of_samples_and_names_of_classes_do_not_matter():
    """Fails when a row is paired with another sample's history, or a class is special."""
    z, y, index = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 3]), torch.tensor([7, 2, 0, 5, 1])
    order, names = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    one, other = EarlyLearningLoss(8, 4).double(), EarlyLearningLoss(8, 4).double()
    for _ in range(3):
        loss = one(z.clone().requires_grad_(), y, index)
        renamed = other(z[order][:, names].clone().requires_grad_(), names.argsort()[y[order]], index[order])
        assert loss.item() == pytest.approx(renamed.item(), rel=1e-12)
    torch.testing.assert_close(other.history, one.history[:, names])


def test_term_and_cross_entropy_equal_the_loss():
    """Fails when term and loss drift apart, or the term forgets that it is a sum over samples."""
    z, y, index = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    objective = Objective({"task": CrossEntropy(), "elr": EarlyLearning(6, 3, weight=2.0)})
    criterion = EarlyLearningLoss(6, 3, strength=2.0)
    for _ in range(2):
        batch = Batch(z.clone().requires_grad_(), y, index)
        total = objective.loss(Step(nn.Identity(), batch, Progress(0, 1)), objective.counts([batch]))
        torch.testing.assert_close(total, criterion(z.clone().requires_grad_(), y, index))
    assert torch.equal(objective.terms["elr"].history, criterion.history)


def test_term_weight_is_a_schedule_and_eval_is_silent():
    """Fails when a schedule is ignored, or when a term in eval mode records or returns something."""
    term = EarlyLearning(4, 3, weight=linear(0.0, 4.0))
    objective = Objective({"elr": term})
    batch = Batch(torch.zeros(4, 3, requires_grad=True), index=torch.arange(4))
    counts = objective.counts([batch])
    half = objective.loss(Step(nn.Identity(), batch, Progress(5, 10)), counts).item()
    assert half == pytest.approx(2 * math.log(1 - 0.3 / 3), rel=1e-5)
    recorded = term.history.clone()
    term.eval()
    assert term(Step(nn.Identity(), batch, Progress(5, 10))).item() == 0.0
    assert torch.equal(term.history, recorded)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_bites(seed):
    """Fails when the mechanism does nothing: on digits with 40 % wrong labels, ELR memorises few of them; a frozen
    history memorises nearly all, and the history finds the wrong labels."""
    split = digits(500, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noisy = flip_labels(split.train_y, 0.4, num_classes=10, generator=generator)
    wrong = noisy != split.train_y
    shares, found = {}, {}
    for name, momentum in (("elr", 0.7), ("frozen", 1.0)):
        model = seeded(seed, mlp, [64, 128, 10])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        criterion = EarlyLearningLoss(500, 10, momentum=momentum)
        data = TensorData(split.train_x, noisy, batch_size=50, seed=seed)
        for epoch in range(80):
            for batch in data.batches(epoch):
                criterion(model(batch.inputs), batch.targets, batch.index).backward()
                optimizer.step()
                optimizer.zero_grad()
        predicted = model(split.train_x).argmax(1)
        shares[name] = (predicted == noisy)[wrong].double().mean().item()
        found[name] = (criterion.suspected_label_errors(noisy) == wrong).double().mean().item()
    assert shares["frozen"] > 0.9
    assert shares["elr"] < 0.3
    assert found["elr"] > 0.85


def test_suspected_label_errors():
    """Fails when samples that were never visited are suspected, or when labels and predictions are exchanged."""
    criterion = EarlyLearningLoss(4, 3)
    criterion.history.copy_(torch.tensor([[0.1, 0.6, 0.1], [0.7, 0.1, 0.1], [0.0, 0.0, 0.0], [0.0, 0.1, 0.8]]))
    assert criterion.suspected_label_errors(torch.tensor([1, 1, 1, 0])).tolist() == [False, True, False, True]


def test_state_continues_bit_for_bit(tmp_path):
    """Fails when the history is not in the state_dict, as in the official code."""
    torch.manual_seed(0)
    batches = [(torch.randn(3, 4), torch.randint(4, (3,)), torch.randperm(9)[:3]) for _ in range(20)]

    def run(criterion, part):
        return [criterion(z.clone().requires_grad_(), y, i).item() for z, y, i in part]

    whole, first = EarlyLearningLoss(9, 4), EarlyLearningLoss(9, 4)
    expected = run(whole, batches)
    run(first, batches[:10])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = EarlyLearningLoss(9, 4)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(first.state_dict()) == ["history"]
    assert run(second, batches[10:]) == expected[10:]
    assert run(copy.deepcopy(first), batches[10:]) == expected[10:]


def test_history_moves_with_the_module():
    """Fails when the history is a plain attribute: `.to()` would leave it behind."""
    assert EarlyLearningLoss(4, 3).to(torch.float64).history.dtype == torch.float64
    criterion = EarlyLearningLoss(4, 3).to("meta")
    assert criterion.history.device.type == "meta"
    with pytest.raises(
        ValueError, match=r"logits are on cpu, the history of EarlyLearningLoss is on meta.*\.to\('cpu'\)"
    ):
        criterion(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([0]))


def test_no_warning_without_reason():
    """Fails when honest logits are taken for probabilities, or distinct samples for repeated ones."""
    criterion = EarlyLearningLoss(8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(torch.rand(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1]), torch.arange(4))
        criterion(torch.randn(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1]), torch.arange(4, 8))


def test_penalty_is_the_pure_part():
    """Fails when the pure function does more than log(1 - <t, p>)."""
    p, t = torch.rand(3, 4, dtype=torch.float64) / 4, torch.rand(3, 4, dtype=torch.float64) / 4
    torch.testing.assert_close(early_learning_penalty(p, t), torch.log(1 - torch.einsum("bc,bc->b", p, t)))


def test_conformance_adapter_is_general():
    """Fails when the adapter reads sizes or kinds off the one golden file: other sizes, optional keys left out."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 3, 7))
    labels, index = generator.integers(7, size=(2, 3)), np.array([[0, 4, 2], [4, 1, 3]])
    hp = {"beta": np.array(0.4), "lam": np.array(2.0), "clamp": np.array(1e-3)}
    elr = conformance.compute(Case("any", {"index": index, "logits": logits, "labels": labels}, hp, {}))
    expected, history = slow_reference(
        [tuple(a.tolist() for a in step) for step in zip(logits, labels, index)], 5, 7, 2.0, 0.4, 1e-3
    )
    np.testing.assert_allclose(elr["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(elr["target"][-1], history, rtol=1e-12)
    inputs = {"index": index, "logits_mixed": logits, "logits_ema_clean": logits, "labels": labels}
    plus = conformance.compute(Case("other", inputs, hp, {}))
    assert plus["q"].shape == (2, 3, 7)
    assert plus["ramp"].tolist() == [1.0, 1.0]
    with pytest.raises(UnknownCase):
        conformance.compute(Case("unknown", {"x": logits}, hp, {}))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32])
def test_index_of_a_smaller_integer_type(dtype):
    """Fails with torch's raw message: check_index lets all integers pass, so the table must take them."""
    one, other = EarlyLearningLoss(6, 3), EarlyLearningLoss(6, 3)
    z, y, index = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 2]), torch.tensor([4, 1])
    assert one(z, y, index.to(dtype)) == other(z, y, index)
    assert torch.equal(one.history, other.history)
