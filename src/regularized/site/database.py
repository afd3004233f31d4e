"""Opens the database: engine, sessions, migrations.

SQLite runs in WAL mode, so that readers never wait for a writer; PostgreSQL is used when the URL says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from regularized.site.settings import SettingsError

__all__ = ["THREADS", "insert_new", "migrate", "one_at_a_time", "open_database", "sessions"]

THREADS = 16
"""Requests that are answered at once, each with one connection at a time; the pool has some more for other threads."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_NEWEST = max(file.name for file in (_MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]
"""Version of the newest migration: each file's name begins with its own."""


_POOL: dict[str, Any] = {"pool_size": THREADS, "max_overflow": 4}


def open_database(url: str) -> Engine:
    """Engine of a database.

    Args:
        url: SQLAlchemy URL: ``sqlite:///PATH`` or ``postgresql://...``; for the latter psycopg is the driver.

    Raises:
        SettingsError: the URL cannot be read, or names another kind of database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(
            "the database URL cannot be read; write sqlite:///PATH or postgresql://USER@HOST/NAME"
        ) from None
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **_POOL)
    if parsed.get_backend_name() != "sqlite":
        raise SettingsError(f"the database must be sqlite or postgresql, got {parsed.get_backend_name()!r}")
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": 30}, **_POOL)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Python's driver begins transactions by itself, and too late; SQLAlchemy's BEGIN below takes its place.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "busy_timeout=30000",
        # For each of some twenty connections; what all of them read again and again is in the system's cache. Mapping
        # the file instead counts it once for each of them.
        "cache_size=-6144",  # KiB
        "mmap_size=0",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    # A transaction that reads first and writes later cannot wait for another writer: it would fail at once.
    # Who means to write says so (see `sessions`), and waits its turn at the beginning.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def sessions(engine: Engine, *, writes: bool = False) -> sessionmaker[Session]:
    """Makes sessions; those that will write take their turn at the beginning.

    Args:
        engine: the database.
        writes: whether the sessions will write.
    """
    return sessionmaker(engine.execution_options(writes=True) if writes else engine, expire_on_commit=False)


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to the present version; nothing happens when they are. Of several at once, one does it.

    Args:
        engine: the database.
        revision: another version, for tests.
    """
    if revision == "head" and _version(engine) == _NEWEST:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.execution_options(writes=True).connect() as connection:
        # SQLite changes a table by making it anew: with foreign keys on, dropping the old one would delete every row of
        # others that belongs to it. It heeds the switch between transactions only, so SQLAlchemy must not know of it.
        driver: Any = connection.connection.driver_connection
        if engine.dialect.name == "sqlite":
            driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                one_at_a_time(connection, "migration")
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
        finally:
            if engine.dialect.name == "sqlite":
                driver.execute("PRAGMA foreign_keys=ON")


def _version(engine: Engine) -> str | None:
    """The version of the tables: read here, since loading alembic takes longer than most commands."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return found


_LOCKS = {"migration": 7_205_001, "catalogue": 7_205_002}
"""Numbers of PostgreSQL's advisory locks: nobody else's, in a database of our own."""


def one_at_a_time(session: Session | Connection, what: str) -> None:
    """Wait until nobody else does this, and keep it to oneself until the transaction ends.

    Who writes papers looks for known ones first; two who do so at once would both find none.
    SQLite has one writer anyway.

    Args:
        session: a session or connection that writes.
        what: ``"migration"`` or ``"catalogue"``.
    """
    connection = session.connection() if isinstance(session, Session) else session
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCKS[what]})


def insert_new(session: Session, table: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows; those whose key is there already are left as they are, whoever wrote them a moment ago.

    Args:
        session: a session that writes.
        table: a mapped class.
        rows: values.
    """
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    if rows:
        session.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))
