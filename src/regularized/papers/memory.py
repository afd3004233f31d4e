"""What the catalogue has found out by reading code and evidence, kept in the user's cache folder until a file changes.

It saves time and nothing else: without it (a read-only disk, a damaged file, no home) everything is found out anew.
Several processes may use it at once, because its file is replaced as a whole; what one of them adds may be lost to
another, which is found out again.

Public names: :class:`Memory`, :func:`folder`.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from regularized._version import __version__

__all__ = ["Memory", "folder"]

_FORMAT = 1
_SUFFIXES = (".py", ".toml", ".json", ".npz")
_T = TypeVar("_T")


class Memory:
    """Findings that hold as long as no file below some folders is changed, added or removed.

    Args:
        file: where they are kept.
        stamp: of the files that they were read from; findings of another stamp are forgotten.
    """

    def __init__(self, file: Path | None, stamp: str) -> None:
        self._file = file
        self._stamp = stamp
        self._known: dict[str, Any] = _read(file, stamp) if file is not None else {}
        self._is_new = False

    @classmethod
    def of(cls, name: str, folders: Iterable[Path]) -> Self:
        """The memory of a catalogue.

        Args:
            name: tells catalogues apart.
            folders: all that may have a say in what is remembered; a file is fine, too.
        """
        roots = sorted({path.absolute() for path in folders})
        place = hashlib.sha256("\0".join([name, *map(str, roots)]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        where = folder()
        return cls(None if where is None else where / f"catalogue-{place}.json", _stamp(roots))

    def recall(self, key: str, find_out: Callable[[], _T]) -> _T:
        """What is known under a key; found out, and remembered from the next :meth:`save` on, where nothing is.

        Args:
            key: what it is.
            find_out: gives it, as JSON would give it back: lists instead of tuples.
        """
        if key not in self._known:
            self._known[key] = find_out()
            self._is_new = True
        found: _T = self._known[key]
        return found

    def knows(self, key: str) -> bool:
        """Whether :meth:`recall` of a key would find out nothing."""
        return key in self._known

    def save(self) -> None:
        """Keep what is new for other processes, where that is possible."""
        if not self._is_new or self._file is None:
            return
        self._is_new = False
        known = json.dumps(self._known, ensure_ascii=True)
        text = json.dumps({"stamp": self._stamp, "checksum": _checksum(known), "known": known})
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(prefix=f"{self._file.name}.", dir=self._file.parent)
            try:
                with open(descriptor, "w", encoding="ascii") as file:
                    file.write(text)
                os.replace(part, self._file)
            except BaseException:
                os.unlink(part)
                raise


def folder() -> Path | None:
    """``cache`` in ``REGULARIZED_HOME`` where that is set, else the user's cache folder; None without a home."""
    if given := os.environ.get("REGULARIZED_HOME"):
        return Path(given).expanduser() / "cache"
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "regularized"
    try:
        return Path.home() / ".cache" / "regularized"
    except RuntimeError:
        return None


def _read(file: Path, stamp: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="ascii"))
        if content["stamp"] == stamp and content["checksum"] == _checksum(content["known"]):
            known: dict[str, Any] = json.loads(content["known"])
            return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(roots: Iterable[Path]) -> str:
    """Of all names, sizes and times below some folders; of the version, too, since some installers set no times."""
    digest = hashlib.sha256(f"{_FORMAT} {__version__} {sys.version}".encode())
    for root in roots:
        for path, size, modified in sorted(_files(str(root))):
            digest.update(f"\0{path}\0{size}\0{modified}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(root: str) -> Iterator[tuple[str, int, int]]:
    if os.path.isfile(root):
        status = os.stat(root)
        yield root, status.st_size, status.st_mtime_ns
        return
    waiting = [root]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        waiting.append(entry.path)
                elif entry.name.endswith(_SUFFIXES):
                    status = entry.stat()
                    yield entry.path, status.st_size, status.st_mtime_ns
