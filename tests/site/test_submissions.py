"""Answers to comments, papers that readers propose, and what the last import brought."""

import datetime

import pytest
from sqlalchemy import func, select
from tests.site.helpers import send, sign_in

from regularized.papers.catalogue import load_catalogue
from regularized.site import queries, remote
from regularized.site.importing import Incoming, Stored, remember
from regularized.site.listing import ImportFailed
from regularized.site.models import Comment, LastImport, ModerationEvent, Paper, Submission
from regularized.site.moderation import Moderation

PAGE = f"/papers/{load_catalogue()[-1].slug}"
FOUND = Incoming("Zymurgical networks", datetime.date(2026, 3, 2), "arxiv", abstract="Brew.", arxiv="2603.00001")


def all_comments(site):
    with site.read() as session:
        return session.scalars(select(Comment).order_by(Comment.id)).all()


def shown(text):
    return [text.find(word) for word in ("first one", "answer one", "answer two", "second one")]


def test_answers_stand_below_what_they_answer(person, site):
    """Fails when an answer is put at the end, an answer to an answer opens a further level, or none can be given."""
    send(person, PAGE, f"{PAGE}/comments", body="first one")
    send(person, PAGE, f"{PAGE}/comments", body="second one")
    first = all_comments(site)[0].id
    send(person, PAGE, f"/comments/{first}/answers", body="answer one")
    answer = all_comments(site)[-1].id
    there = send(person, PAGE, f"/comments/{answer}/answers", body="answer two")
    assert there.status_code == 303
    assert there.headers["location"].startswith(PAGE)
    places = shown(person.get(PAGE).text)
    assert min(places) > 0
    assert places == sorted(places)
    assert [comment.thread_id for comment in all_comments(site)] == [None, None, first, first]


def test_an_answer_outlives_what_it_answers(person, site):
    """Fails when deleting one's own comment deletes what others have answered."""
    send(person, PAGE, f"{PAGE}/comments", body="first one")
    first = all_comments(site)[0].id
    send(person, PAGE, f"/comments/{first}/answers", body="answer one")
    send(person, PAGE, f"/comments/{first}/delete")
    (left,) = all_comments(site)
    assert (left.body, left.thread_id) == ("answer one", None)
    assert "answer one" in person.get(PAGE).text


def test_answers_and_pages(person, site, monkeypatch):
    """Fails when an answer leads to another page than the one on which it stands."""
    monkeypatch.setattr(queries, "COMMENTS_PER_PAGE", 2)
    for text in ("first one", "second one", "third one"):
        send(person, PAGE, f"{PAGE}/comments", body=text)
    first = all_comments(site)[0].id
    there = send(person, PAGE, f"/comments/{first}/answers", body="answer one")
    assert there.headers["location"].partition("#")[0] == PAGE
    assert "answer one" in person.get(PAGE).text
    assert "second one" not in person.get(PAGE).text


def test_what_is_gone_or_hidden_cannot_be_answered(person, site):
    """Fails when an answer to nothing is kept."""
    send(person, PAGE, f"{PAGE}/comments", body="first one")
    number = all_comments(site)[0].id
    token = person.get("/me").text.partition('name="token" value="')[2].partition('"')[0]
    with site.write.begin() as session:
        Moderation(session, "command line", 1).hide(session.get_one(Comment, number), "Advertising.")
    for absent in (number, number + 1, 2**40):
        answer = person.post(f"/comments/{absent}/answers", data={"body": "x", "token": token})
        assert answer.status_code == 404
    assert len(all_comments(site)) == 1


def waiting(site):
    with site.read() as session:
        return session.scalars(select(Submission.arxiv)).all()


@pytest.fixture
def proposed(person, outbox, site, monkeypatch):
    """A moderator's client, after a reader has proposed a paper; nothing here asks arXiv."""
    send(person, "/submit", "/submit", paper="https://arxiv.org/abs/2603.00001v2", reason="It is on *topic*.")
    person.cookies.clear()
    with site.write.begin() as session:
        Moderation(session, "command line", 1).appoint("mod@example.org", on=True, reason="first one")
    sign_in(person, outbox, "mod@example.org")
    monkeypatch.setattr(remote, "fetch_arxiv", lambda identifier, endpoint: FOUND)
    return person


def test_a_proposed_paper_waits_for_a_moderator(proposed, site):
    """Fails when a proposal is listed by itself, is not seen by moderators, or is not there once taken."""
    assert waiting(site) == ["2603.00001"]
    assert "Zymurgical" not in proposed.get("/new").text
    page = proposed.get("/moderation").text
    assert "https://arxiv.org/abs/2603.00001" in page
    assert "It is on *topic*." in page
    without = send(proposed, "/moderation", "/moderation/submissions/2603.00001", act="take", reason=" ")
    assert (without.status_code, waiting(site)) == (400, ["2603.00001"])
    taken = send(proposed, "/moderation", "/moderation/submissions/2603.00001", act="take", reason="On topic.")
    assert "Zymurgical" in proposed.get(taken.headers["location"]).text
    assert "Zymurgical" in proposed.get("/new").text
    assert waiting(site) == []
    with site.read() as session:
        event = session.scalars(select(ModerationEvent).order_by(ModerationEvent.id.desc())).first()
    assert (event.action, event.subject, event.reason) == ("take submission", "arXiv 2603.00001", "On topic.")


def test_a_proposal_is_declined_or_waits_while_arxiv_is_away(proposed, site, monkeypatch):
    """Fails when a proposal is lost because arXiv does not answer, or a declined one is listed."""

    def away(identifier, endpoint):
        raise ImportFailed("arXiv does not answer.")

    monkeypatch.setattr(remote, "fetch_arxiv", away)
    tried = send(proposed, "/moderation", "/moderation/submissions/2603.00001", act="take", reason="On topic.")
    assert (tried.status_code, waiting(site)) == (400, ["2603.00001"])
    send(proposed, "/moderation", "/moderation/submissions/2603.00001", act="decline", reason="Beer.")
    assert waiting(site) == []
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Paper).where(Paper.arxiv == "2603.00001")) == 0
    assert proposed.get("/moderation").text.count("2603.00001") == 1  # the log


def test_what_cannot_be_proposed(person, site):
    """Fails when nonsense or a listed paper is queued, or others than moderators decide."""
    known = next(entry.card.arxiv for entry in load_catalogue() if entry.card.arxiv)
    assert send(person, "/submit", "/submit", paper="arxiv.org/abs/nonsense").status_code == 400
    assert send(person, "/submit", "/submit", paper=known).headers["location"].startswith("/papers/")
    assert waiting(site) == []
    send(person, "/submit", "/submit", paper="2603.00001")
    token = person.get("/me").text.partition('name="token" value="')[2].partition('"')[0]
    decided = person.post("/moderation/submissions/2603.00001", data={"act": "take", "reason": "x", "token": token})
    assert (decided.status_code, waiting(site)) == (404, ["2603.00001"])
    for _ in range(2):
        last = send(person, "/submit", "/submit", paper="2603.00002")
    assert last.status_code == 200
    assert send(person, "/submit", "/submit", paper="2603.00003").status_code == 429


def test_readers_see_whether_the_stream_is_alive(client, site):
    """Fails when a stream that stands still looks alive, or a failure hides when it last worked."""
    assert "last asked" not in client.get("/changes").text
    with site.write.begin() as session:
        remember(
            session,
            "daily",
            "2 March 2026",
            now=1_790_000_000,
            stored=[Stored("a", "a", "added"), Stored("b", "b", "known")],
        )
    assert "2 papers, 1 of them new" in client.get("/changes").text
    with site.write.begin() as session:
        remember(session, "daily", "3 March 2026", now=1_790_100_000, error="no network")
    page = client.get("/changes").text
    assert "it failed (no network); it last worked" in page
    with site.read() as session:
        assert session.scalars(select(LastImport)).one().worked_at == 1_790_000_000
