"""What the solver costs beside a fixed RK4 with as many evaluations, beside torchdiffeq and diffrax at equal error.

The bare field, called as often as torchdiffeq calls it, bounds what any solver can save beside that. diffrax is timed
where it is installed (``pip install diffrax "jax[cpu]"``), compiled, on one thread; compiling is not timed.
"""

import copy
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed
from regularized.scientific.ode_regularization.ode_solver import odeint
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.solver_statistics import SolverStatistics

TOLERANCE = 1e-5
SPEED = 20.0  # of the field beside the other libraries: they take some 50 evaluations then, as trained fields do

Size = tuple[int, int, int]


class _Field(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.net(u)
        return out


Solve = Callable[[nn.Module, Tensor], tuple[Tensor, SolverStatistics | None]]


def _ours(
    field: nn.Module, u: Tensor, *, method: str = "dopri5", tolerance: float = TOLERANCE
) -> tuple[Tensor, SolverStatistics | None]:
    solution = odeint(field, u, (0.0, 1.0), method=method, rtol=tolerance, atol=tolerance)
    return solution.states[-1], solution.statistics


def _rk4(field: nn.Module, u: Tensor, *, steps: int) -> tuple[Tensor, SolverStatistics | None]:
    h, half = 1.0 / steps, 0.5 / steps
    for n in range(steps):
        t = torch.full((), n * h, device=u.device)
        k1 = field(t, u)
        k2 = field(t + half, torch.add(u, k1, alpha=half))
        k3 = field(t + half, torch.add(u, k2, alpha=half))
        k4 = field(t + h, torch.add(u, k3, alpha=h))
        u = torch.add(u, (k1 + k4).add_(k2 + k3, alpha=2.0), alpha=h / 6)
    return u, None


def _torchdiffeq(field: nn.Module, u: Tensor) -> tuple[Tensor, SolverStatistics | None]:
    theirs = import_module("torchdiffeq").odeint
    return theirs(field, u, torch.tensor([0.0, 1.0]), method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1], None


def _bare(field: nn.Module, u: Tensor, *, evaluations: int) -> tuple[Tensor, SolverStatistics | None]:
    """The field alone, each call on the result of the one before, so that the backward pass meets all of them."""
    t = torch.zeros((), device=u.device)
    for _ in range(evaluations):
        u = field(t, u)
    return u, None


def _step(field: nn.Module, u: Tensor, solve: Solve, *, backward: bool, weight: float = 0.0) -> StepFunction:
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


def _problem(size: Size, speed: float = 1.0) -> tuple[_Field, Tensor]:
    batch, features, hidden = size
    field = placed(_Field, features, hidden)
    assert isinstance(field, _Field)
    with torch.no_grad():
        for parameter in field.net[-1].parameters():
            parameter.mul_(speed)
    return field, torch.randn(batch, features, generator=torch.Generator().manual_seed(0)).to(device())


def _penalty(size: Size) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(size)
    solve = partial(_ours, method="tsit5")
    return _step(field, u, solve, backward=True), _step(field, u, solve, backward=True, weight=1.0)


def _against_rk4(size: Size, backward: bool) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(size)
    statistics = _ours(field, u)[1]
    assert statistics is not None
    steps = max(1, round(statistics.evaluations / 4))
    plain = _step(field, u, partial(_rk4, steps=steps), backward=backward)
    return plain, _step(field, u, _ours, backward=backward)


@torch.no_grad()
def _as_accurate(field: _Field, u: Tensor, end: Tensor) -> Solve:
    """Our solver at the loosest tolerance, in quarters of a decade, whose error is at most that of ``end``."""
    truth = _ours(copy.deepcopy(field).double(), u.double(), tolerance=1e-10)[0]
    allowed = torch.dist(end.to(truth), truth)
    for quarter in range(4, 29):
        solve = partial(_ours, tolerance=10.0 ** (-quarter / 4))
        if torch.dist(solve(field, u)[0].to(truth), truth) <= allowed:
            return solve
    raise RuntimeError(f"no tolerance down to 1e-7 has an error of at most {float(allowed):.2g}")


def _against_torchdiffeq(size: Size, backward: bool) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(size, SPEED)
    with torch.no_grad():
        solve = _as_accurate(field, u, _torchdiffeq(field, u)[0])
    return _step(field, u, _torchdiffeq, backward=backward), _step(field, u, solve, backward=backward)


def _bound(size: Size, backward: bool) -> tuple[StepFunction, StepFunction]:
    field, u = _problem(size, SPEED)
    calls: list[None] = []
    handle = field.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        _torchdiffeq(field, u)
    handle.remove()
    bare = partial(_bare, evaluations=len(calls))
    return _step(field, u, _torchdiffeq, backward=backward), _step(field, u, bare, backward=backward)


@cache
def _jax() -> tuple[Any, Any]:
    # One thread, as torch has here. JAX reads this when it makes its first array.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    return import_module("jax"), import_module("diffrax")


def _against_diffrax(size: Size, backward: bool) -> tuple[StepFunction, StepFunction]:
    jax, diffrax = _jax()
    field, u = _problem(size, SPEED)
    first, _, last = field.net
    weights = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in (*first.parameters(), *last.parameters())]
    start = jax.numpy.asarray(u.cpu().numpy())

    def vector_field(t: Any, y: Any, w: Any) -> Any:
        return jax.numpy.tanh(y @ w[0].T + w[1]) @ w[2].T + w[3]

    def solve(w: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Dopri5(),
            0.0,
            1.0,
            None,
            start,
            args=w,
            stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        ).ys[-1]

    compiled = jax.jit(jax.grad(lambda w: (solve(w) ** 2).mean()) if backward else solve)

    def step() -> None:
        jax.block_until_ready(compiled(weights))

    step()
    ours = _as_accurate(field, u, torch.tensor(solve(weights).tolist(), device=device()))
    return step, _step(field, u, ours, backward=backward)


def workloads() -> list[Workload]:
    """The penalty, fixed RK4, and the other libraries where they are installed."""
    sizes: dict[str, Size] = {"B1 D2 H32": (1, 2, 32), "B128 D64 H128": (128, 64, 128)}
    penalised: dict[str, Size] = {"B128 D64 H128": (128, 64, 128), "B128 D64 H1024": (128, 64, 1024)}
    penalised["B512 D784 H100"] = (512, 784, 100)  # the paper's MNIST
    rows = [
        Workload(f"penalty, tsit5, {name}, forward and backward", partial(_penalty, size))
        for name, size in penalised.items()
    ]
    for name, size in sizes.items():
        for backward in (False, True):
            what = f"{name}, {'forward and backward' if backward else 'forward'}"
            rows.append(
                Workload(
                    f"dopri5 / fixed RK4, {what}",
                    partial(_against_rk4, size, backward),
                    note="as many evaluations; the solver's own arithmetic is the difference. Aim: at most 1.7",
                    floor=1.0,
                )
            )
            if find_spec("torchdiffeq") is not None:
                rows.append(
                    Workload(
                        f"dopri5 / torchdiffeq dopri5, {what}",
                        partial(_against_torchdiffeq, size, backward),
                        note="at equal error: ours at the loosest tolerance that is as accurate. Aim: at most 0.5",
                        floor=0.5,
                    )
                )
                rows.append(
                    Workload(
                        f"bare field / torchdiffeq dopri5, {what}",
                        partial(_bound, size, backward),
                        note="the field alone, called as often as torchdiffeq does: the bound for as many calls",
                        floor=0.0,
                    )
                )
            if find_spec("diffrax") is not None:
                rows.append(
                    Workload(
                        f"dopri5 / diffrax Dopri5, {what}",
                        partial(_against_diffrax, size, backward),
                        note="at equal error; theirs compiled, on one thread, without the time of compiling",
                        floor=1.0,
                    )
                )
    return rows
