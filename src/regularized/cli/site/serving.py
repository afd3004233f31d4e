"""Commands that serve the site, save it, bring it back, and write it as static pages."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.site.opening import Json, needs_extra, open_for_command, settings_for_command

__all__ = ["commands"]

commands: typer.Typer = typer.Typer()


@commands.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is for this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that serve.")] = 1,
    access_log: Annotated[
        str, typer.Option(metavar="FILE", help="Write a line for each request; - for standard error.")
    ] = "",
) -> None:
    """Open the catalogue in a browser: lists, search, evidence, discussion, feeds, API.

    Settings come from the environment, see the documentation of `regularized.site.settings`.
    """
    if context.invoked_subcommand is not None:
        return
    needs_extra()
    import socket

    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from regularized.site.afterwards import meanwhile
    from regularized.site.app import create_app
    from regularized.site.encoder_folder import encoder_folder
    from regularized.site.settings import SettingsError

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
    os.environ["REGULARIZED_ACCESS_LOG"] = access_log or os.environ.get("REGULARIZED_ACCESS_LOG", "")
    opened = open_for_command(default_url=f"http://{shown}:{port}")
    try:
        folder = encoder_folder(opened.settings.encoder)
    except SettingsError as error:
        raise CommandError(str(error), Exit.USAGE) from None
    if opened.settings.smtp is None:
        note(f"no mail server is set (REGULARIZED_SMTP_HOST): messages are written to {opened.settings.outbox}")
    if folder is None:
        note("no sentence encoder: search goes by words alone")
    note(f"the catalogue is at {opened.settings.url} (stop with Ctrl-C)")
    # Who sent a request is told by the connection; a proxy in front is believed by the site itself, where it is set.
    options: Any = {"log_level": "warning", "proxy_headers": False, "server_header": False}
    # For processes of our own, which read the settings again.
    os.environ.setdefault("REGULARIZED_SITE_URL", opened.settings.url)
    with listener, meanwhile(opened):
        if workers == 1:
            config = uvicorn.Config(create_app(opened, background=True), **options)
            uvicorn.Server(config).run(sockets=[listener])
        else:
            # A worker that reads the catalogue on a busy machine is not a dead one. All share the socket that already
            # listens: opened anew it would reset whoever came in between.
            options |= {"workers": workers, "timeout_worker_healthcheck": 60, "factory": True}
            config = uvicorn.Config("regularized.site.app:from_environment", **options)
            Multiprocess(config, sockets=[listener]).run()


@commands.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, such as site-2026-03-02.tar.gz.")],
    as_json: Json = False,
) -> None:
    """Save database and secret; the site may go on running."""
    settings = settings_for_command()
    from regularized.site.backup import BackupError, backup

    try:
        contents = backup(settings, file)
    except BackupError as error:
        raise CommandError(str(error), Exit.FAILED) from None
    _tell(contents.rows, as_json=as_json)


@commands.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    as_json: Json = False,
) -> None:
    """Put a backup in the place of database and secret; the site must not run. What was there is kept beside it."""
    settings = settings_for_command()
    from regularized.site.backup import BackupError, restore

    try:
        restored = restore(settings, file)
    except BackupError as error:
        raise CommandError(str(error), Exit.FAILED) from None
    _tell(restored.contents.rows, as_json=as_json)
    for old in restored.kept:
        note(f"what was there before is {old}")
    if not restored.signed:
        note(
            "REGULARIZED_SITE_SECRET is another secret than that of the backup: everybody must sign in again, and the "
            "links in mails that were sent are void"
        )


@commands.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    as_json: Json = False,
) -> None:
    """Write the whole catalogue as static pages, which open from any file server or from the disk."""
    opened = open_for_command()
    from regularized.site.afterwards import find_stale
    from regularized.site.export import ExportError, export

    find_stale(opened)

    try:
        written = export(opened, folder)
    except ExportError as error:
        raise CommandError(str(error), Exit.FAILED) from None
    _tell({"pages": written.pages, "files": written.files}, as_json=as_json)
    note(f"open {folder / 'index.html'}")


def _tell(counts: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        emit_json(counts)
    else:
        emit_table([f"{name}>" for name in counts], [list(counts.values())])
