"""Command that serves the site."""

import logging
from typing import Annotated

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import note
from regularized.cli.site.opening import needs_extra, open_for_command

__all__ = ["commands"]

commands: typer.Typer = typer.Typer()


@commands.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is for this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Open the catalogue in a browser: lists, search, evidence, discussion, feeds, API.

    Settings come from the environment, see the documentation of `regularized.site.settings`.
    """
    if context.invoked_subcommand is not None:
        return
    needs_extra()
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
    opened = open_for_command(default_url=f"http://{shown}:{port}")
    if opened.settings.smtp is None:
        note(f"no mail server is set (REGULARIZED_SMTP_HOST): messages are written to {opened.settings.outbox}")
    if opened.meaning is None:
        note("no sentence encoder: search goes by words alone")
    closing = threading.Event()
    plots = threading.Thread(target=draw_all, args=(opened, closing), name="plots", daemon=True)
    plots.start()
    note(f"the catalogue is at {opened.settings.url} (stop with Ctrl-C)")
    # Who sent a request is told by the connection; a proxy in front is believed by the site itself, where it is set.
    config = uvicorn.Config(
        create_app(opened, background=True), log_level="warning", proxy_headers=False, server_header=False
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        # Python aborts when it ends while a thread is drawing: that one drawing is waited for.
        closing.set()
        plots.join()
