"""What a technique costs: plain step and method step interleaved in one run, and the peak memory of each.

Single times on a shared machine are worth little; the *ratio* of steps that ran side by side is. So the two steps take
turns (A B, then B A), and the ratio is the median of the paired ratios. Each size is measured in a fresh process: where
its memory lies, and what ran before, moves a ratio by more than the pairs of one process show. So a figure that is to
be kept is measured in several of them, and its interval is what they gave; that of one process is a bootstrap over its
pairs.
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
from regularized.evidence.experiment import Unavailable

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
        kept: returns the bytes of what is kept of the plain and of the method's model, of files that were written or of
            tensors that were counted; default None, for a technique that makes nothing smaller. Called in a process of
            its own.
    """

    size: str
    build: Callable[[], tuple[StepFunction, StepFunction]]
    note: str = ""
    floor: float | None = None
    kept: Callable[[], tuple[float, float]] | None = None


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
    processes: int = 1,
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
        seconds: time budget of each workload, which its processes share; each times at least 10 pairs whatever it is.
        processes: fresh processes for each workload, one after the other.
        threads: torch threads; default 1, the quietest.
        memory: measure peak memory, too, in processes of its own.
        seed: seed of the initialisation, the data, and the bootstrap.
        on_row: called with each row as soon as it is measured.

    Returns:
        One row a workload, in the order of the module.

    Raises:
        RuntimeError: a process ended without an answer; what it wrote to standard error says why.
        Unavailable: a workload needs a package that is not installed.
        ValueError: ``processes`` is below 1.
    """
    from importlib import import_module

    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    module: BenchModule = import_module(module_name)
    rows = []
    for number, workload in enumerate(module.workloads()):
        times = [
            _in_fresh_process(_measure_times, module_name, number, seconds / processes, threads, seed)
            for _ in range(processes)
        ]
        ratios = [method / plain for plain, method in times]
        medians = [float(np.median(of_one)) for of_one in ratios]
        peaks = _peaks(module_name, number, seed) if memory else None
        kept = _in_fresh_process(_measure_kept, module_name, number, seed) if workload.kept else None
        row = BenchRow(
            slug=slug,
            size=workload.size,
            plain_ms=float(np.median([np.median(plain) for plain, _ in times])) * 1e3,
            method_ms=float(np.median([np.median(method) for _, method in times])) * 1e3,
            ratio=float(np.median(medians)),
            ratio_interval=(min(medians), max(medians)) if processes > 1 else _median_interval(ratios[0], seed),
            floor=workload.floor if workload.floor is not None else floor,
            peak_memory_ratio=peaks[1] / peaks[0] if peaks else None,
            pairs=sum(map(len, ratios)),
            processes=processes,
            note=workload.note,
            peak_bytes=peaks,
            size_bytes=kept,
        )
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _measure_times(module_name: str, number: int, seconds: float, threads: int, seed: int) -> tuple[Any, Any]:
    from importlib import import_module

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    plain, method = import_module(module_name).workloads()[number].build()
    return _pairs(plain, method, seconds)


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


def _peaks(module_name: str, number: int, seed: int) -> tuple[float, float]:
    plain, method = (_in_fresh_process(_measure_peak, module_name, number, which, seed) for which in (0, 1))
    return plain, method


def _measure_peak(module_name: str, number: int, which: int, seed: int) -> float:
    from importlib import import_module

    torch.set_num_threads(1)
    module = import_module(module_name)
    torch.manual_seed(seed)
    base = _peak_bytes()
    step = module.workloads()[number].build()[which]
    for _ in range(4):
        step()
    return max(_peak_bytes() - base, 1.0)


def _measure_kept(module_name: str, number: int, seed: int) -> tuple[float, float]:
    from importlib import import_module

    torch.manual_seed(seed)
    kept = import_module(module_name).workloads()[number].kept
    plain, method = kept()
    return float(plain), float(method)


def _in_fresh_process(measure: Callable[..., Any], module_name: str, number: int, *arguments: Any) -> Any:
    context = mp.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, measure, module_name, number, *arguments))
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        raise RuntimeError(f"measuring workload {number} of {module_name} failed; see above") from None
    finally:
        process.join()
    if isinstance(answer, Unavailable):
        raise answer
    return answer


def _answer(send: Any, measure: Callable[..., Any], *arguments: Any) -> None:
    try:
        send.send(measure(*arguments))
    except Unavailable as error:
        send.send(error)
    except ImportError as error:  # of a package that is not here: told in a line, by who asked
        if not (isinstance(error, ModuleNotFoundError) or "pip install" in str(error)):
            raise
        send.send(Unavailable(str(error)))
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
