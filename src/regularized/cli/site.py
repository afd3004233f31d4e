"""Commands of the catalogue's site: serve it, get papers in, send the digest. What they need is the extra ``site``."""

import datetime
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import emit_json, emit_table, note

if TYPE_CHECKING:
    from regularized.site.importing import Stored
    from regularized.site.settings import Settings
    from regularized.site.state import Site

__all__ = ["register"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]


def register(app: typer.Typer, papers: typer.Typer) -> None:
    """Add the commands.

    Args:
        app: all commands.
        papers: those below ``papers``.
    """
    app.command()(site)
    digest = typer.Typer(help="The digest by e-mail.", no_args_is_help=True)
    digest.command("send")(send)
    app.add_typer(digest, name="digest")
    papers.command("import")(import_file)
    papers.command("add")(add)
    papers.command("fetch")(fetch)


def site(
    host: Annotated[str, typer.Option(help="Address to listen on; the default is for this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Open the catalogue in a browser: lists, search, evidence, discussion, feeds, API.

    Settings come from the environment, see the documentation of `regularized.site.settings`.
    """
    _needs_extra()
    import socket
    import threading

    import uvicorn

    from regularized.site.app import create_app
    from regularized.site.plots import draw_all

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # who comes while the catalogue is being read waits, and is not refused
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port", Exit.FAILED
        ) from None
    port = listener.getsockname()[1]
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    opened = _open(default_url=f"http://{shown}:{port}")
    if opened.settings.smtp is None:
        note(f"no mail server is set (REGULARIZED_SMTP_HOST): messages are written to {opened.settings.outbox}")
    if opened.meaning is None:
        note("no sentence encoder: search goes by words alone")
    closing = threading.Event()
    plots = threading.Thread(target=draw_all, args=(opened, closing), name="plots", daemon=True)
    plots.start()
    note(f"the catalogue is at {opened.settings.url} (stop with Ctrl-C)")
    # Who sent a request is told by the connection; a proxy in front is believed by the site itself, where it is set.
    config = uvicorn.Config(create_app(opened), log_level="warning", proxy_headers=False, server_header=False)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        # Python aborts when it ends while a thread is drawing: that one drawing is waited for.
        closing.set()
        plots.join()


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
    _needs_extra()
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
    opened = _open()
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
    _needs_extra()
    from regularized.site import importing, remote

    wanted = _or_error(remote.arxiv_id, identifier)
    paper = _or_error(remote.fetch_arxiv, wanted, endpoint=remote.ARXIV)
    opened = _open()
    with opened.write.begin() as session:
        stored = importing.store(session, [paper], now=opened.settings.now)
    _report(stored, as_json=as_json)


def fetch(
    day: Annotated[str, typer.Option(metavar="DATE", help="The Daily Papers of this day, such as 2026-03-02.")] = "",
    week: Annotated[str, typer.Option(metavar="WEEK", help="Those of this week, such as 2026-W10.")] = "",
    as_json: Json = False,
) -> None:
    """Add the Daily Papers of a day or a week; default today."""
    _needs_extra()
    from regularized.site import importing, remote
    from regularized.site.queries import Period

    if day and week:
        raise CommandError("give --day or --week, not both", Exit.USAGE)
    try:
        period = Period.parse("week", week) if week else Period("day", _date(day) if day else datetime.date.today())
    except ValueError:
        raise CommandError(f"--week must be a week such as 2026-W10, got {week!r}", Exit.USAGE) from None
    papers = _or_error(remote.fetch_daily, period, endpoint=remote.DAILY_PAPERS)
    opened = _open()
    with opened.write.begin() as session:
        stored = importing.store(session, papers, now=opened.settings.now)
    _report(stored, as_json=as_json)


def send(as_json: Json = False) -> None:
    """Send the digests that are due; for cron, once an hour or once a day."""
    _needs_extra()
    from regularized.site.digest import send_digests

    opened = _open()
    result = send_digests(opened)
    counts = {"sent": result.sent, "nothing_new": result.empty, "failed": result.failed}
    if as_json:
        emit_json(counts)
    else:
        emit_table([f"{name}>" for name in counts], [list(counts.values())])
    if opened.settings.smtp is None and result.sent:
        note(f"no mail server is set (REGULARIZED_SMTP_HOST): the messages are in {opened.settings.outbox}")
    if result.failed:
        raise CommandError(f"{result.failed} messages were not sent; the log says why", Exit.FAILED)


# -- shared -------------------------------------------------------------------------------------


def _needs_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError:
        raise ImportError('the site needs more packages: pip install "regularized[site]"') from None


def _settings(**options: Any) -> "Settings":
    from regularized.site.settings import Settings

    return Settings.from_environment(**options)


def _open(**options: Any) -> "Site":
    from regularized.site.app import open_site
    from regularized.site.settings import SettingsError

    try:
        return open_site(_settings(**options))
    except SettingsError as error:
        raise CommandError(str(error), Exit.USAGE) from None


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
    outcomes = [row.outcome for row in stored]
    counted = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("added", "updated", "known"))
    note(f"{len(stored)} papers: {counted}")
