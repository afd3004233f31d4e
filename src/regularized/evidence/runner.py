"""Runs a paper's comparison: arms x seeds in parallel, stored as they finish, judged at the end.

Public names:
    ``reproduce(slug, module_name, claims, *, scale, seeds, ...) -> ReproduceResult``
    ``tune(slug, module_name, *, ...) -> TuningResult``
    ``Interrupted`` (a KeyboardInterrupt that says how many runs are kept)

The result goes to :mod:`regularized.evidence.report` (``write``, ``to_json``, ``print_table``).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any, cast

from regularized.evidence import ledger, pictures
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import Experiment, Tuning, Unavailable
from regularized.evidence.pool import Answer, Job, Pool
from regularized.evidence.progress import display
from regularized.evidence.provenance import checkout_state, closure, code_key, cores, environment, versions
from regularized.evidence.results import Failure, ReproduceResult, TuningResult, outcomes, rank_trials
from regularized.evidence.store import Run, Store, canonical

__all__ = ["Interrupted", "reproduce", "tune"]

log = logging.getLogger(__name__)


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
    seeds: int | Sequence[int] = 5,
    workers: int | None = None,
    store: Store | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> ReproduceResult:
    """Run every arm with every seed and judge the claims.

    Runs that the store already holds (same code, settings, seed and versions) are not made again. A run that fails is
    reported and the rest goes on; a claim that needs it stays undecided.

    Args:
        slug: the paper.
        module_name: its experiment, for example ``"regularized.papers.early_learning.experiment"``.
        claims: what to judge.
        scale: ``"smoke"``, ``"laptop"`` (default) or ``"paper"``.
        seeds: how many (0, 1, ... n - 1) or which; default 5, the fewest that give a verdict.
        workers: parallel processes of one thread each; default one for each usable core.
        store: where runs are kept; default the user's store.
        fresh: make runs again that are in the store already.
        progress: show a bar on standard error, or a line for each run where that is no terminal.

    Raises:
        Unavailable: data, a package or hardware of this scale is missing.
        ValueError: the scale or an arm of a claim does not exist, or seeds are not allowed.
        Interrupted: Ctrl-C; finished runs are kept.
        StoreError: the store cannot be used.
        RuntimeError: the experiment cannot be loaded in a process of its own.
    """
    start = time.monotonic()
    experiment = _load(module_name)
    wanted = _seeds(seeds, experiment)
    _check(experiment, module_name, scale, claims)
    jobs = [Job(arm, seed, scale) for seed in wanted for arm in experiment.ARMS]
    with nullcontext(store) if store is not None else Store() as opened:
        runs, failures, reused = _run_matrix(slug, module_name, experiment, jobs, workers, opened, fresh, progress)
        tuning = _known_tuning(slug, module_name, experiment, opened)
    about = runs[0].environment if runs else environment(module_name)
    return ReproduceResult(
        slug=slug,
        module_name=module_name,
        scale=scale,
        seeds=wanted,
        arms=tuple(experiment.ARMS),
        outcomes=outcomes(claims, runs, seeds=wanted, scale=scale),
        runs=tuple(runs),
        failures=tuple(failures),
        notes=tuple(_notes(runs, failures, claims, wanted)),
        tuning=tuning,
        environment=about,
        code_key=code_key(module_name),
        reused=reused,
        seconds=time.monotonic() - start,
    )


def tune(
    slug: str,
    module_name: str,
    *,
    workers: int | None = None,
    store: Store | None = None,
    fresh: bool = False,
    progress: bool = True,
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
    jobs = _trials(tuning)
    with nullcontext(store) if store is not None else Store() as opened:
        runs, failures, reused = _run_matrix(slug, module_name, experiment, jobs, workers, opened, fresh, progress)
    trials, agrees = rank_trials(tuning, runs, _settings(experiment, tuning.scale))
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


def _run_matrix(
    slug: str,
    module_name: str,
    experiment: Experiment,
    jobs: Sequence[Job],
    workers: int | None,
    store: Store,
    fresh: bool,
    progress: bool,
) -> tuple[list[Run], list[Failure], int]:
    """Runs of all jobs that finished, in the order of the jobs; failures; how many runs were there before."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    key, current = code_key(module_name), versions()
    dirty = checkout_state(closure(module_name).values()).dirty
    runs: dict[tuple[str, str, int], Run] = {}
    if not fresh:
        stored = store.find(slug, code_key=key, versions=current, dirty=dirty)
        # Clean rows last, so that they win. A clean tree never takes over what uncommitted code measured.
        known = {(run.scale, *_identity(run)): run for run in sorted(stored, key=lambda run: not run.dirty)}
        runs = {
            _identity(job): known[job.scale, *_identity(job)] for job in jobs if (job.scale, *_identity(job)) in known
        }
    reused = len(runs)
    if reused:
        log.info(
            "%d of %d runs were made by earlier calls with the same code, settings and versions", reused, len(jobs)
        )
    todo = [job for job in jobs if _identity(job) not in runs]
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
                settings={"scale": dict(experiment.SCALES[job.scale]), "arm": dict(experiment.ARMS[job.arm])},
                environment=about,
                dirty=about["dirty"] or dirty,
                seconds=answer["seconds"],
                peak_memory=answer["peak_memory"],
            )
            store.add(run)
            if not job.overrides:  # a trial is no result
                encoded = answer.get("images", {})
                pictures.keep(encoded, slug=slug, scale=job.scale, code_key=key, arm=job.arm, seed=job.seed)
            runs[_identity(job)] = run
        elif answer["status"] == "failed":
            failures.append(Failure(job.arm, job.seed, answer["error"], answer["traceback"], dict(job.overrides)))
        elif answer["status"] == "unavailable":
            raise Unavailable(answer["error"])
        elif answer["status"] == "fatal":
            raise RuntimeError(f"{module_name} does not run: {answer['error']}\n{answer['traceback']}".rstrip())

    if todo:
        count = min(workers or cores(), len(todo))
        with (
            display(f"{slug} {todo[0].scale}", len(jobs), reused, shown=progress) as shown,
            Pool(module_name, todo, workers=count, code_key=key) as pool,
        ):
            try:
                for job, answer in pool.answers():
                    keep(job, answer)
                    shown.show(job, answer)
            except KeyboardInterrupt:
                for job, answer in pool.arrived():
                    keep(job, answer)
                # The interrupt may have come after a run was stored and before it was noted: the store knows.
                of_scale = store.find(slug, scale=jobs[0].scale, code_key=key, versions=current, dirty=dirty)
                kept = {_identity(run) for run in of_scale}
                finished = len(runs) if fresh else sum(_identity(job) in kept for job in jobs)
                raise Interrupted(finished, len(jobs)) from None
    return [runs[_identity(job)] for job in jobs if _identity(job) in runs], failures, reused


def _identity(of: Job | Run) -> tuple[str, str, int]:
    return of.arm, canonical(of.overrides), of.seed


def _load(module_name: str) -> Experiment:
    module = import_module(module_name)
    if missing := [name for name in ("SCALES", "ARMS", "run") if not hasattr(module, name)]:
        raise ValueError(f"{module_name} is no experiment: it lacks {missing}; see regularized.evidence.experiment")
    return cast(Experiment, module)


def _tuning(experiment: Experiment) -> Tuning | None:
    return getattr(experiment, "TUNING", None)


def _trials(tuning: Tuning) -> list[Job]:
    return [
        Job(arm, seed, tuning.scale, dict(overrides))
        for seed in tuning.seeds
        for arm, grid in tuning.grids.items()
        for overrides in grid
    ]


def _settings(experiment: Experiment, scale: str) -> dict[str, dict[str, Any]]:
    return {arm: {**experiment.SCALES[scale], **settings} for arm, settings in experiment.ARMS.items()}


def _known_tuning(slug: str, module_name: str, experiment: Experiment, store: Store) -> TuningResult | None:
    """The tuning table for this code: from the user's store, else from the ledger that is shipped."""
    tuning = _tuning(experiment)
    if tuning is None:
        return None
    key = code_key(module_name)
    wanted = {_identity(job) for job in _trials(tuning)}
    runs = [run for run in store.find(slug, scale=tuning.scale, code_key=key) if _identity(run) in wanted]
    if {_identity(run) for run in runs} != wanted:
        shipped = ledger.load(ledger.path(module_name))
        if shipped is None or shipped.is_stale(key):
            return None
        runs = [run for run in shipped.tuning if _identity(run) in wanted]
        if {_identity(run) for run in runs} != wanted:
            return None
    trials, agrees = rank_trials(tuning, runs, _settings(experiment, tuning.scale))
    return TuningResult(tuning.metric, tuning.direction, tuple(tuning.seeds), trials, agrees, reused=len(runs))


def _seeds(seeds: int | Sequence[int], experiment: Experiment) -> tuple[int, ...]:
    wanted = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not wanted or len(set(wanted)) < len(wanted) or min(wanted) < 0:
        raise ValueError(f"seeds must be a number of at least 1 or different numbers of at least 0, got {seeds!r}")
    tuning = _tuning(experiment)
    if tuning is not None and (both := sorted(set(wanted) & set(tuning.seeds))):
        raise ValueError(f"seeds {both} were used to choose the settings and cannot be evidence: take others")
    return wanted


def _check(experiment: Experiment, module_name: str, scale: str, claims: Sequence[Claim]) -> None:
    if scale not in experiment.SCALES:
        raise ValueError(f"{module_name} has no scale {scale!r}; it has {list(experiment.SCALES)}")
    for claim in claims:
        for arm in (claim.baseline, claim.method):
            if arm not in experiment.ARMS:
                raise ValueError(
                    f"claim {claim.id!r} compares arm {arm!r}, which {module_name} does not have; it has "
                    f"{list(experiment.ARMS)}"
                )


def _notes(
    runs: Sequence[Run], failures: Sequence[Failure], claims: Sequence[Claim], seeds: Sequence[int]
) -> Iterator[str]:
    if failures:
        yield f"{len(failures)} run(s) failed; claims that need them stay undecided."
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
