"""Commands for moderators, and the one that makes somebody a moderator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from regularized.cli.errors import CommandError, Exit
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.site.opening import Json, open_for_command

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from regularized.site.moderation import Moderation

__all__ = ["commands"]

commands: typer.Typer = typer.Typer(help="Moderators, comments, people and papers of the site.", no_args_is_help=True)

Thing = TypeVar("Thing")
Because = Annotated[str, typer.Option("--because", help="The reason; it stands in the log.")]
Email = Annotated[str, typer.Argument(metavar="EMAIL")]
Number = Annotated[int, typer.Argument(metavar="COMMENT", help="Its number: the end of its address, comment-7.")]


@commands.command()
def appoint(email: Email, because: Because) -> None:
    """Make somebody a moderator."""
    address = _address(email)
    _act(lambda acting, _session: acting.appoint(address, on=True, reason=because))


@commands.command()
def dismiss(email: Email, because: Because) -> None:
    """Take the role away again."""
    address = _address(email)
    _act(lambda acting, _session: acting.appoint(address, on=False, reason=because))


@commands.command()
def hide(comment: Number, because: Because) -> None:
    """Hide a comment; readers see the reason instead."""
    from regularized.site.models import Comment

    _act(lambda acting, session: acting.hide(_found(session.get(Comment, comment), f"comment {comment}"), because))


@commands.command()
def show(comment: Number, because: Because) -> None:
    """Show a comment again, or leave one that was reported."""
    from regularized.site.models import Comment

    _act(lambda acting, session: acting.show(_found(session.get(Comment, comment), f"comment {comment}"), because))


@commands.command()
def ban(
    email: Email,
    because: Because,
    hide_comments: Annotated[bool, typer.Option("--hide-comments", help="Hide all of their comments, too.")] = False,
) -> None:
    """Let a person take part no more; their votes do not count."""
    from regularized.site.queries import person_of

    _act(
        lambda acting, session: acting.ban(
            _found(person_of(session, _address(email)), email), because, hide_comments=hide_comments
        )
    )


@commands.command()
def unban(email: Email, because: Because) -> None:
    """Let a person take part again."""
    from regularized.site.queries import person_of

    _act(lambda acting, session: acting.unban(_found(person_of(session, _address(email)), email), because))


@commands.command()
def remove(slug: Annotated[str, typer.Argument(metavar="SLUG")], because: Because) -> None:
    """Remove an imported paper, with votes and comments; the next import leaves it out."""
    from regularized.site.queries import by_slug

    _act(lambda acting, session: acting.remove(_found(by_slug(session, slug), slug), because))


@commands.command()
def correct(
    slug: Annotated[str, typer.Argument(metavar="SLUG")],
    because: Because,
    setting: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="A fact and what is right; may be repeated.")
    ],
) -> None:
    """Correct facts of an imported paper: title, date, arxiv, organization, venue, abstract, code_url."""
    from regularized.site.queries import by_slug

    changes = {}
    for given in setting:
        name, equals, value = given.partition("=")
        if not equals:
            raise CommandError(f"--set must be NAME=VALUE, got {given!r}", Exit.USAGE)
        changes[name] = value
    _act(lambda acting, session: acting.correct(_found(by_slug(session, slug), slug), changes, because))


@commands.command()
def log(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 50, as_json: Json = False
) -> None:
    """What moderators did."""
    opened = open_for_command(catalogue=False)
    from sqlalchemy import select

    from regularized.site.models import ModerationEvent
    from regularized.site.templating import moment

    names = ("at", "moderator", "action", "subject", "reason", "details")
    with opened.read() as session:
        events = session.scalars(select(ModerationEvent).order_by(ModerationEvent.id.desc()).limit(limit)).all()
        rows = [[moment(event.at), *(getattr(event, name) for name in names[1:])] for event in events]
    if as_json:
        emit_json([dict(zip(names, row)) for row in rows])
    else:
        emit_table(list(names[:-1]), [row[:-1] for row in rows])


def _act(act: "Callable[[Moderation, Session], None]") -> None:
    opened = open_for_command(catalogue=False)
    from regularized.site.moderation import Moderation, NotPossible

    try:
        with opened.write.begin() as session:
            act(Moderation(session, "command line", opened.settings.now), session)
    except NotPossible as error:
        raise CommandError(str(error), Exit.USAGE) from None
    note("done; `regularized moderate log` shows it")


def _address(email: str) -> str:
    from regularized.site.mail import valid_address

    address = valid_address(email)
    if address is None:
        raise CommandError(f"{email!r} is not an e-mail address", Exit.USAGE)
    return address


def _found(thing: Thing | None, name: str) -> Thing:
    if thing is None:
        raise CommandError(f"there is no {name}", Exit.NOT_FOUND)
    return thing
