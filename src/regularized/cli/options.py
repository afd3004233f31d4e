"""Arguments and options that several commands share."""

from typing import Annotated

import typer

__all__ = ["Fresh", "Json", "MaybeSlug", "Slug", "TimeLimit", "Workers"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Short name of a paper; `regularized papers` lists them.")]
MaybeSlug = Annotated[str | None, typer.Argument(metavar="[SLUG]", help="Short name of a paper; default all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Parallel processes; default one for each core.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds that a run may take before it is ended; default any.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make runs again that are stored already.")]
