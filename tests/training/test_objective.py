import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.training import (
    Batch,
    Compute,
    CrossEntropy,
    Loss,
    Objective,
    Progress,
    Ridge,
    Step,
    Term,
    Trainer,
    linear,
)
from regularized.training.objective import coefficients, reweigh, term_means

NOW = Progress(0, 10)


class Penalty(Term):
    per_step = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def forward(self, step):
        self.calls += 1
        self.recorded = torch.is_grad_enabled()
        return sum(p.square().sum() for p in step.model.parameters())


class Infinite(Term):
    def forward(self, step):
        return step.logits.sum() * torch.inf


def gradient(terms, batches, progress=NOW):
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    objective = Objective(terms)
    counts = objective.counts(batches)
    for i, batch in enumerate(batches):
        objective.loss(Step(model, batch, progress), counts, first=i == 0).backward()
    return torch.cat([model.weight.grad.flatten(), model.bias.grad]), objective


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(size, 3, generator=generator), torch.randint(0, 4, (size,), generator=generator)
    y[1:3] = -100  # ignored labels, unevenly spread over the parts
    return x, y


@pytest.mark.parametrize("parts", [(8,), (4, 4), (2, 2, 2, 2), (5, 3), (1, 2, 5)])
def test_parts_give_the_gradient_of_the_whole(parts):
    """Fails if parts are averaged rather than summed, ignored labels counted, or the penalty added in each part."""
    x, y = batch()
    penalty = Penalty(weight=0.1)
    split = [Batch.of(pair) for pair in zip(x.split(parts), y.split(parts))]
    ours, objective = gradient({"task": CrossEntropy(), "penalty": penalty}, split)
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    loss = F.cross_entropy(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    torch.testing.assert_close(ours, torch.cat([model.weight.grad.flatten(), model.bias.grad]))
    assert penalty.calls == 1
    values = dict(objective.values())
    torch.testing.assert_close(values["task"] + 0.1 * values["penalty"], loss.detach())


def test_each_term_is_divided_by_what_it_counts():
    """Fails if all terms share one count."""
    x, y = batch()

    class Half(Term):
        def count(self, batch):
            return 2

        def forward(self, step):
            return step.logits.sum()

    objective = Objective({"task": CrossEntropy(), "part": Half()})
    counts = objective.counts([Batch.of((x, y))])
    assert (int(counts["task"]), counts["part"]) == (6, 2)


def test_coefficient_zero_is_absent_but_its_state_goes_on():
    """Fails if 0 * inf becomes NaN, the gradient changes in a bit, or the term is not called."""
    x, y = batch()
    zero = linear(0.0, 1.0)
    penalty = Penalty(weight=zero)
    plain, _ = gradient({"task": CrossEntropy()}, [Batch.of((x, y))])
    ours, objective = gradient(
        {"first": Infinite(weight=zero), "task": CrossEntropy(), "penalty": penalty}, [Batch.of((x, y))]
    )
    assert torch.equal(plain, ours)
    assert penalty.calls == 1
    assert not penalty.recorded  # no graph that nobody needs
    assert [name for name, _ in objective.active()] == ["task"]
    later, _ = gradient({"task": CrossEntropy(), "penalty": penalty}, [Batch.of((x, y))], Progress(5, 10))
    assert not torch.equal(plain, later)


def test_all_coefficients_zero_still_reach_the_model():
    """Fails if there is then nothing to back-propagate."""
    ours, _ = gradient({"task": CrossEntropy(weight=0.0)}, [Batch.of(batch())])
    assert not ours.any()


def test_empty_count_is_zero_not_nan():
    """Fails if a batch whose labels are all ignored divides by zero."""
    x, y = batch()
    ours, objective = gradient({"task": CrossEntropy()}, [Batch.of((x, torch.full_like(y, -100)))])
    assert not ours.any()
    assert dict(objective.values())["task"] == 0


def test_values_are_of_the_last_step_only():
    """Fails if the values of an earlier optimizer step are carried along."""
    x, y = batch()
    objective = Objective({"task": CrossEntropy()})
    model = nn.Linear(3, 4)
    for _ in range(2):
        for i in range(2):
            one = Batch.of((x, y))
            objective.loss(Step(model, one, NOW), objective.counts([one, one]), first=i == 0)
    assert dict(objective.values())["task"].item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


def test_a_weight_that_is_no_number_is_known():
    """Fails if what a schedule gave is forgotten, so that only the sum is seen to be NaN."""
    terms = {"task": CrossEntropy(), "wild": CrossEntropy(weight=lambda progress: float("nan"))}
    _, objective = gradient(terms, [Batch.of(batch())])
    name, weight = objective.unruly()
    assert name == "wild"
    assert weight != weight


def test_moments_are_found_in_order_and_terms_without_loss_keep_theirs():
    """Fails if a term that does not contribute loses its moments, or the order is not that of the terms."""
    seen = []

    class Watch(Term):
        contributes = False

        def __init__(self, name):
            super().__init__()
            self.name = name

        def before_step(self, step):
            seen.append(self.name)

    objective = Objective({"b": Watch("b"), "task": CrossEntropy(), "a": Watch("a")})
    for moment in objective.moments("before_step"):
        moment(None)
    assert seen == ["b", "a"]
    assert objective.names == ("b", "task", "a")


def test_state_of_all_terms_is_one_state_dict():
    """Fails if a term's buffers are not in the objective's state."""
    term = Term()
    term.register_buffer("memory", torch.zeros(2))
    assert list(Objective({"a": term, "task": CrossEntropy()}).state_dict()) == ["terms.a.memory"]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Objective({}), ValueError, "at least one term"),
        (lambda: Objective({"half": CrossEntropy()}), ValueError, "another"),
        (lambda: Objective({"my term": CrossEntropy()}), ValueError, "identifier"),
        (lambda: Objective({"task": F.cross_entropy}), TypeError, "Loss"),
        (lambda: CrossEntropy(label_smoothing=1.0), ValueError, "label_smoothing"),
        (lambda: CrossEntropy(weight="high"), TypeError, "weight"),
        (lambda: gradient({"mean": Loss(F.cross_entropy)}, [Batch.of(batch())]), ValueError, "reduction"),
        (lambda: gradient({"task": CrossEntropy()}, [Batch.of(batch()[0])]), ValueError, "needs targets"),
    ],
)
def test_bad_arguments(call, error, says):
    """Fails if a wrong argument is taken silently."""
    with pytest.raises(error, match=says):
        call()


def test_a_vector_is_not_a_loss():
    """Fails if a term's per-sample losses are broadcast into the sum."""

    class Vector(Term):
        def forward(self, step):
            return step.logits[:, 0]

    with pytest.raises(ValueError, match=r"'v' must return a scalar.*\(8,\)"):
        gradient({"v": Vector()}, [Batch.of(batch())])


def test_means_and_coefficients_make_the_loss():
    """The loss is the sum of coefficient times mean, whatever is counted: fails if the two definitions drift apart."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 4), batch()
    y = y.clone()
    y[0] = -100
    objective = Objective({"task": CrossEntropy(weight=0.5), "ridge": Ridge(weight=0.1), "off": Penalty(weight=0.0)})
    whole = Batch.of((x, y))
    counts, step = objective.counts([whole]), Step(model, whole, NOW)
    means, weights = term_means(objective, step, counts), coefficients(objective)
    assert weights == {"task": 0.5, "ridge": 0.1, "off": 0.0}
    total = sum(weights[name] * means[name] for name in means)
    torch.testing.assert_close(total, objective.loss(step, counts))


def test_coefficients_tell_schedules_from_numbers():
    """Fails if the last value of a schedule is taken for a constant."""
    schedule = linear(0.0, 1.0)
    found = coefficients(Objective({"task": CrossEntropy(), "late": Penalty(weight=schedule)}))
    assert found == {"task": 1.0, "late": schedule}


def test_reweighed_terms_train_with_the_new_coefficients():
    """In the objective that exists and in a trainer built afterwards: fails if only one of them knows."""
    model, (x, y) = nn.Linear(3, 4), batch()
    terms = {"task": CrossEntropy(), "ridge": Ridge(weight=0.1)}
    objective = Objective(terms)
    reweigh(objective, {"ridge": 3.0})
    assert coefficients(objective) == {"task": 1.0, "ridge": 3.0}
    step = Step(model, Batch.of((x, y)), NOW)
    counts = objective.counts([step.batch])
    expected = F.cross_entropy(model(x), y) + 1.5 * sum(p.square().sum() for p in model.parameters())
    torch.testing.assert_close(objective.loss(step, counts), expected)
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    trainer = Trainer(model, terms=terms, optimizer=sgd, compute=Compute(device="cpu"))
    assert coefficients(trainer.objective)["ridge"] == 3.0
    with pytest.raises(ValueError, match=r"no term \['rigde'\]"):
        reweigh(objective, {"rigde": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        reweigh(objective, {"task": 2.0, "ridge": float("nan")})
    assert coefficients(objective) == {"task": 1.0, "ridge": 3.0}  # all or nothing
