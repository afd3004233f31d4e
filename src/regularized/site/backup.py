"""Backup of a site that is running, and the way back.

The file of a running SQLite database is not all of it: what was written last lies beside it. A backup is taken through
SQLite itself, in one piece with the secret that signs cookies and links. PostgreSQL has ``pg_dump`` for that.
"""

import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from regularized._version import __version__
from regularized.site.settings import Settings

__all__ = ["BackupError", "Contents", "Restored", "backup", "restore"]

_DATABASE, _SECRET, _ABOUT = "site.sqlite", "secret", "about.json"
_COUNTED = ("paper", "person", "vote", "comment", "subscription")


class BackupError(RuntimeError):
    """It cannot be done; the message says what to do instead."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds.

    Args:
        rows: rows of the tables that people care about.
        made_at: seconds since 1970.
        version: the package that made it.
    """

    rows: dict[str, int]
    made_at: int
    version: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Args:
        contents: what the backup held.
        kept: where database and secret that were there before are now.
        signed: whether what was signed before the backup holds: people stay signed in, and links in sent mails work.
            Not where the environment gives another secret than the backup has.
    """

    contents: Contents
    kept: tuple[Path, ...]
    signed: bool


def backup(settings: Settings, file: Path) -> Contents:
    """Write a backup; the site may go on running.

    Args:
        settings: the site's.
        file: a new file, ``.tar.gz``, which its owner alone may read.

    Raises:
        BackupError: the database is none that this can save, or the file is there.
    """
    source = _database(settings)
    if not source.is_file():
        raise BackupError(f"there is no database {source}")
    if file.exists():
        raise BackupError(f"{file} is there already; a backup does not replace one")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        copy = Path(folder) / _DATABASE
        _copy(source, copy)
        contents = Contents(_count(copy), settings.now, __version__)
        part = Path(folder) / "backup"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw:
            with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=3) as archive:
                about = {"rows": contents.rows, "made_at": contents.made_at, "version": contents.version}
                for name, value in ((_ABOUT, json.dumps(about)), (_SECRET, settings.secret)):
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode, entry.mtime = len(value.encode()), 0o600, settings.now
                    archive.addfile(entry, io.BytesIO(value.encode()))
                archive.add(copy, _DATABASE)
            raw.flush()
            os.fsync(raw.fileno())
        part.rename(file)
    return contents


def restore(settings: Settings, file: Path) -> Restored:
    """Put a backup in the place of database and secret; what was there is kept beside it.

    With the secret, who was signed in at the time of the backup still is, and the links in mails that were sent work.

    Args:
        settings: the site's; where a secret is given by the environment, that of the backup is left out.
        file: a backup.

    Raises:
        BackupError: the file is no backup, or a site runs on the database.
    """
    target = _database(settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            with tarfile.open(file, "r:gz") as archive:
                for name in (_ABOUT, _SECRET, _DATABASE):
                    _take_out(archive, name, Path(folder))
            about = json.loads((Path(folder) / _ABOUT).read_text(encoding="utf-8"))
            signs = (Path(folder) / _SECRET).read_text(encoding="ascii")
            if len(signs) < 32:
                raise ValueError("its secret is too short")
            rows = _count(Path(folder) / _DATABASE)
        except (OSError, tarfile.TarError, KeyError, EOFError, ValueError, sqlite3.Error) as error:
            raise BackupError(f"{file} is no backup of a site, or is damaged: {error}") from error
        if rows != about["rows"]:
            raise BackupError(f"{file} is damaged: it should hold {about['rows']}, and holds {rows}")
        kept = []
        if target.exists():
            _leave_alone(target)
            kept.append(_put_aside(target))
        (Path(folder) / _DATABASE).rename(target)
        given = os.environ.get("REGULARIZED_SITE_SECRET")
        if not given:
            secret = settings.folder / "secret"
            if secret.exists() and secret.read_text(encoding="utf-8") != signs:
                kept.append(_put_aside(secret))
            (Path(folder) / _SECRET).chmod(0o600)
            (Path(folder) / _SECRET).replace(secret)
    return Restored(Contents(rows, about["made_at"], about["version"]), tuple(kept), given in (None, "", signs))


def _database(settings: Settings) -> Path:
    url = make_url(settings.database)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BackupError("this saves SQLite databases; for PostgreSQL use pg_dump and pg_restore, and keep the secret")
    return Path(url.database)


def _copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source, timeout=60.0) as own, sqlite3.connect(target) as copy:
        own.backup(copy, pages=-1)
    copy.execute("PRAGMA journal_mode=DELETE")
    own.close()
    copy.close()


def _count(database: Path) -> dict[str, int]:
    connection = sqlite3.connect(database)
    try:
        return {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in _COUNTED}
    finally:
        connection.close()


def _take_out(archive: tarfile.TarFile, name: str, folder: Path) -> None:
    """One plain file of an archive, whatever else its entry says of owner, mode and links."""
    entry = archive.getmember(name)
    source = archive.extractfile(entry) if entry.isreg() else None
    if source is None:
        raise ValueError(f"{name} is no plain file in it")
    with source, (folder / name).open("wb") as target:
        shutil.copyfileobj(source, target)


def _leave_alone(target: Path) -> None:
    """See to it that nobody uses a database, and that its file is all of it."""
    connection = sqlite3.connect(target, timeout=1.0)
    try:
        # Leaving WAL mode needs the file for oneself: it fails while a site has it open.
        connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.OperationalError as error:
        raise BackupError(f"{target} is in use ({error}): stop the site first") from error
    finally:
        connection.close()


def _put_aside(file: Path) -> Path:
    """Rename a file to a name that tells when and why, and that none has yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (
        file.with_name(f"{file.name}.before-restore-{stamp}{end}") for end in ("", *(f"-{n}" for n in range(2, 99)))
    )
    old = next(name for name in names if not name.exists())
    file.rename(old)
    return old
