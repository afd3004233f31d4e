"""A site for each test: its own database (a copy of one with the catalogue), clock, outbox and client."""

import email
import re
import shutil
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import default as policy
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='needs the extra "site"')

from starlette.testclient import TestClient

from regularized.papers.catalogue import load_catalogue
from regularized.site.app import create_app
from regularized.site.database import migrate, open_database, sessions
from regularized.site.mail import Mailer
from regularized.site.rendering import environment
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.sync import sync_catalogue

START = 1_790_000_000
URL = "http://testserver"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


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


def settings_in(folder: Path, **options) -> Settings:
    values = {
        "database": f"sqlite:///{folder / 'site.sqlite'}",
        "folder": folder,
        "url": URL,
        "secret": "s" * 40,
        "outbox": folder / "outbox",
        "sender": "regularized@example.org",
        "encoder": "off",
        **options,
    }
    return Settings(**values)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path, clock) -> Settings:
    return settings_in(tmp_path, clock=clock)


@pytest.fixture
def site(filled, settings) -> Iterator[Site]:
    shutil.copy(filled, settings.folder / "site.sqlite")
    engine = open_database(settings.database)
    yield Site(settings, engine, environment(), Mailer(settings), None)
    engine.dispose()


@pytest.fixture
def app(site):
    return create_app(site)


@pytest.fixture
def client(app) -> TestClient:
    return TestClient(app, follow_redirects=False)


class Outbox:
    """Messages in the outbox folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def messages(self) -> list[EmailMessage]:
        files = sorted(self.folder.glob("*.eml"))
        return [email.message_from_bytes(file.read_bytes(), policy=policy) for file in files]

    def link(self, part: str) -> str:
        """The link of the newest message whose address has this part, without the host."""
        text = self.messages()[-1].get_body(("plain",)).get_content()
        return next(link for link in re.findall(rf"{URL}(\S+)", text) if part in link)


@pytest.fixture
def outbox(settings) -> Outbox:
    return Outbox(settings.outbox)


class Forms(HTMLParser):
    """Forms of a page: address -> its hidden fields."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {}
        self._form: dict[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "form":
            self._form = self.found.setdefault(given["action"], {})
        elif tag == "input" and self._form is not None and given.get("type") == "hidden":
            self._form[given["name"]] = given["value"]

    def handle_endtag(self, tag):
        if tag == "form":
            self._form = None


def send(client: TestClient, page: str, action: str, /, **fields):
    """Fill in a form of a page as a browser would: with its hidden fields and the page's cookies."""
    got = client.get(page)
    assert got.status_code == 200, (page, got.status_code)
    hidden = Forms(got.text).found[action]
    return client.post(action, data={**hidden, **fields}, headers={"origin": URL})


def sign_in(client: TestClient, outbox: Outbox, address: str, goes_to: str = "/") -> None:
    """Sign a client in, by the link in the message."""
    asked = send(client, f"/sign-in?next={goes_to}", "/sign-in", email=address)
    assert asked.status_code == 200, asked.text
    used = send(client, outbox.link("/sign-in/link"), "/sign-in/link")
    assert used.status_code == 303, used.text


@pytest.fixture
def person(client, outbox) -> TestClient:
    """A client that is signed in."""
    sign_in(client, outbox, "ada@example.org")
    return client
