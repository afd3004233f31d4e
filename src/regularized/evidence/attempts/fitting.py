"""Whether an attempt is one of this paper, by this code: what it ran with, on what, and what it measured.

It must have measured today's code, or earlier code that the ledger's confirmations found equal to the last bit. Any
other is refused, and not kept with a mark: beside a verdict on other code a reader could not tell whether the code made
the difference or the machine. Versions of Python, torch, numpy and scikit-learn may be others than the ledger's, since
a claim has to outlive them; they are shown.

Public names: :func:`misfits`, :func:`seen_before`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from types import ModuleType
from typing import Any

from regularized.evidence.attempts.files import shown
from regularized.evidence.attempts.form import Attempt
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import Tuning, block_of, describe_arms, resolve, unchanged
from regularized.evidence.ledger import Ledger, fixed, tuning_rule
from regularized.evidence.store import canonical

__all__ = ["misfits", "seen_before"]


def misfits(
    attempt: Attempt, experiment: ModuleType, claims: Sequence[Claim], *, code_key: str, shipped: Ledger | None
) -> Iterator[str]:
    """What keeps an attempt from standing beside a ledger; nothing where it fits.

    Args:
        attempt: of the right form.
        experiment: the module of its paper.
        claims: of the paper's card.
        code_key: of the experiment as it is here.
        shipped: the paper's ledger; None without one.

    Yields:
        The field, what was given, and what is needed.
    """
    theirs = attempt.ledger
    yield from _scale(theirs, experiment, shipped)
    yield from _code(theirs, code_key, shipped)
    if theirs.arms != tuple(experiment.ARMS):
        yield f"arms: got {shown(list(theirs.arms))}; needed are {list(experiment.ARMS)}"
        return
    if theirs.scale in experiment.SCALES:
        yield from _settings(theirs, experiment, exact=theirs.code_key == code_key)
    yield from _differing("claims", theirs.claims, {claim.id: fixed(claim) for claim in claims})
    yield from _seeds(theirs, experiment)
    yield from _versions(theirs)
    yield from _tuning(attempt, experiment)
    yield from _measured(theirs, claims, shipped)
    if shipped is not None:
        yield from _data(theirs, shipped)
    latest = datetime.now(UTC) + timedelta(days=1)
    for run in theirs.runs:
        if datetime.fromisoformat(run.created) > latest:
            yield f"runs: arm {run.arm}, seed {run.seed}: created is {shown(run.created)}, which is yet to come"


def seen_before(attempt: Attempt, others: Mapping[str, Ledger]) -> str:
    """Whose runs an attempt has, in words; empty where all of its runs are its own. A run counts once.

    Args:
        attempt: the attempt.
        others: the ledgers beside which it would stand, by name.
    """
    mine = _identities(attempt.ledger)
    for name, ledger in others.items():
        if both := len(mine & _identities(ledger)):
            return f"runs: {both} of {len(mine)} are runs of {name!r}; needed are runs of its own: a run counts once"
    return ""


def _identities(ledger: Ledger) -> set[str]:
    return {canonical({"run": [r.arm, r.seed, r.created, r.seconds], "metrics": r.metrics}) for r in ledger.runs}


def _scale(theirs: Ledger, experiment: ModuleType, shipped: Ledger | None) -> Iterator[str]:
    needed = "laptop" if shipped is None else shipped.scale
    if theirs.scale != needed or needed not in experiment.SCALES:
        yield f"scale: got {shown(theirs.scale)}; needed is {needed!r}, that of the ledger: another is another question"


def _code(theirs: Ledger, code_key: str, shipped: Ledger | None) -> Iterator[str]:
    equal = {code_key} | (shipped.codes if shipped is not None and shipped.code_key == code_key else frozenset())
    if theirs.code_key not in equal:
        commit = theirs.environment.get("commit") or f"package {theirs.environment.get('package')}"
        yield (
            f"code_key: got {theirs.code_key} ({shown(commit)}); needed is {code_key}, the code here, or earlier code "
            "that `regularized ledger SLUG --confirm` found equal to it: make the runs again with this code"
        )


def _settings(theirs: Ledger, experiment: ModuleType, *, exact: bool) -> Iterator[str]:
    for arm, given in theirs.settings.items():
        needed = _as_json(resolve(experiment, arm, theirs.scale))
        if exact or not unchanged(given, needed):
            yield from _differing(f"settings.{arm}", given, needed)
    yield from _differing("about", theirs.about, _as_json(describe_arms(experiment, theirs.scale)))


def _seeds(theirs: Ledger, experiment: ModuleType) -> Iterator[str]:
    try:
        needed = block_of(experiment, theirs.seeds[0]).numbers
    except ValueError as error:
        yield f"seeds: got {shown(list(theirs.seeds))}; {error}"
        return
    if theirs.seeds != needed:
        yield f"seeds: got {shown(list(theirs.seeds))}; needed is the whole block, {list(needed)}"


def _versions(theirs: Ledger) -> Iterator[str]:
    """Nobody has run this package with less than it needs."""
    try:
        least = dict(_least_versions())
    except metadata.PackageNotFoundError:
        return
    for run in theirs.runs[:1]:
        for name, given in run.versions.items():
            if _numbers(given) < _numbers(least.get(name, "0")):
                yield f"versions.{name}: got {shown(given)}; needed is at least {least[name]}"


def _least_versions() -> Iterator[tuple[str, str]]:
    about = metadata.metadata("regularized")
    for requirement in (f"python{about['Requires-Python']}", *(about.get_all("Requires-Dist") or ())):
        if (found := re.match(r"([\w-]+)[^;]*?>=\s*([\d.]+)", requirement)) is not None and "extra" not in requirement:
            yield found[1].lower(), found[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,9}", version.partition("+")[0])[:3])


def _tuning(attempt: Attempt, experiment: ModuleType) -> Iterator[str]:
    """The runs that chose the settings may be left out: the settings are this code's. What is there is checked."""
    theirs, tuning = attempt.ledger, getattr(experiment, "TUNING", None)
    if theirs.tuning_rule is None and not theirs.tuning:
        return
    if tuning is None:
        yield f"tuning: got {shown(theirs.tuning_rule)}; needed is null, without tuning_runs: nothing is tuned here"
        return
    yield from _differing("tuning", theirs.tuning_rule or {}, _as_json(tuning_rule(tuning)))
    needed = dict(enumerate(_trials(experiment, tuning)))
    given = {
        place: {"arm": run.arm, "overrides": run.overrides, "seed": run.seed, "settings": run.settings}
        for place, run in enumerate(theirs.tuning)
    }
    if len(given) != len(needed):
        yield f"tuning_runs: got {len(given)}; needed are {len(needed)}, one of each trial with each seed, or none"
        return
    for place, one in needed.items():
        yield from _differing(f"tuning_runs[{place}]", given[place], _as_json(one))


def _trials(experiment: ModuleType, tuning: Tuning) -> Iterator[dict[str, Any]]:
    for arm, grid in tuning.grids.items():
        for overrides in grid:
            settings = resolve(experiment, arm, tuning.scale, overrides)
            for seed in tuning.seeds:
                yield {"arm": arm, "overrides": dict(overrides), "seed": seed, "settings": settings}


def _measured(theirs: Ledger, claims: Sequence[Claim], shipped: Ledger | None) -> Iterator[str]:
    """Metrics and curves by name: those of the card, and none that the ledger does not know."""
    needed: dict[str, set[str]] = {arm: set() for arm in theirs.arms}
    for claim in claims:
        for arm in (claim.baseline, claim.method):
            needed.setdefault(arm, set()).add(claim.metric)
    ours = shipped.runs if shipped is not None and shipped.arms == theirs.arms else ()
    allowed: dict[str, set[str]] = {arm: set(names) for arm, names in needed.items()}
    curves: dict[str, set[str]] = {arm: set() for arm in theirs.arms}
    units = {run.curve_unit for run in ours}
    missing_here: set[tuple[str, str, int]] = set()
    for run in ours:
        allowed[run.arm] |= set(run.metrics)
        curves[run.arm] |= set(run.curves)
    for run in theirs.runs:
        where = f"runs: arm {run.arm}, seed {run.seed}"
        missing_here |= {(run.arm, name, run.seed) for name in needed[run.arm] - set(run.metrics)}
        if not ours:
            continue
        if unknown := sorted(set(run.metrics) - allowed[run.arm]):
            yield f"{where}: got metrics {shown(unknown)}; there are {sorted(allowed[run.arm])}"
        if unknown := sorted(set(run.curves) - curves[run.arm]):
            yield f"{where}: got curves {shown(unknown)}; there are {sorted(curves[run.arm])}"
        if run.curve_unit not in units:
            yield f"{where}: curve_unit: got {shown(run.curve_unit)}; needed is one of {sorted(units)}"
    for arm, name, seed in sorted(missing_here):
        # Where the ledger itself lacks it with some seed, a run may come to an end without it.
        if not any(run.arm == arm and name not in run.metrics for run in ours):
            yield f"runs: arm {arm}, seed {seed}: metric {name!r} is missing; a claim of the card needs it"


def _data(theirs: Ledger, shipped: Ledger) -> Iterator[str]:
    """The same seeds have seen the same data; other seeds other data, shared by the same arms."""
    given = {(run.arm, run.seed): run.data for run in theirs.runs}
    ours = {(run.arm, run.seed): run.data for run in shipped.runs}
    if shipped.arms != theirs.arms:
        return
    for key in sorted(given.keys() & ours.keys()):
        if given[key] != ours[key]:
            yield (
                f"runs: arm {key[0]}, seed {key[1]}: data: got {shown(given[key])}; needed is {shown(ours[key])}, that "
                "of the ledger for this seed (data that this machine makes otherwise need seeds of their own)"
            )
    fresh = [seed for seed in theirs.seeds if seed not in shipped.seeds]
    for arm in theirs.arms:
        known = [ours[arm, seed] for seed in shipped.seeds]
        new = [given[arm, seed] for seed in fresh]
        if len(set(known)) == 1 and set(new) - set(known):
            yield f"runs: arm {arm}: data: got {shown(new)}; needed is {shown(known[0])}, the same with every seed"
        elif len(set(known)) == len(known) and (len(set(new)) < len(new) or set(new) & set(known)):
            yield f"runs: arm {arm}: data: got {shown(new)}; needed are data of its own for each seed, not the ledger's"
    shared = {_sharing(theirs.arms, ours, seed) for seed in shipped.seeds}
    for seed in fresh:
        if len(shared) == 1 and _sharing(theirs.arms, given, seed) not in shared:
            yield f"runs: seed {seed}: data: arms share them otherwise than in the ledger, so they differ in more"


def _sharing(arms: Sequence[str], data: Mapping[tuple[str, int], str], seed: int) -> tuple[int, ...]:
    """For each arm, the first that has the same data."""
    seen = [data[arm, seed] for arm in arms]
    return tuple(map(seen.index, seen))


def _differing(field: str, given: Mapping[str, Any], needed: Mapping[str, Any]) -> Iterator[str]:
    for name in [*needed, *(name for name in given if name not in needed)]:
        if name not in needed:
            yield f"{field}.{shown(name)}: is unknown; there are {list(needed)}"
        elif name not in given:
            yield f"{field}.{name}: is missing; needed is {shown(needed[name])}"
        elif canonical({"": given[name]}) != canonical({"": needed[name]}):
            if isinstance(needed[name], Mapping) and isinstance(given[name], Mapping):
                yield from _differing(f"{field}.{name}", given[name], needed[name])
            else:
                yield f"{field}.{name}: got {shown(given[name])}; needed is {shown(needed[name])}"


def _as_json(value: Any) -> Any:
    """As a ledger has it: lists for tuples, names for types."""
    return json.loads(canonical({"": value}))[""]
