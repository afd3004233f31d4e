"""A visitor's tools: a clock, an outbox, and forms that are filled in as a browser does it."""

import email
import re
from email.message import EmailMessage
from email.policy import default as policy
from html.parser import HTMLParser
from pathlib import Path

from sqlalchemy import select, update
from starlette.testclient import TestClient

from regularized.site.models import Paper, VerdictChange
from regularized.site.outbox import deliver_due
from regularized.site.settings import Settings
from regularized.site.state import Site

START = 1_790_000_000
URL = "http://testserver"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


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


class Outbox:
    """Messages in the outbox folder, oldest first; what is due goes there when somebody looks."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def messages(self) -> list[EmailMessage]:
        deliver_due(self.site)
        files = sorted(self.site.settings.outbox.glob("*.eml"))
        return [email.message_from_bytes(file.read_bytes(), policy=policy) for file in files]

    def link(self, part: str) -> str:
        """The link of the newest message whose address has this part, without the host."""
        text = self.messages()[-1].get_body(("plain",)).get_content()
        return next(link for link in re.findall(rf"{URL}(\S+)", text) if part in link)


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


def without_code(site: Site, slug: str) -> None:
    """Show a paper as one that has a card and no code."""
    with site.write.begin() as session:
        session.execute(update(Paper).where(Paper.slug == slug).values(runs=False, standing=0.0, held=0, verdicts={}))


def something_new(site, clock: Clock, slug: str) -> None:
    """A paper that has come in, and a verdict that has changed."""
    with site.write.begin() as session:
        other = session.scalars(select(Paper).where(Paper.slug == slug)).one()
        other.added_at = int(clock.now)
        session.add(
            VerdictChange(
                paper_id=other.id, claim="x", statement="It <helps>.", old="open", new="holds", at=int(clock.now)
            )
        )
