"""Finished runs, kept in one SQLite file: append-only, safe for several processes at once.

Public names: :class:`Run` (one row), :class:`Store`, :class:`StoreError`, :func:`home`. Beside the runs stand
reservations, by which processes that want the same run make it once (:mod:`regularized.evidence.reservations`).

The file lies in ``REGULARIZED_HOME`` (default ``$XDG_DATA_HOME/regularized``, else ``~/.local/share/regularized``). It
is never deleted, truncated or repaired here: what cannot be read is reported with the way to mend it.
"""

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from regularized.evidence.reservations import Heart, Owner, holds

__all__ = ["Run", "Store", "StoreError", "canonical", "home"]

log: logging.Logger = logging.getLogger(__name__)

_APPLICATION = 0x52454755  # "REGU": tells our file from another program's
_BUSY_SECONDS = 60.0
# What makes each format out of the one before; a new file goes through all of them. Never edited, only added to: files
# of every format are out there.
_FORMATS = (
    (
        """
        CREATE TABLE runs (
            id INTEGER PRIMARY KEY,
            created TEXT NOT NULL,
            slug TEXT NOT NULL,
            scale TEXT NOT NULL,
            arm TEXT NOT NULL,
            overrides TEXT NOT NULL,
            seed INTEGER NOT NULL,
            code_key TEXT NOT NULL,
            versions TEXT NOT NULL,
            dirty INTEGER NOT NULL,
            metrics TEXT NOT NULL,
            curves TEXT NOT NULL,
            curve_unit TEXT NOT NULL,
            data TEXT NOT NULL,
            settings TEXT NOT NULL,
            environment TEXT NOT NULL,
            seconds REAL NOT NULL,
            peak_memory INTEGER NOT NULL,
            checksum TEXT NOT NULL
        )
        """,
        "CREATE INDEX runs_by_paper ON runs (slug, scale, code_key)",
    ),
    ("CREATE TABLE reservations (key TEXT PRIMARY KEY, owner TEXT NOT NULL, beat REAL NOT NULL)",),
)
_SCHEMA = len(_FORMATS)
_T = TypeVar("_T")


class StoreError(RuntimeError):
    """The store cannot be used; the message names the file and how to go on. Nothing was changed in it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run of one arm with one seed.

    Args:
        slug: the paper.
        scale: ``"smoke"``, ``"laptop"`` or ``"paper"``.
        arm: the arm.
        seed: the seed.
        code_key: what :func:`regularized.evidence.provenance.code_key` gave.
        versions: versions that the result depends on.
        metrics: final numbers by name; NaN where a run diverged.
        overrides: settings that differ from the arm's own; empty outside of tuning.
        curves: learning curves by name, as (x, y) points.
        curve_unit: what x counts.
        data: fingerprint of the data.
        settings: settings of scale and arm at the time of the run.
        environment: versions, machine and commit.
        dirty: whether code of the run differed from the commit.
        seconds: wall time.
        peak_memory: highest resident memory of the process in bytes, 0 where the platform does not tell.
        created: when it finished, ISO 8601 in UTC.
    """

    slug: str
    scale: str
    arm: str
    seed: int
    code_key: str
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    curve_unit: str = "epoch"
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    dirty: bool = False
    seconds: float = 0.0
    peak_memory: int = 0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def home() -> Path:
    """Folder for runs and reports: ``REGULARIZED_HOME``, else the user's data folder."""
    if given := os.environ.get("REGULARIZED_HOME"):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "regularized"


def canonical(value: Mapping[str, Any]) -> str:
    """JSON with sorted keys: equal mappings give equal text. What JSON does not know (a type, a function) is named.

    Examples:
        >>> canonical({"b": 1, "a": [2.0]})
        '{"a":[2.0],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_named, ensure_ascii=False)


def _named(value: object) -> str:
    # repr() of a function holds its address, which changes from process to process.
    return getattr(value, "__qualname__", None) or str(value)


def _storable(value: str | int | float) -> str | int | float:
    """Text that UTF-8 can hold: half a surrogate pair, from an odd file name, as an escape, in JSON the same thing."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _checksum(row: Mapping[str, str | int | float]) -> str:
    # SQLite has none: a flipped bit inside a number would pass for a measurement.
    return hashlib.sha256(canonical(row).encode()).hexdigest()[:16]


class Store:
    """The runs of one file. Use it in a ``with`` block.

    Args:
        path: the file; default ``evidence.sqlite3`` in :func:`home`. Made on first use, with its folder.

    Raises:
        StoreError: the file is not a store, is damaged, was written by a newer version, or cannot be opened.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path: Path = Path(path) if path is not None else home() / "evidence.sqlite3"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder of the store {self.path}: {error}. Set REGULARIZED_HOME to a folder that you "
                "may write to"
            ) from error
        self._owner = Owner.here().to_text()
        self._heart: Heart | None = None
        with self._explained():
            self._connection = self._open()
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def add(self, run: Run) -> None:
        """Append a run; it is on disk when this returns."""
        row: dict[str, str | int | float] = {
            "created": run.created,
            "slug": run.slug,
            "scale": run.scale,
            "arm": run.arm,
            "overrides": canonical(run.overrides),
            "seed": run.seed,
            "code_key": run.code_key,
            "versions": canonical(run.versions),
            "dirty": int(run.dirty),
            "metrics": canonical(run.metrics),
            "curves": canonical(run.curves),
            "curve_unit": run.curve_unit,
            "data": run.data,
            "settings": canonical(run.settings),
            "environment": canonical(run.environment),
            "seconds": run.seconds,
            "peak_memory": run.peak_memory,
        }
        row = {name: _storable(value) for name, value in row.items()}
        row["checksum"] = _checksum(row)
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        with self._explained():
            self._patiently(lambda: self._connection.execute(f"INSERT INTO runs ({names}) VALUES ({marks})", row))

    def find(
        self,
        slug: str,
        *,
        scale: str | None = None,
        code_key: str | None = None,
        versions: Mapping[str, str] | None = None,
        dirty: bool = True,
    ) -> list[Run]:
        """Runs of a paper, oldest first; a row whose content is damaged is skipped with a warning.

        Args:
            slug: the paper.
            scale: only this scale.
            code_key: only runs of this code.
            versions: only runs with these versions.
            dirty: whether runs of uncommitted code are wanted, too; default yes.
        """
        conditions: dict[str, object] = {"slug": slug}
        if scale is not None:
            conditions["scale"] = scale
        if code_key is not None:
            conditions["code_key"] = code_key
        if versions is not None:
            conditions["versions"] = canonical(versions)
        if not dirty:
            conditions["dirty"] = 0
        where = " AND ".join(f"{name} = :{name}" for name in conditions)
        with self._explained():
            rows = self._connection.execute(f"SELECT * FROM runs WHERE {where} ORDER BY id", conditions).fetchall()
        return [run for row in rows if (run := self._read(row)) is not None]

    def reserve(self, key: str) -> bool:
        """Say that a run is being made here, unless another process is making it.

        Whoever gets False makes another run, looks for this one with :meth:`find` later on, and tries again: the
        reservation may have been given back, or its owner may have died. A reservation lasts until :meth:`release`,
        :meth:`close`, or the end of the process, however it ends.

        Args:
            key: what makes the run the same; any text.

        Returns:
            Whether the run is ours to make. To ask again for what one holds is fine.

        Raises:
            StoreError: the file cannot be written, so that a run could not be kept either.
        """

        def attempt() -> bool:
            with self._alone():
                row = self._connection.execute("SELECT owner, beat FROM reservations WHERE key = ?", (key,)).fetchone()
                if row is not None and row["owner"] != self._owner and holds(row["owner"], row["beat"]):
                    return False
                self._connection.execute(
                    "INSERT OR REPLACE INTO reservations (key, owner, beat) VALUES (?, ?, ?)",
                    (key, self._owner, time.time()),
                )
                return True

        with self._explained():
            ours = self._patiently(attempt)
        if ours and self._heart is None:
            self._heart = Heart(self.path, self._owner)
        return ours

    def release(self, key: str | None = None) -> None:
        """Give a reservation back, or all that this store holds; those of others stay.

        Args:
            key: as for :meth:`reserve`; default all.
        """
        which = "owner = ?" if key is None else "owner = ? AND key = ?"
        values = (self._owner,) if key is None else (self._owner, key)
        with self._explained():
            self._patiently(lambda: self._connection.execute(f"DELETE FROM reservations WHERE {which}", values))

    def close(self) -> None:
        """Give reservations back and close the file."""
        if self._heart is not None:
            self._heart.stop()
            # What cannot be given back now is void as soon as this process has ended.
            with suppress(StoreError):
                self.release()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> sqlite3.Connection:
        # Autocommit; a write is one statement or a few, so that no other process waits for longer than that.
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        self._set_up(connection)
        try:
            self._patiently(lambda: connection.execute("PRAGMA schema_version"))
        except sqlite3.OperationalError:
            connection.close()
            # On a read-only disk SQLite cannot make the files that it reads by. Without a log (-wal) beside it, the
            # file is all there is.
            log_file = self.path.with_name(f"{self.path.name}-wal")
            if not self.path.is_file() or os.access(self.path.parent, os.W_OK) or log_file.exists():
                raise
            connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)
            self._set_up(connection)
        return connection

    @staticmethod
    def _set_up(connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        # A byte that is no UTF-8 spoils its row, which the checksum tells, and no more than that.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")

    def _prepare(self) -> None:
        # Switching to WAL needs the file for itself for a moment, and SQLite does not wait for that by itself.
        self._patiently(lambda: self._connection.execute("PRAGMA journal_mode = WAL"))
        self._connection.execute("PRAGMA synchronous = FULL")  # a finished run survives a power cut
        # Damage is found before a run is made, not when the run cannot be kept.
        (found,) = self._patiently(lambda: self._connection.execute("PRAGMA quick_check(1)").fetchone())
        if found != "ok":
            raise self._damaged(" ".join(found.split()))
        if self._marks() != (_APPLICATION, _SCHEMA):
            self._patiently(self._create_or_upgrade)

    def _marks(self) -> tuple[int, int]:
        """Whose file it is, and its format; both 0 in a new one."""
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        return application, self._connection.execute("PRAGMA user_version").fetchone()[0]

    def _create_or_upgrade(self) -> None:
        with self._alone():
            # Looked at again, because another process may just have done it.
            application, schema = self._marks()
            if (application, schema) == (0, 0):
                tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                application = -1 if tables else _APPLICATION
            if application != _APPLICATION:
                raise StoreError(
                    f"{self.path} is a database of another program. Move it aside, or set REGULARIZED_HOME to another "
                    "folder"
                )
            if schema > _SCHEMA:
                raise StoreError(
                    f"{self.path} has format {schema}, this version of regularized reads {_SCHEMA}. Update it, "
                    "or set REGULARIZED_HOME to another folder"
                )
            for statements in _FORMATS[schema:]:
                for statement in statements:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction in which no other process writes; undone by an error."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has undone it already
                self._connection.execute("ROLLBACK")
            raise

    def _patiently(self, action: Callable[[], _T]) -> _T:
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a mistake in the calling code, such as the use of a closed store
        except sqlite3.OperationalError as error:
            if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise self._damaged(error) from error
            raise StoreError(
                f"cannot use the store {self.path}: {error}. Is the disk full, the file read-only, or another process "
                "holding it for long? Or set REGULARIZED_HOME to another folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, what: object) -> StoreError:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        return StoreError(
            f"the store {self.path} is damaged ({what}). Nothing in it was changed. Move it aside with its -wal and "
            f"-shm files (mv {self.path} {aside}): a new one is made, and finished runs are made again when asked for. "
            f"What is still readable can be saved with: sqlite3 {aside} .recover"
        )

    def _read(self, row: sqlite3.Row) -> Run | None:
        try:
            content = {name: row[name] for name in row.keys() if name not in ("id", "checksum")}  # noqa: SIM118
            if _checksum(content) != row["checksum"]:
                raise ValueError("its checksum does not match")
            return Run(
                slug=row["slug"],
                scale=row["scale"],
                arm=row["arm"],
                seed=int(row["seed"]),
                code_key=row["code_key"],
                versions=json.loads(row["versions"]),
                metrics={name: float(value) for name, value in json.loads(row["metrics"]).items()},
                overrides=json.loads(row["overrides"]),
                curves={
                    name: [(float(x), float(y)) for x, y in points]
                    for name, points in json.loads(row["curves"]).items()
                },
                curve_unit=row["curve_unit"],
                data=row["data"],
                settings=json.loads(row["settings"]),
                environment=json.loads(row["environment"]),
                dirty=bool(row["dirty"]),
                seconds=float(row["seconds"]),
                peak_memory=int(row["peak_memory"]),
                created=row["created"],
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            log.warning(
                "row %s of %s is damaged and left out (%s); the run will be made again", row["id"], self.path, error
            )
            return None


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; that of a general error where the error is Python's own and has none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
