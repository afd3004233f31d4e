"""Runs jobs in worker processes and hands the answers over as they come."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["Answer", "Job", "Pool"]

_TAIL = 4000  # characters of a dead process's last words that are kept

# One thread a process: the cores are kept busy by the seeds, and sums come out in one order.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch asks for to be deterministic on CUDA
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run to make."""

    arm: str
    seed: int
    scale: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


Answer = dict[str, Any]
"""``status`` is done, failed, unavailable, started, or fatal; the rest is as the worker wrote it."""


class Pool:
    """Worker processes for the jobs of one experiment; leaving the ``with`` block ends them at once.

    Args:
        module_name: the experiment.
        jobs: what to run, in this order.
        workers: how many processes.
        code_key: the code that the caller knows; a worker that loaded other code ends the whole run.
    """

    def __init__(self, module_name: str, jobs: Sequence[Job], *, workers: int, code_key: str) -> None:
        self._module_name = module_name
        self._code_key = code_key
        self._jobs = deque(jobs)
        self._left = len(jobs)
        self._answers: SimpleQueue[tuple[Job, Answer]] = SimpleQueue()
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(workers, len(jobs)))]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def answers(self) -> Iterator[tuple[Job, Answer]]:
        """Answers in the order in which they come, until every job has its last one; ``started`` comes before it."""
        while self._left:
            try:
                # In slices, because a wait without end cannot be interrupted on every platform.
                job, answer = self._answers.get(timeout=0.5)
            except Empty:
                continue
            self._left -= answer["status"] != "started"
            yield job, answer

    def arrived(self) -> Iterator[tuple[Job, Answer]]:
        """Answers that are already here; does not wait."""
        while not self._answers.empty():
            yield self._answers.get()

    def _serve(self) -> None:
        """Life of one thread: a process, and jobs for it; a process that dies is replaced."""
        process: subprocess.Popen[str] | None = None
        environment: Mapping[str, Any] = {}
        with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as errors:
            try:
                while not self._stopping:
                    try:
                        job = self._jobs.popleft()
                    except IndexError:
                        return
                    if process is None:
                        errors.seek(0)
                        errors.truncate()
                        process, about = self._start(errors)
                        if about["status"] == "ready" and about["code_key"] != self._code_key:
                            about = {"status": "changed", "error": _CODE_CHANGED, "traceback": ""}
                        if about["status"] == "unavailable":
                            self._answers.put((job, about))
                            return
                        if about["status"] != "ready":
                            self._answers.put((job, about | {"status": "fatal"}))
                            return
                        environment = about["environment"]
                    self._answers.put((job, {"status": "started"}))
                    message = {"arm": job.arm, "seed": job.seed, "scale": job.scale, "overrides": dict(job.overrides)}
                    answer = self._exchange(process, message)
                    if answer is None:
                        code = process.wait()
                        answer = {"status": "failed", "error": _death(code), "traceback": _tail(errors)}
                        self._forget(process)
                        process = None
                    self._answers.put((job, answer | {"environment": environment}))
            finally:
                if process is not None:
                    self._forget(process)

    def _start(self, errors: IO[str]) -> tuple[subprocess.Popen[str], Answer]:
        # -P keeps the worker's folder off the path: our `statistics` must not stand in for the standard library's.
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        with self._lock:
            if self._stopping:
                raise SystemExit  # ends this thread alone
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=os.environ | _WORKER_ENVIRONMENT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which knows what to keep
            )
            self._processes.add(process)
        about = self._exchange(process, {"path": sys.path, "module": self._module_name})
        if about is None:
            about = {"status": "failed", "error": _death(process.wait()), "traceback": _tail(errors)}
        return process, about

    @staticmethod
    def _exchange(process: subprocess.Popen[str], message: Mapping[str, Any]) -> Answer | None:
        """Send a line and wait for one; None when the process is gone."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            return None
        if not line.endswith("\n"):
            return None
        answer: Answer = json.loads(line)
        return answer

    def _forget(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._processes.discard(process)


_CODE_CHANGED = (
    "the code of the experiment changed between the start of the comparison and the start of a worker: call it again"
)


def _death(code: int) -> str:
    if code == -9:
        return "the process of the run was killed (signal 9): most often it was out of memory"
    return (
        f"the process of the run ended by signal {-code}"
        if code < 0
        else f"the process of the run exited with code {code}"
    )


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-_TAIL:]
