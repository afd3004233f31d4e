"""The random teacher. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.mechanisms.probes import logistic_probe
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.loss import distillation_losses
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init
from regularized.self_supervised.random_teacher.teacher import RandomTeacher
from regularized.self_supervised.random_teacher.term import MatchRandomTeacher
from regularized.training import Checkpoints, TensorData, Trainer

adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)


def network(seed, norm=True, dtype=torch.float32):
    layers = [nn.Linear(12, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()]
    model = EncoderWithHead(nn.Sequential(*layers), BottleneckHead(8, hidden=(16,), bottleneck=6, out_features=20))
    return draw_weights(model, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(n=40, dtype=torch.float32):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(9)).to(dtype)


def train(match, x, optimizer=adamw, steps=10, batch=None):
    optimizer = optimizer(match.student.parameters())
    losses = []
    for _ in range(steps):
        loss = match(x) if batch is None else match(x[batch], batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_copy_without_two_modes_is_a_fixed_point():
    """Fails when student and teacher differ in anything else than their weights (temperature, mode, a centre)."""
    teacher = network(0, norm=False, dtype=torch.float64)
    with pytest.warns(NoEffectWarning, match="exact copy"):
        match = RandomTeacher(copy.deepcopy(teacher), teacher)
    before = bits(match.student)
    loss = match(inputs(dtype=torch.float64))
    loss.backward()
    gradients = [p.grad for p in match.student.parameters()]
    assert abs(float(loss.detach())) < 1e-12
    assert torch.cat([g.flatten() for g in gradients]).norm() < 1e-12
    train(match, inputs(dtype=torch.float64), partial(torch.optim.SGD, lr=0.01), steps=20)
    for name, tensor in match.student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-10)


def test_batch_normalisation_drives_a_copy():
    """Fails when the teacher is in training mode, or the student in evaluation mode: then nothing is learned."""
    teacher = network(0)
    match = RandomTeacher(copy.deepcopy(teacher), teacher).train()
    before = bits(teacher)
    losses = train(match, inputs(), steps=40)
    assert losses[0] > 1e-9
    assert losses[-1] < 0.5 * losses[0]
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # the running statistics, above all
    assert not torch.equal(match.student.encoder[1].running_mean, before["encoder.1.running_mean"])


def test_the_same_statistics_make_a_copy_a_fixed_point():
    """Fails when statistics='batch' is ignored, or lets the teacher's buffers drift."""
    teacher = network(0, dtype=torch.float64)
    student = copy.deepcopy(teacher)
    with pytest.warns(NoEffectWarning):
        match = RandomTeacher(student, teacher, statistics="batch").train()
    before = bits(teacher)
    loss = match(inputs(dtype=torch.float64))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_teacher_stays_frozen_in_its_mode(statistics):
    """Fails when a parent's train() reaches the teacher, or a graph is built through it."""
    teacher = network(0).train()
    match = RandomTeacher(network(1), teacher, statistics=statistics)
    around = nn.ModuleList([match])
    before = bits(teacher)
    modes = [part.training for part in teacher.modules()]
    assert modes.count(True) == (statistics == "batch")
    for mode in (True, False, True):
        around.train(mode)
        assert match.student.training is mode
        assert [part.training for part in teacher.modules()] == modes
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output))
    train(match, inputs(), steps=5)
    assert len(seen) == 5
    assert not any(output.requires_grad for output in seen)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_all_parameters_in_the_optimizer_leave_the_teacher_alone():
    """Fails when weight decay or momentum reaches the teacher because somebody passed match.parameters()."""
    match = RandomTeacher(network(1), network(0))
    before = bits(match.teacher)
    optimizer = torch.optim.AdamW(match.parameters(), lr=0.1, weight_decay=0.5)
    match(inputs()).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in match.teacher.state_dict().items())


def test_dropout_is_a_difference_of_modes_too():
    """Fails when the warning of a fixed point comes although dropout gives a signal."""
    teacher = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match = RandomTeacher(copy.deepcopy(teacher), teacher)
        assert float(match(torch.randn(8, 4)).detach()) > 0
    teacher[1].p = 0.0
    with pytest.warns(NoEffectWarning):
        RandomTeacher(copy.deepcopy(teacher), teacher)
    with warnings.catch_warnings():  # other temperatures: no fixed point
        warnings.simplefilter("error")
        RandomTeacher(copy.deepcopy(teacher), teacher, loss="ce", teacher_temperature=0.04, student_temperature=0.1)


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_module_and_term_are_one(loss):
    """Fails when the term sums where the module means, or they differ in temperatures."""
    settings = {"loss": loss, "student_temperature": 0.7, "teacher_temperature": 0.3}
    x = inputs()
    module = RandomTeacher(network(1), network(0), **settings)
    plain = adamw(module.student.parameters())
    for rows in torch.arange(40).split(20):
        module(x[rows]).backward()
        plain.step()
        plain.zero_grad()
    student = network(1)
    trainer = Trainer(student, terms={"match": MatchRandomTeacher(network(0), **settings)}, optimizer=adamw)
    trainer.fit(TensorData(x, batch_size=20, shuffle=False), epochs=1)
    for ours, theirs in zip(student.parameters(), module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("chunk", "headed"), [(None, True), (3, True), (None, False)])
def test_remembered_outputs_are_the_teachers(chunk, headed):
    """Fails when rows are looked up by position in the batch, or kept of another layer."""
    make = (
        network
        if headed
        else lambda seed: draw_weights(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 20)), generator=torch.Generator().manual_seed(seed)
        )
    )
    x, rows = inputs(), torch.tensor([31, 4, 4, 17, 0])
    match = RandomTeacher(make(1), make(0), chunk=chunk)
    expected = match(x[rows])
    calls = []
    match.teacher.module.register_forward_hook(lambda *args: calls.append(args))
    match.remember(x, batch_size=7)
    assert match.remembered.shape == (40, 6 if headed else 20)
    calls.clear()
    torch.testing.assert_close(match(x[rows], rows), expected)
    assert not calls  # looked up, not run
    with pytest.raises(ValueError, match=r"shape \(5,\).*\(40,\)"):
        match(x[rows], torch.arange(40))
    assert not any("remembered" in name for name in match.state_dict())
    match.forget()
    torch.testing.assert_close(match(x[rows], rows), expected)


def test_validation_data_do_not_meet_what_was_remembered():
    """Fails when a validation sample is matched with the training sample of the same number."""
    match = RandomTeacher(network(1), network(0))
    other = inputs() + 1.0
    match.eval()
    expected = match(other)
    match.remember(inputs())
    assert torch.equal(match(other, torch.arange(40)), expected)


def test_remember_takes_batches_and_mappings():
    """Fails when a network that takes keyword arguments cannot be remembered."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, *, values):
            return self.linear(values)

    match = RandomTeacher(Named(), Named())
    x = torch.randn(6, 3)
    expected = match({"values": x})
    match.remember([{"values": part} for part in x.split(4)])
    torch.testing.assert_close(match({"values": x}, torch.arange(6)), expected)
    with pytest.raises(ValueError, match="got none"):
        match.remember([])


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_chunks_change_nothing(loss, weight_norm):
    """Fails when the closed-form gradient of a part is wrong, or the last part that is not full is lost."""
    losses, gradients = [], []
    for chunk in (None, 7):
        student, teacher = network(1, dtype=torch.float64), network(0, dtype=torch.float64)
        student.head.weight_norm = teacher.head.weight_norm = weight_norm
        settings = {"loss": loss, "student_temperature": 0.7, "teacher_temperature": 0.3}
        match = RandomTeacher(student, teacher, chunk=chunk, **settings)
        losses.append(match(inputs(dtype=torch.float64)))
        losses[-1].backward()
        gradients.append([p.grad for p in student.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_state_goes_on():
    """Fails when the teacher or the number of steps is not saved: a resumed run would match another teacher."""
    match = RandomTeacher(network(1), network(0))
    train(match, inputs(), steps=3)
    fresh = RandomTeacher(network(3), network(2))
    fresh.load_state_dict(match.state_dict())
    assert fresh.steps == 3
    assert torch.equal(fresh(inputs()), match(inputs()))
    copied = copy.deepcopy(match)
    assert torch.equal(copied(inputs()), match(inputs()))
    copied.train().double()
    assert not any(part.training for part in copied.teacher.module.modules())


def test_the_term_resumes_with_what_was_remembered(tmp_path):
    """Fails when an interrupted run differs from a whole one after remember() is called again."""
    x = inputs()

    def build(folder):
        term = MatchRandomTeacher(network(0))
        term.remember(x)
        student = network(1)
        data = TensorData(x, batch_size=10, seed=5)
        settings = {"checkpoints": Checkpoints(folder, every=1)} if folder else {}
        return student, Trainer(student, terms={"match": term}, optimizer=adamw, **settings), data

    whole, trainer, data = build(None)
    trainer.fit(data, epochs=3)
    _, first, data = build(tmp_path)
    first.fit(data, epochs=3, max_steps=5)
    resumed, second, data = build(tmp_path)
    second.fit(data, epochs=3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_step_of_a_bad_loss_is_named_and_counted():
    """Fails when evaluation counts as steps, or the number is off by one."""
    from regularized.training.finite import NonFiniteLoss

    match = RandomTeacher(network(1), network(0))
    train(match, inputs(), steps=2)
    with torch.no_grad():
        match(inputs())
    match.eval()(inputs())
    assert match.steps == 2
    with pytest.raises(NonFiniteLoss, match="step 2"):
        match.train()(inputs() / 0)


def test_mixed_precision_keeps_the_loss_in_float32():
    """Fails when the softmax over many outputs is taken in bfloat16; with chunks as well."""
    for chunk in (None, 7):
        exact = RandomTeacher(network(1), network(0), chunk=chunk)
        expected = exact(inputs())
        with torch.autocast("cpu", torch.bfloat16):
            loss = exact(inputs())
        assert loss.dtype == torch.float32
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0.3, atol=1e-6)


def test_a_copied_student_leaves_its_teacher_and_comes_back_in_its_outputs():
    """The mechanism: depth 2, batch normalisation, an exact copy; fails when signs or roles are exchanged.

    Whether its features are better is a matter of real data: see the paper's experiment.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = network(0)
    student = copy.deepcopy(teacher)
    x = torch.randn(200, 12, generator=generator)
    match = RandomTeacher(student, teacher)
    start = float(match(x).detach())
    losses = train(match, x, steps=60)
    assert losses[-1] < 0.3 * start  # the student comes near to the teacher
    moved = sum(
        float((a - b).detach().square().sum()) for a, b in zip(student.parameters(), teacher.parameters(), strict=True)
    )
    assert moved > 1e-3  # although it started there


def test_the_way_of_the_docs():
    """Fails when the parts do not fit together: draw, interpolate, match, probe."""
    teacher = network(0)
    student = interpolate_init(teacher, network(1), alpha=0.2)
    match = RandomTeacher(student, teacher)
    x = inputs(60)
    losses = train(match, x, steps=60)
    assert losses[-1] < losses[0]
    labels = (x[:, 0] > 0).long()
    assert 0.5 < logistic_probe(student.encoder, (x[:40], labels[:40]), (x[40:], labels[40:])) <= 1.0
    assert student.training  # the probe put the mode back


def test_losses_of_the_module_are_those_of_the_function():
    """Fails when a setting of the module does not reach the loss."""
    x, student, teacher = inputs(), network(1), network(0)
    match = RandomTeacher(student, teacher, loss="ce", student_temperature=0.1, teacher_temperature=0.04)
    expected = distillation_losses(
        student(x), teacher(x), loss="ce", student_temperature=0.1, teacher_temperature=0.04
    ).mean()
    torch.testing.assert_close(match(x), expected)
    by_hand = F.cross_entropy(student(x) / 0.1, (teacher(x) / 0.04).softmax(dim=1))
    torch.testing.assert_close(match(x), by_hand)


def test_golden_vectors_of_other_shapes_and_kinds():
    """Fails when the adapter counts layers, needs biases, or takes a case that it does not understand for a pass."""
    import numpy as np

    from regularized.evidence.conformance import Case, UnknownCase
    from regularized.papers.random_teacher.conformance import compute

    draw = np.random.default_rng(0).normal
    weights = {
        "param:mlp.layer0.lin.weight": draw(size=(7, 3)),
        "param:last_layer.lin1.weight": draw(size=(2, 7)),
        "param:last_layer.lin2.weight": draw(size=(4, 2)),
    }
    x = draw(size=(2, 5, 3))
    hidden = F.gelu(torch.tensor(x @ weights["param:mlp.layer0.lin.weight"].T)).numpy()
    feature = hidden @ weights["param:last_layer.lin1.weight"].T
    last = weights["param:last_layer.lin2.weight"]
    unit = feature / np.linalg.norm(feature, axis=-1, keepdims=True)
    hp = {"cfg": np.array("-/l/fn/wn/l/-"), "temp": np.array(0.5), "weight_norm_effective": np.array(1)}
    out = compute(Case("any", {"x": x, **weights}, hp))
    np.testing.assert_allclose(out["projections"], unit @ (last / np.linalg.norm(last, axis=1, keepdims=True)).T)
    np.testing.assert_allclose(out["logits"], 2 * out["projections"])
    without = compute(Case("any", {"x": x, **weights}, hp | {"weight_norm_effective": np.array(0)}))
    np.testing.assert_allclose(without["projections"], unit @ last.T)

    a, b = draw(size=(6, 3)), draw(size=(6, 3))
    mse = {"loss": np.array("MSE"), "s_temp": np.array(0.5), "t_temp": np.array(2.0)}
    loss = compute(Case("any", {"student": a, "teacher": b}, mse))["loss"]
    np.testing.assert_allclose(loss, np.square(2 * a - b / 2).mean())

    init = {"teacher_w": a, "fresh_w": b}
    student = compute(Case("any", init, {"mode": np.array("interpolated"), "alpha": np.array(0.25)}))["student_w"]
    np.testing.assert_allclose(student, 0.75 * a + 0.25 * b)
    for unknown in (
        Case("case0", {"x": x}),
        Case("case2", {"student": a, "teacher": b}, {"loss": np.array("H_pred")}),
        Case("case6", init, {"mode": np.array("elsewhere")}),
        Case("case1", {"x": x, **weights}, {"cfg": np.array("-/l/-/-/l/-")}),
        Case("case1", {"x": x, **weights, "param:mlp.layer0.bn.weight": x}, {}),
    ):
        with pytest.raises(UnknownCase):
            compute(unknown)
