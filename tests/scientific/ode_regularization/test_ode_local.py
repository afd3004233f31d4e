"""The error of one step at a random time, and a random end time. Each test names the fault that makes it fail."""

import pytest
import torch
from torch import nn

from regularized.evidence.models import seeded
from regularized.scientific.ode_regularization.layer import NeuralODE, NeuralSDE
from regularized.scientific.ode_regularization.local import LocalNeuralODE, RandomEndTime
from regularized.scientific.ode_regularization.ode_solver import odeint, odeint_on_grid
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.term import SolverRegularization
from regularized.training import Batch, Progress, Step

DOUBLE = torch.float64
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, u):
        return 4.0 * torch.tanh(self.linear(u)) * (1 + t)


@pytest.fixture
def field():
    return seeded(0, Field).double()


@pytest.fixture
def u():
    return torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def draw(monkeypatch, share):
    """The next random number is this one."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size[0] if size else (), share))


@pytest.mark.parametrize("kind", ["error", "stiffness", "both"])
def test_biased_steps_are_those_of_the_solve(field, u, monkeypatch, kind):
    """Over all draws, the mean of the local penalty, and its gradient, is the penalty itself; the output is the same.

    Fails for a step that is left out or counted twice, and for a penalty without its graph.
    """
    whole = NeuralODE(field, **TOLERANCES)
    out = whole(u)
    penalty = solver_penalty(whole.statistics, kind=kind)
    gradient = torch.autograd.grad(penalty, field.linear.weight)[0]
    layer, count = LocalNeuralODE(field, sampling="biased", **TOLERANCES), len(whole.statistics.step_sizes)
    assert count > 3
    values, gradients = [], []
    for n in range(count):
        draw(monkeypatch, (n + 0.5) / count)
        torch.testing.assert_close(layer(u), out)
        assert layer.statistics.evaluations == whole.statistics.evaluations
        value = solver_penalty(layer.statistics, kind=kind)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, field.linear.weight)[0])
    torch.testing.assert_close(torch.stack(values).mean(), penalty.detach())
    torch.testing.assert_close(torch.stack(gradients).mean(dim=0), gradient)


@pytest.mark.parametrize("span", [(0.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("detach", [False, True])
def test_unbiased_step(field, u, monkeypatch, span, detach):
    """A step from the state at the drawn time, as long as the accepted one around it, written out.

    Fails for a step of another length, direction or start, and for a state that is held constant where it is not.
    """
    draw(monkeypatch, 0.375)
    layer = LocalNeuralODE(field, span=span, detach=detach, **TOLERANCES)
    out = layer(u)
    time = span[0] + 0.375 * (span[1] - span[0])
    solution = odeint(field, u, (span[0], time, span[1]), **TOLERANCES)
    torch.testing.assert_close(out, solution.states[-1])
    done, sizes = 0.0, iter(solution.statistics.step_sizes)
    while done <= abs(time - span[0]):
        done += (h := next(sizes))
    at = solution.states[1].detach() if detach else solution.states[1]
    end = time + h if span[1] > span[0] else time - h
    expected = odeint_on_grid(field, at, (time, end), **TOLERANCES).statistics
    assert layer.statistics.step_sizes == pytest.approx([h])
    assert layer.statistics.evaluations == solution.statistics.evaluations + expected.evaluations
    ours, theirs = (
        torch.autograd.grad(solver_penalty(s, kind="both"), field.linear.weight)[0]
        for s in (layer.statistics, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_unbiased_times_cover_the_span(field, u):
    """In the mean over time, a long step counts by its length. Fails for draws that are not uniform over the span."""
    layer = LocalNeuralODE(field, **TOLERANCES)
    torch.manual_seed(0)
    drawn = []
    for _ in range(30):
        layer(u)
        drawn.append(layer.statistics.step_sizes[0])
    sizes = torch.tensor(odeint(field, u, (0.0, 1.0), **TOLERANCES).statistics.step_sizes)
    expected = float(sizes.square().sum() / sizes.sum())
    spread = float(((sizes - expected).square() * sizes).sum() / sizes.sum()) ** 0.5
    assert sum(drawn) / 30 == pytest.approx(expected, abs=4 * spread / 30**0.5)


def test_evaluation_and_term(field, u):
    """In eval mode nothing is drawn, and the term of all layers finds a local one, also in a random end time."""
    layer = RandomEndTime(LocalNeuralODE(field, backprop="checkpoint", **TOLERANCES), spread=0.2)
    step = Step(layer, Batch.of(u), Progress(0, 1))
    SolverRegularization(weight=1.0)(step).backward()
    assert float(field.linear.weight.grad.abs().sum()) > 0
    state = torch.get_rng_state()
    torch.testing.assert_close(layer.eval()(u), NeuralODE(field, **TOLERANCES).eval()(u))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(layer.state_dict()) == ["layer.f.linear.weight", "layer.f.linear.bias"]


def test_random_end_time(u):
    """Ends are uniform over T - b to T + b, the span itself stays. Fails for a spread that is halved or one-sided."""
    torch.manual_seed(0)
    for layer in (
        NeuralODE(lambda t, v: torch.ones_like(v), span=(3.0, 1.0), **TOLERANCES),
        NeuralSDE(lambda t, v: torch.ones_like(v), lambda t, v: 0 * v, span=(1.0, 3.0), steps=2),
    ):
        start, end = layer.span
        steered = RandomEndTime(layer, spread=1.5)
        ends = torch.stack([start + (steered(u) - u).mean() for _ in range(200)])
        assert float(ends.mean()) == pytest.approx(end, abs=4 * 1.5 / (3 * 200) ** 0.5)
        assert end - 1.5 <= float(ends.min()) < end - 1.4
        assert end + 1.4 < float(ends.max()) <= end + 1.5
        assert layer.span == (start, end)
        assert steered.statistics is layer.statistics


def test_span_survives_an_error(u):
    """A failed solve must not leave a random end behind."""
    layer = NeuralODE(lambda t, v: v / 0, **TOLERANCES)
    with pytest.raises(RuntimeError, match="not finite"):
        RandomEndTime(layer)(u)
    assert layer.span == (0.0, 1.0)
