"""Find a paper: list, search, show, cite."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.options import Json, Slug
from regularized.cli.output import console, emit_json, emit_table, in_terminal, note

if TYPE_CHECKING:
    from regularized.papers.catalogue import Entry

__all__ = ["cite", "papers_app", "show"]

papers_app: typer.Typer = typer.Typer(help="List or search the catalogue; get further papers in.")


@papers_app.callback(invoke_without_command=True)
def papers(
    ctx: typer.Context,
    search: Annotated[str, typer.Option("--search", "-s", help="Your problem, in your words.")] = "",
    family: Annotated[str, typer.Option(help="Only this problem family, for example noisy_labels.")] = "",
    implemented: Annotated[bool, typer.Option("--implemented", help="Only papers with code that runs.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many; default all.")] = None,
    as_json: Json = False,
) -> None:
    """List or search the catalogue, best first (without a search: best proven first)."""
    if ctx.invoked_subcommand is not None:
        return
    from regularized.papers.card import FAMILIES
    from regularized.papers.catalogue import load_catalogue
    from regularized.papers.search import explain
    from regularized.papers.search import search as look_up

    if family and family not in FAMILIES:
        raise CommandError(f"there is no family {family!r}; families: {', '.join(FAMILIES)}", Exit.USAGE)
    found = [
        entry
        for entry in look_up(search, load_catalogue())
        if (not family or family in entry.card.families) and (entry.implemented or not implemented)
    ][:limit]
    runs = {entry.slug: entry.implemented for entry in found}
    if found:
        found[0].memory.save()  # once, and not for each
    why = {entry.slug: explain(search, entry, load_catalogue()) for entry in found} if search.strip() else {}
    if as_json:
        emit_json([entry.to_dict() | ({"matched": why[entry.slug]} if why else {}) for entry in found])
        return
    if not found:
        note("nothing found; try fewer or other words" if search else "nothing found")
    columns: dict[str, Callable[[Entry], object]] = {
        "slug": lambda entry: entry.slug,
        "title": lambda entry: entry.card.title,
        "date": lambda entry: entry.card.date,
        "implemented": lambda entry: runs[entry.slug],
        "evidence": _verdicts,
        "problem": lambda entry: entry.card.problem,
        "matched": lambda entry: why[entry.slug],
    }
    left_out = {"title", "implemented"} if in_terminal() else set()
    shown = [name for name in columns if name not in left_out and (why or name != "matched")]
    emit_table(shown, [[columns[name](entry) for name in shown] for entry in found])


def _verdicts(entry: "Entry") -> str:
    """The verdicts of a paper, counted."""
    from regularized.evidence.claims import SHORT, count_verdicts

    counted = [f"{n} {SHORT[verdict]}" for verdict, n in count_verdicts(entry.outcomes).items() if n]
    return ", ".join(counted) or ("not run" if entry.implemented else "no code yet")


def show(
    slug: Slug,
    page: Annotated[
        bool, typer.Option("--page", help="Its page of the documentation: all knobs, hosts, costs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a paper: the problem that it solves, how to use it, and what was measured."""
    from regularized.cli.show import print_paper, to_json
    from regularized.papers.catalogue import find

    entry = find(slug)
    if page:
        from regularized.cli.page import filled_in, print_page

        if not entry.page:
            raise CommandError(f"{slug} has no page: {'; '.join(entry.missing) or 'nobody wrote one'}", Exit.NOT_FOUND)
        if as_json:
            emit_json({"slug": slug, "page": filled_in(entry)})
        else:
            print_page(entry, console())
    elif as_json:
        emit_json(to_json(entry))
    else:
        print_paper(entry, console())


def cite(
    slugs: Annotated[list[str], typer.Argument(metavar="SLUG...", help="Short names of papers.")],
    as_json: Json = False,
) -> None:
    """Print the papers as BibTeX entries."""
    from regularized.papers.catalogue import find

    entries = {entry.slug: entry.card.bibtex() for entry in map(find, slugs)}
    if as_json:
        emit_json([{"slug": slug, "bibtex": text} for slug, text in entries.items()])
    else:
        print("\n\n".join(entries.values()))
