"""Strengths of any terms learnt from a validation loss. Each test names the fault that makes it fail."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized import CrossEntropy, EarlyLearning, Loss, Ridge, Term, Trainer
from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite
from regularized.scientific.inexact_bilevel.adaptive_fista import AdaptiveFista
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.learn_strengths import NotStronglyConvex, learn_strengths
from regularized.scientific.inexact_bilevel.lower_solvers import solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID
from regularized.scientific.inexact_bilevel.strength_problem import StrengthProblem
from regularized.training import Batch, Compute, Logging, Objective, Progress, Step, TensorData, linear
from regularized.training.objective import coefficients
from regularized.training.randomness import rng_state

SQUARED = Loss(lambda z, y: 0.5 * (z.squeeze(-1) - y).square())


def regression(seed=0, samples=30, features=12, noise=1.5):
    """Training and validation data of a linear teacher, float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples + 60, features, generator=g, dtype=torch.float64)
    w = torch.randn(features, generator=g, dtype=torch.float64)
    y = x @ w / features**0.5 + noise * torch.randn(len(x), generator=g, dtype=torch.float64)
    return (x[:samples], y[:samples]), (x[samples:], y[samples:])


def no_bias(features=12):
    torch.manual_seed(3)
    return nn.Linear(features, 1, bias=False)


def exact_loss(train, valid, ridges):
    """Validation loss of the exact minimiser with a ridge for each weight: ridges (..., features)."""
    (x, y), (xv, yv) = train, valid
    gram = x.T @ x / len(x) + torch.diag_embed(ridges)
    w = torch.linalg.solve(gram, (x.T @ y / len(x)).expand(*ridges.shape[:-1], -1))
    return 0.5 * (w @ xv.T - yv).square().mean(-1), w


def best_ridge(train, valid):
    """By scalar search on the exact loss: three grids, each finer."""
    low, high = -12.0, 6.0
    for _ in range(5):
        grid = torch.linspace(low, high, 201, dtype=torch.float64)
        losses, _ = exact_loss(train, valid, grid.exp()[:, None].expand(-1, train[0].shape[1]))
        at, width = float(grid[losses.argmin()]), (high - low) / 200
        low, high = at - width, at + width
    return float(torch.tensor(at).exp()), float(losses.min())


# -- closed forms ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt_ridge():
    """The strength of one ridge, to which several tests compare theirs."""
    train, valid = regression()
    return learn_strengths(ridge_objective(), ["ridge"], valid, model=no_bias(), data=train, tolerance=1e-6)


def test_ridge_regression_finds_the_exact_optimum(learnt_ridge):
    """Against a scalar search on the closed form: fails for a wrong normalisation, sign, or a step that stops early."""
    train, valid = regression()
    strength, loss = best_ridge(train, valid)
    result = learnt_ridge
    assert result.status == "stationary"
    assert result.curvature == "declared"
    assert result.strengths["ridge"] == pytest.approx(strength, rel=1e-3)
    assert result.validation_loss == pytest.approx(loss, rel=1e-6)
    _, w = exact_loss(train, valid, torch.full((1, 12), strength, dtype=torch.float64))
    torch.testing.assert_close(result.parameters["weight"], w, rtol=1e-3, atol=1e-4)
    assert result.trace[-1].strengths == result.strengths
    assert result.iterations >= result.trace[-1].outer.iterations > 0


class TwoBlocks(nn.Module):
    """A linear model whose weights are two tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.useful, self.useless = nn.Linear(6, 1, bias=False), nn.Linear(6, 1, bias=False)

    def forward(self, x):
        return self.useful(x[:, :6]) + self.useless(x[:, 6:])


def blocks():
    """Both blocks tell something, the second less: both strengths have an optimum inside."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(240, 12, generator=g, dtype=torch.float64)
    w = torch.randn(12, generator=g, dtype=torch.float64)
    w[6:] *= 0.3
    y = x @ w + 2.0 * torch.randn(240, generator=g, dtype=torch.float64)
    return (x[:40], y[:40]), (x[40:], y[40:])


NAMES = ("ridge_useful_weight", "ridge_useless_weight")


def learn_blocks(train, valid, *, start=(0.1, 0.1), names=NAMES, order=1, tolerance=1e-5):
    model = TwoBlocks()
    terms = {"task": SQUARED, **Ridge.per_tensor(model, weight=0.1)}
    for name, weight in zip(NAMES, start):
        terms[name].weight = weight
    objective = Objective(dict(list(terms.items())[::order]))
    return learn_strengths(objective, names, valid, model=model, data=train, tolerance=tolerance)


@pytest.fixture(scope="module")
def learnt():
    return learn_blocks(*blocks())


def test_two_strengths_find_the_best_of_a_fine_grid(learnt):
    """One ridge per tensor: fails if strengths are mixed up or tied."""
    train, valid = blocks()
    grid = torch.linspace(-5, 3, 161, dtype=torch.float64).exp()
    pairs = torch.cartesian_prod(grid, grid)
    losses, _ = exact_loss(train, valid, pairs.repeat_interleave(6, dim=1))
    best = pairs[losses.argmin()]
    assert learnt.validation_loss <= float(losses.min()) + 1e-6
    for name, strength in zip(NAMES, best):
        assert learnt.strengths[name] == pytest.approx(float(strength), rel=0.05)  # the grid's distance
    assert learnt.strengths[NAMES[1]] > 2.0 * learnt.strengths[NAMES[0]]


class Concave(Term):
    """Minus half the squared norm: what a term that is not convex does to a problem, in closed form."""

    per_step = True

    def forward(self, step):
        return -0.5 * sum(p.square().sum() for p in step.model.parameters())


def test_what_is_not_convex_is_measured():
    """Ridge a with a fixed concave term c is ridge a - c: fails if what is declared is believed all the same."""
    train, valid = regression(0, samples=14)
    strength, loss = best_ridge(train, valid)
    objective = Objective({"task": SQUARED, "concave": Concave(weight=0.1), "ridge": Ridge(weight=0.2)})
    result = learn_strengths(objective, ["ridge"], valid, model=no_bias(), data=train, tolerance=1e-7)
    assert result.curvature == "estimated"
    assert result.smallest_curvature < result.strengths["ridge"] - 0.05
    assert result.strengths["ridge"] - 0.1 == pytest.approx(strength, rel=1e-3)
    assert result.validation_loss == pytest.approx(loss, rel=1e-6)
    assert all(step.mu < step.strengths["ridge"] for step in result.trace)


# -- the hypergradient of two terms, one with a memory ----------------------------------------------


def noisy_classes(seed=0, samples=60, share=0.4):
    """Three Gaussian classes; training labels partly wrong. Train, validation and test, float32."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(3, 8, generator=g)
    y = torch.randint(3, (samples + 400,), generator=g)
    x = centres[y] + torch.randn(len(y), 8, generator=g)
    noisy = y[:samples].clone()
    wrong = torch.rand(samples, generator=g) < share
    noisy[wrong] = (noisy[wrong] + torch.randint(1, 3, (int(wrong.sum()),), generator=g)) % 3
    return (x[:samples], noisy), (x[samples : samples + 60], y[samples : samples + 60]), (x[-300:], y[-300:])


def early(train, *, weight=1.0, epochs=4):
    """A term whose memory holds the predictions of a short training, and the model of that."""
    torch.manual_seed(1)
    model, term = nn.Linear(8, 3), EarlyLearning(len(train[0]), 3, weight=weight)
    trainer = Trainer(
        model,
        terms={"task": CrossEntropy(), "elr": term},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.2),
        compute=Compute(device="cpu"),
        logging=Logging(progress_bar=False),
    )
    trainer.fit(TensorData(*train, batch_size=20), epochs=epochs)
    return model, term


@pytest.fixture(scope="module")
def noisy():
    train, valid, test = noisy_classes()
    model, term = early(train)
    return train, valid, test, model, term


def objective_of(term, ridge=0.02):
    return Objective({"task": CrossEntropy(), "ridge": Ridge(weight=ridge), "elr": term})


def test_hypergradient_equals_differences(noisy):
    """Of both strengths, by exact solves at shifted ones: fails if memory moves, or a mode or a count is wrong."""
    train, valid, _, model, term = noisy
    objective = objective_of(term, ridge=0.1)
    problem = StrengthProblem(objective, ["ridge", "elr"], valid, model=model, data=train, deterministic=True)
    theta = problem.theta()

    def solution(theta):
        mu = problem.strong_convexity(problem.named(theta))
        return solve_lower(
            problem.lower, problem.start, theta, mu=mu, L=mu, eps=1e-9, max_iterations=20_000, solver=AdaptiveFista()
        ).x

    found = hypergradient(problem.lower, problem.upper, solution(theta), theta, cg_tol=1e-10).gradient
    for i, direction in enumerate(torch.eye(2, dtype=torch.float64)):
        ahead, behind = (float(problem.upper(solution(theta + s * 1e-4 * direction))) for s in (1, -1))
        assert float(found[i]) == pytest.approx((ahead - behind) / 2e-4, rel=1e-5)
    assert float(found.abs().min()) > 1e-4


def test_the_problem_is_the_objective(noisy):
    """Its value is the trainer's loss on the whole batch with the memory as it is: fails if a coefficient is lost."""
    train, valid, _, model, term = noisy
    objective = objective_of(term, ridge=0.3)
    problem = StrengthProblem(objective, ["elr"], valid, model=model, data=train, deterministic=True)
    batch = Batch(*train, torch.arange(len(train[0])))
    still = copy.deepcopy(term)
    still.momentum = 1.0
    reference = Objective({"task": CrossEntropy(), "ridge": Ridge(weight=0.3), "elr": still})
    expected = reference.loss(Step(model, batch, Progress(0, 1)), reference.counts([batch]))
    value = problem.lower(problem.start, problem.theta())
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert float(problem.upper(problem.start)) == pytest.approx(F.cross_entropy(model(valid[0]), valid[1]).item())


def test_early_learning_strength_undoes_wrong_labels(noisy):
    """What it is for: fails if the strength of a term that helps does not rise, or helps validation alone."""
    train, valid, test, model, term = noisy
    settings = {"model": model, "data": train, "tolerance": 1e-3, "steps": 8}  # enough for nearly all of the gain
    both = learn_strengths(objective_of(term), ["ridge", "elr"], valid, **settings)
    term_off = EarlyLearning(len(train[0]), 3, weight=0.0)
    alone = learn_strengths(objective_of(term_off), ["ridge"], valid, **settings)
    assert both.strengths["elr"] > 2.0
    assert both.validation_loss < alone.validation_loss - 0.03

    def test_loss(result):
        logits = test[0].double() @ result.parameters["weight"].T + result.parameters["bias"]
        return float(F.cross_entropy(logits, test[1]))

    assert test_loss(both) < test_loss(alone) - 0.03


# -- invariances ------------------------------------------------------------------------------------


class Scaled(Term):
    """Another term times a number."""

    per_step = True

    def __init__(self, term, scale, *, weight):
        super().__init__(weight=weight)
        self.term, self.scale = term, scale

    def forward(self, step):
        return self.scale * self.term(step)


def test_invariances(learnt):
    """Order, rows and start do not matter: fails if any enters the optimum."""
    train, valid = blocks()
    rows = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    others = {
        "other order": learn_blocks((train[0][rows], train[1][rows]), valid, names=NAMES[::-1], order=-1),
        "other start": learn_blocks(train, valid, start=(1.0, 0.02)),
    }
    for name, result in others.items():
        assert result.validation_loss == pytest.approx(learnt.validation_loss, rel=1e-6), name
        for strength in NAMES:
            assert result.strengths[strength] == pytest.approx(learnt.strengths[strength], rel=1e-2), name


def test_scaling_a_term_divides_its_strength(learnt_ridge):
    """Fails if the step or the stopping test sees more of a term than its product with the strength."""
    train, valid = regression(0)
    scaled = Scaled(Ridge(weight=1.0), 50.0, weight=1e-2 / 50.0)
    objective = Objective({"task": SQUARED, "ridge": scaled})
    result = learn_strengths(objective, ["ridge"], valid, model=no_bias(), data=train, tolerance=1e-6)
    assert result.curvature == "estimated"
    assert 50.0 * result.strengths["ridge"] == pytest.approx(learnt_ridge.strengths["ridge"], rel=1e-3)
    torch.testing.assert_close(result.parameters["weight"], learnt_ridge.parameters["weight"], rtol=1e-3, atol=1e-4)


# -- state ------------------------------------------------------------------------------------------


def snapshot(model, objective):
    modules = [*model.modules(), *objective.modules()]
    return (
        {k: v.clone() for k, v in {**model.state_dict(), **objective.state_dict()}.items()},
        [m.training for m in modules],
        [len(m._forward_hooks) for m in modules],
        [(p.requires_grad, p.grad is None, p.dtype) for p in model.parameters()],
        coefficients(objective),
        [getattr(term, "momentum", None) for term in objective.terms.values()],
        rng_state()["torch"],
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other


def test_nothing_of_the_users_is_touched(noisy):
    """Fails if memory, weights, modes, hooks, gradients or the global generator are other ones afterwards."""
    train, valid, _, model, term = noisy
    model.eval()
    objective = objective_of(term)
    before = snapshot(model, objective)
    learn_strengths(objective, ["ridge", "elr"], valid, model=model, data=train, steps=2)
    after = snapshot(model, objective)
    assert all(map(same, before, after)), [same(a, b) for a, b in zip(before, after)]
    model.train()


def test_applied_strengths_are_what_is_trained_with_afterwards():
    """By the objective that exists and by a trainer: fails if only the terms, or only the model, learn of them."""
    train, valid = regression(0)
    train, valid = (tuple(t.float() for t in part) for part in (train, valid))
    model, terms = no_bias(), {"task": SQUARED, "ridge": Ridge(weight=1e-2)}
    objective = Objective(terms)
    result = learn_strengths(objective, ["ridge"], valid, model=model, data=train, tolerance=1e-5, apply=True)
    strength = result.strengths["ridge"]
    assert coefficients(objective) == {"task": 1.0, "ridge": strength}
    assert model.weight.dtype == torch.float32
    torch.testing.assert_close(model.weight.double(), result.parameters["weight"], rtol=1e-6, atol=1e-7)
    # Trained further with these strengths, the model stays where it is: it is at the minimum of just that objective.
    before = model.weight.detach().clone()
    trainer = Trainer(
        model,
        terms=terms,
        optimizer=lambda g: torch.optim.SGD(g, lr=0.1),
        compute=Compute(device="cpu"),
        logging=Logging(progress_bar=False),
    )
    assert coefficients(trainer.objective)["ridge"] == strength
    trainer.fit(TensorData(*train, batch_size=len(train[0])), epochs=20)
    torch.testing.assert_close(model.weight, before, rtol=0, atol=1e-3)
    again = learn_strengths(objective, ["ridge"], valid, model=model, data=train, tolerance=1e-3)
    assert len(again.trace) == 1
    assert again.start_loss == pytest.approx(result.validation_loss, rel=1e-4)


def test_frozen_parameters_and_parameters_of_terms():
    """What is trained is what requires a gradient, in model and terms: fails if one is forgotten."""

    class Offset(Term):
        """A trained target of the outputs, pulled to 2."""

        def __init__(self):
            super().__init__(weight=0.5)
            self.level = nn.Parameter(torch.zeros(1))

        def forward(self, step):
            pulled = step.batch.size * (self.level - 2.0).square().sum()
            return (step.logits.squeeze(-1) - self.level).square().sum() + pulled

    train, valid = regression(1, features=4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].requires_grad_(False)
    objective = Objective({"task": SQUARED, "ridge": Ridge(weight=0.1), "offset": Offset()})
    result = learn_strengths(objective, ["ridge", "offset"], valid, model=model, data=train, steps=3, apply=True)
    assert set(result.parameters) == {"2.weight", "2.bias", "terms.offset.level"}
    assert result.curvature == "estimated"  # ridge does not declare anything for the term's parameter
    level = result.parameters["terms.offset.level"]
    torch.testing.assert_close(objective.terms["offset"].level.detach(), level.float())
    assert float(level) > 0.1


def test_terms_may_tap_hidden_states():
    """Fails if a term that reads a submodule's output finds none."""

    class Small(Term):
        taps = ("0",)

        def forward(self, step):
            return step.hidden("0").square().sum()

    train, valid = regression(1, features=4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model[1].requires_grad_(False)
    objective = Objective({"task": SQUARED, "ridge": Ridge(weight=0.1), "small": Small(weight=0.01)})
    result = learn_strengths(objective, ["small"], valid, model=model, data=train, steps=2)
    assert result.validation_loss < result.start_loss


# -- randomness and modes ---------------------------------------------------------------------------


def dropout_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(12, 1, bias=False))


def ridge_objective(weight=1e-2):
    return Objective({"task": SQUARED, "ridge": Ridge(weight=weight)})


def test_dropout_is_refused_or_frozen():
    """Fails if the line search compares two draws, or if a frozen draw leaves the generator elsewhere."""
    train, valid = regression(0)
    with pytest.raises(ValueError, match=r"terms \['task'\] at the same parameters differ.*model.eval\(\)"):
        learn_strengths(ridge_objective(), ["ridge"], valid, model=dropout_model(), data=train)
    off = learn_strengths(ridge_objective(), ["ridge"], valid, model=dropout_model().eval(), data=train, steps=3)
    runs = [
        learn_strengths(
            ridge_objective(), ["ridge"], valid, model=dropout_model(), data=train, steps=3, deterministic=False
        )
        for _ in range(2)
    ]
    assert same(runs[0].parameters, runs[1].parameters)
    assert not same(runs[0].parameters, off.parameters)


def test_frozen_draws_leave_the_generator_alone():
    """Fails if seeding for the frozen draw leaks."""
    train, valid = regression(0)
    model = dropout_model()
    torch.manual_seed(7)
    before = rng_state()["torch"]
    learn_strengths(ridge_objective(), ["ridge"], valid, model=model, data=train, steps=1, deterministic=False)
    assert torch.equal(before, rng_state()["torch"])


def test_batch_normalization():
    """In train mode refused; in eval mode its statistics are constants: fails if they move or are forgotten."""
    train, valid = regression(0)
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 1))
    model[0].running_mean.fill_(0.5)
    with pytest.raises(ValueError, match=r"BatchNorm in train mode.*model.eval\(\)"):
        learn_strengths(ridge_objective(), ["ridge"], valid, model=model, data=train)
    model.eval()
    result = learn_strengths(ridge_objective(), ["ridge"], valid, model=model, data=train, steps=1, apply=True)
    with torch.no_grad():
        loss = 0.5 * (model.double()(valid[0]).squeeze(-1) - valid[1]).square().mean()
    assert float(loss) == pytest.approx(result.validation_loss, rel=1e-6)
    assert bool((model[0].running_mean == 0.5).all())


def test_modes_are_those_of_training_and_of_evaluation():
    """Fails if validation drops out, or a term that holds the model sends it back to train mode."""

    class Holding(Term):
        """A term with the model inside, as those with a teacher have it."""

        per_step = True

        def __init__(self, model):
            super().__init__(weight=0.01)
            self.held = model

        def forward(self, step):
            return self.held[1].weight.square().sum()

    train, valid = regression(0)
    frozen = dropout_model()
    settings = {"data": train, "steps": 1, "apply": True}
    result = learn_strengths(ridge_objective(), ["ridge"], valid, model=frozen, deterministic=False, **settings)
    with torch.no_grad():
        loss = SQUARED.function(frozen.eval().double()(valid[0]), valid[1]).mean()
    assert float(loss) == pytest.approx(result.validation_loss, rel=1e-5)
    model = dropout_model().eval()
    objective = Objective({"task": SQUARED, "ridge": Ridge(weight=1e-2), "holding": Holding(model)})
    learn_strengths(objective, ["ridge"], valid, model=model, **settings)  # refuses what is random


def test_validation_has_the_coefficients_of_training(learnt_ridge):
    """Half the data term in training is half of it in validation: fails if its weight is lost in one of them."""
    train, valid = regression(0)
    half = Objective({"task": Loss(SQUARED.function, weight=0.5), "ridge": Ridge(weight=5e-3)})
    one = learn_strengths(half, ["ridge"], valid, model=no_bias(), data=train, tolerance=1e-6)
    assert 2.0 * one.validation_loss == pytest.approx(learnt_ridge.validation_loss, rel=1e-5)
    assert 2.0 * one.strengths["ridge"] == pytest.approx(learnt_ridge.strengths["ridge"], rel=1e-2)


# -- ends -------------------------------------------------------------------------------------------


def test_budget_and_steps_end_it():
    """Fails if a limit is not looked at, or the count forgets a part."""
    train, valid = regression(0)
    short = learn_strengths(ridge_objective(), ["ridge"], valid, model=no_bias(), data=train, steps=2, tolerance=1e-9)
    assert (short.status, len(short.trace)) == ("steps", 2)
    spent = learn_strengths(ridge_objective(), ["ridge"], valid, model=no_bias(), data=train, budget=1, tolerance=1e-9)
    assert (spent.status, len(spent.trace)) == ("budget", 0)
    assert spent.strengths["ridge"] == pytest.approx(1e-2)
    middle = short.trace[0].outer.iterations + 2  # one gradient is taken before MAID counts
    one = learn_strengths(
        ridge_objective(), ["ridge"], valid, model=no_bias(), data=train, budget=middle, tolerance=1e-9
    )
    assert (one.status, len(one.trace)) == ("budget", 2)


def test_validation_may_be_any_function_of_the_model():
    """Fails if the function gets another model, or another mode, than the one that is trained."""
    train, valid = regression(0)
    given = learn_strengths(ridge_objective(), ["ridge"], valid, model=no_bias(), data=train)
    own = learn_strengths(
        ridge_objective(),
        ["ridge"],
        lambda model: 0.5 * (model(valid[0]).squeeze(-1) - valid[1]).square().mean(),
        model=no_bias(),
        data=TensorData(*train, batch_size=7),
    )
    assert own.strengths["ridge"] == pytest.approx(given.strengths["ridge"], rel=1e-6)


# -- errors -----------------------------------------------------------------------------------------


def test_no_minimum_is_no_problem_to_differentiate():
    """Fails if a saddle, a flat direction or an unbounded objective is taken for a solution."""
    train, valid = regression(0)
    steep = {"task": SQUARED, "ridge": Ridge(weight=0.1), "concave": Concave(weight=50.0)}
    with pytest.raises(NotStronglyConvex, match=r"(?s)ridge = 0.1 .*curvature of -.*Raise the weight of \['ridge'\]"):
        learn_strengths(Objective(steep), ["ridge"], valid, model=no_bias(), data=train)
    few = (train[0][:5], train[1][:5])  # 12 features, 5 samples
    flat = Objective({"task": SQUARED, "bent": Loss(lambda z, y: z.squeeze(-1).square())})
    with pytest.raises(NotStronglyConvex, match=r"(?s)bent = 1 .*Add Ridge\(weight=1e-3\)"):
        learn_strengths(flat, ["bent"], valid, model=no_bias(), data=few)


def test_what_was_learnt_before_it_failed_is_not_lost(monkeypatch):
    """Fails if the error of a later step forgets the steps before, or comes without advice."""
    train, valid = regression(0)
    step, steps = MAID.step, []

    def third_fails(self):
        if len(steps) == 2:
            raise NotPositiveDefinite(-0.5, 1.0, 3)
        steps.append(step(self))
        return steps[-1]

    monkeypatch.setattr(MAID, "step", third_fails)
    with pytest.raises(NotStronglyConvex, match=r"curvature -0\.5 was met.*Raise the weight") as caught:
        learn_strengths(ridge_objective(), ["ridge"], valid, model=no_bias(), data=train, tolerance=1e-9)
    result = caught.value.result
    assert [entry.outer for entry in result.trace] == steps
    assert result.strengths == result.trace[-1].strengths
    assert result.status == "not strongly convex"


def test_starting_at_zero():
    """A zero start is near enough to the solution to be left as it is: fails if its zero derivative is believed."""
    (x, y), (xv, yv) = regression(0)
    train, valid = (x, y / 50.0), (xv, yv / 50.0)
    strength, _ = best_ridge(train, valid)
    result = learn_strengths(ridge_objective(1.0), ["ridge"], valid, model=at_zero(), data=train, tolerance=1e-9)
    assert result.strengths["ridge"] == pytest.approx(strength, rel=1e-2)


def test_a_strength_that_validation_cannot_see():
    """A ridge on parameters that the validation loss does not use: fails if its strength is kept without a word."""
    train, valid = blocks()
    model = TwoBlocks()
    objective = Objective({"task": SQUARED, **Ridge.per_tensor(model, weight=0.1)})
    for x, _ in (train, valid):
        x[:, 6:] = 0.0
    with pytest.raises(ValueError, match=r"does not depend on the strengths of \['ridge_useless_weight'\]"):
        learn_strengths(objective, NAMES, valid, model=model, data=train)


class Once(torch.autograd.Function):
    """A square whose gradient has no derivative: as torch has it, zero without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2.0 * g * ctx.saved_tensors[0]


def at_zero():
    model = no_bias()
    nn.init.zeros_(model.weight)
    return model


class OfWeights(Term):
    """A term that is a function of the weights alone."""

    per_step = True

    def __init__(self, function, weight=0.1):
        super().__init__(weight=weight)
        self.function = function

    def forward(self, step):
        return self.function(step.model.weight)


class Counting(Term):
    """A term that counts its calls in a buffer, and cannot be held still."""

    per_step = True

    def __init__(self):
        super().__init__(weight=0.1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, step):
        self.calls += 1
        return self.calls * step.model.weight.square().sum()


class Mixing(Counting):
    """A term that changes the batch."""

    def transform(self, batch):
        return batch


def run(terms, names, *, model=None, data=None, valid=None, **settings):
    train, held_out = regression(0)
    objective = Objective({"task": SQUARED, **terms})
    return learn_strengths(
        objective, names, valid or held_out, model=model or no_bias(), data=data or train, **settings
    )


def ridge(weight=0.1):
    return {"ridge": Ridge(weight=weight)}


LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression(0)[0]), batch_size=8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: run(ridge(), ["rigde"]), ValueError, "no term 'rigde'.*did you mean 'ridge'"),
        (lambda: run(ridge(), "ridge"), TypeError, r"for example \['ridge'\]"),
        (lambda: run(ridge(), []), ValueError, "at least one term"),
        (lambda: run(ridge(), ["ridge", "ridge"]), ValueError, "occurs twice"),
        (lambda: run(ridge(), ["task", "ridge"]), ValueError, "every term of the objective"),
        (lambda: run(ridge(0.0), ["ridge"]), ValueError, "must be positive.*is 0.0"),
        (lambda: run(ridge(linear(0.0, 1.0)), ["ridge"]), ValueError, "'ridge' is a schedule"),
        (
            lambda: run({**ridge(), "late": OfWeights(torch.sum, weight=linear(0.0, 1.0))}, ["ridge"]),
            ValueError,
            "'late' is a schedule",
        ),
        (lambda: run(ridge(), ["ridge"], data=LOADER), TypeError, "mini-batches.*TensorData"),
        (lambda: run(ridge(), ["ridge"], data=[regression(0)[0]] * 2), TypeError, "several batches"),
        (lambda: run(ridge(), ["ridge"], steps=0), ValueError, "steps must be at least 1"),
        (lambda: run(ridge(), ["ridge"], mu=-1.0), ValueError, "mu must be a finite number > 0"),
        (lambda: run(ridge(), ["ridge"], mu=5.0), ValueError, "mu = 5 was given, but a curvature of"),
        (lambda: run({**ridge(), "count": Counting()}, ["count"]), ValueError, r"\['count'\] change their memory"),
        (lambda: run({**ridge(), "mix": Mixing()}, ["ridge"]), ValueError, r"'mix' does more.*\(transform\)"),
        (
            lambda: run({**ridge(), "still": OfWeights(lambda w: w.detach().square().sum())}, ["still"]),
            ValueError,
            "term 'still' does not depend on the parameters",
        ),
        (
            lambda: run({**ridge(), "linear": OfWeights(lambda w: 0.0 * w.sum())}, ["linear"]),
            ValueError,
            "term 'linear' does not depend on the parameters",
        ),
        (
            lambda: run({**ridge(), "once": OfWeights(lambda w: Once.apply(w).sum())}, ["once"]),
            ValueError,
            "second derivatives of term 'once' are not those of its gradient",
        ),
        (
            lambda: run({**ridge(), "norm": OfWeights(torch.Tensor.norm)}, ["norm"], model=at_zero()),
            ValueError,
            "term 'norm' is not twice differentiable",
        ),
        (
            lambda: run({**ridge(), "noise": OfWeights(lambda w: (w * torch.randn(w.shape)).sum())}, ["ridge"]),
            ValueError,
            r"terms \['noise'\] at the same parameters differ",
        ),
        (
            lambda: run(ridge(), ["ridge"], model=no_bias().requires_grad_(False)),
            ValueError,
            "nothing is trained",
        ),
        (
            lambda: run(ridge(), ["ridge"], valid=lambda model: torch.zeros((), requires_grad=True).double()),
            ValueError,
            "validation loss does not",
        ),
        (lambda: run(ridge(), ["ridge"], valid=lambda model: model(regression(0)[1][0])), ValueError, "one number"),
        (
            lambda: learn_strengths(
                Objective({"task": SQUARED, "other": Loss(lambda z, y: z.squeeze(-1) ** 2), **ridge()}),
                ["task", "other"],
                regression(0)[1],
                model=no_bias(),
                data=regression(0)[0],
            ),
            ValueError,
            "no term is left to measure",
        ),
    ],
)
def test_bad_input(call, error, words):
    """Fails if a case is found late, in other words, or never."""
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_a_tolerance_that_never_moves_is_said():
    """Fails when a start on a plateau, far from the optimum, ends as "stationary" without a word."""
    train, valid = regression()
    objective = Objective({"task": SQUARED, "ridge": Ridge(weight=1e3)})
    settings = {"model": no_bias(), "data": train}
    with pytest.warns(UserWarning, match=r"stayed where they began.*tolerance=0\.01.*smaller tolerance"):
        still = learn_strengths(objective, ["ridge"], valid, tolerance=1e-2, **settings)
    assert still.status == "stationary"
    assert still.strengths["ridge"] == pytest.approx(1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = learn_strengths(objective, ["ridge"], valid, tolerance=2e-4, steps=3, **settings)
    assert moved.validation_loss < 0.97 * still.validation_loss
