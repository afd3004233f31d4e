"""Commands of the catalogue's site: serve it, get papers in, send messages. What they need is the extra ``site``."""

import typer

from regularized.cli.site import mail, moderation, papers, serving

__all__ = ["register"]


def register(app: typer.Typer, listed: typer.Typer) -> None:
    """Add the commands.

    Args:
        app: all commands.
        listed: those below ``papers``.
    """
    app.add_typer(serving.commands, name="site")
    app.add_typer(mail.digest, name="digest")
    app.add_typer(mail.mail, name="mail")
    app.add_typer(moderation.commands, name="moderate")
    listed.command("import")(papers.import_file)
    listed.command("add")(papers.add)
    listed.command("fetch")(papers.fetch)
