"""Runs jobs in worker processes and hands the answers over as they come."""

import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self

from regularized.evidence.worker_process import TookTooLong, WorkerProcess, path_of, program_of

__all__ = ["OTHER_CODE", "Answer", "AnyPool", "Here", "Job", "Lost", "Pool"]

STARTS = 3  # a process that is killed while it starts is started again, so often in all
PAUSE_SECONDS = 1.0  # before it is: what killed it, most often a lack of memory, may have passed


@dataclass(frozen=True, slots=True)
class Job:
    """One run to make.

    Args:
        arm: its arm.
        seed: its seed.
        scale: its scale.
        overrides: settings that win over those of arm and scale.
        label: what a person is shown instead of arm and overrides.
    """

    arm: str
    seed: int
    scale: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    label: str = field(default="", compare=False)


Answer = dict[str, Any]
"""``status`` is done, failed, unavailable, started, or fatal; the rest is as the worker wrote it."""


class AnyPool(Protocol):
    """Where runs are made: leaving the ``with`` block ends what is still under way."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        ...

    def answers(self) -> Iterator[tuple[Job, Answer]]:
        """Answers as they come, ``started`` before the last one of each job."""
        ...

    def arrived(self) -> Iterator[tuple[Job, Answer]]:
        """Answers that are already here."""
        ...


class Here:
    """Runs one after the other in this process, for what no other can import; arguments as of :class:`Pool`.

    A run that crashes the process takes the others with it, and none can be ended early.
    """

    def __init__(
        self, module_name: str, jobs: Sequence[Job], *, workers: int, code_key: str, time_limit: float | None = None
    ) -> None:
        self._module_name = module_name
        self._jobs = tuple(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def answers(self) -> Iterator[tuple[Job, Answer]]:
        """Make the runs, in the order of the jobs."""
        from importlib import import_module

        import torch

        from regularized.evidence.provenance import environment
        from regularized.evidence.worker import answer_to
        from regularized.training.randomness import preserved

        experiment, about = import_module(self._module_name), environment(self._module_name)
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        for job in self._jobs:
            yield job, {"status": "started"}
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                with preserved():
                    answer = answer_to(experiment, asdict(job))
            finally:
                torch.set_num_threads(threads)
                torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            yield job, answer | {"environment": about}

    def arrived(self) -> Iterator[tuple[Job, Answer]]:
        """Nothing: each answer was handed over when it was there."""
        return iter(())


class Pool:
    """Worker processes for the jobs of one experiment; leaving the ``with`` block ends them at once.

    Args:
        module_name: the experiment.
        jobs: what to run, in this order.
        workers: how many processes.
        code_key: the code that the caller knows; a worker that loaded other code ends the whole run.
        time_limit: seconds that a run may take, its process's start not counted; one that takes longer is ended, and
            has failed. Default none.
        package: where the processes import this package from; default where this process did.

    Raises:
        ValueError: ``time_limit`` is not above 0.
    """

    def __init__(
        self,
        module_name: str,
        jobs: Sequence[Job],
        *,
        workers: int,
        code_key: str,
        time_limit: float | None = None,
        package: Path | None = None,
    ) -> None:
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit must be a number of seconds above 0, got {time_limit}")
        self._module_name = module_name
        self._code_key = code_key
        self._time_limit = time_limit
        self._package = package
        self._jobs = deque(jobs)
        self._left = len(jobs)
        self._answers: SimpleQueue[tuple[Job, Answer]] = SimpleQueue()
        self._processes: set[WorkerProcess] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._some_started = False
        self._defect: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(workers, len(jobs)))]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping.set()
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
                if self._defect is not None:
                    raise self._defect from None
                continue
            self._left -= answer["status"] != "started"
            yield job, answer

    def arrived(self) -> Iterator[tuple[Job, Answer]]:
        """Answers that are already here; does not wait."""
        while not self._answers.empty():
            yield self._answers.get()

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a defect of ours, which must not leave the caller waiting
            self._defect = error

    def _serve(self) -> None:
        """Life of one thread: a process, and jobs for it; a process that is lost is replaced."""
        process: WorkerProcess | None = None
        environment: Mapping[str, Any] = {}
        try:
            while (job := self._next_job()) is not None:
                try:
                    if process is None:
                        process, environment = self.start()
                    self._answers.put((job, {"status": "started"}))
                    answer = self.run_in(process, job)
                except Lost as loss:
                    answer = loss.answer
                    if process is not None:
                        self._forget(process)
                        process = None
                self._answers.put((job, answer | {"environment": environment}))
                if process is None and answer["status"] != "failed":
                    return
        finally:
            if process is not None:
                self._forget(process)

    def _next_job(self) -> Job | None:
        try:
            return None if self._stopping.is_set() else self._jobs.popleft()
        except IndexError:
            return None

    def start(self) -> tuple[WorkerProcess, Mapping[str, Any]]:
        """A process that is ready for jobs, and its environment.

        Raises:
            Lost: there is none.
        """
        problem = ("the comparison was ended", "")
        for attempt in range(STARTS):
            if attempt:
                self._stopping.wait(PAUSE_SECONDS)
            try:
                process = self._launch()
            except OSError as error:
                problem = (f"no process can be started: {error}", "")
                continue
            path = sys.path if self._package is None else path_of(self._package)
            about = process.ask({"path": path, "module": self._module_name})
            if about is not None and about["status"] == "ready" and about["code_key"] == self._code_key:
                self._some_started = True
                return process, about["environment"]
            killed = about is None and process.was_killed
            if about is None:
                problem = process.last_words()
            self._forget(process)
            if about is not None and about["status"] == "ready":
                raise Lost("fatal", OTHER_CODE)
            if about is not None:
                status = "unavailable" if about["status"] == "unavailable" else "fatal"
                raise Lost(status, about["error"], about["traceback"])
            if not killed:
                raise Lost("fatal", *problem)
        # Where others could start, it is this machine now and not the experiment: the other jobs go on.
        raise Lost("failed" if self._some_started else "fatal", *problem)

    def _launch(self) -> WorkerProcess:
        with self._lock:
            if self._stopping.is_set():
                raise Lost("failed", "the comparison was ended")
            process = WorkerProcess() if self._package is None else WorkerProcess(program_of(self._package))
            self._processes.add(process)
        return process

    def run_in(self, process: WorkerProcess, job: Job) -> Answer:
        """A run in a process that :meth:`start` has given.

        Raises:
            Lost: the process is gone, or the run takes too long.
        """
        message = {"arm": job.arm, "seed": job.seed, "scale": job.scale, "overrides": dict(job.overrides)}
        try:
            answer = process.ask(message, seconds=self._time_limit)
        except TookTooLong:
            raise Lost("failed", f"the run took longer than {self._time_limit:g} s and was ended") from None
        if answer is None:
            raise Lost("failed", *process.last_words())
        return answer

    def _forget(self, process: WorkerProcess) -> None:
        process.end()
        with self._lock:
            self._processes.discard(process)


class Lost(Exception):
    """There is no process, or no longer; with the answer to the job that it was for."""

    def __init__(self, status: str, error: str, traceback: str = "") -> None:
        super().__init__(error)
        self.answer: Answer = {"status": status, "error": error, "traceback": traceback}


OTHER_CODE = (
    "the code of the experiment changed between the start of the comparison and the start of a worker: call it again"
)
