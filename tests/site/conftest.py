"""A site for each test: its own database (a copy of one with the catalogue), clock, outbox and client."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='needs the extra "site"')

from jinja2 import Environment
from starlette.testclient import TestClient
from tests.site.helpers import START, Clock, Outbox, settings_in, sign_in
from tests.site.postgresql import _template, empty_postgresql, filled_postgresql, postgresql  # noqa: F401 - fixtures

from regularized.papers.catalogue import load_catalogue
from regularized.site import plots
from regularized.site.app import create_app
from regularized.site.database import migrate, open_database, sessions
from regularized.site.mail import Mailer
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.sync import sync_catalogue
from regularized.site.templating import environment


@pytest.fixture(scope="session")
def filled(tmp_path_factory) -> Path:
    """A database with the catalogue, made once."""
    file = tmp_path_factory.mktemp("site") / "filled.sqlite"
    engine = open_database(f"sqlite:///{file}")
    migrate(engine)
    with sessions(engine, writes=True).begin() as session:
        sync_catalogue(session, load_catalogue(), now=START)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return file


@pytest.fixture(scope="session", autouse=True)
def _drawn_once() -> Iterator[None]:
    """Matplotlib takes seconds for a paper, and each test has a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_draw", cache(plots._draw))
        yield


@pytest.fixture
def filled_home(filled, tmp_path, monkeypatch, tell_what_is_known) -> Path:
    """A data folder in which commands find the site and what is known of the papers, and need not make both."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    (tmp_path / "site").mkdir()
    shutil.copy(filled, tmp_path / "site" / "site.sqlite")
    tell_what_is_known()
    return tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path, clock) -> Settings:
    return settings_in(tmp_path, clock=clock)


@pytest.fixture(scope="session")
def templates() -> Environment:
    """Each is compiled once."""
    return environment()


@pytest.fixture
def site(filled, settings, templates) -> Iterator[Site]:
    shutil.copy(filled, settings.folder / "site.sqlite")
    engine = open_database(settings.database)
    yield Site(settings, engine, templates, Mailer(settings), None)
    engine.dispose()


@pytest.fixture
def app(site):
    return create_app(site)


@pytest.fixture
def client(app) -> TestClient:
    return TestClient(app, follow_redirects=False)


@pytest.fixture
def outbox(site) -> Outbox:
    return Outbox(site)


@pytest.fixture
def person(client, outbox) -> TestClient:
    """A client that is signed in."""
    sign_in(client, outbox, "ada@example.org")
    return client
