"""Many at once, on both databases: what is counted is counted right, and nobody gets a defect for an answer."""

import datetime
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from starlette.testclient import TestClient
from tests.site.helpers import START, URL, Clock, settings_in

from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue
from regularized.site import trending
from regularized.site.app import create_app
from regularized.site.database import insert_new, migrate, one_at_a_time, open_database
from regularized.site.importing import Incoming, store
from regularized.site.locks import lock_papers, lock_person
from regularized.site.mail import Mailer
from regularized.site.models import (
    Comment,
    Follow,
    LoginSession,
    ModerationEvent,
    Paper,
    Person,
    SearchWord,
    Subscription,
    Vote,
)
from regularized.site.moderation import MODERATOR, Moderation
from regularized.site.security import form_token, hashed, new_token, seal_cookie, seal_link
from regularized.site.state import Site
from regularized.site.sync import sync_catalogue
from regularized.site.templating import environment

PAPERS = [
    Incoming(f"{name} networks", datetime.date(2026, 3, 2), "arxiv", abstract=f"{name} brewing.", arxiv=f"2603.0000{i}")
    for i, name in enumerate(("Zymurgical", "Fermented"))
]
VOTERS = 16


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """Address of a database without tables."""
    if request.param == "postgresql":
        return request.getfixturevalue("empty_postgresql")
    return f"sqlite:///{tmp_path / 'site.sqlite'}"


@pytest.fixture
def small(database, tmp_path):
    """A site with two papers."""
    engine = open_database(database)
    migrate(engine)
    settings = settings_in(tmp_path, database=database, clock=Clock())
    site = Site(settings, engine, environment(), Mailer(settings), None)
    with site.write.begin() as session:
        store(session, PAPERS, now=START)
    yield site
    engine.dispose()


def browsers(site, count):
    """Clients of as many people who have signed in."""
    app = create_app(site)
    people = []
    with site.write.begin() as session:
        for number in range(count):
            token = new_token()
            person = session.scalar(
                insert(Person).values(email=f"p{number}@example.org", name="", created_at=START).returning(Person.id)
            )
            session.add(LoginSession(digest=hashed(token), person_id=person, expires_at=START + 10**6))
            people.append(token)
    for token in people:
        client = TestClient(app, follow_redirects=False, raise_server_exceptions=False)
        client.cookies.set("session", seal_cookie(site.settings, token, salt="session"))
        client.token = form_token(site.settings, token)
        yield client


def post(client, address, **fields):
    return client.post(address, data={"token": client.token, **fields}, headers={"origin": URL}).status_code


def at_once(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def test_votes_of_many_at_once(small):
    """Fails when a vote or a comment is not counted: of 100 votes of 16 voters, 93 once were."""
    with small.read() as session:
        slugs = session.scalars(select(Paper.slug).order_by(Paper.id)).all()

    def acts(client):
        answers = []
        for slug in slugs:
            page = f"/papers/{slug}"
            answers += [post(client, f"{page}/vote", on=on) for on in ("1", "", "1")]
            answers.append(post(client, f"{page}/comments", body="Fine."))
        return answers

    answers = at_once([lambda client=client: acts(client) for client in browsers(small, VOTERS)])
    assert {status for some in answers for status in some} == {303}
    with small.write.begin() as session:
        for paper in session.scalars(select(Paper)).all():
            counted = (paper.votes, paper.comments, paper.heat)
            assert counted[:2] == (VOTERS, VOTERS)
            trending.update(session, paper)
            assert counted == (paper.votes, paper.comments, paper.heat)
        assert session.scalar(select(func.count()).select_from(Vote)) == VOTERS * len(slugs)


def test_one_person_in_several_windows(small):
    """Fails when the same form, sent several times at once, is a defect or counts more than once."""
    (client,) = browsers(small, 1)
    with small.read() as session:
        slug = session.scalars(select(Paper.slug)).first()
    family = next(iter(FAMILIES))
    wish = seal_link(
        small.settings,
        {"email": "ada@example.org", "frequency": "daily", "families": [], "at": START},
        purpose="subscribe",
    )
    forms = [
        (f"/papers/{slug}/vote", {"on": "1"}),
        (f"/families/{family}/follow", {"on": "1"}),
        ("/digest/confirm", {"wish": wish}),
        (f"/papers/{slug}/comments", {"body": "Once."}),
    ] * 6
    answers = at_once([lambda form=form: post(client, form[0], **form[1]) for form in forms])
    assert set(answers) == {200, 303}
    with small.read() as session:
        counts = [session.scalar(select(func.count()).select_from(table)) for table in (Vote, Follow, Subscription)]
        assert counts == [1, 1, 1]
        assert session.scalar(select(Paper.votes).where(Paper.slug == slug)) == 1
        assert session.scalar(select(Paper.comments).where(Paper.slug == slug)) == len(
            session.scalars(select(Comment.id)).all()
        )


def test_who_leaves_while_voting_stays_away(small):
    """Fails when a form that arrives while a person is being deleted makes them again, or is a defect."""
    (client,) = browsers(small, 1)
    with small.read() as session:
        slug = session.scalars(select(Paper.slug)).first()
    calls = [lambda: post(client, "/me/delete")]
    calls += [lambda: post(client, f"/papers/{slug}/vote", on="1")] * 4 + [lambda: post(client, "/me", name="Ada")] * 4
    assert set(at_once(calls)) <= {303, 409}
    with small.read() as session:
        assert [session.scalar(select(func.count()).select_from(table)) for table in (Person, Vote)] == [0, 0]
        assert session.scalar(select(Paper.votes).where(Paper.slug == slug)) == 0


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("ends", ["delete", "ban"])
def test_a_vote_that_is_being_written_while_its_person_goes(small, ends):
    """Fails when who deletes or bans a person looks for their votes before those that are on the way are there.

    SQLite has one writer at a time.
    """
    (client,) = browsers(small, 1)

    def leave():
        if ends == "delete":
            return post(client, "/me/delete")
        with small.write.begin() as session:
            Moderation(session, "command line", START).ban(session.scalars(select(Person)).one(), "Sold votes.")
        return 303

    with ThreadPoolExecutor(1) as pool:
        with small.write.begin() as session:
            paper = session.scalars(select(Paper).order_by(Paper.id)).first()
            person = session.scalar(select(Person.id))
            lock_person(session, person)
            lock_papers(session, paper.id)
            insert_new(session, Vote, [{"person_id": person, "paper_id": paper.id, "at": START}])
            trending.update(session, paper)
            assert paper.votes == 1
            session.flush()
            left = pool.submit(leave)
            until_it_waits(small, left)
        assert left.result() == 303
    with small.read() as session:
        assert session.scalar(select(Paper.votes).where(Paper.id == paper.id)) == 0


def until_it_waits(site, call):
    """Returns when a call on PostgreSQL waits for a lock, or is done."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    while not call.done():
        with site.read() as other:
            if other.scalar(waiting):
                return


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_what_goes_while_a_moderator_decides(small):
    """Fails when hiding a comment that its author deletes, or correcting a paper that another removes, is a defect.

    SQLite has one writer at a time.
    """
    author, moderator = browsers(small, 2)
    with small.write.begin() as session:
        session.execute(update(Person).where(Person.email == "p1@example.org").values(role=MODERATOR))
        paper = session.scalars(select(Paper).order_by(Paper.id)).first()
    assert post(author, f"/papers/{paper.slug}/comments", body="Nonsense.") == 303
    with small.read() as session:
        number = session.scalar(select(Comment.id))
    hides = f"/moderation/comments/{number}", {"act": "hide", "reason": "Rude."}
    corrects = (
        f"/moderation/papers/{paper.slug}",
        {"act": "correct", "field": "venue", "value": "X", "reason": "Wrong."},
    )
    for gone, (address, fields), answer in (
        (delete(Comment).where(Comment.id == number), hides, 400),
        (delete(Paper).where(Paper.id == paper.id), corrects, 409),
    ):
        with ThreadPoolExecutor(1) as pool:
            with small.write.begin() as session:
                one_at_a_time(session, "catalogue")
                lock_papers(session, paper.id)
                session.execute(gone)
                decided = pool.submit(post, moderator, address, **fields)
                until_it_waits(small, decided)
            assert decided.result() == answer
    with small.read() as session:
        assert session.scalars(select(ModerationEvent.id)).all() == []


def test_two_that_import_the_same(small):
    """Fails when a paper comes in twice, or one of two imports breaks off."""
    fresh = [Incoming(f"New paper {i}", datetime.date(2026, 3, 2), "arxiv", arxiv=f"2603.1000{i}") for i in range(5)]

    def imports(papers):
        with small.write.begin() as session:
            return [row.outcome for row in store(session, papers, now=START)]

    outcomes = at_once([lambda: imports(fresh), lambda: imports(fresh[::-1]), lambda: imports(fresh)])
    assert sorted(outcome for some in outcomes for outcome in some) == ["added"] * 5 + ["known"] * 10


def test_several_that_start_on_an_empty_database(database):
    """Fails when of two processes that start for the first time one dies, in the migration or in writing the papers."""
    code = f"from regularized.site.database import *; migrate(open_database({database!r})); print('done')"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in started] == ["done\n", "done\n"]
    entries = load_catalogue()[:6]
    engine = open_database(database)

    def sync():
        from regularized.site.database import sessions

        with sessions(engine, writes=True).begin() as session:
            return sync_catalogue(session, entries, now=START).added

    assert sorted(at_once([sync, sync, sync])) == [0, 0, len(entries)]
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(SearchWord)) > 100
    engine.dispose()
