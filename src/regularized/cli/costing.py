"""What the comparisons of the catalogue cost."""

from typing import Annotated

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.options import Json, MaybeSlug
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.selection import entries

__all__ = ["cost"]


def cost(
    slug: MaybeSlug = None,
    scale: Annotated[str, typer.Option(help="paper (the original set-ups), laptop, or another scale.")] = "paper",
    as_json: Json = False,
) -> None:
    """Say how many runs a comparison has, and what is known of its memory and time, each figure with its source."""
    from regularized.papers.cost import costs, total

    found = costs(entries(slug), scale=scale)
    if not found:
        what = f"{slug} has no" if slug else "no paper has a"
        raise CommandError(f"{what} scale {scale!r}; all have smoke, laptop and paper", Exit.USAGE)
    if as_json:
        emit_json([each.to_dict() for each in found])
        return
    columns = ["slug", "arms>", "seeds>", "runs>", "asks for a GPU", "memory, GB>", "hours>", "memory by", "time by"]
    rows = [
        [c.slug, c.arms, c.seeds, c.runs, c.gpu, str(c.gigabytes), str(c.hours), c.gigabytes.source, c.hours.source]
        for c in found
    ]
    emit_table(columns, rows)
    note(f"{total(found)}.")
