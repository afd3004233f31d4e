"""The loop stays thin. Figures for people come from the benchmark itself; here the best of some rounds is compared."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "trainer_overhead.py"


@pytest.mark.slow
def test_trainer_costs_little_more_than_bare_accelerate():
    """Fails if something heavy (a read of the device, a search for moments, a wrapper) gets into the step."""
    spec = importlib.util.spec_from_file_location("trainer_overhead", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    best = {name: min(times) for name, times in benchmark.measure(rounds=8, steps=200).items()}
    assert best["Trainer"] - best["bare Accelerate"] < 60  # microseconds a step
    assert best["data: TensorData"] - best["data: direct indexing"] < 10
