"""The same site on PostgreSQL, a real server."""

import datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select
from starlette.testclient import TestClient
from tests.site.helpers import START, Clock, Outbox, send, settings_in, sign_in, something_new

from regularized.papers.catalogue import load_catalogue
from regularized.papers.search import search as command_line
from regularized.site import queries
from regularized.site.app import create_app
from regularized.site.database import migrate, open_database
from regularized.site.digest import write_digests
from regularized.site.importing import Incoming, store
from regularized.site.mail import Mailer
from regularized.site.models import Base, Paper, Person, RateCount, Subscription, VerdictChange
from regularized.site.queries import Filters
from regularized.site.search import find
from regularized.site.state import Site
from regularized.site.sync import sync_catalogue
from regularized.site.templating import environment

pytest.importorskip("psycopg", reason='needs the extra "postgresql"')

ENTRIES = load_catalogue()
PAPER = ENTRIES[-1]


@pytest.fixture
def site(filled_postgresql, tmp_path):
    """The site on PostgreSQL."""
    settings = settings_in(tmp_path, database=filled_postgresql, clock=Clock())
    engine = open_database(settings.database)
    yield Site(settings, engine, environment(), Mailer(settings), None)
    engine.dispose()


def test_tables_and_synchronisation(site):
    """Fails when a migration or an upsert is SQLite's alone, or a second start changes rows."""
    migrate(site.engine)
    with site.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        differences = [d for d in compare_metadata(context, Base.metadata) if "vector" not in str(d)]
        assert differences == []
    with site.write.begin() as session:
        changes = sync_catalogue(session, ENTRIES, now=START + 1)
        assert (changes.added, changes.updated, changes.verdicts) == (0, 0, 0)


def test_lists_are_those_of_sqlite(site, filled):
    """Fails when the databases order, filter or count differently."""
    other = open_database(f"sqlite:///{filled}")
    from regularized.site.database import sessions

    with site.read() as here, sessions(other)() as there:
        for order in ("best", "new"):
            for filters in (Filters(), Filters(runs=True), Filters(family=PAPER.card.families[0]), Filters(year=2024)):
                pages = [queries.list_papers(s, order, filters=filters, per_page=100) for s in (here, there)]
                assert [p.slug for p in pages[0].papers] == [p.slug for p in pages[1].papers]
                assert pages[0].total == pages[1].total
        assert queries.counts(here) == queries.counts(there)
        assert queries.families(here) == queries.families(there)
        assert queries.tags(here) == queries.tags(there)
        assert queries.years(here) == queries.years(there)
        paper = queries.by_slug(here, ENTRIES[0].slug)
        assert queries.related(here, paper)
    other.dispose()


def test_search(site):
    """Fails when full text, stems, beginnings, misspelling or filters do not work on PostgreSQL."""
    with site.read() as session:
        for question in ("my labels are wrong", "annotators disagree", "over-confident", "forgets old tasks"):
            found = [paper.slug for paper in find(session, question, per_page=100).page.papers]
            expected = [entry.slug for entry in command_line(question, ENTRIES)]
            assert set(found[:3]) & set(expected[:3]), question
        first = find(session, "annotators disagree").page.papers[0].slug
        assert first == command_line("annotators disagree", ENTRIES)[0].slug
        assert find(session, "robust to adver").page.total
        assert find(session, "adversariel").page.total
        runs = find(session, "labels", filters=Filters(runs=True)).page.papers
        assert runs
        assert all(paper.runs for paper in runs)
        for hostile in ("'", '"', "& | !", "a:*", "\\", ":*", "<->", "日本語", "''')"):
            find(session, hostile)


def test_people_and_digest(site):
    """Fails when signing in, votes, comments, limits or the digest need SQLite."""
    client, outbox = TestClient(create_app(site), follow_redirects=False), Outbox(site)
    page = f"/papers/{PAPER.slug}"
    sign_in(client, outbox, "ada@example.org")
    assert send(client, page, f"{page}/vote", on="1").status_code == 303
    assert send(client, page, f"{page}/comments", body="*fine* \U0001f600").status_code == 303
    assert "<em>fine</em> \U0001f600" in client.get(page).text
    assert PAPER.card.title in client.get("/trending").text.replace("&#39;", "'")
    send(client, "/digest", "/digest", email="ada@example.org", frequency="daily")
    assert send(client, outbox.link("/digest/confirm"), "/digest/confirm").status_code == 200
    site.settings.clock.now += 24 * 3600
    something_new(site, site.settings.clock, PAPER.slug)
    assert write_digests(site).written == 1
    link = outbox.messages()[-1]["List-Unsubscribe"].strip("<>").removeprefix("http://testserver")
    assert client.post(link).status_code == 200
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Subscription)) == 0
        assert session.scalar(select(func.count()).select_from(VerdictChange)) == 1
        assert session.scalar(select(func.max(RateCount.count))) >= 1
    assert send(client, "/me", "/me/delete").status_code == 303
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Person)) == 0


def test_pages_and_api(site):
    """Fails when a query of a page, a feed or the API is SQLite's alone."""
    client = TestClient(create_app(site), follow_redirects=False)
    for address in ("/", "/new", "/trending", "/compare", "/month/2024-09", "/search?q=labels&year=2020", "/feeds"):
        assert client.get(address).status_code == 200
    for address in (f"/papers/{PAPER.slug}", "/feeds/best.atom", "/feeds/search.json?q=labels", "/feeds/verdicts.atom"):
        assert client.get(address).status_code == 200
    for address in ("/api/v1/papers?q=labels", f"/api/v1/papers/{PAPER.slug}", "/api/v1/families"):
        assert client.get(address).status_code == 200
    assert client.get("/search?q=%00").status_code == 400
    assert client.get("/papers/nothing").status_code == 404


def test_importing(site):
    """Fails when an imported paper is doubled, or not found on PostgreSQL."""
    paper = Incoming("Zymurgical networks", datetime.date(2026, 3, 2), "arxiv", abstract="Brewing.", arxiv="2603.00001")
    with site.write.begin() as session:
        assert [store(session, [paper], now=now)[0].outcome for now in (1, 2)] == ["added", "known"]
        assert session.scalar(select(func.count()).select_from(Paper)) == len(ENTRIES) + 1
        assert [found.title for found in find(session, "brewing").page.papers] == ["Zymurgical networks"]
