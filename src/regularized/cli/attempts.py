"""``regularized ledger export`` and ``ledger import``: evidence that travels between machines and persons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regularized.cli.checkout import needs_checkout
from regularized.cli.errors import CommandError, Exit, exit_of
from regularized.cli.options import Json, Slug
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.selection import implemented

if TYPE_CHECKING:
    from regularized.evidence.attempts.form import Attempt
    from regularized.evidence.claims import Outcome
    from regularized.papers.catalogue import Entry

__all__ = ["export_evidence", "import_evidence"]


def export_evidence(
    slug: Slug,
    destination: Annotated[
        Path, typer.Argument(metavar="DIR|FILE.zip", help="New or empty folder; a zip where the name ends in .zip.")
    ],
    mine: Annotated[
        bool, typer.Option("--mine", help="Your own runs of this code, not those that ship: an attempt to send.")
    ] = False,
    first: Annotated[
        int | None, typer.Option(help="With --mine: the block of seeds, as of `reproduce`. Default the declared.")
    ] = None,
    by: Annotated[str, typer.Option(help="With --mine: who made them; a name, of a person or a group.")] = "",
    where: Annotated[str, typer.Option(help="With --mine: on what machine. Default its processor.")] = "",
    remark: Annotated[str, typer.Option("--note", help="With --mine: what else a reader should know.")] = "",
    as_json: Json = False,
) -> None:
    """Write a paper's evidence as one self-contained folder: runs, settings, verdicts, report, environment.

    Its README.md says how anybody can check it. `regularized ledger import` reads it.
    """
    from regularized.evidence.attempts import bundle

    entry = implemented(slug)
    if mine:
        attempt = _own(entry, first=first, by=by, where=where, remark=remark)
        outcomes: Sequence[Outcome] = attempt.ledger.outcomes(entry.card.claims)
        others: Sequence[Attempt] = ()
    elif first is not None or by or where or remark:
        raise CommandError("--first, --by, --where and --note go with --mine: what ships says who made it", Exit.USAGE)
    else:
        attempt, outcomes, others = _shipped(entry), entry.outcomes, entry.load_attempts()
    abstract = [pair for sentence in entry.abstract for pair in sentence.pairs()]
    try:
        path = bundle.write(destination, attempt, outcomes, title=entry.card.title, abstract=abstract, others=others)
    except bundle.BundleError as error:
        raise CommandError(str(error), Exit.FAILED) from error
    verdicts = {outcome.claim.id: outcome.verdict.value for outcome in outcomes}
    if as_json:
        emit_json({"slug": slug, "path": str(path), "attempt": attempt.name, "verdicts": verdicts})
    else:
        emit_table(["slug", "claims", "path"], [[slug, _counted(verdicts), path]])


def import_evidence(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE|DIR...", help="attempt.json, or a folder or zip with it.")
    ],
    check: Annotated[bool, typer.Option("--check", help="Only say whether it fits, and its verdicts.")] = False,
    as_json: Json = False,
) -> None:
    """Keep attempts of other machines or persons beside the ledgers, where they fit this code.

    A file that does not fit is refused with the field, what was given, and what is needed; the others are kept all the
    same. Keeping is for developers, in a checkout; `--check` works everywhere.
    """
    from regularized.evidence.attempts.files import named

    if not check:
        needs_checkout("ledger import")
    rows: list[dict[str, Any]] = []
    refused = 0
    for file in files:
        name = named(file)
        try:
            rows.append({"file": name, **_take(file, check=check)})
        except Exception as error:  # one bad file never stops the rest; a defect of ours does
            if exit_of(error) is None and not isinstance(error, ImportError):
                raise
            problems = list(getattr(error, "problems", None) or [str(error)])
            note("\n  ".join([f"refused {name}:", *problems]))
            rows.append({"file": name, "refused": problems})
            refused += 1
    if as_json:
        emit_json(rows)
    else:
        taken = [row for row in rows if "refused" not in row]
        columns = ["file", "slug", "attempt", "status", "claims", "contested"]
        cells = [
            [row[n] for n in columns[:4]] + [_counted(row["verdicts"]), ", ".join(row["contested"])] for row in taken
        ]
        emit_table(columns, cells)
    if refused:
        raise CommandError(f"{refused} of {len(files)} refused; nothing was written of them", Exit.FAILED)


def _own(entry: "Entry", *, first: int | None, by: str, where: str, remark: str) -> "Attempt":
    """What this home holds of a paper."""
    from regularized.evidence import ledger
    from regularized.evidence.attempts import form
    from regularized.evidence.experiment import block_of

    if not by.strip():
        raise CommandError('--mine needs --by "NAME": an attempt says who made it', Exit.USAGE)
    experiment, shipped = entry.experiment(), entry.load_ledger()
    scale = shipped.scale if shipped is not None else "laptop"
    try:
        seeds = block_of(experiment, first)
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    data = ledger.collect(
        entry.slug, entry.module_name("experiment"), entry.card.claims, scale=scale, seeds=seeds, tuned=False
    )
    command = f"regularized reproduce {entry.slug} --scale {scale}"
    maker = form.Maker(
        by=by.strip(),
        where=where.strip() or str(data["environments"][0].get("cpu", "")),
        when=max(row["created"] for row in data["runs"]),
        note=remark.strip(),
        command=command if first is None else f"{command} --first {first}",
    )
    return form.of_data(data, maker)


def _shipped(entry: "Entry") -> "Attempt":
    import json

    from regularized.evidence.attempts import bundle, form

    shipped = entry.load_ledger()
    if shipped is None:
        raise CommandError(
            f"no runs of {entry.slug} ship; make your own and export them with --mine: regularized reproduce "
            f"{entry.slug}",
            Exit.UNAVAILABLE,
        )
    data = json.loads(entry.ledger.read_text(encoding="utf-8"))
    return form.of_data(data, bundle.maker_of_shipped(shipped))


def _take(file: Path, *, check: bool) -> dict[str, Any]:
    """Check a file and, unless it is a trial, keep it; says what it is, and which claims it makes contested."""
    from itertools import islice

    from regularized.evidence.attempts import files, fitting, form, judging, kept
    from regularized.evidence.claims import Verdict

    attempt = form.parse(files.read(file))
    entry = implemented(attempt.ledger.slug)
    claims, shipped, others = entry.card.claims, entry.load_ledger(), entry.load_attempts()
    found = fitting.misfits(attempt, entry.experiment(), claims, code_key=entry.code_key, shipped=shipped)
    if problems := list(islice(found, 20)):
        raise files.AttemptError(problems)
    beside = {one.name: one.ledger for one in others}
    known = attempt.name in beside
    seen = fitting.seen_before(attempt, ({} if shipped is None else {judging.SHIPPED: shipped}) | beside)
    if seen and not known and not check:
        raise files.AttemptError([seen])
    if known or seen:
        status, path = ("known" if known else f"checked; {seen}"), None
    elif check:
        status, path = "checked", None
    else:
        status, path = "kept", kept.keep(attempt, entry.folder)
        note(f"kept {path}; commit it, and it stands beside the ledger")
    together = judging.together(claims, shipped, others if known or seen else [*others, attempt])
    verdicts = {outcome.claim.id: outcome.verdict.value for outcome in attempt.ledger.outcomes(claims)}
    return {
        "slug": entry.slug,
        "attempt": attempt.name,
        "status": status,
        "path": None if path is None else str(path),
        "verdicts": verdicts,
        "contested": [outcome.claim.id for outcome in together if outcome.verdict is Verdict.CONTESTED],
    }


def _counted(verdicts: Mapping[str, str]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts.values()).items())
