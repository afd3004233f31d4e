"""Commands that get papers into the site: a saved listing page, one paper of arXiv, the papers of a day or a week."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.site.opening import Json, needs_extra, open_for_command

if TYPE_CHECKING:
    from regularized.site.importing import Stored

__all__ = ["add", "fetch", "import_file"]


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A listing page of Daily Papers, saved as text.")],
    saved: Annotated[
        str, typer.Option(metavar="DATE", help="When the page was saved: dates without a year are of then.")
    ] = "",
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out entries that cannot be read, and say which; else none is taken."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a saved listing page: new papers are added, known ones are matched."""
    needs_extra()
    from regularized.site import importing, listing

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CommandError(f"there is no file {file}", Exit.NOT_FOUND) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} cannot be read as UTF-8 text: {error}", Exit.FAILED) from None
    day = _date(saved) if saved else datetime.date.today()
    page = _or_error(listing.read_listing, text, source=str(file), saved=day)
    if page.faults and not skip_bad:
        raise CommandError(f"{page.faults[0]}. Nothing was imported; --skip-bad leaves such entries out", Exit.FAILED)
    opened = open_for_command()
    with opened.write.begin() as session:
        stored = importing.store(
            session, importing.dated(session, page.entries, day, own_day=page.day), now=opened.settings.now
        )
    _report(stored, as_json=as_json)
    for fault in page.faults:
        note(f"skipped: {fault}")


def add(
    identifier: Annotated[str, typer.Argument(metavar="ARXIV_ID", help="For example 2007.00151.")],
    as_json: Json = False,
) -> None:
    """Add a paper from arXiv by its identifier."""
    needs_extra()
    from regularized.site import importing, remote

    wanted = _or_error(remote.arxiv_id, identifier)
    paper = _or_error(remote.fetch_arxiv, wanted, endpoint=remote.ARXIV)
    opened = open_for_command()
    with opened.write.begin() as session:
        stored = importing.store(session, [paper], now=opened.settings.now)
    _report(stored, as_json=as_json)


def fetch(
    day: Annotated[str, typer.Option(metavar="DATE", help="The Daily Papers of this day, such as 2026-03-02.")] = "",
    week: Annotated[str, typer.Option(metavar="WEEK", help="Those of this week, such as 2026-W10.")] = "",
    as_json: Json = False,
) -> None:
    """Add the Daily Papers of a day or a week; default today."""
    needs_extra()
    from regularized.site import importing, remote
    from regularized.site.queries import Period

    if day and week:
        raise CommandError("give --day or --week, not both", Exit.USAGE)
    try:
        period = Period.parse("week", week) if week else Period("day", _date(day) if day else datetime.date.today())
    except ValueError:
        raise CommandError(f"--week must be a week such as 2026-W10, got {week!r}", Exit.USAGE) from None
    opened = open_for_command()
    now = opened.settings.now
    try:
        papers = _or_error(remote.fetch_daily, period, endpoint=remote.DAILY_PAPERS)
    except CommandError as error:  # readers see that the stream stands still, and why
        with opened.write.begin() as session:
            importing.remember(session, "daily", period.words, now=now, error=str(error))
        raise
    with opened.write.begin() as session:
        stored = importing.store(session, papers, now=now)
        importing.remember(session, "daily", period.words, now=now, stored=stored)
    _report(stored, as_json=as_json)


def _or_error(call: Any, *arguments: Any, **options: Any) -> Any:
    from regularized.site.listing import ImportFailed
    from regularized.site.remote import Offline

    try:
        return call(*arguments, **options)
    except ImportFailed as error:
        raise CommandError(str(error), Exit.FAILED) from None
    except Offline as error:
        raise CommandError(str(error), Exit.UNAVAILABLE) from None


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise CommandError(f"a date looks like 2026-03-02, got {text!r}", Exit.USAGE) from None


def _report(stored: "list[Stored]", *, as_json: bool) -> None:
    if as_json:
        emit_json([{"slug": row.slug, "title": row.title, "outcome": row.outcome} for row in stored])
    else:
        emit_table(["outcome", "slug", "title"], [[row.outcome, row.slug, row.title] for row in stored])
    outcomes: list[str] = [row.outcome for row in stored]
    kinds = ("added", "updated", "known", *(["removed by a moderator, left out"] if "removed" in outcomes else []))
    counted = ", ".join(f"{outcomes.count(kind.split()[0])} {kind}" for kind in kinds)
    note(f"{len(stored)} papers: {counted}")
