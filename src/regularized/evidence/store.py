"""Finished runs, kept in one SQLite file: append-only, safe for several processes at once.

Public names: :class:`Run` (one row), :class:`Store`, :class:`StoreError`, :func:`home`.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Run", "Store", "StoreError", "canonical", "home"]

log = logging.getLogger(__name__)

_APPLICATION = 0x52454755  # "REGU": tells our file from another program's
_SCHEMA = 1
_BUSY_SECONDS = 60.0
_COLUMNS = """
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
"""
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
        self.path = Path(path) if path is not None else home() / "evidence.sqlite3"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder of the store {self.path}: {error}. Set REGULARIZED_HOME to a folder that you "
                "may write to"
            ) from error
        with self._explained():
            # Autocommit; every write is one statement, so that no other process waits for longer than that.
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
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

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        # Switching to WAL needs the file for itself for a moment, and SQLite does not wait for that by itself.
        self._patiently(lambda: self._connection.execute("PRAGMA journal_mode = WAL"))
        self._connection.execute("PRAGMA synchronous = FULL")  # a finished run survives a power cut
        if self._marks() != (_APPLICATION, _SCHEMA):
            self._patiently(self._create)

    def _marks(self) -> tuple[int, int]:
        """Whose file it is, and its format; both 0 in a new one."""
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        return application, self._connection.execute("PRAGMA user_version").fetchone()[0]

    def _create(self) -> None:
        # Alone with the file from here on: looked at again, because another process may just have made it.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            application, schema = self._marks()
            if (application, schema) == (0, 0):
                tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                application = -1 if tables else _APPLICATION
                schema = _SCHEMA
                if not tables:
                    self._connection.execute(f"CREATE TABLE runs ({_COLUMNS})")
                    self._connection.execute("CREATE INDEX runs_by_paper ON runs (slug, scale, code_key)")
                    self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                    self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")
            if application != _APPLICATION:
                raise StoreError(
                    f"{self.path} is a database of another program. Move it aside, or set REGULARIZED_HOME to another "
                    "folder"
                )
            if schema != _SCHEMA:
                raise StoreError(
                    f"{self.path} has format {schema}, this version of regularized reads {_SCHEMA}. Update it, "
                    "or set REGULARIZED_HOME to another folder"
                )
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise

    def _patiently(self, action: Callable[[], _T]) -> _T:
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise self._damaged(error) from error
            raise StoreError(
                f"cannot use the store {self.path}: {error}. Is the disk full, the file read-only, or another process "
                "holding it for long? Or set REGULARIZED_HOME to another folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: sqlite3.Error) -> StoreError:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        return StoreError(
            f"the store {self.path} is damaged ({error}). Nothing in it was changed. Move it aside with its -wal and "
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
