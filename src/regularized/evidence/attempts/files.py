"""The text of an attempt out of a file, a folder or a zip that a stranger sent: nothing is unpacked, all is bounded.

Public names: :func:`read`, :data:`FILE`, :data:`LARGEST`, :class:`AttemptError`, :func:`shown`, :func:`named`.
"""

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import error as StructError

from regularized.evidence.ledger import LedgerError

__all__ = ["FILE", "LARGEST", "AttemptError", "named", "read", "shown"]

FILE = "attempt.json"
"""Name of the attempt in a folder or a zip; all else there is for people."""

LARGEST = 4 * 2**20
"""Bytes of an attempt: ten times the largest ledger that ships."""

_LARGEST_ZIP = 32 * 2**20
_MOST_ENTRIES = 2000
_MOST_UNPACKED = 256 * 2**20
_SHOWN = 80


class AttemptError(LedgerError):
    """An attempt is refused; nothing was written.

    Args:
        problems: each names the field, what was given, and what is needed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("; ".join(self.problems))


def shown(value: object) -> str:
    """What was given, for a message: short, and in letters that move no cursor and colour no terminal.

    Examples:
        >>> print(shown("\\x1b[31mred"), shown(1.5))
        '\\x1b[31mred' 1.5
    """
    # The start of a long text alone: to quote all of a huge one would cost as much again.
    text = ascii(value[: 2 * _SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def named(path: Path) -> str:
    """A path for a message: whole, since its end tells files apart, and quoted where it is odd."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def read(path: Path) -> str:
    """The text of an attempt.

    Args:
        path: ``attempt.json`` under any name, a folder with it, or a zip with it (in a folder or not).

    Raises:
        AttemptError: it is none of these, too large, or a zip that no export writes.
    """
    if path.is_dir():
        content = _bytes_of(path / FILE, LARGEST, follow=False)
    else:
        content = _bytes_of(path, _LARGEST_ZIP, follow=True)
        if content.startswith(b"PK\x03\x04"):
            content = _out_of_zip(path)
        elif len(content) > LARGEST:
            raise AttemptError([f"{named(path)}: has {len(content)} bytes; an attempt has at most {LARGEST}"])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AttemptError([f"{named(path)}: must be JSON in UTF-8 ({error.reason} at {error.start})"]) from None


def _bytes_of(path: Path, most: int, *, follow: bool) -> bytes:
    """A regular file: a pipe would wait for ever, and a link of a stranger's folder may lead anywhere."""
    # O_NONBLOCK, or opening a pipe waits for its other end; neither flag exists everywhere.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise AttemptError([f"{named(path)}: must be a file, a folder with {FILE}, or a zip with it"])
            content = file.read(most + 1)
    except OSError as error:
        raise AttemptError([f"{named(path)}: cannot be read ({error.strerror})"]) from None
    if len(content) > most:
        raise AttemptError([f"{named(path)}: is larger than the {most} bytes that are allowed"])
    return content


def _out_of_zip(path: Path) -> bytes:
    where = named(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if problems := list(_problems(entries)):
                raise AttemptError([f"{where}: {problem}" for problem in problems[:5]])
            found = [entry for entry in entries if re.fullmatch(rf"(?:[^/]+/)?{re.escape(FILE)}", entry.filename)]
            if len(found) != 1:
                raise AttemptError([f"{where}: must hold one {FILE}, at the top or in one folder; it has {len(found)}"])
            with archive.open(found[0]) as file:
                content = file.read(LARGEST + 1)  # whatever the zip says of its size
    except AttemptError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise AttemptError([f"{where}: is a damaged zip ({shown(str(error))})"]) from None
    except (OSError, StructError) as error:
        raise AttemptError([f"{where}: cannot be read ({shown(str(error))})"]) from None
    if len(content) > LARGEST:
        raise AttemptError([f"{where}: its {FILE} is larger than the {LARGEST} bytes that are allowed"])
    return content


def _problems(entries: Sequence[zipfile.ZipInfo]) -> Iterator[str]:
    """What no export writes. Nothing is unpacked here, but who looks at the rest may unpack it."""
    if len(entries) > _MOST_ENTRIES:
        yield f"has {len(entries)} entries; at most {_MOST_ENTRIES} are allowed"
        return
    if (total := sum(entry.file_size for entry in entries)) > _MOST_UNPACKED:
        yield f"would unpack to {total} bytes; at most {_MOST_UNPACKED} are allowed"
    names: set[str] = set()
    for entry in entries:
        # The name as the zip has it: zipfile itself cuts names at a zero byte and turns backslashes.
        name = entry.orig_filename
        parts = name.removesuffix("/").split("/")
        if not name.isprintable() or any(part in ("", ".", "..") for part in parts) or set(name) & set("\\:"):
            yield f"entry {shown(name)}: must be a plain relative path"
        elif name.casefold() in names:
            yield f"entry {shown(name)}: is there twice"
        elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            yield f"entry {shown(name)}: must be a file or a folder, no link"
        elif entry.flag_bits & 1:
            yield f"entry {shown(name)}: must not be encrypted"
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield f"entry {shown(name)}: must be stored or deflated"
        names.add(name.casefold())
