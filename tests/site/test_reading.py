"""What readers find beside lists and search: guide, leaders, what changed, my problems, votes from lists, sharing."""

import datetime
import re

from sqlalchemy import select
from tests.site.helpers import URL, Forms, something_new

from regularized.papers.catalogue import load_catalogue
from regularized.site import queries
from regularized.site.guides import guide
from regularized.site.importing import Incoming, store
from regularized.site.models import Paper, Vote

ENTRIES = load_catalogue()
RUNS = next(entry for entry in ENTRIES if entry.implemented and entry.page)


def test_the_guide_stands_on_the_papers_page(client):
    """Fails when the site says less than the documentation, shows its markers, or a link leads nowhere."""
    page = client.get(f"/papers/{RUNS.slug}").text
    assert 'id="guide"' in page
    first = re.search(r"^## (.+)$", RUNS.page, re.MULTILINE)[1]
    assert f"<h3>{first}</h3>" in page
    for entry in ENTRIES:
        shown = guide(entry.slug, "regularized.papers")
        assert bool(shown) == bool(entry.page)
        assert "{{" not in shown
        assert "!!!" not in shown
        for target in re.findall(r'href="([^"]*)"', shown):
            assert target.startswith(("https://", "http://", "/papers/")), (entry.slug, target)
    assert guide("nothing", "regularized.papers") == ""


def test_contents_of_a_papers_page(client, site):
    """Fails when a paper's page names a part that it has not, leaves out a long one, or names them in another order."""
    measured = next(
        entry for entry in ENTRIES if entry.ledger.is_file() and entry.page and (entry.folder / "bench.json").is_file()
    )
    listed = Incoming("Zymurgical networks", datetime.date(2026, 3, 2), "arxiv", arxiv="2603.00001")
    with site.write.begin() as session:
        (stored,) = store(session, [listed], now=1)
    always = {"use", "cite", "discussion"}
    for slug, more in ((measured.slug, {"summary", "guide", "claims", "cost", "related"}), (stored.slug, set())):
        page = client.get(f"/papers/{slug}").text
        contents = page.partition('aria-label="On this page">')[2].partition("</nav>")[0]
        named = re.findall(r'href="#([\w-]+)"', contents)
        places = re.findall(r'\bid="([\w-]+)"', page)
        assert named == [place for place in places if place in named], slug
        assert always | more <= set(named)
        assert more or not {"summary", "guide", "claims", "curves", "cost"} & set(named)


def test_authors_organisation_and_venue_are_found(client, site):
    """Fails when a paper is not found by who wrote it, or where."""
    paper = Incoming(
        "Zymurgical networks",
        datetime.date(2026, 3, 2),
        "arxiv",
        authors=("Grace Hopperlin",),
        organization="Brewery University",
        arxiv="2603.00001",
    )
    with site.write.begin() as session:
        store(session, [paper], now=1)
    for question in ("hopperlin", "brewery university"):
        assert "Zymurgical networks" in client.get("/search", params={"q": question}).text
    known = next(entry for entry in ENTRIES if entry.card.authors)
    surname = known.card.authors[0].split()[-1]
    found = client.get("/api/v1/papers", params={"q": f"{surname} {known.card.authors[-1]}"}).json()["papers"]
    assert known.slug in [paper["slug"] for paper in found]


def test_weak_hits_are_left_out(client):
    """Fails when a question of common words finds nearly every paper: one once returned 44 of 44."""
    for question in ("training network model with less data", "learning deep networks"):
        assert client.get("/api/v1/papers", params={"q": question}).json()["total"] < 0.6 * len(ENTRIES)


def test_the_cost_of_a_question_is_bounded(site):
    """Fails when a question of many, or of repeated, words costs more queries than one of a few."""
    from sqlalchemy import event

    from regularized.site.search import find

    counted = []
    with site.read() as session:
        event.listen(site.engine, "before_cursor_execute", lambda *arguments: counted.append(arguments[2]))
        costs = []
        for question in (
            "training network model",
            "training network model " * 15,
            " ".join(f"w{i}x" for i in range(90)),
        ):
            counted.clear()
            find(session, question)
            costs.append(len(counted))
    assert costs[1] <= costs[0] + 2  # the pair "model training"
    assert costs[2] < 120


def test_votes_from_a_list(person, site):
    """Fails when a list has no buttons for who has signed in, they do not count, or lead away from the list."""
    address = f"/papers/{ENTRIES[0].slug}/vote"
    page = person.get("/?page=1")
    hidden = Forms(page.text).found[address]
    voted = person.post(address, data=hidden, headers={"origin": URL})
    assert voted.headers["location"] == f"/?page=1#paper-{ENTRIES[0].slug}"
    with site.read() as session:
        assert session.scalar(select(Vote.paper_id)) is not None
    assert Forms(person.get("/").text).found[address]["on"] == ""
    away = person.post(address, data={**hidden, "back": "https://evil.example/"}, headers={"origin": URL})
    assert away.headers["location"].startswith("/#")


def test_nobody_else_sees_those_buttons(client):
    """Fails when who only reads gets forms, and with them a cookie."""
    page = client.get("/")
    assert "row-vote" not in page.text
    assert "set-cookie" not in page.headers


def test_my_problems(person, site):
    """Fails when following a problem means nothing."""
    from tests.site.helpers import send

    entry = ENTRIES[0]
    family = entry.card.families[0]
    assert "You follow no problem yet" in person.get("/me/problems").text
    send(person, f"/families/{family}", f"/families/{family}/follow", on="1")
    page = person.get("/me/problems").text
    assert f'href="/papers/{entry.slug}"' in page
    with site.read() as session:
        inside = {paper.slug for paper in queries.list_papers(session, families=[family], per_page=100).papers}
    assert inside == {entry.slug for entry in ENTRIES if family in entry.card.families}
    assert 'href="/me/problems"' in person.get("/me").text
    person.cookies.clear()
    assert person.get("/me/problems").status_code == 303


def test_what_changed_by_day(client, site, clock):
    """Fails when a verdict that flipped, or a paper that came in, is not under its day."""
    clock.now += 3 * 24 * 3600
    something_new(site, clock, RUNS.slug)
    page = client.get("/changes").text
    days = re.findall(r'id="day-(\d{4}-\d\d-\d\d)"', page)
    assert days == sorted(days, reverse=True)
    assert days[0] == datetime.datetime.fromtimestamp(clock.now, datetime.UTC).date().isoformat()
    latest = page.split('id="day-')[1]
    assert "It &lt;helps&gt;." in latest
    assert f'href="/papers/{RUNS.slug}"' in latest


def test_leaders_by_problem(client, site):
    """Fails when a problem's best-proven technique is not its first, or one of which nothing holds leads."""
    page = client.get("/leaders").text
    with site.read() as session:
        papers = [paper for paper in queries.comparison(session) if paper.held]
        assert papers
        for family in papers[0].families:
            board = page.split(f'id="leaders-{family}"')[1]
            assert re.search(r'href="/papers/(\w+)"', board)[1] == papers[0].slug
        nothing = session.scalars(select(Paper).where(Paper.runs, Paper.held == 0)).all()
    for paper in nothing:
        assert f'href="/papers/{paper.slug}"' not in page


def test_what_is_shared_has_a_title_and_a_description(client):
    """Fails when a link that is shared shows neither what it is, nor where."""
    page = client.get(f"/papers/{RUNS.slug}").text
    told = dict(re.findall(r'<meta property="og:(\w+)" content="([^"]*)">', page))
    assert told["title"].startswith(RUNS.card.title[:20])
    assert told["url"] == f"{URL}/papers/{RUNS.slug}"
    assert told["description"] == re.search(r'<meta name="description" content="([^"]*)">', page)[1]
    assert len(told["description"]) > 20


def test_lists_are_linked(client):
    """Fails when a list can be reached by who knows its address alone."""
    page = client.get("/").text
    for address in ("/new", "/changes", "/leaders", "/compare"):
        assert f'href="{address}"' in page
    assert "Side by side" in page
