"""Mail through a real SMTP server on this machine."""

import asyncio
import contextlib
import dataclasses
import email
import re
import shutil
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from email.policy import default

import pytest

pytest.importorskip("aiosmtpd", reason="needs aiosmtpd")

from aiosmtpd.controller import Controller
from sqlalchemy import select
from starlette.testclient import TestClient
from tests.site.helpers import Outbox, send, something_new

from regularized.papers.catalogue import load_catalogue
from regularized.site import mail, outbox
from regularized.site.app import create_app
from regularized.site.digest import write_digests
from regularized.site.mail import Mailer, Unreachable, valid_address
from regularized.site.models import Outgoing
from regularized.site.outbox import deliver_due
from regularized.site.settings import Smtp
from regularized.site.state import Site


class Box:
    """Keeps what arrives; refuses what it is told to."""

    def __init__(self) -> None:
        self.messages = []
        self.tried = []
        self.refuse: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()

    async def handle_DATA(self, server, session, envelope):
        while not self.gate.is_set():  # a server that takes its time
            await asyncio.sleep(0.01)
        self.tried.append(envelope)
        if self.refuse:
            return self.refuse.pop(0)
        self.messages.append(envelope)
        self.arrived.set()
        return "250 OK"


@pytest.fixture
def box():
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

    def __init__(self, box: Box, site: Site) -> None:
        self.box = box
        self.site = site

    def messages(self):
        deliver_due(self.site)
        return [email.message_from_bytes(envelope.content, policy=default) for envelope in self.box.messages]

    def tried(self):
        """Those that the server did not take, too."""
        return [email.message_from_bytes(envelope.content, policy=default) for envelope in self.box.tried]


def test_from_sign_in_to_unsubscribing_by_smtp(mailing, box, clock):
    """Fails when a message that works in the outbox does not survive a mail server."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box, mailing)
    said = send(client, "/sign-in", "/sign-in", email="ada@example.org")
    assert "outbox" not in said.text
    link = arrived.link("/sign-in/link")
    assert box.messages[0].rcpt_tos == ["ada@example.org"]
    assert box.messages[0].mail_from == "regularized@example.org"
    assert send(client, link, "/sign-in/link").status_code == 303
    send(client, "/digest", "/digest", email="ada@example.org", frequency="daily")
    assert send(client, arrived.link("/digest/confirm"), "/digest/confirm").status_code == 200
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    assert write_digests(mailing).written == 1
    link = arrived.messages()[-1]["List-Unsubscribe"].strip("<>").removeprefix("http://testserver")
    assert client.post(link, data={"List-Unsubscribe": "One-Click"}).status_code == 200
    assert not mailing.settings.outbox.exists()


def test_list_headers_are_read_by_mail_programs(mailing, box, clock):
    """Fails when the address that ends a digest leaves as an encoded word or in pieces, or other lines get too long."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box, mailing)
    send(client, "/digest", "/digest", email="ada@example.org", frequency="daily")
    send(client, arrived.link("/digest/confirm"), "/digest/confirm")
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    assert write_digests(mailing).written == deliver_due(mailing).sent == 1
    head, _, body = box.messages[-1].content.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    (line,) = [line for line in lines if line.startswith(b"List-Unsubscribe:")]
    # A link in angle brackets as RFC 2369 wants it, in the very bytes.
    assert re.fullmatch(rb"List-Unsubscribe: <http://testserver/digest/unsubscribe\?key=[\w.-]{60,}>", line), line
    assert b"List-Unsubscribe-Post: List-Unsubscribe=One-Click" in lines
    with mailing.write.begin() as session:
        outbox.put(session, mailing, "ada@example.org", "Über " * 60, "ü" * 500, "<p>t</p>")
    assert deliver_due(mailing).sent == 1
    assert max(map(len, box.messages[-1].content.split(b"\r\n"))) <= 78
    assert max(map(len, body.split(b"\r\n"))) <= 998


def post(site, recipient="ada@example.org", **options) -> None:
    """Write a message into the outbox."""
    with site.write.begin() as session:
        outbox.put(session, site, recipient, "S", "t", "<p>t</p>", **options)


def waiting(site) -> list[tuple]:
    with site.read() as session:
        return session.execute(select(Outgoing.due_at, Outgoing.tries, Outgoing.error).order_by(Outgoing.id)).all()


def test_a_server_that_says_later_is_asked_again(mailing, box, clock):
    """Fails when one busy moment loses a message, pauses do not grow, or a second try has another Message-ID."""
    box.refuse = ["451 later", "451 later"]
    post(mailing)
    pauses = []
    for _ in range(2):
        assert deliver_due(mailing).later == 1
        assert deliver_due(mailing).sent == 0  # not before its time
        ((due, _tries, error),) = waiting(mailing)
        assert "451 later" in error
        pauses.append(due - mailing.settings.now)
        clock.now = due
    assert pauses == [60, 120]
    assert deliver_due(mailing).sent == 1
    assert waiting(mailing) == []
    assert len({message["Message-ID"] for message in Arrived(box, mailing).tried()}) == 1


def test_what_is_refused_for_good_is_not_repeated(mailing, box, clock):
    """Fails when a refusal for good is repeated, vanishes without a word, or keeps the text of the message."""
    box.refuse = ["550 never", "550 never"]
    post(mailing)
    assert deliver_due(mailing).refused == 1
    clock.now += 30 * 24 * 3600
    assert deliver_due(mailing).sent == 0
    assert box.refuse == ["550 never"]
    ((due, tries, error),) = waiting(mailing)
    assert (due, tries, "550 never" in error) == (None, 1, True)
    with mailing.read() as session:
        assert session.scalars(select(Outgoing.content)).all() == [b""]


def test_what_is_too_late_is_not_sent(mailing, box, clock):
    """Fails when a link that works no more still goes out."""
    post(mailing, expires_at=mailing.settings.now + 900)
    clock.now += 900
    assert deliver_due(mailing).refused == 1
    assert box.messages == []


def test_a_crash_loses_nothing_and_doubles_nothing(mailing, box, clock, monkeypatch):
    """Fails when a message that somebody died over is lost, or is sent by two at once."""
    post(mailing)

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mail._Server, "send", killed)
        with pytest.raises(KeyboardInterrupt):
            deliver_due(mailing)
    assert deliver_due(mailing).sent == 0  # it may be on its way
    clock.now += outbox.CLAIM
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: deliver_due(mailing).sent, range(4)))
    assert sum(results) == len(box.messages) == 1


def test_a_message_is_written_with_what_it_tells_of(site):
    """Fails when a transaction that is taken back still sends its message."""
    with site.write() as session:
        outbox.put(session, site, "ada@example.org", "S", "t", "<p>t</p>")
        session.rollback()
    assert waiting(site) == []


def test_a_slow_server_does_not_stop_the_site(mailing, box):
    """Fails when a request waits for the mail server: twenty sign-ins once left the site without an answer."""
    box.gate.clear()
    with TestClient(create_app(mailing, background=True), follow_redirects=False) as client:
        try:
            for number in range(20):
                assert send(client, "/sign-in", "/sign-in", email=f"p{number}@example.org").status_code == 200
            assert client.get("/about").status_code == 200
            assert box.messages == []
        finally:
            box.gate.set()
        assert box.arrived.wait(120)
    clean = {envelope.rcpt_tos[0] for envelope in box.messages}
    assert clean <= {f"p{number}@example.org" for number in range(20)}


def test_a_dead_server_is_said(site, box, caplog):
    """Fails when a message is lost with the server, the log is silent, or a person waits without a word."""
    smtp = Smtp("127.0.0.1", 9, security="none", timeout=0.5)
    settings = dataclasses.replace(site.settings, smtp=smtp)
    dead = dataclasses.replace(site, settings=settings, mailer=Mailer(settings))
    client = TestClient(create_app(dead), follow_redirects=False)
    assert "does not take messages" not in send(client, "/sign-in", "/sign-in", email="ada@example.org").text
    send(client, "/sign-in", "/sign-in", email="bob@example.org")
    result = deliver_due(dead)
    assert (result.later, result.unreachable) == (1, True)  # one try for both
    assert "127.0.0.1:9" in caplog.text
    assert "does not take messages" in send(client, "/sign-in", "/sign-in", email="eve@example.org").text
    assert len(waiting(dead)) == 3


def test_one_bad_address_does_not_keep_the_others_from_theirs(mailing, box, clock):
    """Fails when a refused digest ends the call, or the others are written twice."""
    client, arrived = TestClient(create_app(mailing), follow_redirects=False), Arrived(box, mailing)
    for name in ("ada", "bob"):
        send(client, "/digest", "/digest", email=f"{name}@example.org", frequency="daily")
        send(client, arrived.link("/digest/confirm"), "/digest/confirm")
    clock.now += 24 * 3600
    something_new(mailing, clock, load_catalogue()[-1].slug)
    box.refuse = ["550 never"]
    assert write_digests(mailing).written == 2
    result = deliver_due(mailing)
    assert (result.sent, result.refused) == (1, 1)
    assert write_digests(mailing).written == 0


def test_login_needs_a_safe_line(site, box):
    """Fails when starttls is asked for and the message goes out in clear without it."""
    settings = dataclasses.replace(site.settings, smtp=Smtp("127.0.0.1", box.port, timeout=60.0))
    mailer = Mailer(settings)
    with mailer.open() as way, pytest.raises(Unreachable):
        way.send(mailer.compose("ada@example.org", "S", "t", "<p>t</p>"))
    assert box.messages == []


def dripping(listener, phase, ended) -> None:
    """Serve one client; from a word of its on, or from the beginning, an answer comes a letter at a time for ever."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
        heard = "CONNECT"
        while heard != phase:
            connection.sendall({"CONNECT": b"220 x", "DATA": b"354 go"}.get(heard, b"250 ok") + b"\r\n")
            line = lines.readline()
            if heard == "DATA":
                while line != b".\r\n":
                    line = lines.readline()
            heard = line.split()[0].decode().upper()
        while not ended.wait(0.02):
            connection.sendall(b"2")


@pytest.mark.parametrize("phase", ["CONNECT", ".", "QUIT"])
def test_a_server_that_answers_a_letter_at_a_time(site, phase):
    """Fails when it holds a message for longer than its claim, after which another process sends it again."""
    assert Smtp("").deadline < outbox.CLAIM / 2
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=dripping, args=(listener, phase, ended), daemon=True)
        thread.start()
        limit = threading.Timer(60, ended.set)  # without a deadline this test fails after a minute, and does not hang
        limit.start()
        smtp = Smtp("127.0.0.1", listener.getsockname()[1], security="none", timeout=60.0, deadline=0.3)
        mailer = Mailer(dataclasses.replace(site.settings, smtp=smtp))
        told = pytest.raises(Unreachable, match=r"not done after 0\.3 s")
        taken = contextlib.nullcontext() if phase == "QUIT" else told
        with mailer.open() as way, taken:
            way.send(mailer.compose("ada@example.org", "S", "t", "<p>t</p>"))
        in_time = not ended.is_set()
        limit.cancel()
        ended.set()
        thread.join()
    assert in_time


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, for a certificate that nobody has signed")
def test_a_server_behind_tls_shows_who_it_is(site, tmp_path):
    """Fails when anybody between us and the mail server is given password and messages."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -days 2"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as line:
                line.sendall(b"554 no\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        smtp = Smtp("localhost", listener.getsockname()[1], security="tls", timeout=60.0)
        mailer = Mailer(dataclasses.replace(site.settings, smtp=smtp))
        with mailer.open() as way, pytest.raises(Unreachable, match="certificate verify failed"):
            way.send(mailer.compose("ada@example.org", "S", "t", "<p>t</p>"))
        thread.join()


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


def test_headers_cannot_be_injected(site):
    """Fails when a line break in a subject, a recipient or a header makes a new header."""
    for broken in (
        {"recipient": "a@example.org\r\nBcc: b@example.org"},
        {"subject": "S\r\nBcc: b@example.org"},
        {"headers": {"X-Thing": "x\nBcc: b@example.org"}},
    ):
        values = {"recipient": "a@example.org", "subject": "S", "headers": {}, **broken}
        with pytest.raises(ValueError, match="line"):
            site.mailer.compose(values["recipient"], values["subject"], "t", "<p>t</p>", headers=values["headers"])
