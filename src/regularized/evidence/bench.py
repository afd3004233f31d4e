"""What a technique costs: plain step and method step interleaved in one run, and the peak memory of each.

Single times on a shared machine are worth little; the *ratio* of steps that ran side by side is. So the two steps take
turns (A B, then B A), the ratio is the median of the paired ratios, and its interval is a bootstrap over the pairs.
"""

import gc
import multiprocessing as mp
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from regularized.evidence.bench_rows import BenchRow

__all__ = ["Workload", "bench"]

StepFunction: TypeAlias = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """One size at which a technique is timed.

    Args:
        size: what is timed, for the table.
        build: returns the plain step and the method step: functions without arguments that each do one whole training
            step (forward, backward, optimizer) of equal models on equal batches.
        note: what to know when reading the row.
        floor: floor for this size where it differs from the card's.
    """

    size: str
    build: Callable[[], tuple[StepFunction, StepFunction]]
    note: str = ""
    floor: float | None = None


class BenchModule(Protocol):
    """What ``papers/<slug>/bench.py`` offers."""

    def workloads(self) -> Sequence[Workload]:
        """The sizes, smallest first."""
        ...


def bench(
    slug: str,
    module_name: str,
    *,
    floor: float | None = None,
    seconds: float = 12.0,
    threads: int = 1,
    memory: bool = True,
    seed: int = 0,
    on_row: Callable[[BenchRow], None] | None = None,
) -> list[BenchRow]:
    """Time every workload of a paper's bench module.

    Args:
        slug: paper, for the rows.
        module_name: dotted name of the bench module.
        floor: the card's floor, for workloads without their own.
        seconds: time budget of each workload; at least 10 pairs are timed whatever it is.
        threads: torch threads; default 1, the quietest.
        memory: measure peak memory in fresh processes too.
        seed: seed of the initialisation, the data, and the bootstrap.
        on_row: called with each row as soon as it is measured.

    Returns:
        One row a workload, in the order of the module.
    """
    from importlib import import_module

    module: BenchModule = import_module(module_name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for number, workload in enumerate(module.workloads()):
            torch.manual_seed(seed)
            plain, method = workload.build()
            plain_times, method_times = _pairs(plain, method, seconds)
            del plain, method
            gc.collect()
            ratios = method_times / plain_times
            row = BenchRow(
                slug=slug,
                size=workload.size,
                plain_ms=float(np.median(plain_times)) * 1e3,
                method_ms=float(np.median(method_times)) * 1e3,
                ratio=float(np.median(ratios)),
                ratio_interval=_median_interval(ratios, seed),
                floor=workload.floor if workload.floor is not None else floor,
                peak_memory_ratio=_memory_ratio(module_name, number, seed) if memory else None,
                pairs=len(ratios),
                note=workload.note,
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
    finally:
        torch.set_num_threads(before)
    return rows


def _pairs(plain: StepFunction, method: StepFunction, seconds: float) -> tuple[Any, Any]:
    """Interleaved times of the two steps, order turned round each time."""
    for _ in range(3):
        plain()
        method()
    _wait()
    times: tuple[list[float], list[float]] = ([], [])
    steps = (plain, method)
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        pair = 0
        while pair < 10 or (time.perf_counter() < deadline and pair < 2000):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                start = time.perf_counter()
                steps[which]()
                _wait()
                times[which].append(time.perf_counter() - start)
            pair += 1
    finally:
        if collecting:
            gc.enable()
    return np.array(times[0]), np.array(times[1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median_interval(values: Any, seed: int, resamples: int = 2000) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return float(low), float(high)


def _memory_ratio(module_name: str, number: int, seed: int) -> float:
    plain, method = (_peak_in_fresh_process(module_name, number, which, seed) for which in (0, 1))
    return method / plain


def _peak_in_fresh_process(module_name: str, number: int, which: int, seed: int) -> float:
    context = mp.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(send, module_name, number, which, seed))
    process.start()
    send.close()
    try:
        peak: float = receive.recv()
    except EOFError:
        raise RuntimeError(f"measuring the memory of workload {number} of {module_name} failed; see above") from None
    finally:
        process.join()
    return peak


def _measure_peak(send: Any, module_name: str, number: int, which: int, seed: int) -> None:
    from importlib import import_module

    torch.set_num_threads(1)
    module = import_module(module_name)
    torch.manual_seed(seed)
    base = _peak_bytes()
    step = module.workloads()[number].build()[which]
    for _ in range(4):
        step()
    send.send(max(_peak_bytes() - base, 1.0))
    send.close()


def _peak_bytes() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux it survives exec, so a child of a large process would start with its parent's peak.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
