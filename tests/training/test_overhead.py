"""The loop stays thin. Figures for people come from the benchmark itself; here the best of some rounds is compared.

In processor time, and as a share of the same machine's bare loop: what else the machine does, and how fast it is, must
not decide.
"""

import importlib.util
import math
import time
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "trainer_overhead.py"


@pytest.mark.slow
def test_trainer_costs_little_more_than_bare_accelerate():
    """Fails if something heavy (a read of the device, a search for moments, a wrapper) gets into the step."""
    spec = importlib.util.spec_from_file_location("trainer_overhead", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    best = dict.fromkeys(("bare Accelerate", "Trainer", "data: direct indexing", "data: TensorData"), math.inf)

    def is_thin() -> bool:
        loop, data = "Trainer", "data: TensorData"
        return best[loop] < 1.1 * best["bare Accelerate"] and best[data] < 2 * best["data: direct indexing"]

    for _ in range(6):  # a neighbour on the same core lengthens a round, and nothing shortens one
        measured = benchmark.measure(rounds=4, steps=200, clock=time.process_time)
        best = {name: min(least, *measured[name]) for name, least in best.items()}
        if is_thin():
            break
    assert is_thin(), best
