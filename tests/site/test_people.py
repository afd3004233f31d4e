"""What people do: sign in, vote, comment, follow, subscribe, leave; and that mail arrives."""

import email.utils
import re

from sqlalchemy import func, select
from tests.site.helpers import Forms, send, sign_in, something_new, without_code

from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue
from regularized.site import queries
from regularized.site.digest import write_digests
from regularized.site.models import Comment, Follow, Paper, Person, SignInToken, Subscription, Vote

ENTRIES = load_catalogue()
PAPER = ENTRIES[-1]
PAGE = f"/papers/{PAPER.slug}"
DAY = 24 * 3600


def count(site, table):
    with site.read() as session:
        return session.scalar(select(func.count()).select_from(table))


def paper(site):
    with site.read() as session:
        return queries.by_slug(session, PAPER.slug)


# -- signing in ---------------------------------------------------------------------------------


def test_sign_in_from_the_outbox(client, outbox, site):
    """Fails when the link does not sign in, leads elsewhere than asked, or the person has no name to show."""
    assert "Sign in" in client.get(PAGE).text
    asked = send(client, f"/sign-in?next={PAGE}", "/sign-in", email=" Ada@Example.org ")
    assert asked.status_code == 200
    (message,) = outbox.messages()
    assert message["To"] == "ada@example.org"
    assert message["Subject"] == "Sign in to regularized"
    assert [part.get_content_type() for part in message.walk()][1:] == ["text/plain", "text/html"]
    assert email.utils.parsedate_to_datetime(message["Date"]).timestamp() == site.settings.now
    link = outbox.link("/sign-in/link")
    assert client.get(link).status_code == 200
    assert count(site, Person) == 0
    used = send(client, link, "/sign-in/link")
    assert (used.status_code, used.headers["location"]) == (303, PAGE)
    assert "reader 1" in client.get(PAGE).text
    assert "ada@example.org" not in client.get(PAGE).text
    assert "ada@example.org" in client.get("/me").text
    assert list(site.settings.outbox.glob("*.part")) == []
    assert all(file.stat().st_mode & 0o077 == 0 for file in site.settings.outbox.iterdir())


def test_errors_know_who_asks(person):
    """Fails when an error page tells somebody who has signed in to sign in: unknown address, refused form."""
    missing = person.get("/nothing-here")
    refused = person.post(f"{PAGE}/vote", data={"token": "forged"})
    wrong = person.get("/search?family=x")
    assert [page.status_code for page in (missing, refused, wrong)] == [404, 403, 400]
    for page in (missing, refused, wrong):
        assert "reader 1" in page.text
        assert "Sign in" not in page.text
        assert "no-store" in page.headers["cache-control"]


def test_a_link_works_once_and_not_for_ever(client, outbox, clock, site):
    """Fails when a link that somebody finds later still signs in."""
    sign_in(client, outbox, "ada@example.org")
    used = outbox.link("/sign-in/link")
    client.cookies.clear()
    assert send(client, used, "/sign-in/link").status_code == 403
    send(client, "/sign-in", "/sign-in", email="ada@example.org")
    fresh = outbox.link("/sign-in/link")
    clock.now += 15 * 60 + 1
    assert send(client, fresh, "/sign-in/link").status_code == 403
    assert client.get("/me").status_code == 303
    send(client, "/sign-in", "/sign-in", email="ada@example.org")
    assert count(site, SignInToken) == 1  # what is too old is cleared away


def test_one_person_for_one_address(client, outbox, site):
    """Fails when the same address, written otherwise, makes a second person."""
    for address in ("ada@example.org", "ADA@example.org"):
        sign_in(client, outbox, address)
        client.cookies.clear()
    assert count(site, Person) == 1


def test_sessions_end(person, clock):
    """Fails when signing out leaves the cookie good for whoever has copied it, or a session never ends."""
    copied = person.cookies["session"]
    assert person.get("/me").status_code == 200
    signed_out = send(person, "/me", "/sign-out")
    assert signed_out.status_code == 303
    assert person.get("/me").status_code == 303
    person.cookies.set("session", copied)
    assert person.get("/me").status_code == 303


def test_a_session_ends_by_itself(person, clock, monkeypatch):
    """Fails when a stolen browser is signed in for ever."""
    assert person.get("/me").status_code == 200
    clock.now += 31 * DAY
    assert person.get("/me").status_code == 303


def test_wrong_addresses(client, outbox):
    """Fails when something that is no address gets a message."""
    for wrong in ("", "ada", "ada@", "@example.org", "a b@example.org", "ada@example", "ä@example.org", "a@b.c\nx"):
        assert send(client, "/sign-in", "/sign-in", email=wrong).status_code == 400
    assert outbox.messages() == []


# -- votes and comments -------------------------------------------------------------------------


def test_vote(person, site):
    """Fails when a vote does not count, counts twice, cannot be taken back, or moves the evidence."""
    before = paper(site)
    for _ in range(2):
        assert send(person, PAGE, f"{PAGE}/vote", on="1").headers["location"] == PAGE
    after = paper(site)
    assert (after.votes, count(site, Vote)) == (1, 1)
    assert (after.standing, after.held, after.margin) == (before.standing, before.held, before.margin)
    assert 'aria-pressed="true"' in person.get(PAGE).text
    assert PAPER.card.title in person.get("/trending").text.replace("&#39;", "'")
    send(person, PAGE, f"{PAGE}/vote", on="")
    assert (paper(site).votes, paper(site).heat, count(site, Vote)) == (0, None, 0)


def test_votes_of_several(client, outbox, site):
    """Fails when one person's vote replaces another's."""
    for name in ("ada", "bob", "eve"):
        client.cookies.clear()
        sign_in(client, outbox, f"{name}@example.org")
        send(client, PAGE, f"{PAGE}/vote", on="1")
    assert paper(site).votes == 3


def test_comment(person, site):
    """Fails when Markdown is not rendered, the name is missing, or the comment leads nowhere."""
    send(person, "/me", "/me", name=" Ada\u202e  Lovelace ")
    said = send(person, PAGE, f"{PAGE}/comments", body="It *works* with `seed=3`.\n\n- one\n- two")
    assert re.fullmatch(rf"{PAGE}#comment-\d+", said.headers["location"])
    html = person.get(PAGE).text
    assert "<em>works</em>" in html
    assert "<li>one</li>" in html
    assert "<strong>Ada Lovelace</strong>" in html
    assert paper(site).comments == 1
    assert send(person, PAGE, f"{PAGE}/comments", body="  \n ").status_code == 400
    assert count(site, Comment) == 1


def test_comments_are_paged(person, site, clock):
    """Fails when a long discussion is sent whole, a comment is on no page, or who writes one does not see it."""
    with site.write.begin() as session:
        number, author = (
            session.scalar(select(Paper.id).where(Paper.slug == PAPER.slug)),
            session.scalar(select(Person.id)),
        )
        session.add_all(
            Comment(paper_id=number, person_id=author, body="x", html=f"<p>said {i:03}</p>", at=int(clock.now))
            for i in range(110)
        )
    pages = [re.findall(r"said (\d{3})", person.get(PAGE, params={"comments": i}).text) for i in (1, 2, 3)]
    assert [len(page) for page in pages] == [50, 50, 10]
    assert [int(number) for page in pages for number in page] == list(range(110))
    assert f'href="{PAGE}?comments=2#discussion"' in person.get(PAGE).text
    assert person.get(PAGE, params={"comments": 4}).status_code == 404
    said = send(person, PAGE, f"{PAGE}/comments", body="the last word")
    assert re.fullmatch(rf"{PAGE}\?comments=3#comment-\d+", said.headers["location"])
    assert "the last word" in person.get(said.headers["location"]).text


def test_only_ones_own_comment_can_be_deleted(client, outbox, site):
    """Fails when anybody can delete what somebody else has said."""
    sign_in(client, outbox, "ada@example.org")
    send(client, PAGE, f"{PAGE}/comments", body="mine")
    with site.read() as session:
        number = session.scalar(select(Comment.id))
    client.cookies.clear()
    sign_in(client, outbox, "eve@example.org")
    assert f"/comments/{number}/delete" not in client.get(PAGE).text
    token = Forms(client.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    assert client.post(f"/comments/{number}/delete", data={"token": token}).status_code == 404
    assert client.post(f"/comments/{10**30}/delete", data={"token": token}).status_code == 404
    assert count(site, Comment) == 1
    client.cookies.clear()
    sign_in(client, outbox, "ada@example.org")
    assert send(client, PAGE, f"/comments/{number}/delete").status_code == 303
    assert (count(site, Comment), paper(site).comments) == (0, 0)


def test_without_signing_in_nothing_is_done(client, site):
    """Fails when a form of somebody who has not signed in changes anything."""
    client.get("/sign-in")
    token = Forms(client.get("/sign-in").text).found["/sign-in"]["token"]
    family = PAPER.card.families[0]
    for address in (f"{PAGE}/vote", f"{PAGE}/comments", f"/families/{family}/follow", "/me", "/me/delete"):
        response = client.post(
            address, data={"token": token, "on": "1", "body": "x"}, headers={"referer": f"http://testserver{PAGE}"}
        )
        assert (response.status_code, response.headers["location"]) == (303, f"/sign-in?next={PAGE}")
    assert [count(site, table) for table in (Vote, Comment, Follow, Person)] == [0, 0, 0, 0]


def test_follow(person, site):
    """Fails when a followed problem is forgotten, or not proposed for the digest."""
    family = PAPER.card.families[0]
    page = f"/families/{family}"
    send(person, page, f"{page}/follow", on="1")
    assert FAMILIES[family] in person.get("/me").text
    assert re.search(rf'value="{family}" checked', person.get("/digest").text)
    send(person, page, f"{page}/follow", on="")
    assert count(site, Follow) == 0
    token = Forms(person.get(page).text).found[f"{page}/follow"]["token"]
    assert person.post("/families/nothing/follow", data={"token": token, "on": "1"}).status_code == 404


def test_leaving(person, site):
    """Fails when something of a person stays behind, or their vote goes on counting."""
    send(person, PAGE, f"{PAGE}/vote", on="1")
    send(person, PAGE, f"{PAGE}/comments", body="x")
    assert send(person, "/me", "/me/delete").status_code == 303
    assert [count(site, table) for table in (Person, Vote, Comment)] == [0, 0, 0]
    assert (paper(site).votes, paper(site).comments, paper(site).heat) == (0, 0, None)
    assert person.get("/me").status_code == 303


# -- the digest ---------------------------------------------------------------------------------


def subscribe(client, outbox, address="ada@example.org", **fields):
    assert send(client, "/digest", "/digest", email=address, **fields).status_code == 200
    link = outbox.link("/digest/confirm")
    confirmed = send(client, link, "/digest/confirm")
    assert confirmed.status_code == 200
    return link


def test_nothing_is_sent_before_it_is_confirmed(client, outbox, site, clock):
    """Fails when a stranger can subscribe an address, or a program that follows links confirms it."""
    send(client, "/digest", "/digest", email="victim@example.org", frequency="daily")
    assert client.get(outbox.link("/digest/confirm")).status_code == 200
    assert count(site, Subscription) == 0
    clock.now += 2 * DAY
    something_new(site, clock, PAPER.slug)
    assert write_digests(site).written == 0
    assert len(outbox.messages()) == 1


def test_digest(client, outbox, site, clock):
    """Fails when the digest lacks a part, its links or its headers, or goes out twice."""
    subscribe(client, outbox, frequency="daily")
    clock.now += DAY
    something_new(site, clock, PAPER.slug)
    without_code(site, PAPER.slug)
    assert write_digests(site).written == 1
    message = outbox.messages()[-1]
    text, html = (message.get_body((kind,)).get_content() for kind in ("plain", "html"))
    assert "1 changed verdicts, 1 new papers" in message["Subject"]
    for body in (text, html):
        assert PAPER.card.title in body
        assert f"http://testserver/papers/{PAPER.slug}" in body
        assert "/digest/unsubscribe?key=" in body
        assert "no runnable code yet" in body
    assert "It <helps>." in text
    assert "It &lt;helps&gt;." in html
    assert "http" not in re.sub(r'href="http[^"]*"', "", html)  # nothing is loaded when it is read
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert re.fullmatch(r"<http://testserver/digest/unsubscribe\?key=\S+>", message["List-Unsubscribe"])
    assert write_digests(site).written == 0
    clock.now += DAY
    assert (write_digests(site).empty, len(outbox.messages())) == (1, 2)


def test_frequency(client, outbox, site, clock):
    """Fails when a weekly digest comes daily, or a cron that is early by minutes skips a day."""
    subscribe(client, outbox, "daily@example.org", frequency="daily")
    subscribe(client, outbox, "weekly@example.org", frequency="weekly")
    got = []
    for _ in range(8):
        clock.now += DAY - 60
        something_new(site, clock, PAPER.slug)
        before = len(outbox.messages())
        write_digests(site)
        got.append(sorted(message["To"].split("@")[0] for message in outbox.messages()[before:]))
    assert got == [["daily"]] * 6 + [["daily", "weekly"], ["daily"]]


def test_digest_of_some_problems(client, outbox, site, clock):
    """Fails when a choice of problems is ignored."""
    other = next(family for family in FAMILIES if family not in PAPER.card.families)
    subscribe(client, outbox, "other@example.org", frequency="daily", family=other)
    subscribe(client, outbox, "same@example.org", frequency="daily", family=[PAPER.card.families[0], other])
    clock.now += DAY
    something_new(site, clock, PAPER.slug)
    result = write_digests(site)
    assert (result.written, result.empty) == (1, 1)
    assert outbox.messages()[-1]["To"] == "same@example.org"


def test_trending_in_the_digest(person, outbox, site, clock):
    """Fails when what is talked about is left out, or is told again when the talk is over."""
    subscribe(person, outbox, frequency="daily")
    clock.now += DAY
    send(person, PAGE, f"{PAGE}/vote", on="1")
    assert write_digests(site).written == 1
    assert "what is talked about" in outbox.messages()[-1]["Subject"]
    clock.now += DAY
    assert write_digests(site).empty == 1


def test_one_click_ends_it(client, outbox, site, clock, app):
    """Fails when a mail program cannot unsubscribe by itself (RFC 8058), or looking at the link does."""
    from starlette.testclient import TestClient

    subscribe(client, outbox, frequency="daily")
    clock.now += DAY
    something_new(site, clock, PAPER.slug)
    write_digests(site)
    address = outbox.messages()[-1]["List-Unsubscribe"].strip("<>").removeprefix("http://testserver")
    stranger = TestClient(app)
    assert stranger.get(address).status_code == 200
    assert count(site, Subscription) == 1
    clicked = stranger.post(address, data={"List-Unsubscribe": "One-Click"})
    assert (clicked.status_code, clicked.text) == (200, "unsubscribed\n")
    assert count(site, Subscription) == 0
    assert stranger.post(address, data={"List-Unsubscribe": "One-Click"}).status_code == 200
    clock.now += DAY
    something_new(site, clock, PAPER.slug)
    assert write_digests(site).written == 0


def test_unsubscribe_by_the_page(client, outbox, site, clock):
    """Fails when the link at the foot of a digest leads nowhere."""
    subscribe(client, outbox, frequency="daily")
    clock.now += DAY
    something_new(site, clock, PAPER.slug)
    write_digests(site)
    link = outbox.link("/digest/unsubscribe")
    (action,) = [action for action in Forms(client.get(link).text).found if "unsubscribe" in action]
    ended = client.post(action, headers={"accept": "text/html"})
    assert "You are unsubscribed" in ended.text
    assert count(site, Subscription) == 0
    assert client.get(link).status_code == 403


def test_changing_the_subscription(client, outbox, site, clock):
    """Fails when subscribing again doubles the digest, or an old confirmation is good for ever."""
    link = subscribe(client, outbox, frequency="daily")
    subscribe(client, outbox, frequency="weekly", family="curriculum")
    with site.read() as session:
        (kept,) = session.scalars(select(Subscription)).all()
    assert (kept.frequency, kept.families) == ("weekly", ["curriculum"])
    clock.now += 4 * DAY
    assert client.get(link).status_code == 403
    assert send(client, "/digest", "/digest", email="a@example.org", frequency="hourly").status_code == 400
    assert send(client, "/digest", "/digest", email="a@example.org", family="x").status_code == 400
