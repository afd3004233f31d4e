"""Hostile visitors: one test for each way in."""

import dataclasses
import re

import pytest
from sqlalchemy import func, select, text
from starlette.testclient import TestClient
from tests.site.helpers import URL, Forms, send, settings_in, sign_in

from regularized.papers.catalogue import load_catalogue
from regularized.site import security
from regularized.site.app import create_app
from regularized.site.importing import Incoming, store
from regularized.site.limits import address_of
from regularized.site.markdown import render
from regularized.site.middleware import LARGEST_BODY, BodyLimit
from regularized.site.models import Comment, LoginSession, Paper, Person, SignInToken, Subscription, Vote
from regularized.site.security import (
    form_token,
    is_form_token,
    local_path,
    open_link,
    seal_link,
)

ENTRIES = load_catalogue()
PAPER = ENTRIES[-1]
PAGE = f"/papers/{PAPER.slug}"


def count(site, table):
    with site.read() as session:
        return session.scalar(select(func.count()).select_from(table))


# -- scripts ------------------------------------------------------------------------------------

SCRIPTS = """
<script>alert(1)</script>
<img src=x onerror=alert(1)>
<svg/onload=alert(1)>
[click](javascript:alert(1))
[click](JaVaScRiPt:alert(1))
[click](data:text/html;base64,PHNjcmlwdD4=)
[click](vbscript:x)
[x]: javascript:alert(1)
![x](https://evil.example/pixel.png)
<a href="javascript:alert(1)">x</a>
<iframe src="https://evil.example"></iframe>
<style>*{display:none}</style>
<form action="https://evil.example"><input name=q></form>
<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>
`<script>alert(1)</script>`
<https://evil.example/"onmouseover="alert(1)>
[a](https://e.example "t\\" onmouseover=alert(1) x=\\"")
<p style="position:fixed">x</p>
&lt;script&gt;alert(1)&lt;/script&gt;
# <script>alert(1)</script>""".strip().splitlines()


@pytest.mark.parametrize("body", SCRIPTS)
def test_comments_cannot_act(body):
    """Fails when a comment brings an element, an attribute or an address that could run or load anything (XSS)."""
    html = render(body)
    for tag in re.findall(r"<(/?\w+)", html):
        assert tag.strip("/") in {"p", "a", "code", "h4", "em", "strong", "pre"}, html
    for given in re.findall(r"<a ([^>]*)>", html):
        names = set(re.findall(r'(\w+)="', given))
        assert names <= {"href", "title", "rel"}, html
        assert re.search(r'href="(https?:|mailto:)', given), html
        assert "nofollow" in given


def test_hostile_comment_on_its_page(person):
    """Fails when the page shows a comment otherwise than as sanitised, or a name as HTML."""
    send(person, "/me", "/me", name="<b>Ada</b>")
    send(person, PAGE, f"{PAGE}/comments", body="<script>alert(1)</script> **bold**")
    html = person.get(PAGE).text
    assert "<script>alert(1)" not in html
    assert "<strong>bold</strong>" in html
    assert "&lt;b&gt;Ada&lt;/b&gt;" in html


def test_hostile_paper(client, site):
    """Fails when a title or abstract from elsewhere is taken for HTML, on a page or in an attribute (XSS)."""
    title = '"><script>alert(1)</script>'
    import datetime

    hostile = Incoming(title, datetime.date(2030, 1, 1), "listing", abstract=title, organization=title)
    with site.write.begin() as session:
        slug = store(session, [hostile], now=1)[0].slug
    for address in ("/new", f"/papers/{slug}", "/search?q=alert", "/day/2030-01-01"):
        html = client.get(address).text
        assert "<script>alert(1)" not in html
        assert "&lt;script&gt;alert(1)" in html


def test_hostile_question(client):
    """Fails when what was searched comes back as HTML (reflected XSS)."""
    question = '"><script>alert(1)</script>'
    for address in ("/search", "/sign-in"):
        html = client.get(address, params={"q": question, "next": question, "tag": question}).text
        assert "<script>alert(1)" not in html
    assert "<script>alert(1)" not in client.get(f"/papers/{question}").text
    assert "<script>alert(1)" not in client.get("/day/<script>alert(1)").text


@pytest.mark.parametrize(
    "address", ["/", PAGE, "/nothing", "/api/v1/papers", "/feeds/best.atom", "/static/site.css", "/%00"]
)
def test_policy(client, address):
    """Fails when an answer allows inline script or style, framing, sniffing, or other origins."""
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    for part in ("base-uri 'none'", "form-action 'self'"):
        assert part in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


# -- forms of others ----------------------------------------------------------------------------

FORMS = [
    (f"{PAGE}/vote", {"on": "1"}),
    (f"{PAGE}/comments", {"body": "spam"}),
    (f"/families/{PAPER.card.families[0]}/follow", {"on": "1"}),
    ("/me", {"name": "changed"}),
    ("/me/delete", {}),
    ("/sign-out", {}),
    ("/sign-in", {"email": "victim@example.org"}),
    ("/sign-in/link", {"link_token": "x"}),
    ("/digest", {"email": "victim@example.org"}),
    ("/digest/confirm", {"wish": "x"}),
    ("/comments/1/delete", {}),
]


@pytest.mark.parametrize(("address", "fields"), FORMS)
def test_forms_of_other_sites_are_refused(person, site, outbox, address, fields):
    """Fails when a page of another site can act for a person who is signed in here (CSRF)."""
    before = len(outbox.messages())
    token = Forms(person.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    attempts = [
        (fields, {}),
        ({**fields, "token": ""}, {}),
        ({**fields, "token": "0" * 64}, {}),
        ({**fields, "token": token}, {"origin": "https://evil.example"}),
        ({**fields, "token": token}, {"sec-fetch-site": "cross-site"}),
        ({**fields, "token": token}, {"sec-fetch-site": "same-site"}),
    ]
    for data, headers in attempts:
        assert person.post(address, data=data, headers=headers).status_code == 403
    assert [count(site, table) for table in (Vote, Comment, Person, LoginSession)] == [0, 0, 1, 1]
    assert len(outbox.messages()) == before


def test_a_token_is_one_visitors(client, app, outbox, site):
    """Fails when the token that an attacker got for himself is good for others."""
    sign_in(client, outbox, "eve@example.org")
    hers = Forms(client.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    victim = TestClient(app, follow_redirects=False)
    sign_in(victim, outbox, "ada@example.org")
    assert victim.post(f"{PAGE}/vote", data={"token": hers, "on": "1"}).status_code == 403
    assert count(site, Vote) == 0


def test_reading_changes_nothing(person, site):
    """Fails when a GET request changes something."""
    before = [count(site, table) for table in (Vote, Comment, Person, LoginSession, Subscription)]
    for address, _ in FORMS:
        assert person.get(address).status_code in (200, 303, 403, 404, 405)
    assert [count(site, table) for table in (Vote, Comment, Person, LoginSession, Subscription)] == before


# -- ways out -----------------------------------------------------------------------------------

ELSEWHERE = """
https://evil.example
//evil.example
/\\evil.example
\\\\evil.example
/\tevil.example
javascript:alert(1)
https:evil.example
 /x
/%0d%0aLocation:x\r\nSet-Cookie: a=b
evil.example""".lstrip("\n").split("\n")


@pytest.mark.parametrize("target", ELSEWHERE)
def test_no_open_redirect(client, outbox, target):
    """Fails when a link to our sign-in page can send a person to another site afterwards."""
    assert local_path(target) == "/"
    page = client.get("/sign-in", params={"next": target})
    assert Forms(page.text).found["/sign-in"]["next"] == "/"
    fields = {**Forms(page.text).found["/sign-in"], "next": target, "email": "ada@example.org"}
    client.post("/sign-in", data=fields)
    used = send(client, outbox.link("/sign-in/link"), "/sign-in/link")
    assert used.headers["location"] == "/"


def test_links_in_messages_are_ours(client, outbox):
    """Fails when a forged Host header gets into a message, so that its link leads to another site."""
    page = client.get("/sign-in")
    headers = {"host": "evil.example", "x-forwarded-host": "evil.example"}
    fields = {**Forms(page.text).found["/sign-in"], "email": "ada@example.org"}
    client.post("/sign-in", data=fields, headers=headers)
    for message in outbox.messages():
        assert "evil.example" not in message.as_string()


# -- tokens and cookies -------------------------------------------------------------------------


def test_cookies(filled, tmp_path, clock):
    """Fails when a cookie can be read by scripts, goes out with forms of other sites, or goes in clear."""
    import shutil

    from regularized.site.database import open_database
    from regularized.site.mail import Mailer
    from regularized.site.state import Site
    from regularized.site.templating import environment

    settings = settings_in(tmp_path, url="https://papers.example.org", clock=clock)
    shutil.copy(filled, tmp_path / "site.sqlite")
    secure = Site(settings, open_database(settings.database), environment(), Mailer(settings), None)
    client = TestClient(create_app(secure), base_url="https://papers.example.org")
    response = client.get("/sign-in")
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("__Host-form=")
    for part in ("HttpOnly", "Secure", "SameSite=lax", "Path=/"):
        assert part in cookie
    assert "Domain" not in cookie
    assert response.headers["strict-transport-security"]
    secure.engine.dispose()


def test_readers_get_no_cookie(client):
    """Fails when somebody who only reads is given something to be recognised by."""
    for address in ("/", PAGE, "/search?q=x", "/compare", "/about", "/trending", "/api/v1/papers", "/feeds/best.atom"):
        assert "set-cookie" not in client.get(address).headers


def test_session_cookies_are_signed_and_new(client, outbox, site):
    """Fails when a cookie can be made or changed by its owner, or one from before signing in stays good (fixation)."""
    client.get("/sign-in")
    before = client.cookies["form"]
    sign_in(client, outbox, "ada@example.org")
    cookie = client.cookies["session"]
    assert cookie.split(".")[0] != before.split(".")[0]
    assert client.get("/me").status_code == 200
    token, stamp, signature = cookie.split(".")
    for forged in (
        f"{token}x.{stamp}.{signature}",
        f"{token}.{stamp}x.{signature}",
        f"{token}.{stamp}.x",
        token,
        "",
        ".",
    ):
        client.cookies.clear()
        client.cookies.set("session", forged)
        assert client.get("/me").status_code == 303
    client.cookies.clear()
    client.cookies.set("session", before)
    assert client.get("/me").status_code == 303


def test_what_is_stored_lets_nobody_in(client, outbox, site):
    """Fails when who reads the database, or a backup of it, can sign in."""
    send(client, "/sign-in", "/sign-in", email="ada@example.org")
    token = outbox.link("/sign-in/link").partition("token=")[2]
    with site.read() as session:
        stored = session.scalars(select(SignInToken.digest)).one()
    assert token not in stored
    assert security.hashed(token) == stored
    assert send(client, f"/sign-in/link?token={stored}", "/sign-in/link").status_code == 403


def test_tokens_cannot_be_guessed(client, site):
    """Fails when tokens are short or alike, or guessing is not slowed down."""
    tokens = {security.new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert min(map(len, tokens)) >= 43
    codes = [send(client, f"/sign-in/link?token=guess{i}", "/sign-in/link").status_code for i in range(35)]
    assert codes == [403] * 30 + [429] * 5
    assert count(site, Person) == 0


def test_signed_links_serve_one_purpose(settings):
    """Fails when the key of one link works in another, or a changed one is accepted."""
    sealed = seal_link(settings, [1, "k"], purpose="unsubscribe")
    assert open_link(settings, sealed, purpose="unsubscribe") == [1, "k"]
    assert open_link(settings, sealed, purpose="subscribe") is None
    assert open_link(settings, sealed[:-1] + ("A" if sealed[-1] != "A" else "B"), purpose="unsubscribe") is None
    other = dataclasses.replace(settings, secret="t" * 40)
    assert open_link(other, sealed, purpose="unsubscribe") is None
    assert open_link(settings, "", purpose="unsubscribe") is None


def test_addresses_are_not_given_away(client, outbox):
    """Fails when the answer tells whether somebody is known here."""
    sign_in(client, outbox, "ada@example.org")
    client.cookies.clear()
    known = send(client, "/sign-in", "/sign-in", email="ada@example.org")
    unknown = send(client, "/sign-in", "/sign-in", email="bob@example.org")
    assert known.status_code == unknown.status_code
    strip = re.compile(r"ada|bob|[0-9a-f]{64}")
    assert strip.sub("", known.text) == strip.sub("", unknown.text)


# -- too much -----------------------------------------------------------------------------------


def test_rate_of_messages(client, outbox, clock):
    """Fails when an address can be flooded with messages through us, by one visitor or many."""
    codes = [send(client, "/sign-in", "/sign-in", email="victim@example.org").status_code for _ in range(7)]
    assert codes == [200] * 5 + [429] * 2
    refused = send(client, "/sign-in", "/sign-in", email="victim@example.org")
    assert 0 < int(refused.headers["retry-after"]) <= 3600
    assert len(outbox.messages()) == 5
    codes = [send(client, "/digest", "/digest", email="victim@example.org").status_code for _ in range(5)]
    assert codes == [200] * 3 + [429] * 2
    codes = [send(client, "/sign-in", "/sign-in", email=f"a{i}@example.org").status_code for i in range(20)]
    assert codes.count(429) == 5
    clock.now += 3600
    assert send(client, "/sign-in", "/sign-in", email="victim@example.org").status_code == 200


def test_rate_of_votes_and_comments(person, site):
    """Fails when one person can flood the site."""
    token = Forms(person.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    votes = [person.post(f"{PAGE}/vote", data={"token": token, "on": str(i % 2)}).status_code for i in range(62)]
    assert votes == [303] * 60 + [429] * 2
    said = [person.post(f"{PAGE}/comments", data={"token": token, "body": "x"}).status_code for _ in range(12)]
    assert said == [303] * 10 + [429] * 2
    assert count(site, Comment) == 10


def test_address_of_a_visitor(settings):
    """Fails when a visitor can choose the address that limits count, or has 2^64 of them."""
    scope = {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"1.1.1.1, 2.2.2.2")]}
    assert address_of(settings, scope) == "10.0.0.1"
    assert address_of(dataclasses.replace(settings, proxies=1), scope) == "2.2.2.2"
    assert address_of(dataclasses.replace(settings, proxies=3), scope) == "10.0.0.1"
    six = [{"client": (f"2001:db8::{i}", 1), "headers": []} for i in (1, 2)]
    assert address_of(settings, six[0]) == address_of(settings, six[1]) == "2001:db8::/64"
    assert address_of(settings, {"client": None, "headers": []}) == "unknown"


def test_large_bodies(person, site):
    """Fails when a request can fill the memory, with or without telling its length."""
    large = b"x" * (LARGEST_BODY + 1)
    assert person.post(f"{PAGE}/comments", content=large).status_code == 413
    chunks = (b"x" * 1024 for _ in range(LARGEST_BODY // 1024 + 2))
    assert person.post(f"{PAGE}/comments", content=chunks).status_code == 413
    assert person.post(f"{PAGE}/comments", content=b"x", headers={"content-length": "-5"}).status_code == 413
    assert person.post("/", content=large).status_code == 413
    assert "default-src 'none'" in person.post("/", content=large).headers["content-security-policy"]
    long = send(person, PAGE, f"{PAGE}/comments", body="y" * 8001)
    assert long.status_code == 400
    assert send(person, PAGE, f"{PAGE}/comments", body="日" * 8000).status_code == 303
    assert count(site, Comment) == 1


def test_strangers_cannot_lock_a_person_out(app, outbox, site):
    """Fails when what others ask for, in a person's name or from the same house, keeps him from signing in."""
    eve, ada = (TestClient(app, follow_redirects=False, client=(address, 1)) for address in ("10.0.0.1", "10.0.0.2"))
    asked = [send(eve, "/sign-in", "/sign-in", email="ada@example.org").status_code for _ in range(8)]
    asked += [send(eve, "/sign-in", "/sign-in", email=f"ada+{i}@example.org").status_code for i in range(4)]
    assert asked == [200] * 5 + [429] * 7
    asked = [send(eve, "/digest", "/digest", email="ada@example.org").status_code for _ in range(5)]
    assert asked == [200] * 3 + [429] * 2
    sign_in(ada, outbox, "ada@example.org")
    assert send(ada, "/digest", "/digest", email="ada@example.org").status_code == 200
    # Somebody in her house has used up the tries of links that do not work; hers does.
    ada.cookies.clear()
    assert send(ada, "/sign-in", "/sign-in", email="ada@example.org").status_code == 200
    token = Forms(ada.get("/sign-in").text).found["/sign-in"]["token"]
    tries = [ada.post("/sign-in/link", data={"token": token, "link_token": "x"}).status_code for _ in range(32)]
    assert tries == [403] * 30 + [429] * 2
    assert send(ada, outbox.link("/sign-in/link"), "/sign-in/link").status_code == 303


def test_a_mailbox_has_a_limit_of_its_own(app, outbox, site):
    """Fails when many together can flood a mailbox."""
    codes = []
    for i in range(12):
        one = TestClient(app, follow_redirects=False, client=(f"10.0.1.{i}", 1))
        codes += [send(one, "/sign-in", "/sign-in", email=f"ada+{i}{j}@example.org").status_code for j in range(5)]
    assert codes == [200] * 50 + [429] * 10
    assert len(outbox.messages()) == 50


def test_a_proxy_that_is_not_believed_is_told_of(site, caplog):
    """Fails when a site behind a proxy takes all its visitors for one and says nothing, or says it at each request."""
    client = TestClient(create_app(site))
    client.get("/health")
    assert "REGULARIZED_SITE_PROXIES" not in caplog.text
    for _ in range(2):
        client.get("/health", headers={"x-forwarded-for": "1.1.1.1"})
    assert caplog.text.count("REGULARIZED_SITE_PROXIES") == 1
    caplog.clear()
    for proxies, url, told in ((1, "https://a.example", 0), (0, "https://a.example", 1)):
        settings = dataclasses.replace(site.settings, proxies=proxies, url=url)
        TestClient(create_app(dataclasses.replace(site, settings=settings))).get("/health")
        assert caplog.text.count("REGULARIZED_SITE_PROXIES") == told


WIDE = {
    "table": "|a" * 100 + "\n" + "|-" * 100 + "\n" + "|\n" * 3700,
    "reference": f"[x]: https://example.org/{'y' * 3900}\n\n" + "[x]" * 1300,
    "links": "[a](b)" * 1300,
    "list": "- \n" * 2600,
    "escapes": "&<" * 4000,
}


@pytest.mark.parametrize("body", WIDE.values(), ids=WIDE)
def test_short_comments_make_no_long_pages(body):
    """Fails when 8 kB of a comment become hundreds of kilobytes on everybody's page."""
    assert len(body) <= 8000
    assert len(render(body)) < 100_000
    assert "<table>" in render("|a|b|\n|-|-|\n|1|2|")
    assert '<a href="https://example.org"' in render("[x]\n\n[x]: https://example.org")


@pytest.mark.parametrize("parts", [[], [{"type": "http.request", "body": b"half", "more_body": True}]])
def test_bodies_that_never_end(parts):
    """Fails when a request that is sent in half keeps its connection for ever, or reaches the application."""
    import anyio

    said, waiting = [], list(parts)

    async def receive():
        if not waiting:
            await anyio.sleep_forever()
        return waiting.pop(0)

    async def answer(message):
        said.append(message)

    async def never(*_):
        raise AssertionError("the application saw half a request")

    async def ask():
        with anyio.fail_after(30):
            await BodyLimit(never, slowest=0.05)({"type": "http", "headers": []}, receive, answer)

    anyio.run(ask)
    assert (said[0]["status"], (b"connection", b"close") in said[0]["headers"]) == (408, True)


def test_tokens_of_forms_are_masked(settings):
    """Fails when the token of a form can be read from the length of a compressed page, or a cut one is taken."""
    tokens = [form_token(settings, "ada") for _ in range(2)]
    assert not {tokens[0][i : i + 8] for i in range(120)} & {tokens[1][i : i + 8] for i in range(120)}
    assert all(is_form_token(settings, "ada", token) for token in tokens)
    for wrong in (
        "",
        "x",
        "ü" * 128,
        tokens[0][:64],
        tokens[0][:-2],
        "0" * 128,
        tokens[0][64:] + tokens[0][:64] + "00",
    ):
        assert not is_form_token(settings, "ada", wrong)
    assert not is_form_token(settings, "bob", tokens[0])


@pytest.mark.parametrize(
    "depth", ["> " * 3000, "[" * 3900 + "](" * 3900, "*a " * 2600, "- " * 3900, "`" * 7900, "|a" * 3900]
)
def test_costly_markdown(depth):
    """Fails when a comment that is allowed takes seconds to render."""
    import time

    start = time.process_time()
    render(depth)
    assert time.process_time() - start < 2.0


# -- the database -------------------------------------------------------------------------------

INJECTIONS = ["' OR '1'='1", "'; DROP TABLE paper; --", '" UNION SELECT email FROM person --', "1) OR (1=1", "\\'; --"]


@pytest.mark.parametrize("text_", INJECTIONS)
def test_no_sql_from_outside(person, site, text_):
    """Fails when text from outside becomes SQL, by any parameter or field."""
    for address in ("/search", "/api/v1/papers"):
        for name in ("q", "tag"):
            response = person.get(address, params={name: text_})
            assert response.status_code == 200
            assert "ada@example.org" not in response.text
        for name in ("family", "year", "verdict", "page"):
            assert person.get(address, params={name: text_}).status_code in (400, 422)
    for address in (f"/papers/{text_}", f"/families/{text_}", f"/day/{text_}", f"/api/v1/papers/{text_}"):
        assert person.get(address).status_code == 404
    send(person, "/me", "/me", name=f"Ada {text_}")
    send(person, PAGE, f"{PAGE}/comments", body=text_)
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Paper)) == len(ENTRIES)
        assert session.scalars(select(Comment.body)).one() == text_
        assert session.scalars(select(Person.name)).one() == f"Ada {text_}"
        assert session.execute(text("PRAGMA integrity_check")).scalar() == "ok"


def test_null_characters(person, site):
    """Fails when a character that PostgreSQL does not store ends in an error of ours."""
    assert person.get("/search?q=%00").status_code == 400
    assert person.get("/papers/a%00b").status_code == 400
    send(person, PAGE, f"{PAGE}/comments", body="a\0b")
    send(person, "/me", "/me", name="a\0b")
    with site.read() as session:
        assert session.scalars(select(Comment.body)).one() == "ab"
        assert session.scalars(select(Person.name)).one() == "ab"
    assert person.get(URL).status_code == 200


def test_files_outside_are_not_served(client):
    """Fails when an address leads out of the folder of static files."""
    for address in (
        "/static/../settings.py",
        "/static/..%2fsettings.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
    ):
        assert client.get(address).status_code == 404
