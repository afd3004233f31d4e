"""Runs a paper's comparison: arms x seeds in parallel, stored as they finish, judged at the end.

Public names:
    ``reproduce(slug, module_name, claims, *, scale, seeds, ...) -> ReproduceResult``
    ``tune(slug, module_name, *, ...) -> TuningResult``
    ``Interrupted`` (a KeyboardInterrupt that says how many runs are kept)

The result goes to :mod:`regularized.evidence.report` (``write``, ``to_json``, ``print_table``).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

from regularized.evidence import ledger, pictures, sounds
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import Tuning, Unavailable, block_of, describe_arms, resolve, seeds_of
from regularized.evidence.pool import Answer, AnyPool, Job, Pool
from regularized.evidence.progress import Display, display
from regularized.evidence.provenance import checkout_state, closure, code_key, cores, environment, versions
from regularized.evidence.results import Failure, ReproduceResult, TuningResult, outcomes, rank_trials
from regularized.evidence.store import Run, Store, canonical
from regularized.mechanisms.surgery import close_names

__all__ = ["Interrupted", "reproduce", "run_jobs", "tune"]

log: logging.Logger = logging.getLogger(__name__)

_WAIT = 1.0  # seconds between looks at the store for a run that another process is making


class Interrupted(KeyboardInterrupt):
    """The user interrupted; finished runs are in the store and the next call goes on from there.

    Args:
        finished: runs of this matrix that are kept.
        total: runs of the matrix.
    """

    def __init__(self, finished: int, total: int) -> None:
        super().__init__(f"interrupted: {finished} of {total} runs are kept, the same command goes on from there")
        self.finished = finished
        self.total = total


def reproduce(
    slug: str,
    module_name: str,
    claims: Sequence[Claim],
    *,
    scale: str = "laptop",
    seeds: int | None = None,
    first: int | None = None,
    arms: Sequence[str] | None = None,
    workers: int | None = None,
    store: Store | None = None,
    fresh: bool = False,
    progress: bool = True,
    time_limit: float | None = None,
    pool: Callable[..., AnyPool] = Pool,
) -> ReproduceResult:
    """Run every arm with every seed and judge the claims.

    Runs that the store already holds (same code, settings, seed and versions) are not made again. A run that fails is
    reported and the rest goes on; a claim that needs it stays open.

    Args:
        slug: the paper.
        module_name: its experiment, for example ``"regularized.papers.early_learning.experiment"``.
        claims: what to judge.
        scale: ``"smoke"``, ``"laptop"`` (default) or ``"paper"``.
        seeds: how many of the declared seeds, from the first on; default all. With fewer every claim stays open.
        first: another block of as many seeds, for an attempt of one's own, see
            :func:`~regularized.evidence.experiment.block_of`; default the declared.
        arms: only these arms, in the experiment's order; default all. Claims about others are left out of the result,
            but count in the correction for the number of claims.
        workers: parallel processes of one thread each; default one for each usable core.
        store: where runs are kept; default the user's store.
        fresh: make runs again that are in the store already.
        progress: show a bar on standard error, or a line for each run where that is no terminal.
        time_limit: seconds that a run may take; one that takes longer is ended, and has failed. Default none.
        pool: what makes the runs; default processes on this machine. Others are in
            :mod:`regularized.evidence.engines`.

    Raises:
        Unavailable: data, a package or hardware of this scale is missing.
        ValueError: the scale, an arm, an arm of a claim or the block of seeds does not exist, or more seeds are asked
            for than the experiment declares.
        Interrupted: Ctrl-C; finished runs are kept.
        StoreError: the store cannot be used.
        RuntimeError: the experiment cannot be loaded in a process of its own.
    """
    start = time.monotonic()
    experiment = _load(module_name)
    wanted = _seeds(seeds, experiment, first)
    _check(experiment, module_name, scale, claims)
    chosen = _chosen(arms, experiment, module_name)
    jobs = [Job(arm, seed, scale) for seed in wanted for arm in chosen]
    with nullcontext(store) if store is not None else Store() as opened:
        runs, failures, reused = _run_matrix(
            slug, module_name, experiment, jobs, workers, opened, fresh, progress, time_limit, pool
        )
        tuning = _known_tuning(slug, module_name, experiment, opened)
    declared = seeds_of(experiment).count
    short = "" if len(wanted) == declared else f"{len(wanted)} of the {declared} declared seeds: a look, not a verdict"
    about = describe_arms(experiment, scale)
    judged = outcomes(claims, runs, seeds=wanted, scale=scale, about=about, problem=short)
    return ReproduceResult(
        slug=slug,
        module_name=module_name,
        scale=scale,
        seeds=wanted,
        arms=chosen,
        outcomes=tuple(o for o in judged if {o.claim.baseline, o.claim.method} <= set(chosen)),
        runs=tuple(runs),
        failures=tuple(failures),
        notes=tuple(_notes(runs, failures, claims, wanted)),
        tuning=tuning,
        about=about,
        environment=runs[0].environment if runs else environment(module_name),
        code_key=code_key(module_name),
        reused=reused,
        seconds=time.monotonic() - start,
        own_block=wanted[0] != seeds_of(experiment).first,
    )


def tune(
    slug: str,
    module_name: str,
    *,
    workers: int | None = None,
    store: Store | None = None,
    fresh: bool = False,
    progress: bool = True,
    time_limit: float | None = None,
    pool: Callable[..., AnyPool] = Pool,
) -> TuningResult:
    """Run the experiment's tuning grid, as many trials for each arm, and say which setting is best.

    The trials are stored, so that the report of a comparison and the ledger can show them.

    Args:
        slug: the paper.
        module_name: its experiment.
        workers: as in :func:`reproduce`.
        store: as in :func:`reproduce`.
        fresh: as in :func:`reproduce`.
        progress: as in :func:`reproduce`.
        time_limit: as in :func:`reproduce`.
        pool: as in :func:`reproduce`.

    Raises:
        ValueError: the experiment has no ``TUNING``.
        Unavailable, Interrupted, StoreError, RuntimeError: as in :func:`reproduce`.
    """
    start = time.monotonic()
    experiment = _load(module_name)
    tuning = _tuning(experiment)
    if tuning is None:
        raise ValueError(f"{module_name} has no TUNING: its settings come from the paper, there is nothing to tune")
    _check(experiment, module_name, tuning.scale, ())
    if unknown := sorted(set(tuning.grids) - set(experiment.ARMS)):
        raise ValueError(f"TUNING of {module_name} names arms {unknown}; it has {sorted(experiment.ARMS)}")
    jobs = trials_of(tuning)
    with nullcontext(store) if store is not None else Store() as opened:
        runs, failures, reused = _run_matrix(
            slug, module_name, experiment, jobs, workers, opened, fresh, progress, time_limit, pool
        )
    trials, agrees = rank_trials(tuning, runs, resolved(experiment, tuning.scale))
    return TuningResult(
        metric=tuning.metric,
        direction=tuning.direction,
        seeds=tuple(tuning.seeds),
        trials=trials,
        agrees=agrees,
        failures=tuple(failures),
        reused=reused,
        seconds=time.monotonic() - start,
    )


def run_jobs(
    slug: str,
    module_name: str,
    jobs: Sequence[Job],
    *,
    store: Store,
    workers: int | None = None,
    progress: bool = True,
    fresh: bool = True,
    pool: Callable[..., AnyPool] = Pool,
) -> tuple[list[Run], list[Failure], int]:
    """Make single runs; see :func:`reproduce` for the other arguments and errors.

    Args:
        slug: under which they are kept.
        module_name: the experiment.
        jobs: the runs.
        store: where they are kept.
        workers: parallel processes.
        progress: show how far it is.
        fresh: make them whatever the store holds; default True.
        pool: what makes them; default processes of their own.

    Returns:
        The runs in the order of the jobs, what failed, and how many were there before.
    """
    return _run_matrix(slug, module_name, _load(module_name), jobs, workers, store, fresh, progress, pool=pool)


def _run_matrix(
    slug: str,
    module_name: str,
    experiment: ModuleType,
    jobs: Sequence[Job],
    workers: int | None,
    store: Store,
    fresh: bool,
    progress: bool,
    time_limit: float | None = None,
    pool: Callable[..., AnyPool] = Pool,
) -> tuple[list[Run], list[Failure], int]:
    """Runs of all jobs that finished, in the order of the jobs; failures; how many runs were there before."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    key, current = code_key(module_name), versions()
    dirty = checkout_state(closure(module_name).values()).dirty
    wanted = [_identity(experiment, job) for job in jobs]
    runs: dict[Identity, Run] = {}
    if not fresh:
        stored = store.find(slug, code_key=key, versions=current, dirty=dirty)
        # Clean rows last, so that they win. A clean tree never takes over what uncommitted code measured.
        known = {identity_of(run): run for run in sorted(stored, key=lambda run: not run.dirty)}
        runs = {identity: known[identity] for identity in wanted if identity in known}
    reused = sum(identity in runs for identity in wanted)
    if reused:
        log.info(
            "%d of %d runs were made by earlier calls with the same code, settings and versions", reused, len(jobs)
        )
    # Arms with the same settings (one claim's control, another's method) share their runs.
    todo: list[Job] = []
    for i, (job, identity) in enumerate(zip(jobs, wanted)):
        if identity not in runs and identity not in wanted[:i]:
            todo.append(job)
    failures: list[Failure] = []

    def keep(job: Job, answer: Answer) -> None:
        if answer["status"] == "done":
            about = answer["environment"]
            run = Run(
                slug=slug,
                scale=job.scale,
                arm=job.arm,
                seed=job.seed,
                code_key=key,
                versions=current,
                metrics=answer["metrics"],
                overrides=dict(job.overrides),
                curves={name: [(x, y) for x, y in points] for name, points in answer["curves"].items()},
                curve_unit=answer["curve_unit"],
                data=answer["data"],
                settings=resolve(experiment, job.arm, job.scale, job.overrides),
                environment=about,
                dirty=about["dirty"] or dirty,
                seconds=answer["seconds"],
                peak_memory=answer["peak_memory"],
            )
            store.add(run)
            if not job.overrides:  # a trial is no result
                for kind, name in ((pictures, "images"), (sounds, "sounds")):
                    encoded = answer.get(name, {})
                    kind.keep(encoded, slug=slug, scale=job.scale, code_key=key, arm=job.arm, seed=job.seed)
            runs[_identity(experiment, job)] = run
        elif answer["status"] == "failed":
            failures.append(Failure(job.arm, job.seed, answer["error"], answer["traceback"], dict(job.overrides)))
        elif answer["status"] == "unavailable":
            raise Unavailable(answer["error"])
        elif answer["status"] == "fatal":
            raise RuntimeError(f"{module_name} does not run: {answer['error']}\n{answer['traceback']}".rstrip())

    def reservation(job: Job) -> str:
        return canonical({"slug": slug, "code": key, "versions": current, "run": list(_identity(experiment, job))})

    def look() -> None:
        """Take what is stored by now, by whomever."""
        for run in store.find(slug, code_key=key, versions=current, dirty=dirty):
            if identity_of(run) in wanted:
                runs.setdefault(identity_of(run), run)

    def make(jobs: Sequence[Job], shown: Display) -> None:
        count = min(workers or cores(), len(jobs))
        with pool(module_name, jobs, workers=count, code_key=key, time_limit=time_limit) as opened:
            try:
                for job, answer in opened.answers():
                    keep(job, answer)
                    shown.show(job, answer)
            except KeyboardInterrupt:
                for job, answer in opened.arrived():
                    keep(job, answer)
                raise

    if todo:
        with display(f"{slug} {todo[0].scale}", len(todo) + reused, reused, shown=progress) as shown:
            try:
                # Another process may be making some of them: those are left to it and looked for, until it has them or
                # has died. To look comes after reserving, or a run that ends in between would be made twice.
                while todo:
                    ours = [job for job in todo if fresh or store.reserve(reservation(job))]
                    if not fresh:
                        look()
                        todo = [job for job in todo if _identity(experiment, job) not in runs]
                    ours = [job for job in ours if job in todo]
                    if ours:
                        make(ours, shown)
                        todo = [job for job in todo if job not in ours]
                    elif todo:
                        time.sleep(_WAIT)
            except KeyboardInterrupt:
                # The interrupt may have come after a run was stored and before it was noted: the store knows.
                kept = {identity_of(run) for run in store.find(slug, code_key=key, versions=current, dirty=dirty)}
                finished = len(runs) if fresh else sum(identity in kept for identity in wanted)
                raise Interrupted(finished, len(jobs)) from None
    store.release()
    finished_runs = [_named(runs[identity], job) for job, identity in zip(jobs, wanted) if identity in runs]
    return finished_runs, failures, reused


Identity: TypeAlias = tuple[str, int]
"""What a run of some code is known by: its resolved settings as text, and its seed."""


def identity_of(run: Run) -> Identity:
    """What a stored run is known by."""
    return canonical(run.settings), run.seed


def _identity(experiment: ModuleType, job: Job) -> Identity:
    return canonical(resolve(experiment, job.arm, job.scale, job.overrides)), job.seed


def _named(run: Run, job: Job) -> Run:
    """The run as this job's: it may have been made for another arm with the same settings."""
    return replace(run, arm=job.arm, scale=job.scale, overrides=dict(job.overrides))


def resolved(experiment: ModuleType, scale: str) -> dict[str, dict[str, Any]]:
    """What each arm runs with."""
    return {arm: resolve(experiment, arm, scale) for arm in experiment.ARMS}


def _load(module_name: str) -> ModuleType:
    module = import_module(module_name)
    if missing := [name for name in ("DEFAULTS", "SCALES", "ARMS", "run", "about") if not hasattr(module, name)]:
        raise ValueError(f"{module_name} is no experiment: it lacks {missing}; see regularized.evidence.experiment")
    return module


def _tuning(experiment: ModuleType) -> Tuning | None:
    return getattr(experiment, "TUNING", None)


def trials_of(tuning: Tuning) -> list[Job]:
    """The runs of a tuning."""
    return [
        Job(arm, seed, tuning.scale, dict(overrides))
        for seed in tuning.seeds
        for arm, grid in tuning.grids.items()
        for overrides in grid
    ]


def _known_tuning(slug: str, module_name: str, experiment: ModuleType, store: Store) -> TuningResult | None:
    """The tuning table for this code: from the user's store, else from the ledger that is shipped."""
    tuning = _tuning(experiment)
    if tuning is None:
        return None
    key = code_key(module_name)
    jobs = trials_of(tuning)
    wanted = [_identity(experiment, job) for job in jobs]
    runs: Sequence[Run] = ()
    shipped = ledger.load(ledger.path(module_name))
    for found in (store.find(slug, code_key=key), () if shipped is None or shipped.is_stale(key) else shipped.tuning):
        known = {identity_of(run): run for run in found}
        if set(wanted) <= set(known):
            runs = [_named(known[identity], job) for identity, job in zip(wanted, jobs)]
            break
    if not runs:
        return None
    trials, agrees = rank_trials(tuning, runs, resolved(experiment, tuning.scale))
    return TuningResult(tuning.metric, tuning.direction, tuple(tuning.seeds), trials, agrees, reused=len(runs))


def _seeds(seeds: int | None, experiment: ModuleType, first: int | None = None) -> tuple[int, ...]:
    declared = block_of(experiment, first)
    count = declared.count if seeds is None else seeds
    if not 1 <= count <= declared.count:
        raise ValueError(
            f"{experiment.__name__} declares {declared.count} seeds and was asked for {count}: fewer are a look "
            "without verdict, more would be seeds added after a look. To measure with more, declare a fresh block: "
            "SEEDS = Seeds(count, first=..., why=...)"
        )
    tuning = _tuning(experiment)
    if tuning is not None and (both := sorted(set(declared.numbers) & set(tuning.seeds))):
        raise ValueError(f"seeds {both} were used to choose the settings and cannot be evidence: take others")
    return declared.numbers[:count]


def _chosen(arms: Sequence[str] | None, experiment: ModuleType, module_name: str) -> tuple[str, ...]:
    """The arms to be run, in the order of the experiment."""
    if arms is None:
        return tuple(experiment.ARMS)
    if unknown := [arm for arm in arms if arm not in experiment.ARMS]:
        near = close_names(unknown, list(experiment.ARMS))
        raise ValueError(f"{module_name} has no arm {', '.join(map(repr, unknown))}; {near}")
    if not arms:
        raise ValueError(f"no arm is asked for; there are {list(experiment.ARMS)}")
    return tuple(arm for arm in experiment.ARMS if arm in arms)


def _check(experiment: ModuleType, module_name: str, scale: str, claims: Sequence[Claim]) -> None:
    """Refuse what cannot be run, before the first run."""
    packages: Mapping[str, str] = getattr(experiment, "PACKAGES", {})
    if missing := [package for package in packages if not _is_installed(package)]:
        extras = ",".join(sorted({packages[package] for package in missing}))
        raise Unavailable(f'{module_name} needs {", ".join(missing)}: pip install "regularized[{extras}]"')
    if scale not in experiment.SCALES:
        raise ValueError(f"{module_name} has no scale {scale!r}; it has {list(experiment.SCALES)}")
    for claim in claims:
        for arm in (claim.baseline, claim.method):
            if arm not in experiment.ARMS:
                raise ValueError(
                    f"claim {claim.id!r} compares arm {arm!r}, which {module_name} does not have; it has "
                    f"{list(experiment.ARMS)}"
                )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


def _notes(
    runs: Sequence[Run], failures: Sequence[Failure], claims: Sequence[Claim], seeds: Sequence[int]
) -> Iterator[str]:
    if failures:
        yield f"{len(failures)} run(s) failed; claims that need them stay open."
    if any(run.dirty for run in runs):
        yield "The code has uncommitted changes: these runs are kept apart and never exported as evidence."
    data = {(run.arm, run.seed): run.data for run in runs if run.data}
    for claim in claims:
        pairs = ((seed, data.get((claim.baseline, seed)), data.get((claim.method, seed))) for seed in seeds)
        if apart := [seed for seed, one, other in pairs if one and other and one != other]:
            yield (
                f"Claim {claim.id}: {claim.baseline} and {claim.method} did not see the same data with seeds {apart}, "
                "so their difference is not that of the method alone."
            )
