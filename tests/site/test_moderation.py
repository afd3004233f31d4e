"""Moderators: hiding, banning, removing, correcting, reports, the log; and names that pass for others."""

import datetime
import json
import re

import pytest
from sqlalchemy import func, select
from tests.site.helpers import Forms, send, sign_in

from regularized.papers.catalogue import load_catalogue
from regularized.site import queries
from regularized.site.importing import Incoming, store
from regularized.site.models import Comment, ModerationEvent, Paper, Person, Report
from regularized.site.moderation import Moderation, NotPossible

PAPER = load_catalogue()[-1]
PAGE = f"/papers/{PAPER.slug}"
IMPORTED = Incoming("Zymurgical networks", datetime.date(2026, 3, 2), "arxiv", abstract="Brew.", arxiv="2603.00001")


def acting(session, site):
    return Moderation(session, "command line", site.settings.now)


@pytest.fixture
def moderator(client, outbox, site):
    """A client of a moderator, after somebody else has said something."""
    sign_in(client, outbox, "eve@example.org")
    send(client, PAGE, f"{PAGE}/vote", on="1")
    send(client, PAGE, f"{PAGE}/comments", body="Buy *pills*")
    client.cookies.clear()
    with site.write.begin() as session:
        acting(session, site).appoint("mod@example.org", on=True, reason="first one")
    sign_in(client, outbox, "mod@example.org")
    return client


def said(site):
    with site.read() as session:
        return session.scalars(select(Comment)).one()


def counts(site):
    with site.read() as session:
        paper = queries.by_slug(session, PAPER.slug)
        return paper.votes, paper.comments


def test_a_comment_is_hidden_and_shown_again(moderator, site):
    """Fails when what a moderator hides is still read, still counts, or leaves no line in the log."""
    number = said(site).id
    send(moderator, PAGE, f"/moderation/comments/{number}", act="hide", reason="Advertising.")
    page = moderator.get(PAGE).text
    assert "pills" not in page
    assert "hidden this comment: Advertising." in page
    assert counts(site) == (1, 0)
    send(moderator, PAGE, f"/moderation/comments/{number}", act="show", reason="It was a joke.")
    assert "<em>pills</em>" in moderator.get(PAGE).text
    assert counts(site) == (1, 1)
    with site.read() as session:
        events = session.scalars(select(ModerationEvent).order_by(ModerationEvent.id)).all()
    assert [(event.action, event.moderator) for event in events] == [
        ("appoint", "command line"),
        ("hide comment", "mod@example.org"),
        ("show comment", "mod@example.org"),
    ]
    assert events[1].details["body"] == "Buy *pills*"
    assert "Advertising." in moderator.get("/moderation").text
    without = send(moderator, PAGE, f"/moderation/comments/{number}", act="hide", reason="  ")
    assert (without.status_code, "give a reason" in without.text) == (400, True)


def test_a_banned_person_is_out(moderator, outbox, site, app):
    """Fails when who is banned can go on, come back by a new link, or still moves the counts."""
    from starlette.testclient import TestClient

    banned = TestClient(app, follow_redirects=False)
    sign_in(banned, outbox, "eve@example.org")
    assert banned.get("/me").status_code == 200
    person = said(site).person_id
    send(moderator, PAGE, f"/moderation/people/{person}", act="ban", reason="Advertising.", hide_comments="1")
    assert banned.get("/me").status_code == 303
    assert counts(site) == (0, 0)
    assert "pills" not in banned.get(PAGE).text
    send(banned, "/sign-in", "/sign-in", email="eve@example.org")
    refused = send(banned, outbox.link("/sign-in/link"), "/sign-in/link")
    assert (refused.status_code, "Advertising." in refused.text) == (403, True)
    send(moderator, "/moderation", f"/moderation/people/{person}", act="unban", reason="Sorry.")
    sign_in(banned, outbox, "eve@example.org")
    assert counts(site) == (1, 0)  # what was hidden stays hidden until somebody shows it
    own = site.read().scalar(select(Person.id).where(Person.role == "moderator"))
    with site.write.begin() as session, pytest.raises(NotPossible, match="role"):
        acting(session, site).ban(session.get_one(Person, own), "x")


def test_nobody_else_moderates(person, outbox, site):
    """Fails when a reader can open the moderators' page, or send one of its forms."""
    send(person, PAGE, f"{PAGE}/comments", body="mine")
    assert person.get("/moderation").status_code == 404
    assert "/moderation" not in person.get(PAGE).text
    token = Forms(person.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    for address, act in (
        (f"comments/{said(site).id}", "hide"),
        ("people/1", "ban"),
        (f"papers/{PAPER.slug}", "remove"),
    ):
        answer = person.post(f"/moderation/{address}", data={"token": token, "act": act, "reason": "x"})
        assert answer.status_code == 404
    assert said(site).hidden_because is None


def test_a_comment_is_reported(moderator, outbox, site, app):
    """Fails when a report does not reach the moderators, counts twice, or stays when they have decided.

    Or when the forms of a comment that stands twice on their page, reported and among the latest, cannot be told apart.
    """
    from starlette.testclient import TestClient

    number = said(site).id
    reader = TestClient(app, follow_redirects=False)
    sign_in(reader, outbox, "ada@example.org")
    action = f"/comments/{number}/report"
    assert send(reader, PAGE, action, reason="It sells <pills>.").status_code == 303
    assert "You have reported this comment" in reader.get(PAGE).text
    token = Forms(reader.get(PAGE).text).found[f"{PAGE}/vote"]["token"]
    assert reader.post(action, data={"token": token, "reason": "again"}).status_code == 303
    page = moderator.get("/moderation").text
    assert "1 report: It sells &lt;pills&gt;." in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert f"why-{number}" in ids
    assert len(ids) == len(set(ids))
    send(moderator, "/moderation", f"/moderation/comments/{number}", act="show", reason="It is fine.")
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Report)) == 0


def test_a_paper_is_corrected_and_removed(moderator, site):
    """Fails when a wrong paper cannot be mended or comes back with the next import; or a card is overruled."""
    with site.write.begin() as session:
        (stored,) = store(session, [IMPORTED], now=1)
    page = f"/papers/{stored.slug}"
    action = f"/moderation/papers/{stored.slug}"
    changed = send(moderator, page, action, act="correct", field="title", value=" Better  title ", reason="A typo.")
    assert changed.headers["location"] == page
    assert "<h1>Better title</h1>" in moderator.get(page).text
    assert "Better title" in moderator.get("/search?q=better+title").text
    for field, value in (("date", "yesterday"), ("title", "…"), ("slug", "x"), ("code_url", "javascript:x")):
        assert send(moderator, page, action, act="correct", field=field, value=value, reason="x").status_code == 400
    assert send(moderator, page, action, act="remove", reason="Spam.").headers["location"] == "/moderation"
    assert moderator.get(page).status_code == 404
    with site.write.begin() as session:
        assert [row.outcome for row in store(session, [IMPORTED], now=2)] == ["removed"]
        other = Incoming("Zymurgical networks", datetime.date(2026, 3, 2), "arxiv")
        assert [row.outcome for row in store(session, [other], now=2)] == ["removed"]
        card = queries.by_slug(session, PAPER.slug)
        with pytest.raises(NotPossible, match="card"):
            acting(session, site).remove(card, "x")


@pytest.mark.parametrize(
    "name", ["regularized staff", "Admin", "аdmin", "ADM1N", "Moderator", "reader 1", "Reader 12", "The Team", "·"]
)
def test_names_that_pass_for_the_site(person, site, name):
    """Fails when a reader can call themselves what only who runs the site is."""
    refused = send(person, "/me", "/me", name=name)
    assert refused.status_code == 400
    with site.read() as session:
        assert session.scalars(select(Person.name)).one() == ""


def test_a_name_is_one_persons(person, outbox, site, app):
    """Fails when two people can have one name, or names that look the same."""
    from starlette.testclient import TestClient

    assert send(person, "/me", "/me", name="Ada Lovelace").status_code == 303
    assert send(person, "/me", "/me", name="Ada Lovelace").status_code == 303  # one's own
    other = TestClient(app, follow_redirects=False)
    sign_in(other, outbox, "eve@example.org")
    for name in ("Ada Lovelace", "ada lovelace", "Adа Lоvelace", "Ada  Lóvelace", "A.d.a Lovelace"):
        assert send(other, "/me", "/me", name=name).status_code == 400, name
    assert send(other, "/me", "/me", name="Ada Byron").status_code == 303
    assert send(person, "/me", "/me", name="").status_code == 303
    assert send(other, "/me", "/me", name="Ada Lovelace").status_code == 303


def test_commands(tmp_path, monkeypatch):
    """Fails when an operator cannot appoint, hide or look at the log without a browser."""
    from tests.site.test_site_commands import call

    from regularized.site.opening import open_site
    from regularized.site.settings import Settings

    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    monkeypatch.setenv("REGULARIZED_SITE_ENCODER", "off")
    site = open_site(Settings.from_environment())
    with site.write.begin() as session:
        session.add(Person(email="eve@example.org", created_at=1))
        session.flush()
        paper, person = session.scalars(select(Paper.id)).first(), session.scalars(select(Person.id)).one()
        session.add(Comment(paper_id=paper, person_id=person, body="x", html="x", at=1))
        store(session, [IMPORTED], now=1)
    number = said(site).id
    assert call("moderate", "appoint", "mod@example.org", "--because", "trusted").exit_code == 0
    assert call("moderate", "hide", str(number), "--because", "spam").exit_code == 0
    assert call("moderate", "ban", "eve@example.org", "--because", "spam").exit_code == 0
    done = call("moderate", "correct", "arxiv-2603.00001", "--set", "venue=ICML", "--because", "known now")
    assert done.exit_code == 0, done.output
    assert call("moderate", "remove", "nothing", "--because", "x").exit_code == 3
    assert call("moderate", "remove", PAPER.slug, "--because", "x").exit_code == 2
    told = json.loads(call("moderate", "log", "--json").stdout)
    assert [row["action"] for row in told] == ["correct paper", "ban", "hide comment", "appoint"]
    assert said(site).hidden_because == "spam"
    site.engine.dispose()
