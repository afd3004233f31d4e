"""Check the parts: against the authors' code, against the contract, and what they cost."""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regularized.cli.checkout import needs_checkout
from regularized.cli.errors import CommandError, Exit
from regularized.cli.options import Json, MaybeSlug
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.selection import Parts

__all__ = ["bench", "conform", "contract"]


def conform(
    slug: MaybeSlug = None,
    golden: Annotated[Path | None, typer.Option(help="Folder of SLUG.npz files; default the shipped ones.")] = None,
    as_json: Json = False,
) -> None:
    """Compare implementations with the golden vectors of the authors' code; exit 1 if any output disagrees."""
    from regularized.evidence.conformance import GoldenError
    from regularized.evidence.conformance import conform as compare

    parts = Parts(slug, "conformance")
    if golden is not None and not golden.is_dir():
        raise CommandError(f"there is no folder {golden}", Exit.NOT_FOUND)
    rows, problems = [], []
    for entry, adapter in parts:
        path = entry.golden if golden is None else golden / f"{entry.slug}.npz"
        if golden is not None and not path.exists():
            if slug is not None:
                raise CommandError(f"there is no golden file {path}", Exit.NOT_FOUND)
            note(f"{entry.slug}: skipped, there is no {path}")
            continue
        try:
            rows.extend(compare(entry.slug, adapter, path))
        except GoldenError as error:
            problems.append(str(error))
            note(f"error: {error}")
    if as_json:
        emit_json([row.to_dict() for row in rows])
    else:
        columns = ["slug", "case", "output", "max_abs_error>", "max_rel_error>", "tolerance>", "ok"]
        emit_table(
            columns,
            [[r.slug, r.case, r.output, r.max_abs_error, r.max_rel_error, r.tolerance, r.ok] for r in rows],
        )
        for row in rows:
            if row.note:
                note(f"{row.slug} {row.case} {row.output}: {row.note}")
    if not rows and not problems and not parts.left_out:
        raise CommandError(
            f"nothing was compared: {golden or 'the catalogue'} has no golden file of these papers", Exit.NOT_FOUND
        )
    wrong = sum(not row.ok for row in rows)
    note(f"{len(rows) - wrong} of {len(rows)} outputs agree")
    parts.end(failed=bool(wrong or problems))


def contract(
    slug: MaybeSlug = None,
    module: Annotated[
        str, typer.Option("--module", help="A module of yours with a function subjects(), in place of the papers.")
    ] = "",
    save: Annotated[
        bool, typer.Option("--save", help="Write what came out beside the paper's contract, for the documentation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check what every technique promises: that it bites, is deterministic, resumes exactly, ...; exit 1 if one fails.

    A check that does not apply says why; it counts neither as passed nor as failed.
    """
    from regularized.evidence.contract import Outcome, run
    from regularized.evidence.contract import save as save_outcomes

    if module and (slug or save):
        raise CommandError("--module goes without SLUG and --save: it is about a module of yours", Exit.USAGE)
    if save:
        needs_checkout("contract --save")
    found: list[Outcome] = []
    parts = Parts(slug, "contract")
    for name, subjects, exceptions, home in _subjects_of_module(module) if module else _subjects_of_papers(parts):
        outcomes = []
        for outcome in run(name, subjects, exceptions=exceptions):
            outcomes.append(outcome)
            if outcome.status == "failed":
                note(f"{name}: {outcome.subject}: {outcome.check} failed: {outcome.reason}")
        if save and not any(outcome.status == "failed" for outcome in outcomes):
            note(f"saved {save_outcomes(outcomes, home)}")
        found += outcomes
    if as_json:
        emit_json([outcome.to_dict() for outcome in found])
    else:
        emit_table(
            ["slug", "subject", "check", "status", "reason"],
            [[o.slug, o.subject, o.check, o.status.replace("_", " "), o.reason] for o in found],
        )
    counted = Counter(outcome.status for outcome in found)
    note(", ".join(f"{number} {status.replace('_', ' ')}" for status, number in counted.items()))
    parts.end(failed=bool(counted["failed"]))


def _subjects_of_papers(parts: Parts) -> Iterator[tuple[str, Sequence[Any], Mapping[str, str], str]]:
    """Slug, subjects, the card's exceptions by check, and the name of the contract module of each paper."""
    for entry, module in parts:
        exceptions = {exception.check: exception.reason for exception in entry.card.exceptions}
        yield entry.slug, module.subjects(), exceptions, module.__name__


def _subjects_of_module(name: str) -> Iterator[tuple[str, Sequence[Any], Mapping[str, str], str]]:
    """The same for a module that is no paper's."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the module may lie in the working directory
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise CommandError(f"there is no module {name}, here or installed", Exit.NOT_FOUND) from error
    if not callable(getattr(module, "subjects", None)):
        raise CommandError(
            f"{name} has no function subjects() that returns a list of regularized.evidence.contract.Subject",
            Exit.USAGE,
        )
    yield name, module.subjects(), {}, name


def bench(
    slug: MaybeSlug = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each size, which its processes share.")] = 12.0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Fresh processes for each size; default 5 with --save, otherwise 1.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; one is the quietest.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, too, in processes of their own.")] = True,
    save: Annotated[
        bool, typer.Option("--save", help="Write the rows beside the paper's bench module, for the documentation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what a technique costs: its step against a plain one, interleaved, beside the least possible ratio.

    Says so where a figure has left what was saved.
    """
    from regularized.evidence import bench_rows
    from regularized.evidence.bench import bench as measure

    if save:
        needs_checkout("bench --save")
    rows: list[bench_rows.BenchRow] = []

    def keep(row: bench_rows.BenchRow) -> None:
        rows.append(row)
        note(f"{row.slug}: {row.size}: {row.ratio:.3f}")

    parts = Parts(slug, "bench")
    for entry, module in list(parts):  # all of them are loaded, and so found to be complete, before the first is timed
        implementation = entry.card.implementation
        try:
            measured = measure(
                entry.slug,
                module.__name__,
                floor=implementation.floor if implementation else None,
                seconds=seconds,
                processes=processes or (5 if save else 1),
                threads=threads,
                memory=memory,
                on_row=keep,
            )
        except (RuntimeError, ImportError) as error:  # what is measured by then is shown all the same
            parts.leave_out(entry.slug, error, what="failed")
            continue
        for text in bench_rows.departures(measured, bench_rows.load(entry.folder / "bench.json")):
            note(f"{entry.slug}: {text}")
        if save:
            note(f"saved {bench_rows.save(measured, module.__name__)}")
    if as_json:
        emit_json([row.to_dict() for row in rows])
    else:
        columns = [
            "slug",
            "size",
            "plain ms>",
            "method ms>",
            "ratio>",
            "low>",
            "high>",
            "floor>",
            "peak memory ratio>",
            "size ratio>",
        ]
        emit_table(
            columns,
            [
                [
                    r.slug,
                    r.size,
                    r.plain_ms,
                    r.method_ms,
                    r.ratio,
                    *r.ratio_interval,
                    r.floor,
                    r.peak_memory_ratio,
                    r.size_ratio,
                ]
                for r in rows
            ],
        )
    parts.end()
