"""Commands that send messages, for cron and for operators: the digests that are due, and what waits in the outbox."""

from typing import TYPE_CHECKING

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.site.opening import Json, open_for_command

if TYPE_CHECKING:
    from regularized.site.state import Site

__all__ = ["digest", "mail"]

digest: typer.Typer = typer.Typer(help="The digest by e-mail.", no_args_is_help=True)
mail: typer.Typer = typer.Typer(help="Messages that wait to be sent.", no_args_is_help=True)


@digest.command("send")
def send_digests(as_json: Json = False) -> None:
    """Send the digests that are due; for cron, once an hour or once a day."""
    opened = open_for_command(catalogue=False)
    from regularized.site.digest import write_digests

    written = write_digests(opened)
    _deliver(opened, {"written": written.written, "nothing_new": written.empty}, as_json=as_json)


@mail.command("send")
def send(as_json: Json = False) -> None:
    """Send what waits in the outbox and is due; a running site does so by itself."""
    _deliver(open_for_command(catalogue=False), {}, as_json=as_json)


@mail.command("list")
def show(as_json: Json = False) -> None:
    """What waits in the outbox or was given up, and why; never what it says."""
    opened = open_for_command(catalogue=False)
    from sqlalchemy import select

    from regularized.site.models import Outgoing
    from regularized.site.templating import moment

    names = ("id", "recipient", "written", "next_try", "tries", "error")
    with opened.read() as session:
        rows = [
            (
                row.id,
                row.recipient,
                moment(row.created_at),
                "never" if row.due_at is None else moment(row.due_at),
                row.tries,
                row.error,
            )
            for row in session.execute(
                select(
                    Outgoing.id,
                    Outgoing.recipient,
                    Outgoing.created_at,
                    Outgoing.due_at,
                    Outgoing.tries,
                    Outgoing.error,
                ).order_by(Outgoing.id)
            )
        ]
    if as_json:
        emit_json([dict(zip(names, row)) for row in rows])
    else:
        emit_table(["id", "recipient", "written", "next try", "tries", "error"], rows)


def _deliver(site: "Site", counts: dict[str, int], *, as_json: bool) -> None:
    from regularized.site.outbox import deliver_due

    result = deliver_due(site)
    counts = {**counts, "sent": result.sent, "later": result.later, "refused": result.refused}
    if as_json:
        emit_json(counts)
    else:
        emit_table([f"{name}>" for name in counts], [list(counts.values())])
    if site.settings.smtp is None and result.sent:
        note(f"no mail server is set (REGULARIZED_SMTP_HOST): the messages are in {site.settings.outbox}")
    if result.later:
        note(f"the mail server did not take {result.later}: they wait and are tried again, here or by a running site")
    if result.refused:
        raise CommandError(f"{result.refused} messages are given up; `regularized mail list` says why", Exit.FAILED)
