"""What tests of the evidence storey share."""

import importlib.util
import math
from pathlib import Path

import pytest

from regularized.evidence import worker_process
from regularized.evidence.claims import Claim, Reported
from regularized.evidence.experiment import resolve
from regularized.evidence.results import Failure, ReproduceResult, Trial, TuningResult, outcomes
from regularized.evidence.store import Run

HERE = Path(__file__).parent
COLD_WORKER = worker_process.PROGRAM


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A data folder of the test's own."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def cold_workers(warm_workers, monkeypatch):
    """Workers start as they do for users, for a test that asks for it."""
    monkeypatch.setattr(worker_process, "PROGRAM", COLD_WORKER)


@pytest.fixture
def fake(home, monkeypatch):
    """Name of the fake experiment, importable here and in worker processes."""
    monkeypatch.syspath_prepend(str(HERE))
    return "fake_experiment"


@pytest.fixture
def claim():
    return Claim(
        id="end",
        statement="Better is better <at> the end & after.",
        metric="accuracy",
        direction="higher",
        baseline="plain",
        method="better",
        differs=("name", "rate", "best_rate", "gain"),
        smallest_effect=2.0,
        unit="points",
        reported=(
            Reported("CIFAR-10, accuracy %", 81.88, 89.15, "table 2"),
            Reported("CIFAR-100", None, 60.0, "README"),
        ),
        note="Seen on digits.",
    )


def settings_of(arm, scale="laptop", **overrides):
    """What the fake experiment's arm runs with."""
    spec = importlib.util.spec_from_file_location("fake_experiment", HERE / "fake_experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return resolve(module, arm, scale, overrides)


_ARMS = {"plain": 70.0, "better": 75.0, "control": 70.5}


def _runs(seeds=10, *, code_key="key", versions=None, **changes):
    """What the fake experiment might have measured at laptop scale."""
    return [
        Run(
            **{
                "slug": "paper",
                "scale": "laptop",
                "arm": arm,
                "seed": seed,
                "code_key": code_key,
                "versions": versions or {"torch": "2.13"},
                "metrics": {"accuracy": level + 0.1 * seed, "validation": level / 3},
                "curves": {"accuracy": [(x, level + seed - math.exp(-x / 40)) for x in range(120)]},
                "data": f"data{seed}",
                "settings": settings_of(arm),
                "environment": {"cpu": "x", "commit": "c", "dirty": False},
                "seconds": 1.234567,
                "peak_memory": 2**28,
                "created": "2025-01-02T03:04:05+00:00",
            }
            | changes
        )
        for arm, level in _ARMS.items()
        for seed in range(seeds)
    ]


def _result(claims: list[Claim], runs=None, seeds=10, **changes) -> ReproduceResult:
    runs = _runs(seeds) if runs is None else runs
    return ReproduceResult(
        **{
            "slug": "paper",
            "module_name": "papers.paper.experiment",
            "scale": "laptop",
            "seeds": tuple(range(seeds)),
            "arms": tuple(_ARMS),
            "outcomes": outcomes(claims, runs, seeds=range(seeds), scale="laptop"),
            "runs": tuple(runs),
            "environment": {"cpu": "x", "torch": "2.13"},
            "code_key": "key",
            "reused": 3,
            "seconds": 12.3456,
            "tuning": TuningResult(
                "validation",
                "higher",
                (1000, 1001),
                (Trial("plain", {"rate": 0.1}, (1.0, 2.0), best=True), Trial("better", {"rate": 0.2}, (1.0, math.nan))),
                {"plain": False},
            ),
            "failures": (Failure("control", 1, "RuntimeError: <b>bad</b>", "Traceback <script>alert(1)</script>"),),
        }
        | changes
    )


@pytest.fixture
def make_runs():
    """Runs made by hand, for tests that need no training."""
    return _runs


@pytest.fixture
def make_result():
    """A whole result made by hand, with tuning and a failure."""
    return _result


@pytest.fixture
def make_settings():
    """Resolved settings of the fake experiment's arms."""
    return settings_of
