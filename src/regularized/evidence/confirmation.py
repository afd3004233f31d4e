"""After a refactor: proof, to the last bit, that measured runs are still what the code gives.

When only code changed, one seed of every arm is run again, another one each time. Where all metrics and curves are
equal to the last bit on the same kind of machine, the other runs are taken over under the new key, and the ledger
records the confirmation: commit, seed, arms. Where one differs, nothing is taken over.

Processors round differently, and a training makes much of little. Where the ledger was made on another one, the code of
the ledger's commit is run here, too, from a checkout of it, and the two codes are compared instead.

Public names:
    ``confirm(slug, module_name, ...) -> Confirmation``
    ``difference(before, again, ignored) -> str``
"""

from collections.abc import Callable, Collection, Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from regularized.evidence import ledger
from regularized.evidence.experiment import resolve, unchanged, unrepeatable
from regularized.evidence.pool import OTHER_CODE, AnyPool, Job, Pool
from regularized.evidence.provenance import code_key, cores, environment, versions
from regularized.evidence.runner import run_jobs
from regularized.evidence.store import Run, Store, canonical

__all__ = ["Confirmation", "confirm", "difference"]

_SAME_MACHINE = ("cpu", "device")


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What a repetition showed.

    Args:
        seed: the seed that was run again.
        arms: the arms that were repeated.
        left_out: arms whose settings changed, or that are new: their runs have to be made.
        differing: for each arm that came out otherwise, what differed.
        taken_over: how many runs now count for the present code.
    """

    seed: int
    arms: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    differing: Mapping[str, str] = field(default_factory=dict)
    taken_over: int = 0


def confirm(
    slug: str,
    module_name: str,
    *,
    store: Store | None = None,
    workers: int | None = None,
    progress: bool = True,
    pool: Callable[..., AnyPool] = Pool,
    beside: Path | None = None,
) -> Confirmation:
    """Run one seed of every arm of the ledger again, and take its other runs over where nothing differs.

    Args:
        slug: the paper.
        module_name: its experiment.
        store: where runs are kept; default the user's store.
        workers: parallel processes; default one for each usable core.
        progress: show how far it is.
        pool: what makes the runs; default processes on this machine.
        beside: a checkout of the ledger's code. An arm that comes out otherwise than in the ledger is run from there,
            on this machine, and compared with that. Default none: what differs from the ledger differs.

    Returns:
        What was found. With ``differing`` empty the ledger's runs are in the store under the present key.

    Raises:
        LedgerError: there is no ledger, it is of this code already, it was made with other versions or on another kind
            of machine (which may round differently), the code in ``beside`` is not the ledger's, or a run failed.
    """
    experiment = import_module(module_name)
    shipped = ledger.load(ledger.path(module_name))
    key = code_key(module_name)
    if shipped is None:
        raise ledger.LedgerError(f"{slug} has no ledger that could be confirmed; write one: regularized ledger {slug}")
    if not shipped.is_stale(key):
        raise ledger.LedgerError(f"the ledger of {slug} is of the present code: there is nothing to confirm")
    _check_machine(slug, shipped, environment(module_name), codes=beside is not None)
    arms = tuple(
        arm
        for arm in shipped.arms
        if arm in experiment.ARMS and unchanged(shipped.settings[arm], resolve(experiment, arm, shipped.scale))
    )
    seed = shipped.seeds[len(shipped.confirmations) % len(shipped.seeds)]
    jobs = [Job(arm, seed, shipped.scale) for arm in arms]
    with nullcontext(store) if store is not None else Store() as opened:
        again, failures, _ = run_jobs(
            slug, module_name, jobs, workers=workers, store=opened, progress=progress, pool=pool
        )
        if failures:
            raise ledger.LedgerError(f"{slug}: nothing was confirmed, a run failed: {failures[0].error}")
        before = {(run.arm, run.seed): run for run in shipped.runs}
        ignored = unrepeatable(experiment)
        compared = {run.arm: difference(before[run.arm, seed], run, ignored) for run in again}
        differing = {arm: what for arm, what in compared.items() if what}
        former: Mapping[str, Run] = {}
        if differing and beside is not None:
            former = _made_in(beside, module_name, shipped, sorted(differing), seed, workers)
            compared = {run.arm: difference(former[run.arm], run, ignored) for run in again if run.arm in former}
            differing = {arm: f"beside the former code, {what}" for arm, what in compared.items() if what}
        left_out = tuple(arm for arm in experiment.ARMS if arm not in arms)
        if differing or not arms:
            return Confirmation(seed, arms, left_out, differing)
        record = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": again[0].environment["commit"],
            "from": shipped.code_key,
            "to": key,
            "seed": seed,
            "arms": list(arms),
            "outcome": "equal to the last bit",
            "beside": sorted(former),
        }
        repeated = {(canonical(run.settings), run.seed) for run in again}
        taken = [
            _taken_over(replace(run, settings=settings), key, record)
            for run in (*shipped.runs, *shipped.tuning)
            if run.arm in arms
            and unchanged(run.settings, settings := resolve(experiment, run.arm, run.scale, run.overrides))
            and (canonical(settings), run.seed) not in repeated
        ]
        for run in taken:
            opened.add(run)
    return Confirmation(seed, arms, left_out, taken_over=len(taken))


def _made_in(
    checkout: Path, module_name: str, shipped: ledger.Ledger, arms: Collection[str], seed: int, workers: int | None
) -> dict[str, Run]:
    """What the code of a checkout gives here: a run of each arm, as the ledger would keep it."""
    before = {run.arm: run for run in shipped.runs if run.seed == seed}
    jobs = [Job(arm, seed, shipped.scale) for arm in arms]
    package = checkout / "src" / "regularized"
    count = min(workers or cores(), len(jobs))
    made = {}
    with Pool(module_name, jobs, workers=count, code_key=shipped.code_key, package=package) as former:
        for job, answer in former.answers():
            if answer["status"] == "done":
                curves = {name: [(x, y) for x, y in points] for name, points in answer["curves"].items()}
                made[job.arm] = replace(before[job.arm], metrics=answer["metrics"], curves=curves, data=answer["data"])
            elif answer.get("error") == OTHER_CODE:
                raise ledger.LedgerError(
                    f"{checkout} does not hold the code of the ledger, whose key is {shipped.code_key}: check out a "
                    f"commit at which the ledger was current; it was made with {shipped.environment.get('commit')}"
                )
            elif answer["status"] != "started":
                raise ledger.LedgerError(f"{checkout}: the run of {job.arm} failed: {answer['error']}")
    return made


def _check_machine(slug: str, shipped: ledger.Ledger, here: Mapping[str, Any], *, codes: bool) -> None:
    if dict(shipped.runs[0].versions) != versions():
        raise ledger.LedgerError(
            f"the ledger of {slug} was made with {dict(shipped.runs[0].versions)}, here are {versions()}: "
            "other versions round differently, so it has to be made anew"
        )
    there = {name: shipped.environment.get(name) for name in _SAME_MACHINE}
    other = [f"{name} {value}, here {here[name]}" for name, value in there.items() if value != here[name]]
    if other and not codes:
        raise ledger.LedgerError(
            f"the ledger of {slug} was made on another kind of machine ({'; '.join(other)}), which may round "
            "differently: confirm it there, or with a checkout of its code beside (--beside)"
        )


def difference(before: Run, again: Run, ignored: Set[str]) -> str:
    """What differs between a run and its repetition, in words; empty when nothing does.

    Args:
        before: the run, as the ledger keeps it.
        again: the repetition.
        ignored: metrics and curves that differ from run to run.
    """
    if before.data != again.data:
        return f"other data ({before.data}, now {again.data})"
    names = sorted({*before.metrics, *again.metrics} - set(ignored))
    for name in names:
        one, other = before.metrics.get(name), again.metrics.get(name)
        if repr(one) != repr(other):  # NaN equals NaN here, and -0.0 is not 0.0
            return f"{name} was {one!r}, is {other!r}"
    for name in sorted({*before.curves, *again.curves} - set(ignored)):
        # The ledger keeps thinned curves.
        points, repeated = (ledger.thin(list(run.curves.get(name, ()))) for run in (before, again))
        if repr(points) != repr(repeated):
            return f"the curve {name}"
    return ""


def _taken_over(run: Run, key: str, record: Mapping[str, Any]) -> Run:
    history = [*run.environment.get(ledger.CONFIRMED, ()), dict(record)]
    return replace(run, code_key=key, environment={**run.environment, ledger.CONFIRMED: history}, dirty=False)
