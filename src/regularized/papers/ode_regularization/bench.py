"""What the solver costs beside a fixed RK4 with as many evaluations and beside torchdiffeq; what the penalty adds."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.models import seeded
from regularized.scientific.ode_regularization import solver_penalty
from regularized.scientific.ode_solver import SolverStatistics, odeint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5


class _Field(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.net(u)
        return out


Solve = Callable[[_Field, Tensor], tuple[Tensor, SolverStatistics | None]]


def _ours(field: _Field, u: Tensor, *, method: str = "dopri5") -> tuple[Tensor, SolverStatistics | None]:
    solution = odeint(field, u, (0.0, 1.0), method=method, rtol=TOLERANCE, atol=TOLERANCE)
    return solution.states[-1], solution.statistics


def _rk4(field: _Field, u: Tensor, *, steps: int) -> tuple[Tensor, SolverStatistics | None]:
    h, half = 1.0 / steps, 0.5 / steps
    for n in range(steps):
        t = torch.full((), n * h, device=u.device)
        k1 = field(t, u)
        k2 = field(t + half, torch.add(u, k1, alpha=half))
        k3 = field(t + half, torch.add(u, k2, alpha=half))
        k4 = field(t + h, torch.add(u, k3, alpha=h))
        u = torch.add(u, (k1 + k4).add_(k2 + k3, alpha=2.0), alpha=h / 6)
    return u, None


def _torchdiffeq(field: _Field, u: Tensor) -> tuple[Tensor, SolverStatistics | None]:
    theirs = import_module("torchdiffeq").odeint
    return theirs(field, u, torch.tensor([0.0, 1.0]), method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1], None


def _step(field: _Field, u: Tensor, solve: Solve, *, backward: bool, weight: float = 0.0) -> StepFunction:
    def step() -> None:
        if not backward:
            with torch.no_grad():
                solve(field, u)
            return
        out, statistics = solve(field, u)
        loss = out.square().mean()
        if weight and statistics is not None:
            loss = loss + weight * solver_penalty(statistics)
        loss.backward()
        field.zero_grad()

    return step


def _problem(batch: int, features: int, hidden: int) -> tuple[_Field, Tensor]:
    field = seeded(0, lambda: _Field(features, hidden)).to(DEVICE)
    assert isinstance(field, _Field)
    return field, torch.randn(batch, features, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _against_rk4(size: tuple[int, int, int], backward: bool) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(*size)
    statistics = _ours(field, u)[1]
    assert statistics is not None
    steps = max(1, round(statistics.evaluations / 4))
    plain = _step(field, u, partial(_rk4, steps=steps), backward=backward)
    return plain, _step(field, u, _ours, backward=backward)


def _against_torchdiffeq(size: tuple[int, int, int], backward: bool) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(*size)
    return _step(field, u, _torchdiffeq, backward=backward), _step(field, u, _ours, backward=backward)


def _penalty(size: tuple[int, int, int]) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(*size)
    solve = partial(_ours, method="tsit5")
    return _step(field, u, solve, backward=True), _step(field, u, solve, backward=True, weight=1.0)


def workloads() -> list[Workload]:
    """Fixed RK4 with as many evaluations, torchdiffeq's dopri5 where it is installed, and the penalty alone."""
    sizes = {"B1 D2 H32": (1, 2, 32), "B128 D64 H128": (128, 64, 128)}
    rows = [Workload("penalty, tsit5, B128 D64 H128, forward and backward", partial(_penalty, (128, 64, 128)))]
    for name, size in sizes.items():
        for backward in (False, True):
            what = f"{name}, {'forward and backward' if backward else 'forward'}"
            rows.append(
                Workload(
                    f"dopri5 / fixed RK4, {what}",
                    partial(_against_rk4, size, backward),
                    note="as many evaluations; the solver's own arithmetic is the difference",
                    floor=1.0,
                )
            )
            if find_spec("torchdiffeq") is not None:
                rows.append(
                    Workload(
                        f"dopri5 / torchdiffeq dopri5, {what}",
                        partial(_against_torchdiffeq, size, backward),
                        note="equal tolerance, each with its own control of the step size",
                        floor=0.5,
                    )
                )
    return rows
