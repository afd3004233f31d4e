"""``regularized compare``: which technique helps on given data."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.options import Engine, EngineName, Gpus, on_engine
from regularized.cli.output import emit_json, emit_table, in_terminal, note

if TYPE_CHECKING:
    from regularized.evidence.comparison import Plan

__all__ = ["compare"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def compare(
    data: Annotated[Path, typer.Argument(help="A .csv, .tsv, .parquet or .npz file, or a folder of images by class.")],
    target: Annotated[str | None, typer.Option(help="Column or array with the targets.")] = None,
    problem: Annotated[str, typer.Option(help='Family of the problem: "noisy labels", "overfitting", ...')] = (
        "overfitting"
    ),
    candidates: Annotated[
        str | None, typer.Option(help="Techniques instead of the family's, with commas; a + b is one arm.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What decides; default accuracy, or rmse for numbers.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings tried for each arm in each split.")] = 8,
    splits: Annotated[int, typer.Option(min=3, help="How often the samples are dealt anew.")] = 5,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of a training; default by the number of samples.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time, such as 90s, 30m or 2h: fewer splits, then trials.")] = None,
    clean_test: Annotated[Path | None, typer.Option(help="Data with trusted targets, to judge on.")] = None,
    combine: Annotated[bool, typer.Option("--combine", help="Try what is best alone together, too.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done and how long it takes; no more.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Parallel processes; default one for each core.")] = None,
    engine: Engine = EngineName.LOCAL,
    gpus: Gpus = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make trainings again that are stored already.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder of the report; default your data folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")] = False,
) -> None:
    """Which technique helps on your data: all tuned alike, judged on samples that no choice has seen.

    The answer may be that nothing does. Trainings are kept: the same command goes on where it was interrupted.
    """
    from regularized.evidence.comparison.report import write
    from regularized.evidence.report import ReportError, default_directory, prepare
    from regularized.papers.comparison import compare as run

    seconds = None if budget is None else _seconds(budget)
    folder = report or default_directory("comparison", data.stem or data.resolve().name)
    if report is not None and not plan:
        prepare(report)  # before the runs: a place that was asked for must do

    def show(planned: "Plan") -> None:
        for line in planned.lines():
            note(line)
        if plan:
            raise typer.Exit

    where = {} if plan else on_engine(engine, gpus)
    try:
        result = run(
            None,
            data,
            problem=problem,
            target=target,
            candidates=None if candidates is None else [name.strip() for name in candidates.split(",")],
            metric=metric,
            trials=trials,
            splits=splits,
            epochs=epochs,
            budget=seconds,
            clean_test=clean_test,
            combine=combine,
            workers=workers,
            fresh=fresh,
            on_plan=show,
            **where,
        )
    except FileNotFoundError as error:
        raise CommandError(str(error), Exit.NOT_FOUND) from error
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), Exit.USAGE) from error
    unwritten = ""
    try:
        result = write(result, folder)
    except ReportError as error:  # what was measured is shown all the same
        unwritten = str(error)
    if as_json:
        emit_json(result.to_dict())
    else:
        head, rows = result.table()
        emit_table(head, rows)
        note(result.recommendation)
        if in_terminal():
            note(f"\n{result.snippet}")
        note(unwritten or f"report with plot and code: {result.report}")
    if unwritten and report is not None:
        raise typer.Exit(int(Exit.FAILED))


def _seconds(text: str) -> float:
    """A time such as ``30m``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    if found is None or not float(found[1]):
        raise CommandError(f"budget must be a time such as 90s, 30m or 2h, got {text!r}", Exit.USAGE)
    return float(found[1]) * _UNITS[found[2]]
