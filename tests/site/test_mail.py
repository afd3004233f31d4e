"""Mail through a real SMTP server on this machine."""

import dataclasses
import re
import socket

import pytest

pytest.importorskip("aiosmtpd", reason="needs aiosmtpd")

from aiosmtpd.controller import Controller
from starlette.testclient import TestClient
from tests.site.helpers import Outbox, send, something_new

from regularized.papers.catalogue import load_catalogue
from regularized.site import mail
from regularized.site.app import create_app
from regularized.site.digest import send_digests
from regularized.site.mail import Mailer, MailError, valid_address
from regularized.site.settings import Smtp
from regularized.site.state import Site


class Box:
    """Keeps what arrives; refuses what it is told to."""

    def __init__(self) -> None:
        self.messages = []
        self.refuse: list[str] = []

    async def handle_DATA(self, server, session, envelope):
        if self.refuse:
            return self.refuse.pop(0)
        self.messages.append(envelope)
        return "250 OK"


@pytest.fixture
def box(monkeypatch):
    monkeypatch.setattr(mail.time, "sleep", lambda _seconds: None)
    handler = Box()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        handler.port = free.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=handler.port)
    controller.start()
    yield handler
    controller.stop()


@pytest.fixture
def mailing(site, box) -> Site:
    """The site with a mail server."""
    smtp = Smtp("127.0.0.1", box.port, security="none", timeout=60.0)
    settings = dataclasses.replace(site.settings, smtp=smtp)
    return dataclasses.replace(site, settings=settings, mailer=Mailer(settings))


class Arrived(Outbox):
    """Messages that have arrived at the server."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def messages(self):
        import email
        from email.policy import default

        return [email.message_from_bytes(envelope.content, policy=default) for envelope in self.box.messages]


def test_from_sign_in_to_unsubscribing_by_smtp(mailing, box, clock):
    """Fails when a message that works in the outbox does not survive a mail server."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box)
    said = send(client, "/sign-in", "/sign-in", email="ada@example.org")
    assert "outbox" not in said.text
    assert box.messages[0].rcpt_tos == ["ada@example.org"]
    assert box.messages[0].mail_from == "regularized@example.org"
    assert send(client, arrived.link("/sign-in/link"), "/sign-in/link").status_code == 303
    send(client, "/digest", "/digest", email="ada@example.org", frequency="daily")
    assert send(client, arrived.link("/digest/confirm"), "/digest/confirm").status_code == 200
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    assert send_digests(mailing).sent == 1
    link = arrived.messages()[-1]["List-Unsubscribe"].strip("<>").removeprefix("http://testserver")
    assert client.post(link, data={"List-Unsubscribe": "One-Click"}).status_code == 200
    assert not mailing.settings.outbox.exists()


def test_list_headers_are_read_by_mail_programs(mailing, box, clock):
    """Fails when the address that ends a digest leaves as an encoded word or in pieces, or other lines get too long."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box)
    send(client, "/digest", "/digest", email="ada@example.org", frequency="daily")
    send(client, arrived.link("/digest/confirm"), "/digest/confirm")
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    assert send_digests(mailing).sent == 1
    head, _, body = box.messages[-1].content.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    (line,) = [line for line in lines if line.startswith(b"List-Unsubscribe:")]
    # A link in angle brackets as RFC 2369 wants it, in the very bytes.
    assert re.fullmatch(rb"List-Unsubscribe: <http://testserver/digest/unsubscribe\?key=[\w.-]{60,}>", line), line
    assert b"List-Unsubscribe-Post: List-Unsubscribe=One-Click" in lines
    mailing.mailer.send("ada@example.org", "Über " * 60, "ü" * 500, "<p>t</p>")
    assert max(map(len, box.messages[-1].content.split(b"\r\n"))) <= 78
    assert max(map(len, body.split(b"\r\n"))) <= 998


def test_a_server_that_says_later_is_asked_again(mailing, box):
    """Fails when one busy moment loses a message, or a refusal for good is repeated."""
    box.refuse = ["451 later", "451 later"]
    mailing.mailer.send("ada@example.org", "S", "t", "<p>t</p>")
    assert len(box.messages) == 1
    box.refuse = ["550 never", "550 never"]
    with pytest.raises(MailError, match="550 never"):
        mailing.mailer.send("ada@example.org", "S", "t", "<p>t</p>")
    assert box.refuse == ["550 never"]


def test_a_dead_server_is_said(site, caplog):
    """Fails when a person is told that a message was sent, or sees a traceback."""
    settings = dataclasses.replace(site.settings, smtp=Smtp("127.0.0.1", 9, security="none", timeout=0.5))
    dead = dataclasses.replace(site, settings=settings, mailer=Mailer(settings))
    client = TestClient(create_app(dead), follow_redirects=False)
    response = send(client, "/sign-in", "/sign-in", email="ada@example.org")
    assert response.status_code == 503
    assert "could not be sent" in response.text
    assert "127.0.0.1:9" in caplog.text


def test_one_bad_address_does_not_keep_the_others_from_theirs(mailing, box, clock):
    """Fails when a refused digest ends the call, or is never tried again."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box)
    for name in ("ada", "bob"):
        send(client, "/digest", "/digest", email=f"{name}@example.org", frequency="daily")
        send(client, arrived.link("/digest/confirm"), "/digest/confirm")
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    box.refuse = ["550 never"]
    result = send_digests(mailing)
    assert (result.sent, result.failed) == (1, 1)
    assert send_digests(mailing).sent == 1
    assert send_digests(mailing).sent == 0


def test_login_needs_a_safe_line(site, box):
    """Fails when starttls is asked for and the message goes out in clear without it."""
    settings = dataclasses.replace(site.settings, smtp=Smtp("127.0.0.1", box.port, timeout=60.0))
    with pytest.raises(MailError):
        Mailer(settings).send("ada@example.org", "S", "t", "<p>t</p>")
    assert box.messages == []


INJECTING = [
    "a@example.org\r\nBcc: b@example.org",
    "a@example.org\n",
    "a@example.org,b@example.org",
    "a@example.org b@example.org",
    "<a@example.org>",
    "A <a@example.org>",
    "a@example.org\0",
    "a%0a@exa\nmple.org",
    "a" * 250 + "@example.org",
    '"a b"@example.org',
    "a@[127.0.0.1]",
    "a@-example.org",
    "\ta@example.org",
    "a@example.org\u2028x",
]


@pytest.mark.parametrize("address", INJECTING)
def test_addresses_that_would_inject(address):
    """Fails when an address could add a header or a recipient."""
    assert valid_address(address) is None


def test_headers_cannot_be_injected(site, outbox):
    """Fails when a line break in a subject, a recipient or a header makes a new header."""
    for broken in (
        {"recipient": "a@example.org\r\nBcc: b@example.org"},
        {"subject": "S\r\nBcc: b@example.org"},
        {"headers": {"X-Thing": "x\nBcc: b@example.org"}},
    ):
        values = {"recipient": "a@example.org", "subject": "S", "headers": {}, **broken}
        with pytest.raises(ValueError, match="line"):
            site.mailer.send(values["recipient"], values["subject"], "t", "<p>t</p>", headers=values["headers"])
    assert outbox.messages() == []
