"""The evidence that ships with the package: one text file a paper, written from the store and never by hand.

Public names: :func:`export` (store -> ``ledger.json`` beside the experiment), :func:`load`, :func:`path`,
:class:`Ledger` (``outcomes(claims)``, ``is_stale(code_key)``, ``to_result(claims)``), :class:`LedgerError`; and its
parts, for what is written and read elsewhere: :func:`collect`, :func:`parse`, :func:`laid_out`, :func:`write`.

One run a line, sorted, so that a change of the evidence reads well as a diff. Verdicts are not in the file: they are
computed from the runs whenever they are shown, with the claims of the card as they are then.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from regularized.evidence.claims import Claim, Outcome
from regularized.evidence.experiment import Seeds, Tuning, describe_arms, resolve, seeds_of, unchanged
from regularized.evidence.provenance import code_key, versions
from regularized.evidence.results import ReproduceResult, TuningResult, outcomes, rank_trials
from regularized.evidence.store import Run, Store, canonical
from regularized.evidence.verdicts import MINIMUM_SEEDS

__all__ = [
    "CONFIRMED",
    "FORMAT",
    "RUN_KEYS",
    "Ledger",
    "LedgerError",
    "collect",
    "export",
    "fixed",
    "laid_out",
    "load",
    "parse",
    "path",
    "tuning_rule",
    "write",
]

FORMAT = 2
_CURVE_POINTS = 50  # a curve of more points is thinned: it is for looking at, and 44 papers share one wheel
RUN_KEYS = ("arm", "seed", "overrides", "metrics", "curves", "curve_unit", "data", "seconds", "peak_memory", "created")
CONFIRMED = "confirmed"
"""Key in the environment of a run: the confirmations by which it was taken over to later code, oldest first."""


class LedgerError(ValueError):
    """The ledger cannot be written yet, or its file is damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Measured runs of a paper.

    Args:
        slug: the paper.
        scale: scale of the runs.
        seeds: the seeds that every arm has.
        arms: the arms, baselines first.
        settings: for each arm everything that it ran with, defaults included.
        about: for each arm what it was measured on, see :meth:`~regularized.evidence.experiment.About.to_dict`, and
            whether that is a ``toy``.
        code_key: the code that was measured.
        runs: the runs of the comparison.
        tuning: the runs by which settings were chosen.
        tuning_rule: metric, direction and seeds of the tuning; empty without.
        why_seeds: why these seeds and not ten from 0; empty where they are.
        claims: what of each claim may not change once results were seen, see :func:`fixed`.
    """

    slug: str
    scale: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Mapping[str, Any]]
    code_key: str
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...] = ()
    tuning_rule: Mapping[str, Any] | None = None
    why_seeds: str = ""
    claims: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def outcomes(self, claims: Sequence[Claim]) -> tuple[Outcome, ...]:
        """Verdict of each claim from the runs."""
        return outcomes(claims, self.runs, seeds=self.seeds, scale=self.scale, about=self.about)

    def is_stale(self, current: str) -> bool:
        """Whether the code has changed since it was measured; ``current`` is the experiment's code key."""
        return self.code_key != current

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where the first run took place."""
        return self.runs[0].environment if self.runs else {}

    @property
    def confirmations(self) -> tuple[Mapping[str, Any], ...]:
        """By which repetitions runs of earlier code were taken over, oldest first: commit, seed, arms, outcome."""
        found: list[Mapping[str, Any]] = []
        for run in self.runs:
            found += [one for one in run.environment.get(CONFIRMED, ()) if one not in found]
        return tuple(sorted(found, key=lambda one: str(one["at"])))

    @property
    def codes(self) -> frozenset[str]:
        """Keys of this code, and of earlier code that confirmations of all arms found equal to the last bit."""
        known = {self.code_key}
        for one in reversed(self.confirmations):
            if one["to"] in known and set(self.arms) <= set(one["arms"]):
                known.add(str(one["from"]))
        return frozenset(known)

    def to_result(self, claims: Sequence[Claim], *, module_name: str = "") -> ReproduceResult:
        """The form that reports show; all runs count as reused."""
        tuning = None
        if self.tuning_rule is not None:
            grids: dict[str, list[Mapping[str, Any]]] = {}
            for run in self.tuning:
                tried = grids.setdefault(run.arm, [])
                if run.overrides not in tried:
                    tried.append(run.overrides)
            rule = Tuning(
                self.tuning_rule["metric"],
                self.tuning_rule["direction"],
                grids,
                scale=self.tuning_rule["scale"],
                seeds=tuple(self.tuning_rule["seeds"]),
            )
            trials, agrees = rank_trials(rule, self.tuning, self.settings)
            tuning = TuningResult(rule.metric, rule.direction, rule.seeds, trials, agrees)
        return ReproduceResult(
            slug=self.slug,
            module_name=module_name,
            scale=self.scale,
            seeds=self.seeds,
            arms=self.arms,
            outcomes=self.outcomes(claims),
            runs=self.runs,
            tuning=tuning,
            about=self.about,
            environment=self.environment,
            code_key=self.code_key,
            reused=len(self.runs),
            seconds=math.fsum(run.seconds for run in self.runs),
        )


def path(module_name: str) -> Path:
    """Where the ledger of an experiment lies: ``ledger.json`` in the folder of its module. Loads nothing of it."""
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no module {module_name!r}", name=module_name)
    return Path(spec.origin).with_name("ledger.json")


def export(
    slug: str,
    module_name: str,
    claims: Sequence[Claim] = (),
    *,
    scale: str = "laptop",
    store: Store | None = None,
    destination: Path | None = None,
) -> Path:
    """Write the stored evidence of the present code to the ledger.

    Taken are runs of committed code, of the present code key and versions, with the seeds that the experiment declares:
    which seeds count is not a choice.

    Args:
        slug: the paper.
        module_name: its experiment.
        claims: the claims of its card; their thresholds are written down, so that a later change of one is noticed.
        scale: scale of the runs; default ``"laptop"``.
        store: where the runs are; default the user's store.
        destination: the file; default beside the experiment.

    Returns:
        The file. It is replaced at once or not at all.

    Raises:
        LedgerError: fewer than ten seeds are declared, runs are missing, or something was changed after results had
            been seen without taking fresh seeds; says which.
    """
    target = destination or path(module_name)
    data = collect(slug, module_name, claims, scale=scale, store=store)
    _refuse_second_looks(slug, target, data)
    write(target, laid_out(data))
    return target


def collect(
    slug: str,
    module_name: str,
    claims: Sequence[Claim] = (),
    *,
    scale: str = "laptop",
    store: Store | None = None,
    seeds: Seeds | None = None,
    tuned: bool = True,
) -> dict[str, Any]:
    """The stored evidence of the present code as a ledger holds it; see :func:`export`.

    Args:
        slug: the paper.
        module_name: its experiment.
        claims: the claims of its card.
        scale: scale of the runs; default ``"laptop"``.
        store: where the runs are; default the user's store.
        seeds: another block than the experiment declares; default the declared.
        tuned: whether the runs by which settings were chosen belong to it; default True.

    Returns:
        Plain data, ready for :func:`laid_out`.

    Raises:
        LedgerError: fewer than ten seeds are declared, or runs are missing; says which.
    """
    experiment = import_module(module_name)
    seeds = seeds or seeds_of(experiment)
    if seeds.count < MINIMUM_SEEDS:
        raise LedgerError(f"{slug} declares {seeds.count} seeds; a verdict needs at least {MINIMUM_SEEDS}")
    key = code_key(module_name)
    with nullcontext(store) if store is not None else Store() as opened:
        stored = opened.find(slug, code_key=key, versions=versions(), dirty=False)
        uncommitted = len(opened.find(slug, code_key=key, versions=versions())) - len(stored)
    known = {(canonical(run.settings), run.seed): run for run in stored}
    settings = {arm: resolve(experiment, arm, scale) for arm in experiment.ARMS}
    named = {arm: canonical(given) for arm, given in settings.items()}
    if missing := {
        arm: lacking for arm in settings if (lacking := [s for s in seeds.numbers if (named[arm], s) not in known])
    }:
        hint = f" ({uncommitted} runs of uncommitted code do not count: commit first)" if uncommitted else ""
        block = "" if seeds.numbers == seeds_of(experiment).numbers else f" --first {seeds.first}"
        raise LedgerError(
            f"{slug} lacks runs of committed code with the present versions at {scale} scale, seeds by arm: {missing}"
            f"{hint}. Make them: regularized reproduce {slug} --scale {scale}{block}"
        )
    runs = [
        replace(known[named[arm], seed], arm=arm, scale=scale, overrides={})
        for arm in settings
        for seed in seeds.numbers
    ]
    tuning: Tuning | None = getattr(experiment, "TUNING", None) if tuned else None
    trials = _tuning_rows(slug, experiment, tuning, known)
    head = {
        "format": FORMAT,
        "slug": slug,
        "scale": scale,
        "seeds": list(seeds.numbers),
        "why_seeds": seeds.why,
        "arms": list(settings),
        "code_key": key,
        "versions": runs[0].versions,
        "settings": settings,
        "about": describe_arms(experiment, scale),
        "claims": {claim.id: fixed(claim) for claim in claims},
        "tuning": tuning_rule(tuning),
    }
    return _plain(head, runs, trials)


def fixed(claim: Claim) -> dict[str, Any]:
    """What may not change once results were seen."""
    names = ("metric", "direction", "baseline", "method", "smallest_effect", "relative")
    return {name: getattr(claim, name) for name in names}


def _refuse_second_looks(slug: str, target: Path, head: Mapping[str, Any]) -> None:
    """Refuse seeds that were seen before with other thresholds, settings, code or in another number.

    Runs that were taken over by a confirmation are of the same code to the last bit. New arms and new claims may join
    seeds that were seen: their threshold is fixed before their own first run.
    """
    try:
        before = json.loads(target.read_text(encoding="utf-8"))
        if before["format"] != FORMAT:
            return
        seen, now = set(before["seeds"]), set(head["seeds"])
        arms_before, claims_before = before["settings"], before.get("claims", {})
        code_before, versions_before = before["code_key"], before["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing was seen, or nothing that can be read
    if not seen & now:
        return
    changed = []
    if seen != now and not (len(seen) < MINIMUM_SEEDS and seen < now and len(now) == MINIMUM_SEEDS):
        changed.append(f"the number of seeds ({len(seen)}, now {len(now)})")
    changed += [
        f"claim {name!r}"
        for name, now_fixed in head["claims"].items()
        if name in claims_before and claims_before[name] != now_fixed
    ]
    judged = {arm for one in head["claims"].values() for arm in (one["baseline"], one["method"])}
    changed += [
        f"the settings of arm {arm!r}"
        for arm in sorted(judged & set(arms_before))
        if not unchanged(arms_before[arm], head["settings"][arm])
    ]
    if code_before != head["code_key"] and versions_before == dict(head["versions"]):
        taken_over = {row["arm"] for row in head["runs"] if head["environments"][row["environment"]].get(CONFIRMED)}
        if judged & set(arms_before) - taken_over:
            changed.append("the code")
    if changed:
        raise LedgerError(
            f"{slug}: {', '.join(changed)} changed after results of seeds {sorted(seen & now)} had been seen. Declare "
            f"a fresh block and say why: SEEDS = Seeds({len(now)}, first={max(seen | now) // 100 * 100 + 100}, why=...)"
        )


def tuning_rule(tuning: Tuning | None) -> dict[str, Any] | None:
    """How settings were chosen, as a ledger says it; None where nothing was tuned."""
    if tuning is None:
        return None
    return {
        "metric": tuning.metric,
        "direction": tuning.direction,
        "scale": tuning.scale,
        "seeds": list(tuning.seeds),
    }


def _tuning_rows(
    slug: str, experiment: ModuleType, tuning: Tuning | None, known: Mapping[tuple[str, int], Run]
) -> list[Run]:
    if tuning is None:
        return []
    wanted = [
        (arm, overrides, canonical(resolve(experiment, arm, tuning.scale, overrides)), seed)
        for arm, grid in tuning.grids.items()
        for overrides in grid
        for seed in tuning.seeds
    ]
    if missing := [(arm, overrides, seed) for arm, overrides, text, seed in wanted if (text, seed) not in known]:
        raise LedgerError(
            f"{slug} lacks {len(missing)} of {len(wanted)} tuning runs of committed code, the first is arm "
            f"{missing[0][0]!r} with {missing[0][1]}, seed {missing[0][2]}. Make them: regularized tune {slug}"
        )
    return [
        replace(known[text, seed], arm=arm, scale=tuning.scale, overrides=dict(overrides))
        for arm, overrides, text, seed in wanted
    ]


def load(file: Path) -> Ledger | None:
    """Read a ledger; None when there is no such file.

    Raises:
        LedgerError: the file is damaged or of a newer format.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise LedgerError(
                f"{file} has format {data['format']}, this version of regularized reads {FORMAT}: update it"
            )
        return parse(data)
    except LedgerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(file, error) from error


def parse(data: Mapping[str, Any]) -> Ledger:
    """A ledger from its plain data.

    Args:
        data: what :func:`collect` gives, or the file as JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: it is damaged.
    """
    settings, tried = data["settings"], data["tuned_settings"]

    def run(row: Mapping[str, Any], *, comparison: bool) -> Run:
        return Run(
            slug=data["slug"],
            scale=data["scale"] if comparison or data["tuning"] is None else data["tuning"]["scale"],
            code_key=data["code_key"],
            versions=data["versions"],
            settings=settings[row["arm"]] if comparison else {**tried[row["arm"]], **row["overrides"]},
            environment=data["environments"][row["environment"]],
            metrics={name: math.nan if v is None else float(v) for name, v in row["metrics"].items()},
            curves={
                name: [(float(x), math.nan if y is None else float(y)) for x, y in points]
                for name, points in row["curves"].items()
            },
            **{name: row[name] for name in RUN_KEYS if name not in ("metrics", "curves")},
        )

    return Ledger(
        slug=data["slug"],
        scale=data["scale"],
        seeds=tuple(data["seeds"]),
        arms=tuple(data["arms"]),
        settings=settings,
        about=data["about"],
        why_seeds=data["why_seeds"],
        code_key=data["code_key"],
        runs=tuple(run(row, comparison=True) for row in data["runs"]),
        tuning=tuple(run(row, comparison=False) for row in data["tuning_runs"]),
        tuning_rule=data["tuning"],
        claims=data.get("claims", {}),
    )


def _damaged(file: Path, error: Exception) -> LedgerError:
    return LedgerError(
        f"the ledger {file} is damaged ({type(error).__name__}: {error}). Restore it from the repository or install "
        "the package again; it is written by a command, never by hand"
    )


def _plain(head: Mapping[str, Any], runs: Sequence[Run], trials: Sequence[Run]) -> dict[str, Any]:
    """The whole ledger as plain data; runs name their environment by its place in a list."""
    environments: list[Mapping[str, Any]] = []
    for run in [*runs, *trials]:
        if run.environment not in environments:
            environments.append(run.environment)

    def row_of(run: Run, *, curves: bool) -> dict[str, Any]:
        row = {name: getattr(run, name) for name in RUN_KEYS}
        row["metrics"] = {name: _number(value) for name, value in sorted(run.metrics.items())}
        row["curves"] = {name: thin(points) for name, points in sorted(run.curves.items())} if curves else {}
        row["seconds"] = round(run.seconds, 2)
        row["environment"] = environments.index(run.environment)
        return row

    return {
        **head,
        # What trials of an arm share; each row adds its overrides.
        "tuned_settings": {
            run.arm: {k: v for k, v in run.settings.items() if k not in run.overrides} for run in trials
        },
        "environments": environments,
        "runs": [row_of(run, curves=True) for run in runs],
        "tuning_runs": [row_of(run, curves=False) for run in trials],
    }


def laid_out(data: Mapping[str, Any]) -> str:
    """The text of a ledger: each environment and each run on a line of its own.

    Args:
        data: what :func:`collect` gives.
    """
    lists = {
        "environments": [json.dumps(about, ensure_ascii=False) for about in data["environments"]],
        **{
            name: [json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str) for row in data[name]]
            for name in ("runs", "tuning_runs")
        },
    }
    blocks = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=str)}"
        for name, value in data.items()
        if name not in lists
    ]
    for name, lines in lists.items():
        inner = ",\n".join(f"  {text}" for text in lines)
        blocks.append(f"{json.dumps(name)}: [\n{inner}\n]" if lines else f"{json.dumps(name)}: []")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    """At most 50 points, first and last among them, to five digits."""
    step = max(1, math.ceil((len(points) - 1) / (_CURVE_POINTS - 1)))
    kept = list(points[::step])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return [(float(f"{x:.5g}"), _number(float(f"{y:.5g}"))) for x, y in kept]


def write(target: Path, text: str) -> None:
    """Write a file at once or not at all."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
