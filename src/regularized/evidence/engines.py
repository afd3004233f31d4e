"""Runs on other machines: whatever hands out tasks and gives futures for them. Ray is the one that is tested.

Each task asks the same worker process as a local run does, so that threads, seeds and determinism are the same; the
engine decides where. What a lost machine took along is made again. Only the caller writes to the store.

Public names: :class:`Engine`, :class:`EnginePool`, :class:`RayEngine`, :class:`ExecutorEngine`.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from regularized.evidence.experiment import Unavailable
from regularized.evidence.pool import Answer, Job, Lost, Pool
from regularized.evidence.provenance import checkout_state, closure, versions
from regularized.evidence.worker_process import WorkerProcess

__all__ = ["DaskEngine", "Engine", "EnginePool", "ExecutorEngine", "RayEngine", "make_run"]

TRIES = 4
"""How often a run is handed out whose machine was lost, in all."""


class Engine(Protocol):
    """Somebody else's machines."""

    def submit(self, module_name: str, job: Mapping[str, Any], about: Mapping[str, Any]) -> "Future[Answer]":
        """Hand out one call of :func:`make_run` with these arguments."""
        ...

    def cancel(self, future: "Future[Answer]") -> None:
        """Give up one that is under way."""
        ...


def make_run(module_name: str, job: Mapping[str, Any], about: Mapping[str, Any]) -> Answer:
    """One run, on the machine of the engine; the worker process is kept for the next one.

    Args:
        module_name: the experiment.
        job: arguments of a :class:`~regularized.evidence.pool.Job`.
        about: ``code_key`` and ``versions`` of the caller, which must be those here, and ``time_limit``.
    """
    if (here := versions()) != about["versions"]:
        differing = {name: (here.get(name), about["versions"].get(name)) for name in {*here, *about["versions"]}}
        told = ", ".join(f"{name} {a} there and {b} here" for name, (a, b) in sorted(differing.items()) if a != b)
        return _fatal(f"a machine of the engine has other versions: {told}; install the same on all")
    pool = Pool(module_name, (), workers=1, code_key=about["code_key"], time_limit=about["time_limit"])
    # Which GPU a task may use can be another one the next time; a process sees what it saw at its start. Each thread
    # has a process of its own, as an engine may run several tasks in one process.
    key = (threading.get_ident(), module_name, about["code_key"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    for other in [known for known in list(_kept) if known[0] == key[0] and known != key]:
        _kept.pop(other)[0].end()
    environment: Mapping[str, Any] = {}
    try:
        if key not in _kept:
            _kept[key] = pool.start()
        process, environment = _kept[key]
        answer = pool.run_in(process, Job(**job))
    except Lost as loss:
        answer = loss.answer
        if key in _kept:
            _kept.pop(key)[0].end()
    return answer | {"environment": dict(environment)}


_kept: dict[tuple[int, str, str, str | None], tuple[WorkerProcess, Mapping[str, Any]]] = {}


def _fatal(error: str) -> Answer:
    return {"status": "fatal", "error": error, "traceback": "", "environment": {}}


class EnginePool:
    """The face of :class:`~regularized.evidence.pool.Pool`, on an engine; ``workers`` is for the engine to decide.

    Args:
        engine: hands out the tasks.
        module_name: the experiment.
        jobs: what to run.
        workers: not used.
        code_key: the code that the caller knows; other code on a machine ends the whole run.
        time_limit: seconds that a run may take; default any.
    """

    def __init__(
        self,
        engine: Engine,
        module_name: str,
        jobs: Sequence[Job],
        *,
        workers: int,
        code_key: str,
        time_limit: float | None = None,
    ) -> None:
        self._engine, self._module_name = engine, module_name
        self._about = {"code_key": code_key, "versions": dict(versions()), "time_limit": time_limit}
        self._jobs = tuple(jobs)
        self._open: dict[Future[Answer], tuple[int, Job]] = {}
        self._tries: Counter[int] = Counter()
        self._device: str | None = None
        # A tree that was shipped to another machine has no git: commit and changes are those of the caller.
        state = checkout_state(closure(module_name).values())
        self._checkout = {"commit": state.commit, "dirty": state.dirty}

    def __enter__(self) -> Self:
        for number, job in enumerate(self._jobs):
            self._hand_out(number, job)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._open:
            self._engine.cancel(future)

    def answers(self) -> Iterator[tuple[Job, Answer]]:
        """Answers as they come."""
        while self._open:
            for future in wait(self._open, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield from self._take(future)

    def arrived(self) -> Iterator[tuple[Job, Answer]]:
        """Answers that are already here."""
        for future in [future for future in self._open if future.done()]:
            yield from self._take(future)

    def _hand_out(self, number: int, job: Job) -> None:
        content = {"arm": job.arm, "seed": job.seed, "scale": job.scale, "overrides": dict(job.overrides)}
        self._tries[number] += 1
        self._open[self._engine.submit(self._module_name, content, self._about)] = number, job

    def _take(self, future: "Future[Answer]") -> Iterator[tuple[Job, Answer]]:
        number, job = self._open.pop(future)
        try:
            answer = future.result()
        except Exception as error:  # of the engine: ours come back as answers
            if self._tries[number] < TRIES:
                self._hand_out(number, job)
                return
            answer = {"status": "failed", "error": f"lost {TRIES} times: {error}", "traceback": "", "environment": {}}
        yield job, self._checked(answer)

    def _checked(self, answer: Answer) -> Answer:
        """Paired arms are compared: all of them must have run on one kind of device."""
        environment = answer["environment"]
        if answer["status"] != "done":
            return answer
        device = environment["device"]
        self._device = self._device or device
        if device != self._device:
            return _fatal(
                f"one run was made on {self._device}, another on {device}: runs that are compared need one kind of "
                "device. Restrict the cluster to one"
            )
        return answer | {"environment": environment | self._checkout}


class RayEngine:
    """Ray's tasks, on the cluster of ``RAY_ADDRESS``, or on one that is started on this machine.

    The package goes along as it is here, unless the caller has connected already;
    the versions of Python, torch and the rest must be there.

    Args:
        cpus: cores for a run; default 1, which is what a run has locally.
        gpus: GPUs for a run, a half for two on one; default none.

    Raises:
        Unavailable: Ray is not installed, or no machine of the cluster has so much.

    Attributes:
        handed_out: how many tasks were.
    """

    def __init__(self, *, cpus: float = 1, gpus: float = 0) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise Unavailable('--engine ray needs Ray: pip install "regularized[ray]"') from error
        self._ray = ray
        if not ray.is_initialized():
            package = str(Path(__file__).parents[1])
            excluded = ["**/__pycache__", "**/golden.npz", "**/ledger.json"]
            ray.init(log_to_driver=False, runtime_env={"py_modules": [package], "excludes": excluded})
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        _refuse_more_than_there_is(machines, CPU=cpus, GPU=gpus)
        # What is lost is handed out again by the pool, which counts.
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(make_run)
        self._references: dict[Future[Answer], Any] = {}
        self.handed_out: int = 0

    def submit(self, module_name: str, job: Mapping[str, Any], about: Mapping[str, Any]) -> "Future[Answer]":
        """Hand out a task."""
        reference = self._task.remote(module_name, job, about)
        future: Future[Answer] = reference.future()
        self._references[future] = reference
        self.handed_out += 1
        return future

    def cancel(self, future: "Future[Answer]") -> None:
        """End it at once; its worker process ends with the one that asked it."""
        self._ray.cancel(self._references[future], force=True)


def _refuse_more_than_there_is(machines: Sequence[Mapping[str, float]], **wanted: float) -> None:
    """Say at once what an engine would wait for, for ever and without a word."""
    for what, amount in wanted.items():
        most = max((machine.get(what, 0.0) for machine in machines), default=0.0)
        if amount > most:
            raise Unavailable(
                f"a run is to have {amount:g} {what}, and no machine of the cluster has more than {most:g}"
            )


class ExecutorEngine:
    """Any :class:`concurrent.futures.Executor` whose tasks run in processes or on machines of their own.

    Args:
        executor: hands out the tasks.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, module_name: str, job: Mapping[str, Any], about: Mapping[str, Any]) -> "Future[Answer]":
        """Hand out a task."""
        return self._executor.submit(make_run, module_name, job, about)

    def cancel(self, future: "Future[Answer]") -> None:
        """Not begin it, if it has not begun."""
        future.cancel()


class DaskEngine(ExecutorEngine):
    """Dask's workers: of the caller's client, of the scheduler at ``DASK_SCHEDULER_ADDRESS``, or started here.

    Nothing is shipped: the package must be installed on every machine, the same as here. Workers that have GPUs are
    started with ``--resources "GPU=1"``.

    Args:
        gpus: GPUs for a run, a half for two on one; default none.

    Raises:
        Unavailable: Dask is not installed, or no worker has so much, or there is none.
    """

    def __init__(self, *, gpus: float = 0) -> None:
        try:
            distributed: Any = import_module("distributed")
        except ImportError as error:
            raise Unavailable('--engine dask needs Dask: pip install "regularized[dask]"') from error
        try:
            client = distributed.default_client()
        except ValueError:
            address = os.environ.get("DASK_SCHEDULER_ADDRESS")
            client = distributed.Client(
                address or distributed.LocalCluster(threads_per_worker=1, dashboard_address=None)
            )
        workers = list(client.scheduler_info(n_workers=-1)["workers"].values())
        machines = [{"CPU": worker["nthreads"], **worker["resources"]} for worker in workers]
        _refuse_more_than_there_is(machines, CPU=1, GPU=gpus)
        super().__init__(client.get_executor(pure=False, **({"resources": {"GPU": gpus}} if gpus else {})))
