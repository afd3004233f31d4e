"""Which papers a command is about, and what to do where one of them does not load."""

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from regularized.cli.errors import CommandError, Exit, exit_of
from regularized.cli.output import note

if TYPE_CHECKING:
    from regularized.papers.catalogue import Entry

__all__ = ["Parts", "entries", "implemented"]


def implemented(slug: str) -> "Entry":
    """The paper of a slug, which must run."""
    from regularized.papers.catalogue import find

    entry = find(slug)
    if not entry.implemented:
        raise CommandError(
            f"{slug} has no code that runs yet ({'; '.join(entry.missing)}). List papers that run: regularized papers "
            "--implemented",
            Exit.UNAVAILABLE,
        )
    return entry


def entries(slug: str | None) -> Sequence["Entry"]:
    """The paper of a slug, or all that are implemented, by name."""
    if slug is not None:
        return [implemented(slug)]
    from regularized.papers.catalogue import load_catalogue

    return sorted((entry for entry in load_catalogue() if entry.implemented), key=lambda entry: entry.slug)


class Parts:
    """Modules of papers. Of all papers, one that does not load is told and left out; of one paper, it is an error.

    Args:
        slug: the paper; None for all.
        part: which module of its folder.

    Attributes:
        left_out: exit code of what kept a paper from taking part, by slug.
    """

    def __init__(self, slug: str | None, part: str) -> None:
        self._slug, self._part = slug, part
        self._entries = entries(slug)
        self.left_out: dict[str, Exit] = {}

    def __iter__(self) -> Iterator[tuple["Entry", ModuleType]]:
        for entry in self._entries:
            try:
                module = importlib.import_module(entry.module_name(self._part))
            except Exception as error:
                if self._slug is not None:
                    raise
                self.leave_out(entry.slug, error)
            else:
                yield entry, module

    def leave_out(self, slug: str, error: Exception, *, what: str = "does not load") -> None:
        """Go on without a paper, and say why."""
        code = exit_of(error) or Exit.FAILED
        self.left_out[slug] = code
        if code is Exit.UNAVAILABLE:
            note(f"error: {slug} is left out: {error}")
        else:
            note(f"error: {slug} is left out, its {self._part} {what}: {type(error).__name__}: {error}")

    def end(self, *, failed: bool = False) -> None:
        """End the command with its exit code: 1 where something failed, 4 where all that was amiss is not here."""
        codes = {Exit.FAILED} if failed else set(self.left_out.values())
        if codes:
            raise typer.Exit(int(Exit.UNAVAILABLE if codes == {Exit.UNAVAILABLE} else Exit.FAILED))
