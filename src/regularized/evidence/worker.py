"""The process that makes runs, one after the other; started by :mod:`regularized.evidence.runner` and by nobody else.

Lines of JSON come in on what was standard input and go out on what was standard output. A run has neither: what it
prints goes to standard error, so that it can never be taken for a message, and what it reads is empty, so that it
cannot wait for what nobody will type. When the other side goes away, so does this process.

Plain processes with pipes, not ``multiprocessing``: a caller needs no ``if __name__ == "__main__"``, nothing is
pickled, and a run that is killed (out of memory) fails alone.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from types import ModuleType


def main() -> None:
    """Answer the first line (path, module) with code key and environment, each further one (a job) with a run."""
    # Descriptors, not sys.stdin and sys.stdout: C libraries and processes that a run starts use them, too.
    with os.fdopen(os.dup(0), encoding="utf-8") as messages, os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        lines = _lines(messages)
        start = json.loads(next(lines))
        sys.path[:] = start["path"]
        try:
            experiment, about = _load(start["module"])
            answer: dict[str, Any] = {"status": "ready", **about}
        except Exception as error:
            answer = _problem(error)
        _send(out, answer)
        if answer["status"] == "ready":
            for line in lines:
                _send(out, answer_to(experiment, json.loads(line)))


def _lines(messages: TextIO) -> Iterator[str]:
    """Lines from the other side; the process ends with them even when a run is under way."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in messages:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield queue.get()


def _send(out: Any, message: Mapping[str, Any]) -> None:
    out.write(json.dumps(message, default=str) + "\n")
    out.flush()


def _load(module_name: str) -> tuple["ModuleType", dict[str, Any]]:
    from importlib import import_module

    import torch

    from regularized.evidence.provenance import code_key, environment

    torch.set_num_threads(1)
    # warn_only: an operation without a deterministic form (on some GPUs) is no reason not to measure.
    torch.use_deterministic_algorithms(True, warn_only=True)
    experiment = import_module(module_name)
    return experiment, {"code_key": code_key(module_name), "environment": environment(module_name)}


def answer_to(experiment: "ModuleType", job: Mapping[str, Any]) -> dict[str, Any]:
    """Make a run in this process: what came of it, as it is sent."""
    import random

    import numpy as np
    import torch

    from regularized.evidence import pictures, sounds
    from regularized.evidence.experiment import Audible, Illustrated, resolve

    # An experiment draws from generators of its own. One that forgot is still the same in each process and order of
    # runs.
    random.seed(job["seed"])
    np.random.seed(job["seed"])  # noqa: NPY002
    torch.manual_seed(job["seed"])
    _forget_peak()
    start = time.perf_counter()
    try:
        settings = resolve(experiment, job["arm"], job["scale"], job["overrides"])
        measured = experiment.run(settings, job["seed"])
        return {
            "status": "done",
            "metrics": {str(name): float(value) for name, value in measured.metrics.items()},
            "curves": {
                str(name): [(float(x), float(y)) for x, y in points] for name, points in measured.curves.items()
            },
            "curve_unit": measured.curve_unit,
            "data": measured.data,
            "images": pictures.encode(measured.images) if isinstance(measured, Illustrated) else {},
            "sounds": sounds.encode(measured.sounds) if isinstance(measured, Audible) else {},
            "seconds": time.perf_counter() - start,
            "peak_memory": _peak(),
        }
    except Exception as error:
        return _problem(error)


def _problem(error: Exception) -> dict[str, Any]:
    from regularized.evidence.experiment import Unavailable

    status = "unavailable" if isinstance(error, Unavailable) else "failed"
    text = str(error) if status == "unavailable" else f"{type(error).__name__}: {error}"
    return {"status": status, "error": text, "traceback": "".join(traceback.format_exception(error))}


def _forget_peak() -> None:
    """Start the high-water mark of memory again, so that it is one run's (Linux; elsewhere it is the process's)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
