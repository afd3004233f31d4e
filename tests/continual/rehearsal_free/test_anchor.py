"""Anchors, Fisher information and the path integral: closed forms, and the minimum that they lead to."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.continual.rehearsal_free import (
    WeightAnchor,
    add_anchor_gradient,
    anchor_penalty,
    diagonal_fisher,
    path_importance,
    select_parameters,
    train_only,
)
from regularized.continual.tasks import Task
from regularized.evidence.models import mlp
from regularized.training import CrossEntropy, TensorData, Trainer
from regularized.training.options import Compute, Logging
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_fisher_of_one_is_l2_bit_for_bit_and_the_gradient_is_that_of_the_penalty():
    """Fails on a factor 1/2 in one of the two, on importances that are squared, and on anchors with a gradient."""
    shapes = [(3, 4), (5,)]
    weights, anchors = [nn.Parameter(w) for w in tensors(0, *shapes)], tensors(1, *shapes)
    fisher = [f.abs() for f in tensors(2, *shapes)]
    ones = [torch.ones_like(f) for f in fisher]
    assert torch.equal(anchor_penalty(weights, anchors, None), anchor_penalty(weights, anchors, ones))
    for importances in (None, fisher):
        expected = torch.autograd.grad(0.7 * anchor_penalty(weights, anchors, importances), weights)
        for w in weights:
            w.grad = torch.ones_like(w)  # what the loss left there stays
        add_anchor_gradient(weights, anchors, importances, strength=0.7)
        for w, gradient in zip(weights, expected):
            torch.testing.assert_close(w.grad, 1.0 + gradient)


def test_a_quadratic_ends_where_it_must():
    """a/2 (t - m)^2 + lambda (t - t*)^2 has its minimum at (a m + 2 lambda t*) / (a + 2 lambda). Fails on 1/2."""
    a, m, strength, start = 2.0, 3.0, 0.5, -1.0
    t = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([t], lr=0.2)
    for _ in range(300):
        (a / 2 * (t - m) ** 2).sum().backward()
        add_anchor_gradient([t], [torch.tensor([start])], None, strength=strength)
        optimizer.step()
        optimizer.zero_grad()
    assert abs(t.item() - (a * m + 2 * strength * start) / (a + 2 * strength)) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_exact_and_empirical_fisher_are_one_in_expectation(chunk_size):
    """Over labels that the model draws. Fails on batch gradients squared, on p squared, and on a sum over samples."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 3).double()
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    p = model(x).softmax(1).detach()
    exact = diagonal_fisher(model, [(x, p.argmax(1))], ["weight"], chunk_size=chunk_size)["weight"]
    expected = torch.zeros_like(exact)
    for row, label, share in ((n, c, p[n, c]) for n in range(7) for c in range(3)):
        one = diagonal_fisher(model, [(x[row : row + 1], torch.tensor([label]))], ["weight"], kind="empirical")
        expected += share * one["weight"] / 7
    torch.testing.assert_close(exact, expected)


def test_fisher_leaves_the_model_as_it_was_and_sees_it_in_evaluation_mode():
    """Fails when dropout is drawn, batch statistics move, or the mode is not put back."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0]))]
    first, second = (diagonal_fisher(model, data, ["0.weight"]) for _ in range(2))
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert model.training
    assert model[2].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fisher_over_some_columns_is_that_of_a_head_with_these_alone():
    """Fails when classes that were not seen take a share of the softmax."""
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    whole, part = nn.Linear(3, 4), nn.Linear(3, 2)
    columns = torch.tensor([3, 1])
    with torch.no_grad():
        part.weight.copy_(whole.weight[columns])
        part.bias.copy_(whole.bias[columns])
    found = diagonal_fisher(whole, [(x, y)], ["weight"], columns=columns)["weight"]
    torch.testing.assert_close(found[columns], diagonal_fisher(part, [(x, y)], ["weight"])["weight"])
    assert not found[[0, 2]].any()


def fitted(anchor, *, task, epochs=30, model=None):
    torch.manual_seed(0)
    model = mlp([4, 8, 2]) if model is None else model
    x = torch.randn(64, 4)
    data = TensorData(x, (x[:, task] > 0).long(), batch_size=16)
    trainer = Trainer(
        model,
        terms={"task": CrossEntropy(), "anchor": anchor},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        logging=Logging(every=0, progress_bar=False),
        compute=Compute(device="cpu"),
    )
    trainer.fit(data, epochs=epochs, task=Task(task, (0, 1), data))
    return model


@pytest.mark.parametrize(("importance", "strength"), [("none", 2.0), ("fisher", 20.0), ("path", 2.0)])
def test_the_first_task_is_free_and_the_second_is_held(importance, strength):
    """Fails when an anchor pulls before there is one, or when it is not taken at the end of the task."""
    moved = {}
    for weight in (0.0, strength):
        anchor = WeightAnchor(weight=weight, importance=importance)
        model = fitted(anchor, task=0)
        before = [p.detach().clone() for p in model.parameters()]
        assert anchor.active
        assert anchor.value() == 0.0
        fitted(anchor, task=1, model=model)
        moved[weight] = before, float((model[0].weight - before[0]).detach().square().sum())
    (free, free_way), (held, held_way) = moved.values()
    assert all(torch.equal(a, b) for a, b in zip(free, held))
    assert held_way < 0.6 * free_way


def test_a_pretrained_model_is_held_from_the_first_task_by_l2_alone():
    """Fails when EWC holds weights of which it knows nothing, or L2 waits for a second task."""
    free = fitted(WeightAnchor(weight=0.0), task=0)
    held = fitted(WeightAnchor(weight=4.0, pretrained=True), task=0)
    fisher = fitted(WeightAnchor(weight=4.0, pretrained=True, importance="fisher"), task=0)
    assert not torch.equal(free[0].weight, held[0].weight)
    assert torch.equal(free[0].weight, fisher[0].weight)


def test_a_strong_anchor_leaves_the_weights_where_they_were_but_not_the_head():
    """Fails when the head is held as well."""

    def moved(weight):
        torch.manual_seed(0)
        model = mlp([4, 8, 2])
        start = [p.detach().clone() for p in model.parameters()]
        fitted(WeightAnchor(weight=weight, pretrained=True), task=0, model=model)
        return [float((p - q).detach().norm()) for p, q in zip(model.parameters(), start)]

    free, held = moved(0.0), moved(4.9)  # 2 x 4.9 x 0.1 < 1: stable
    assert held[0] < 0.15 * free[0]
    assert held[2] > 0.5 * free[2]


def test_the_path_integral_is_the_fall_of_the_loss():
    """Small steps of gradient descent: the sum of path shares is how far the loss fell. Fails on the sign."""
    model, x = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)), torch.randn(32, 2)
    y = (x[:, 0] > 0).long()
    anchor = WeightAnchor(weight=0.0, importance="path")
    anchor.attach(model)
    anchor.task_start(Task(0, (0, 1), None))
    optimizer = torch.optim.SGD([model[0].weight], lr=1e-3)
    first = F.cross_entropy(model(x), y).item()
    for number in range(400):
        step = Step(model, Batch(x, y), Progress(number, 400))
        F.cross_entropy(model(x), y).backward()
        anchor.before_step(step)
        optimizer.step()
        anchor.after_step(step)
        model.zero_grad()
    fall = first - F.cross_entropy(model(x), y).item()
    assert fall > 0
    assert abs(anchor.get_buffer("path:0/weight").sum().item() - fall) < 0.02 * fall
    assert path_importance(torch.tensor([-1.0]), torch.tensor([1.0])).item() == 0.0


def test_importances_of_tasks_add_up_with_a_decay():
    """Fails when a task's importances replace those before it."""
    model = mlp([4, 6, 2])
    data = TensorData(torch.randn(20, 4), torch.randint(2, (20,)), batch_size=20)
    tables = []
    for decay in (1.0, 0.0):
        anchor = WeightAnchor(weight=1.0, importance="fisher", decay=decay)
        anchor.attach(model)
        for number in range(2):
            anchor.task_start(Task(number, (0, 1), data))
            anchor.task_end(Task(number, (0, 1), data))
        tables.append(anchor.get_buffer("importance:0/weight"))
    torch.testing.assert_close(tables[0], 2.0 * tables[1])


def test_selections():
    """Fails when the head is among them, or a kind of parameters is missed."""
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    assert select_parameters(model, "norms") == ["0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias"]
    assert select_parameters(model, r"linear1\.weight$") == ["0.linear1.weight"]
    assert not any(name.startswith("1.") for name in select_parameters(model))
    timm_names = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)}), "head": nn.Linear(4, 2)})
    assert select_parameters(timm_names, "qkv") == ["attn.qkv.weight", "attn.qkv.bias"]
    assert train_only(timm_names, "qkv") == ["attn.qkv.weight", "attn.qkv.bias", "head.weight", "head.bias"]
