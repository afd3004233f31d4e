"""What the commands of the site share: the extra that they need, and the site, opened with errors that people read."""

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regularized.cli.errors import CommandError, Exit

if TYPE_CHECKING:
    from regularized.site.settings import Settings
    from regularized.site.state import Site

__all__ = ["Json", "needs_extra", "open_for_command", "settings_for_command"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]


def needs_extra() -> None:
    """Say how to install what the site needs, where it is missing."""
    # Looked for and not imported: a command that serves no page needs no web framework.
    if not all(map(importlib.util.find_spec, ("fastapi", "sqlalchemy"))):
        raise ImportError('the site needs more packages: pip install "regularized[site]"')


def settings_for_command(**options: Any) -> "Settings":
    """The settings from the environment."""
    needs_extra()
    from regularized.site.settings import Settings, SettingsError

    try:
        return Settings.from_environment(**options)
    except SettingsError as error:
        raise CommandError(str(error), Exit.USAGE) from None
    except OSError as error:
        raise _cannot_write(f"{error.strerror}: {error.filename}") from None


def open_for_command(*, catalogue: bool = True, **options: Any) -> "Site":
    """The site of the environment, with its tables up to date; the catalogue, too, unless that is left out."""
    settings = settings_for_command(**options)
    from sqlalchemy.exc import OperationalError

    from regularized.site.opening import open_site
    from regularized.site.settings import SettingsError

    try:
        return open_site(settings, catalogue=catalogue)
    except SettingsError as error:
        raise CommandError(str(error), Exit.USAGE) from None
    except OperationalError as error:
        raise _cannot_write(f"{error.orig} (REGULARIZED_SITE_DATABASE, or a file in REGULARIZED_HOME)") from None


def _cannot_write(why: str) -> CommandError:
    return CommandError(
        f"the site cannot keep its tables and files: {why}. Set REGULARIZED_HOME to a folder that you may write to",
        Exit.FAILED,
    )
