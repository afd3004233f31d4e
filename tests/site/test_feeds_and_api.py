"""Feeds that readers can read, and the API that its description promises."""

import datetime
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from tests.site.helpers import START, send

from regularized.evidence.claims import Verdict
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue
from regularized.papers.memory import Memory
from regularized.papers.search import search as command_line
from regularized.site import queries
from regularized.site.feeds import ENTRIES as MOST
from regularized.site.importing import Incoming, store
from regularized.site.models import Comment, VerdictChange
from regularized.site.sync import sync_catalogue

ENTRIES = load_catalogue()
MEASURED = next(entry for entry in ENTRIES if entry.ledger.is_file())
ATOM = "{http://www.w3.org/2005/Atom}"
OWN = "{urn:regularized:feed:1}"

FEEDS = ["best", "new", "trending", "verdicts", f"family/{MEASURED.card.families[0]}", "search"]


def atom(client, address):
    response = client.get(address)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/atom+xml")
    return ElementTree.fromstring(response.content)


@pytest.fixture
def changed(site):
    """A verdict that has changed."""
    with site.write.begin() as session:
        paper = queries.by_slug(session, MEASURED.slug)
        claim = paper.claims[0]
        session.add(
            VerdictChange(
                paper_id=paper.id, claim=claim.name, statement=claim.statement, old="open", new="holds", at=10**9
            )
        )


@pytest.mark.parametrize("name", FEEDS)
def test_atom_has_what_the_standard_asks_for(client, changed, name):
    """Fails when an element that RFC 4287 requires is missing, an id occurs twice, or a date cannot be read."""
    feed = atom(client, f"/feeds/{name}.atom")
    assert feed.tag == f"{ATOM}feed"
    for element in (feed, *feed.iter(f"{ATOM}entry")):
        for name_ in ("id", "title", "updated"):
            assert len(element.findall(f"{ATOM}{name_}")) == 1
        assert datetime.datetime.fromisoformat(element.find(f"{ATOM}updated").text).tzinfo is not None
    links = {link.get("rel"): link.get("href") for link in feed.findall(f"{ATOM}link")}
    assert client.get(links["self"].removeprefix("http://testserver")).status_code == 200
    assert client.get(links["alternate"].removeprefix("http://testserver")).status_code == 200
    ids = [element.text for element in feed.iter(f"{ATOM}id")]
    assert len(ids) == len(set(ids))
    if name != "trending":
        assert len(ids) > 1


@pytest.mark.parametrize("name", FEEDS)
def test_json_feed_says_the_same(client, changed, name):
    """Fails when the JSON feed and the Atom feed of a list part, or a field that readers asked for is missing."""
    response = client.get(f"/feeds/{name}.json")
    assert response.headers["content-type"] == "application/feed+json"
    feed = response.json()
    assert feed["version"] == "https://jsonfeed.org/version/1.1"
    entries = atom(client, f"/feeds/{name}.atom").findall(f"{ATOM}entry")
    assert [item["id"] for item in feed["items"]] == [entry.find(f"{ATOM}id").text for entry in entries]
    assert [item["title"] for item in feed["items"]] == [entry.find(f"{ATOM}title").text for entry in entries]
    for item in feed["items"]:
        assert {"title", "summary", "authors", "url", "tags", "date_published", "date_modified"} <= set(item)
        assert set(item["_regularized"]["code"]) == {"url", "state"}


def test_entry_tells_code_and_verdicts(client):
    """Fails when a reader of the feed cannot see whether a paper runs, and what was found."""
    items = {item["url"].rpartition("/")[2]: item for item in client.get("/feeds/best.json").json()["items"]}
    for entry in ENTRIES[:20]:
        told = items[entry.slug]["_regularized"]
        assert (told["code"]["state"] == "runs here") == entry.implemented
        assert sum(told["verdicts"].values()) == sum(claim.kind == "claim" for claim in entry.card.claims)
        assert set(entry.card.families) | set(entry.card.tags) == set(items[entry.slug]["tags"])
        assert items[entry.slug]["authors"]
    node = atom(client, "/feeds/best.atom").find(f"{ATOM}entry")
    assert node.find(f"{OWN}code").get("state") == "runs here"
    assert node.findall(f"{OWN}claims")


def test_feed_of_a_saved_search(client):
    """Fails when a search's feed is another search."""
    items = client.get("/feeds/search.json", params={"q": "my labels are wrong", "runs": "1"}).json()["items"]
    expected = [e.slug for e in command_line("my labels are wrong", ENTRIES) if e.implemented]
    assert [item["url"].rpartition("/")[2] for item in items] == expected
    assert client.get("/feeds/search.json", params={"family": "x"}).status_code == 400
    assert client.get("/feeds/nothing.atom").status_code in (400, 404)
    assert client.get("/feeds/family/nothing.atom").status_code == 404


def test_feed_with_hostile_text(client, site):
    """Fails when a title breaks out of the XML, or a control character makes the feed unreadable."""
    title = 'A </title><script>x</script> & "paper"'
    with site.write.begin() as session:
        store(session, [Incoming(title, datetime.date(2030, 1, 1), "arxiv", abstract="a\x0bb\x1f]]>")], now=1)
    feed = atom(client, "/feeds/new.atom")
    assert feed.find(f"{ATOM}entry/{ATOM}title").text == title
    assert feed.find(f"{ATOM}entry/{ATOM}summary").text == "ab]]>"
    assert len(feed.findall(f"{ATOM}entry")) == min(MOST, len(ENTRIES) + 1)


@pytest.mark.parametrize("address", ["/api/v1/papers", "/api/v1/families", "/feeds/best.atom", "/feeds/best.json"])
def test_etag(client, address):
    """Fails when what a client has already is sent again, or a changed answer is taken for the old one."""
    first = client.get(address)
    tag = first.headers["etag"]
    plain = tag.removeprefix("W/")
    for given in (tag, plain, f"W/{plain}", f'"other", {tag}', "*"):
        again = client.get(address, headers={"if-none-match": given})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(address, headers={"if-none-match": '"other"'}).status_code == 200


def test_etag_changes_with_the_content(client, site):
    """Fails when a client would never see a new paper."""
    tag = client.get("/api/v1/papers").headers["etag"]
    with site.write.begin() as session:
        store(session, [Incoming("New", datetime.date(2030, 1, 1), "arxiv")], now=1)
    assert client.get("/api/v1/papers", headers={"if-none-match": tag}).status_code == 200


def test_api_pages(client):
    """Fails when following `next` loses or repeats papers."""
    address, slugs = "/api/v1/papers?per_page=10", []
    while address:
        response = client.get(address)
        body = response.json()
        slugs += [paper["slug"] for paper in body["papers"]]
        assert ("link" in response.headers) == (body["next"] is not None)
        address = body["next"]
    assert len(slugs) == len(set(slugs)) == body["total"] == len(ENTRIES)
    assert client.get("/api/v1/papers?page=1000").json()["papers"] == []
    for wrong in ("page=0", "per_page=101", "year=x", "family=x", "verdict=x", "order=votes", "implemented=perhaps"):
        assert client.get(f"/api/v1/papers?{wrong}").status_code == 422


def test_api_search_is_that_of_the_command_line(client):
    """Fails when a program gets another answer from the API than from `regularized papers --search`."""
    found = client.get("/api/v1/papers", params={"q": "over-confident probabilities", "per_page": 100}).json()
    assert [p["slug"] for p in found["papers"]] == [
        e.slug for e in command_line("over-confident probabilities", ENTRIES)
    ]
    assert found["by_meaning"] is False


def test_api_paper_has_the_evidence(client):
    """Fails when effect, interval or verdict differ from the ledger's."""
    body = client.get(f"/api/v1/papers/{MEASURED.slug}").json()
    for claim, outcome in zip(body["claims"], MEASURED.outcomes, strict=True):
        assert (claim["id"], claim["verdict"], claim["effect"]) == (
            outcome.claim.id,
            outcome.verdict.value,
            outcome.effect,
        )
        assert claim["interval"] == list(outcome.interval or (None, None))
        assert len(claim["reported"]) == len(outcome.claim.reported)
    assert body["bibtex"] == MEASURED.card.bibtex()
    assert body["implemented"]
    assert client.get("/api/v1/papers/nothing").status_code == 404
    assert {row["name"] for row in client.get("/api/v1/families").json()} == set(FAMILIES)


def test_a_claim_on_which_attempts_disagree(client, site):
    """Fails when a contested claim is shown as decided, cannot be asked for, or a stranger's name is markup."""
    first, *rest = MEASURED.outcomes
    said = (*first.attempts, replace(first.attempts[0], name="x-1a2b3c4d", by="<script>x()</script>", where="*here*"))
    entry = replace(MEASURED, memory=Memory(None, ""))  # of a changed entry nothing is known yet
    entry.__dict__["outcomes"] = (replace(first, verdict=Verdict.CONTESTED, attempts=said), *rest)
    with site.write.begin() as session:
        sync_catalogue(session, [entry if one is MEASURED else one for one in ENTRIES], now=START + 1)
    page = client.get(f"/papers/{entry.slug}").text
    assert '<span class="badge contested">contested</span>' in page
    assert "Attempts disagree" in page
    assert "&lt;script&gt;x()&lt;/script&gt;, *here*" in page
    assert "<script>x()" not in page
    assert "1 contested" in client.get("/search?verdict=contested").text
    found = client.get("/api/v1/papers?verdict=contested").json()
    assert [(paper["slug"], paper["verdicts"]["contested"]) for paper in found["papers"]] == [(entry.slug, 1)]
    claim = client.get(f"/api/v1/papers/{entry.slug}").json()["claims"][0]
    assert claim["verdict"] == "contested"
    assert [one["by"] for one in claim["attempts"]] == ["regularized", "<script>x()</script>"]
    assert "<b>1</b> are contested" in client.get("/").text
    assert client.get("/api/v1/totals").json()["claims"]["contested"] == 1


def test_verdict_changes(client, changed):
    """Fails when a changed verdict is in no feed or not in the API."""
    (row,) = client.get("/api/v1/verdict-changes").json()
    assert (row["slug"], row["old"], row["new"]) == (MEASURED.slug, "open", "holds")
    (item,) = client.get("/feeds/verdicts.json").json()["items"]
    assert item["title"].startswith("holds: ")


def test_api_lists_of_a_period(client):
    """Fails when a program cannot ask for the papers of a day, week or month, or gets others than the page shows."""
    day = MEASURED.card.date
    week = f"{day.isocalendar().year}-W{day.isocalendar().week:02}"
    for period, name in (("day", f"{day}"), ("week", week), ("month", f"{day:%Y-%m}")):
        found = client.get("/api/v1/papers", params={"listed": f"{day}", "period": period}).json()
        page = client.get(f"/{period}/{name}").text
        assert MEASURED.slug in [paper["slug"] for paper in found["papers"]]
        assert all(f'href="/papers/{paper["slug"]}"' in page for paper in found["papers"])
    assert client.get("/api/v1/papers?listed=2026-02-30").status_code == 422
    assert client.get("/api/v1/papers?listed=1999-01-01").json()["total"] == 0


def test_api_comments_with_their_answers(person, site, clock):
    """Fails when a program cannot read what readers say, which answer belongs where, or reads what is hidden."""
    address = f"/papers/{MEASURED.slug}"
    for body in ("First **word**.", "Second."):
        send(person, address, f"{address}/comments", body=body)
    send(person, address, "/comments/1/answers", body="An answer.")
    with site.write.begin() as session:
        session.get(Comment, 2).hidden_because = "spam"
    first, answer, second = person.get(f"/api/v1{address}/comments").json()["comments"]
    assert (first["text"], first["answers"], first["author"]) == ("First **word**.", None, "reader 1")
    assert "<strong>word</strong>" in first["html"]
    assert first["url"].endswith(f"{address}#comment-{first['id']}")
    assert (answer["text"], answer["answers"]) == ("An answer.", first["id"])
    assert (second["text"], second["html"], second["hidden_because"]) == ("", "", "spam")
    assert person.get("/api/v1/papers/nothing/comments").status_code == 404


def test_api_has_what_the_pages_have(client, changed, site):
    """Fails when leaders, days of changes, totals, plots, guide or related papers are on pages alone."""
    boards = client.get("/api/v1/leaders").json()
    page = client.get("/leaders").text
    assert [board["family"] for board in boards] == re.findall(r'id="leaders-(\w+)"', page)
    days = client.get("/api/v1/changes").json()["days"]
    assert [day["date"] for day in days] == re.findall(r'id="day-([\d-]+)"', client.get("/changes").text)
    assert days[-1]["verdicts"][0]["slug"] == MEASURED.slug
    totals = client.get("/api/v1/totals").json()
    with site.read() as session:
        counted = queries.counts(session)
    assert (totals["papers"], totals["implemented"]) == (counted.papers, counted.runs)
    assert totals["claims"]["holds"] == counted.claims["holds"]
    body = client.get(f"/api/v1/papers/{MEASURED.slug}").json()
    page = client.get(f"/papers/{MEASURED.slug}").text
    assert body["guide"] in page
    assert all(f'href="/papers/{slug}"' in page for slug in body["related"])
    plots = client.get(f"/api/v1/papers/{MEASURED.slug}/plots").json()
    effects = [plot["name"] for plot in plots if plot["kind"] == "effect"]
    assert effects == [outcome.claim.id for outcome in MEASURED.outcomes if outcome.effects]
    assert all(plot["svg"].startswith("<svg") for plot in plots)


def test_description_names_only_what_is_there(client):
    """Fails when the description loses an address, or pages and forms get into it."""
    description = client.get("/api/openapi.json").json()
    assert set(description["paths"]) == {
        "/api/v1/papers",
        "/api/v1/papers/{slug}",
        "/api/v1/papers/{slug}/comments",
        "/api/v1/papers/{slug}/plots",
        "/api/v1/leaders",
        "/api/v1/changes",
        "/api/v1/totals",
        "/api/v1/families",
        "/api/v1/verdict-changes",
    }
    assert "HTTPValidationError" not in json.dumps(description)
