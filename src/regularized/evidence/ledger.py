"""The evidence that ships with the package: one text file a paper, written from the store and never by hand.

Public names: :func:`export` (store -> ``ledger.json`` beside the experiment), :func:`load`, :func:`path`,
:class:`Ledger` (``outcomes(claims)``, ``is_stale(code_key)``, ``to_result(claims)``), :class:`LedgerError`.

One run a line, sorted, so that a change of the evidence reads well as a diff. Verdicts are not in the file: they are
computed from the runs whenever they are shown, with the claims of the card as they are then.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from regularized.evidence.claims import Claim, Outcome
from regularized.evidence.experiment import Tuning
from regularized.evidence.provenance import code_key, versions
from regularized.evidence.results import ReproduceResult, TuningResult, outcomes, rank_trials
from regularized.evidence.statistics import MINIMUM_SEEDS
from regularized.evidence.store import Run, Store, canonical

__all__ = ["Ledger", "LedgerError", "export", "load", "path"]

_FORMAT = 1
_CURVE_POINTS = 50  # a curve of more points is thinned: it is for looking at, and 44 papers share one wheel
_RUN_KEYS = ("arm", "seed", "overrides", "metrics", "curves", "curve_unit", "data", "seconds", "peak_memory", "created")


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
        code_key: the code that was measured.
        runs: the runs of the comparison.
        tuning: the runs by which settings were chosen.
        tuning_rule: metric, direction and seeds of the tuning; empty without.
    """

    slug: str
    scale: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    code_key: str
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...] = ()
    tuning_rule: Mapping[str, Any] | None = None

    def outcomes(self, claims: Sequence[Claim]) -> tuple[Outcome, ...]:
        """Verdict of each claim from the runs."""
        return outcomes(claims, self.runs, seeds=self.seeds, scale=self.scale)

    def is_stale(self, current: str) -> bool:
        """Whether the code has changed since it was measured; ``current`` is the experiment's code key."""
        return self.code_key != current

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where the first run took place."""
        return self.runs[0].environment if self.runs else {}

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
            used = {run.arm: {**run.settings["scale"], **run.settings["arm"]} for run in self.runs}
            trials, agrees = rank_trials(rule, self.tuning, used)
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
    *,
    scale: str = "laptop",
    store: Store | None = None,
    destination: Path | None = None,
) -> Path:
    """Write the stored evidence of the present code to the ledger.

    Taken are runs of committed code, of the present code key and versions, with the seeds 0, 1, ... as far as every arm
    has
    them without a gap: which seeds count is not a choice.

    Args:
        slug: the paper.
        module_name: its experiment.
        scale: scale of the runs; default ``"laptop"``.
        store: where the runs are; default the user's store.
        destination: the file; default beside the experiment.

    Returns:
        The file. It is replaced at once or not at all.

    Raises:
        LedgerError: fewer than five seeds of every arm, or trials of the tuning are missing; says which.
    """
    experiment = import_module(module_name)
    key = code_key(module_name)
    with nullcontext(store) if store is not None else Store() as opened:
        stored = opened.find(slug, code_key=key, versions=versions(), dirty=False)
        uncommitted = len(opened.find(slug, code_key=key, versions=versions())) - len(stored)
    arms = list(experiment.ARMS)
    evidence = {(run.arm, run.seed): run for run in stored if run.scale == scale and not run.overrides}
    count = 0
    while all((arm, count) in evidence for arm in arms):
        count += 1
    if count < MINIMUM_SEEDS:
        missing = {
            arm: lacking for arm in arms if (lacking := [s for s in range(MINIMUM_SEEDS) if (arm, s) not in evidence])
        }
        hint = f" ({uncommitted} runs of uncommitted code do not count: commit first)" if uncommitted else ""
        raise LedgerError(
            f"{slug} lacks runs of committed code with the present versions at {scale} scale, seeds by arm: {missing}"
            f"{hint}. Make them: regularized reproduce {slug} --scale {scale} --seeds {MINIMUM_SEEDS}"
        )
    runs = [evidence[arm, seed] for arm in arms for seed in range(count)]
    rule, trials = _tuning_rows(slug, getattr(experiment, "TUNING", None), stored)
    target = destination or path(module_name)
    _write(target, _text(slug, scale, key, arms, range(count), runs, rule, trials))
    return target


def _tuning_rows(slug: str, tuning: Tuning | None, stored: Sequence[Run]) -> tuple[dict[str, Any] | None, list[Run]]:
    if tuning is None:
        return None, []
    found = {(run.arm, canonical(run.overrides), run.seed): run for run in stored if run.scale == tuning.scale}
    wanted = [(arm, canonical(o), s) for arm, grid in tuning.grids.items() for o in grid for s in tuning.seeds]
    if missing := [(arm, overrides, seed) for arm, overrides, seed in wanted if (arm, overrides, seed) not in found]:
        raise LedgerError(
            f"{slug} lacks {len(missing)} of {len(wanted)} tuning runs of committed code, the first is arm "
            f"{missing[0][0]!r} with {missing[0][1]}, seed {missing[0][2]}. Make them: regularized tune {slug}"
        )
    rule = {
        "metric": tuning.metric,
        "direction": tuning.direction,
        "scale": tuning.scale,
        "seeds": list(tuning.seeds),
    }
    return rule, [found[row] for row in wanted]


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
        if data["format"] != _FORMAT:
            raise LedgerError(
                f"{file} has format {data['format']}, this version of regularized reads {_FORMAT}: update it"
            )
        settings = data["settings"]

        def run(row: Mapping[str, Any], *, comparison: bool) -> Run:
            return Run(
                slug=data["slug"],
                scale=data["scale"] if comparison else data["tuning"]["scale"],
                code_key=data["code_key"],
                versions=data["versions"],
                settings={"scale": settings["scale"], "arm": settings["arms"][row["arm"]]} if comparison else {},
                environment=data["environments"][row["environment"]],
                metrics={name: math.nan if v is None else float(v) for name, v in row["metrics"].items()},
                curves={
                    name: [(float(x), math.nan if y is None else float(y)) for x, y in points]
                    for name, points in row["curves"].items()
                },
                **{name: row[name] for name in _RUN_KEYS if name not in ("metrics", "curves")},
            )

        return Ledger(
            slug=data["slug"],
            scale=data["scale"],
            seeds=tuple(data["seeds"]),
            arms=tuple(data["arms"]),
            code_key=data["code_key"],
            runs=tuple(run(row, comparison=True) for row in data["runs"]),
            tuning=tuple(run(row, comparison=False) for row in data["tuning_runs"]),
            tuning_rule=data["tuning"],
        )
    except LedgerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> LedgerError:
    return LedgerError(
        f"the ledger {file} is damaged ({type(error).__name__}: {error}). Restore it from the repository or install "
        "the package again; it is written by a command, never by hand"
    )


def _text(
    slug: str,
    scale: str,
    key: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    runs: Sequence[Run],
    rule: Mapping[str, Any] | None,
    trials: Sequence[Run],
) -> str:
    environments: list[Mapping[str, Any]] = []
    for run in [*runs, *trials]:
        if run.environment not in environments:
            environments.append(run.environment)

    def line(run: Run) -> str:
        row = {name: getattr(run, name) for name in _RUN_KEYS}
        row["metrics"] = {name: _number(value) for name, value in sorted(run.metrics.items())}
        row["curves"] = {name: _thin(points) for name, points in sorted(run.curves.items())} if run in runs else {}
        row["seconds"] = round(run.seconds, 2)
        row["environment"] = environments.index(run.environment)
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str)

    head = {
        "format": _FORMAT,
        "slug": slug,
        "scale": scale,
        "seeds": list(seeds),
        "arms": list(arms),
        "code_key": key,
        "versions": runs[0].versions,
        "settings": {"scale": runs[0].settings["scale"], "arms": {run.arm: run.settings["arm"] for run in runs}},
        "tuning": rule,
    }
    blocks = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=str)}" for name, value in head.items()
    ]
    lists = {
        "environments": [json.dumps(about, ensure_ascii=False) for about in environments],
        "runs": [line(run) for run in runs],
        "tuning_runs": [line(run) for run in trials],
    }
    for name, lines in lists.items():
        inner = ",\n".join(f"  {text}" for text in lines)
        blocks.append(f"{json.dumps(name)}: [\n{inner}\n]" if lines else f"{json.dumps(name)}: []")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    """At most 50 points, first and last among them, to five digits."""
    step = max(1, math.ceil((len(points) - 1) / (_CURVE_POINTS - 1)))
    kept = list(points[::step])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return [(float(f"{x:.5g}"), _number(float(f"{y:.5g}"))) for x, y in kept]


def _write(target: Path, text: str) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
