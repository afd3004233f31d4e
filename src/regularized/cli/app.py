"""The commands, put together. Each imports what it needs when it runs: ``--help`` must not wait for torch."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regularized.cli.attempts import export_evidence, import_evidence
from regularized.cli.checking import bench, conform, contract
from regularized.cli.comparing import compare
from regularized.cli.costing import cost
from regularized.cli.errors import MEANING, CommandError, Exit, exit_of
from regularized.cli.finding import cite, papers_app, show
from regularized.cli.options import Json
from regularized.cli.output import emit_json, note
from regularized.cli.recording import ledger, outlook, rates
from regularized.cli.running import reproduce, tune
from regularized.cli.site import register as register_site

__all__ = ["app"]

SCHEMA_VERSION = 1
"""Raised when a key of any ``--json`` output is renamed or removed; new keys do not raise it."""


class _Commands(TyperGroup):
    """Turns errors that a person can mend into one message and an exit code; knows commands of two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """``ledger export`` before ``ledger``, whose first argument is a paper: none can have such a name."""
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            note(str(interrupt) or "interrupted")
            code = Exit.INTERRUPTED
        except Exception as error:
            known = exit_of(error)
            if known is None:
                raise
            note(f"error: {error}")
            code = known
        raise typer.Exit(int(code))


_CODES = "\n\n".join(f"{code.value}: {MEANING[code]}" for code in Exit)

app: typer.Typer = typer.Typer(
    name="regularized",
    cls=_Commands,
    help="Published techniques for regularized training that work, compose, and are proven: every paper is a command.",
    epilog=f"Exit codes:\n\n{_CODES}\n\nIn a terminal the commands print tables, in a pipe tab-separated values.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version; with --json as JSON.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: as JSON.", hidden=True)] = False,
) -> None:
    """Print the version where it is asked for; otherwise the command follows."""
    if version:
        _print_version(as_json=as_json)
        raise typer.Exit
    if as_json:
        raise CommandError("--json goes after the command: regularized COMMAND --json", Exit.USAGE)


def _print_version(*, as_json: bool) -> None:
    from regularized._version import __version__

    if not as_json:
        print(f"regularized {__version__}")
        return
    import platform
    from importlib import metadata

    try:
        torch_version: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = None
    about = {"name": "regularized", "version": __version__, "schema_version": SCHEMA_VERSION}
    emit_json({**about, "python": platform.python_version(), "torch": torch_version})


def new_paper(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="Short name: lower-case letters, digits, underscores.")],
    family: Annotated[str, typer.Option(help="Problem family, which is the folder of the technique.")],
    title: Annotated[str, typer.Option(help="Exact title of the paper.")] = "",
    checkout: Annotated[Path, typer.Option(help="Root of the checkout.")] = Path(),
    as_json: Json = False,
) -> None:
    """Lay out the files of a new paper: they run as they are, and its test names each line to fill in."""
    from regularized.cli.scaffold import lay_out

    written = lay_out(slug, family=family, title=title, checkout=checkout)
    if as_json:
        emit_json([str(path) for path in written])
        return
    for path in written:
        print(path)
    note(
        f"Now fill in what says FILL IN; `pytest {written[-1]}` lists it. Put the golden vectors of the authors' code "
        f"into golden.npz beside the card. Then commit, and write the evidence: regularized ledger {slug}"
    )


app.add_typer(papers_app, name="papers")
for command in (show, cite, cost, reproduce, tune, conform, contract, bench, rates, outlook, ledger):
    app.command()(command)
app.command("ledger export")(export_evidence)
app.command("ledger import")(import_evidence)
app.command("new-paper")(new_paper)
app.command()(compare)
register_site(app, papers_app)
