"""Commands that keep what they find in the source tree: refused where there is none."""

from regularized.cli.errors import CommandError, Exit

__all__ = ["needs_checkout"]


def needs_checkout(command: str) -> None:
    """Refuse to write into an installed package, whose files no commit knows and the next upgrade replaces.

    Args:
        command: what was asked for, for the message.

    Raises:
        CommandError: the package does not run from a checkout.
    """
    from regularized.evidence import provenance

    if not provenance.is_checkout():
        raise CommandError(
            f"`regularized {command}` keeps its result among the sources, and this is an installed package: no commit "
            f"would say what was measured, and the next upgrade would undo it. In a clone, after `pip install -e .`, "
            f"it works. To measure and keep nothing: regularized reproduce, bench or contract SLUG, without --save",
            Exit.UNAVAILABLE,
        )
