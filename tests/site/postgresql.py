"""A PostgreSQL server for tests: a real one, started here from Debian's package as a user without rights."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from tests.site.helpers import START

from regularized.papers.catalogue import load_catalogue
from regularized.site.database import migrate, open_database, sessions
from regularized.site.sync import sync_catalogue


@pytest.fixture(scope="session")
def postgresql():
    """Address of a server with its data and socket in a folder of its own; nothing else on the machine sees it."""
    pytest.importorskip("psycopg", reason='needs the extra "postgresql"')
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        # Not in CI, where conftest.py makes this a failure.
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    programs = found[-1].parent
    user = None
    if os.geteuid() == 0:
        # It refuses to run as root.
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("there is no user without rights to run PostgreSQL as")
    folder = Path(tempfile.mkdtemp(prefix="regularized-pg-"))
    try:
        if user:
            shutil.chown(folder, user)
        clean = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command, user=user, cwd=folder, env=clean, capture_output=True, text=True, timeout=120
            )

        made = run(str(programs / "initdb"), "-D", "data", "-U", "site", "-A", "trust", "-E", "UTF8", "--no-sync")
        if made.returncode:
            pytest.skip(f"PostgreSQL cannot be set up here: {made.stderr.strip()}")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off -c shared_buffers=32MB"
        started = run(str(programs / "pg_ctl"), "-D", "data", "-o", options, "-l", "log", "-w", "start")
        assert started.returncode == 0, started.stdout + started.stderr
        try:
            yield f"postgresql://site@/postgres?host={folder}"
        finally:
            run(str(programs / "pg_ctl"), "-D", "data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_postgresql(postgresql):
    """Address of a database without tables."""
    engine = open_database(postgresql)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return postgresql


@pytest.fixture(scope="session")
def _template(postgresql):
    """Address of a database with the catalogue, made once."""
    _administer(postgresql, "CREATE DATABASE filled")
    address = _named(postgresql, "filled")
    engine = open_database(address)
    migrate(engine)
    with sessions(engine, writes=True).begin() as session:
        sync_catalogue(session, load_catalogue(), now=START)
    engine.dispose()
    return postgresql


@pytest.fixture
def filled_postgresql(_template):
    """Address of a database with the catalogue, a copy for each test."""
    _administer(_template, "CREATE DATABASE copied TEMPLATE filled")
    yield _named(_template, "copied")
    _administer(_template, "DROP DATABASE copied WITH (FORCE)")


def _named(address: str, database: str) -> str:
    return address.replace("/postgres?", f"/{database}?")


def _administer(address: str, command: str) -> None:
    engine = open_database(address)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(command)
    engine.dispose()
