"""Who is making which run, so that processes that want the same one make it once.

A reservation is a row of the store that names its owner. It is void when the owner's process is gone, which is seen at
once on the same machine; elsewhere (a home folder that machines share) when its owner has not renewed it for minutes.
What is void may be taken over, so a crash needs no cleaning up. Should two processes make a run after all, nothing is
lost but time: the store only ever gains rows.

Public names: :class:`Owner`, :class:`Heart` (renews what an owner holds). The table is written by
:class:`regularized.evidence.store.Store`.
"""

import json
import os
import platform
import secrets
import sqlite3
import threading
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

__all__ = ["Heart", "Owner", "holds"]

_BEAT_SECONDS = 20.0
_VOID_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A store that is open in a process.

    Args:
        place: where process numbers mean the same: machine, its last start, and container.
        process: number of the process.
        born: when the process started, as the system tells it; a later process may get the same number. Empty where
            the system does not tell.
        token: tells several stores of one process apart.
    """

    place: str
    process: int
    born: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def here(cls) -> Self:
        """An owner in this process."""
        return cls(_place(), os.getpid(), _born(os.getpid()))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what :meth:`to_text` wrote.

        Raises:
            ValueError, TypeError: it is something else.
        """
        return cls(**json.loads(text))

    def to_text(self) -> str:
        """The owner as JSON."""
        return json.dumps(asdict(self))

    def is_gone(self) -> bool:
        """Whether its process is known to have ended; False where that cannot be seen from here."""
        if self.place != _place() or os.name == "nt":  # Windows: signal 0 would interrupt the process
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it lives and is somebody else's
            pass
        return self.born != _born(self.process)


def holds(owner: str, beat: float) -> bool:
    """Whether a reservation still counts.

    Args:
        owner: from :meth:`Owner.to_text`; a damaged one counts as nobody.
        beat: when it was last renewed, seconds since 1970. One that lies in the future counts by its distance, too:
            after a jump of the clock its owner renews it with the new time.
    """
    try:
        gone = Owner.from_text(owner).is_gone()
    except (ValueError, TypeError):
        return False
    return not gone and abs(time.time() - beat) < _VOID_SECONDS


class Heart:
    """A thread that renews an owner's reservations until it is stopped.

    Args:
        path: the store's file.
        owner: from :meth:`Owner.to_text`.
        seconds: time between two beats.
    """

    def __init__(self, path: Path, owner: str, *, seconds: float = _BEAT_SECONDS) -> None:
        self._path = path
        self._owner = owner
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; returns at once."""
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds):
            # A beat that fails (a full disk, a busy file) is made good by the next one.
            with (
                suppress(sqlite3.Error),
                closing(sqlite3.connect(self._path, timeout=self._seconds, isolation_level=None)) as connection,
            ):
                connection.execute("UPDATE reservations SET beat = ? WHERE owner = ?", (time.time(), self._owner))


def _place() -> str:
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _born(process: int) -> str:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the name before it may hold spaces and brackets
