"""Train and compare: a paper's claims, and the settings of its arms."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regularized.cli.errors import CommandError, Exit, exit_of
from regularized.cli.options import Engine, EngineName, Fresh, Gpus, Json, Slug, TimeLimit, Workers, on_engine
from regularized.cli.output import console, emit_json, emit_table, in_terminal, note
from regularized.cli.selection import implemented

if TYPE_CHECKING:
    from regularized.evidence.results import ReproduceResult

__all__ = ["print_claims", "reproduce", "tune"]


def reproduce(
    slug: Slug,
    scale: Annotated[str, typer.Option(help="smoke (seconds), laptop (minutes), or paper (the original set-up).")] = (
        "laptop"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many of the declared seeds; default all. Fewer give no verdict.")
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(
            help="Another block of as many seeds, for an attempt of your own: 0, 100, ..., 900. Default the declared."
        ),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Only these arms, with commas; claims about others are not shown. Default all.")
    ] = "",
    workers: Workers = None,
    fresh: Fresh = False,
    time_limit: TimeLimit = None,
    engine: Engine = EngineName.LOCAL,
    gpus: Gpus = 0,
    report: Annotated[Path | None, typer.Option(help="Folder of the report; default your data folder.")] = None,
    as_json: Json = False,
) -> None:
    """Run a paper's comparison and judge its claims; write report and plot.

    Runs are kept: the same command goes on where it was interrupted. Exits with 0 whatever the verdict is.
    """
    from regularized.evidence import report as reports
    from regularized.evidence.claims import Verdict, reason_text
    from regularized.evidence.runner import reproduce as run

    entry = implemented(slug)
    if report is not None:
        reports.prepare(report)  # before the runs: a place that was asked for must do
    result = _or_usage(
        run,
        slug,
        entry.module_name("experiment"),
        entry.card.claims,
        scale=scale,
        seeds=seeds,
        first=first,
        arms=[name.strip() for name in arms.split(",")] if arms else None,
        workers=workers,
        fresh=fresh,
        time_limit=time_limit,
        **on_engine(engine, gpus),
    )
    result.notes += tuple(
        f"Claim {outcome.claim.id} is contested, {reason_text(outcome)}. All of them: regularized show {slug}"
        for outcome in entry.outcomes
        if outcome.verdict is Verdict.CONTESTED
    )
    unwritten = ""
    try:
        reports.write(result, report or reports.default_directory(slug, scale), title=entry.card.title)
    except reports.ReportError as error:  # what was measured is shown all the same
        unwritten = str(error)
    if as_json:
        emit_json(reports.to_json(result))
    elif in_terminal():
        reports.print_table(result, console())
    else:
        print_claims(result)
        for text in result.notes:
            note(text)
    if unwritten:
        note(unwritten)
    elif not as_json:
        note(f"report with plots: {result.report}")
    if result.failures:
        failed = result.failures[0]
        raise CommandError(
            f"{len(result.failures)} of {len(result.runs) + len(result.failures)} runs failed; the first, arm "
            f"{failed.arm!r} with seed {failed.seed}: {failed.error}",
            Exit.FAILED,
        )
    if unwritten and report is not None:
        raise typer.Exit(int(Exit.FAILED))


def print_claims(result: "ReproduceResult") -> None:
    """The claims with what was measured, a line each."""
    from regularized.evidence.claims import reason_text

    columns = ["claim", "baseline", "method", "effect", "low", "high", "smallest_effect", "unit", "verdict", "reason"]
    rows = []
    for outcome in result.outcomes:
        claim = outcome.claim
        low, high = outcome.interval or (None, None)
        unit = "share" if claim.relative else claim.unit
        measured = [outcome.effect, low, high, claim.smallest_effect, unit, outcome.verdict.value, reason_text(outcome)]
        rows.append([claim.id, claim.baseline, claim.method, *measured])
    emit_table(columns, rows)


def tune(
    slug: Slug,
    workers: Workers = None,
    fresh: Fresh = False,
    time_limit: TimeLimit = None,
    engine: Engine = EngineName.LOCAL,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Try the settings of a paper's arms: as many trials for each, on seeds that are no evidence."""
    from regularized.evidence.runner import tune as run

    entry = implemented(slug)
    where = on_engine(engine, gpus)
    result = _or_usage(
        run, slug, entry.module_name("experiment"), workers=workers, fresh=fresh, time_limit=time_limit, **where
    )
    if as_json:
        trials = [
            {
                "arm": trial.arm,
                "overrides": dict(trial.overrides),
                "values": list(trial.values),
                "mean": trial.mean,
                "best": trial.best,
            }
            for trial in result.trials
        ]
        head = {"slug": slug, "metric": result.metric, "direction": result.direction, "seeds": list(result.seeds)}
        emit_json({**head, "trials": trials, "agrees": dict(result.agrees), "seconds": result.seconds})
    else:
        rows = [
            [t.arm, ", ".join(f"{k}={v}" for k, v in t.overrides.items()), t.mean, "best" if t.best else ""]
            for t in result.trials
        ]
        emit_table(
            ["arm", "settings", f"{result.metric}>", "chosen"], rows, title=f"{slug}: {result.direction} is better"
        )
    for arm, agrees in result.agrees.items():
        if not agrees:
            note(f"arm {arm!r} of the experiment does not use its best settings {dict(result.best[arm])}")
    if result.failures:
        raise CommandError(f"{len(result.failures)} trials failed; the first: {result.failures[0].error}", Exit.FAILED)


def _or_usage(run: Any, *arguments: Any, **options: Any) -> Any:
    """Call the runner; what it refuses (a scale, seeds used for tuning) was asked for wrongly.

    Nothing else can raise these errors: experiments run in other processes, and their failures are results.
    """
    try:
        return run(*arguments, **options)
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    except RuntimeError as error:
        if exit_of(error) is not None:
            raise
        raise CommandError(str(error), Exit.FAILED) from error
