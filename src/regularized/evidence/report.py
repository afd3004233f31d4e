"""Shows a comparison: JSON for scripts, tables for the terminal, a self-contained HTML report with plots.

Public names:
    ``to_json(result) -> dict``            the keys that scripts rely on
    ``print_table(result, console)``       rich tables
    ``write(result, directory) -> Path``   ``report.html`` with its curves, pictures and sounds as files beside it; sets
    ``result.report``
    ``prepare(directory) -> Path``         makes sure, before the runs, that a report can be written after them
    ``default_directory(slug, scale)``     where the command writes unless told otherwise
    ``ReportError``                        a report cannot be written
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regularized.evidence import pictures, sounds
from regularized.evidence._html import page
from regularized.evidence._plots import save_curves
from regularized.evidence.claims import (
    Outcome,
    Verdict,
    counts_text,
    effect_text,
    interval_text,
    reason_text,
    threshold_text,
)
from regularized.evidence.numbers import NARROW, aligned
from regularized.evidence.results import ReproduceResult
from regularized.evidence.store import home

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ReportError", "default_directory", "explained", "prepare", "print_table", "to_json", "write"]

_STYLES = {
    Verdict.HOLDS: "bold green",
    Verdict.SMALLER: "bold cyan",
    Verdict.NO_EFFECT: "bold red",
    Verdict.OPPOSITE: "bold red",
    Verdict.OPEN: "bold yellow",
    Verdict.CONTESTED: "bold magenta",
    Verdict.NOT_RUN: "dim",
}


def to_json(result: ReproduceResult) -> dict[str, Any]:
    """Plain data of a result; numbers that are missing or not finite are None.

    Returns:
        ``slug``, ``scale``, ``seeds`` (how many), ``claims`` (``id, statement, metric, baseline, method, effect,
        interval, verdict`` and, beyond those, ``smallest_effect, kind, relative, differs, p_value, worst_seed, data,
        model, sampling, toy, unit, effects, problem``), ``arms`` (arm ->
        metric -> value for each seed), ``report`` (path or None), ``seconds``; and ``seed_values, reused, failures,
        notes, code_key, environment``. An interval always has two ends; they are None while it is unknown.
    """
    return {
        "slug": result.slug,
        "scale": result.scale,
        "seeds": len(result.seeds),
        "claims": [_claim_json(outcome) for outcome in result.outcomes],
        "arms": {
            arm: {
                metric: [_finite(value) for value in result.values(arm, metric)] for metric in _metrics_of(result, arm)
            }
            for arm in result.arms
        },
        "report": None if result.report is None else str(result.report),
        "seconds": round(result.seconds, 3),
        "seed_values": list(result.seeds),
        "reused": result.reused,
        "failures": [{"arm": f.arm, "seed": f.seed, "error": f.error} for f in result.failures],
        "notes": list(result.notes),
        "code_key": result.code_key,
        "environment": dict(result.environment),
    }


def _claim_json(outcome: Outcome) -> dict[str, Any]:
    claim = outcome.claim
    return {
        "id": claim.id,
        "statement": claim.statement,
        "metric": claim.metric,
        "baseline": claim.baseline,
        "method": claim.method,
        "effect": _finite(outcome.effect),
        "interval": [None, None] if outcome.interval is None else [_finite(end) for end in outcome.interval],
        "verdict": outcome.verdict.value,
        "smallest_effect": claim.smallest_effect,
        "kind": claim.kind,
        "relative": claim.relative,
        "differs": list(claim.differs),
        "p_value": _finite(outcome.p_value),
        "worst_seed": None if outcome.worst_seed is None else dict(zip(("seed", "effect"), outcome.worst_seed)),
        "data": outcome.about.get("data"),
        "model": outcome.about.get("model"),
        "sampling": outcome.about.get("sampling"),
        "toy": outcome.toy,
        "unit": claim.unit,
        "effects": [_finite(value) for value in outcome.effects],
        "problem": outcome.problem,
    }


def print_table(result: ReproduceResult, console: "Console") -> None:
    """Print claims with interval and verdict, what every arm measured, and what went wrong.

    Args:
        result: the comparison.
        console: where to; rich takes care of width and colours.
    """
    from rich.table import Table
    from rich.text import Text

    heading = f"{result.slug}, {result.scale} scale, {len(result.seeds)} seeds"
    if console.width < NARROW:
        _print_claims_one_by_one(result, heading, console)
    else:
        _print_claims_side_by_side(result, heading, console)
    for reason in dict.fromkeys(filter(None, map(reason_text, result.outcomes))):
        ids = ", ".join(outcome.claim.id for outcome in result.outcomes if reason_text(outcome) == reason)
        console.print(Text(f"{ids}: {reason}", style="yellow"))
    if result.runs:
        # Of the metrics those that are judged; a screen has no room for all, the page has.
        judged = list(dict.fromkeys(outcome.claim.metric for outcome in result.outcomes)) or result.metrics
        measured = Table(title="over seeds", title_justify="left")
        for heading, right in (("metric", False), ("arm", False), ("mean", True), ("lowest", True), ("highest", True)):
            measured.add_column(heading, justify="right" if right else "left", overflow="fold")
        for metric in judged:
            values = {arm: [v for v in result.values(arm, metric) if v is not None] for arm in result.arms}
            show = aligned([value for column in values.values() for value in column])
            for arm, column in values.items():
                if column:
                    cells = (math.fsum(column) / len(column), min(column), max(column))
                    measured.add_row(Text(metric), Text(arm), *map(show, cells))
            measured.add_section()
        console.print(measured)
    for failure in result.failures:
        console.print(Text(f"{failure.arm} seed {failure.seed} failed: {failure.error}", style="red"))
        if failure.traceback:
            console.print(Text(failure.traceback.rstrip(), style="dim"))
    for note in result.notes:
        console.print(Text(note, style="yellow"))
    if result.reused:
        console.print(
            f"{result.reused} of {len(result.runs)} runs were made by earlier calls (same code, settings, versions)."
        )


def _print_claims_side_by_side(result: ReproduceResult, heading: str, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    verdicts = Table(title=Text(heading), title_justify="left")
    for name, right in (
        ("claim", False),
        ("arms", False),
        ("effect", True),
        ("95 % interval", True),
        ("counts from", True),
    ):
        verdicts.add_column(name, justify="right" if right else "left", overflow="fold")
    verdicts.add_column("verdict", no_wrap=True)
    for outcome in result.outcomes:
        claim = outcome.claim
        verdicts.add_row(
            Text(claim.statement),
            Text(f"{claim.method} over {claim.baseline}"),
            Text(effect_text(claim, outcome.effect)),
            Text(interval_text(claim, outcome)),
            Text(threshold_text(claim)),
            Text(outcome.verdict.value, style=_STYLES[outcome.verdict]),
        )
    console.print(verdicts)


def _print_claims_one_by_one(result: ReproduceResult, heading: str, console: "Console") -> None:
    """Each claim as a block of lines: six columns of one word each are no table."""
    from rich.text import Text

    console.print(Text(heading, style="italic"))
    for outcome in result.outcomes:
        claim = outcome.claim
        console.print()
        console.print(Text(outcome.verdict.value, style=_STYLES[outcome.verdict]), Text(claim.id, style="bold"))
        console.print(Text(claim.statement))
        console.print(
            Text(
                f"{claim.method} over {claim.baseline}: {effect_text(claim, outcome.effect)} "
                f"{interval_text(claim, outcome)}, {counts_text(claim)}"
            )
        )
    console.print()


class ReportError(RuntimeError):
    """A report cannot be written; the message names the place and the way out. The runs are kept all the same."""


def default_directory(slug: str, scale: str) -> Path:
    """Folder of a paper's report in the user's data folder: ``reports/SLUG/SCALE``."""
    return home() / "reports" / slug / scale


def prepare(directory: Path | str) -> Path:
    """Make the folder of a report and try whether it can be written to: asked before runs that take hours.

    Args:
        directory: the folder; made when missing.

    Returns:
        The folder, absolute.

    Raises:
        ReportError: it is no folder, or nothing can be written there.
    """
    folder = Path(directory).expanduser()
    with explained(folder):
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    return folder


def write(result: ReproduceResult, directory: Path | str, *, title: str = "") -> Path:
    """Write the report, its plot, its pictures and its sounds; sets ``result.report``.

    The page needs no other file and makes no request: style and plots are in it.

    Args:
        result: the comparison.
        directory: folder to write to; made when missing, files of an earlier report are replaced.
        title: heading; default the slug.

    Returns:
        ``report.html``, absolute.

    Raises:
        ReportError: the folder cannot be written to, or the disk is full.
    """
    folder = prepare(directory)
    with explained(folder):
        save_curves(result, folder)
        pictures.save(result, folder)
        sounds.save(result, folder)
        target = folder / "report.html"
        part = target.with_name("report.html.part")
        # What is no character, from an odd file name, as an escape: a name must not cost the report.
        part.write_bytes(page(result, title=title or result.slug).encode("utf-8", "backslashreplace"))
        part.replace(target)
    result.report = target
    return target


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the system says of files in a folder into a :class:`ReportError`."""
    try:
        yield
    except OSError as error:
        raise ReportError(
            f"cannot write a report to {folder}: {error.strerror or error}. Give another folder with --report, or make "
            "room; finished runs are kept"
        ) from error


def _metrics_of(result: ReproduceResult, arm: str) -> list[str]:
    return [name for name in result.metrics if any(name in run.metrics for run in result.runs_of(arm))]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
