"""Pages: what they show, where they lead, how they fail, and how many queries they ask."""

import datetime
import re
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import urljoin, urlsplit

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient
from tests.site.helpers import without_code

from regularized.evidence.claims import Verdict, count_verdicts
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue
from regularized.site import queries
from regularized.site.importing import Incoming, store
from regularized.site.plots import plots_of, safe_svg

ENTRIES = load_catalogue()
# Whichever comes first and has everything that a page can show.
MEASURED = next(
    entry
    for entry in ENTRIES
    if entry.ledger.is_file() and entry.card.official and any(run.curves for run in entry.load_ledger().runs)
)
WAITING = ENTRIES[-1]
DAY = datetime.date(2026, 3, 2)

PAGES = [
    "/",
    "/new",
    "/trending",
    f"/families/{MEASURED.card.families[0]}",
    f"/day/{MEASURED.card.date}",
    "/week/2020-W27",
    "/month/2020-06",
    "/search",
    "/search?q=my+labels+are+wrong&runs=1",
    f"/papers/{MEASURED.slug}",
    f"/papers/{WAITING.slug}",
    "/compare",
    "/changes",
    "/leaders",
    "/about",
    "/feeds",
    "/api",
    "/sign-in",
    "/digest",
    "/nothing-here",
]


class Page(HTMLParser):
    """What a page holds: text, elements, and mistakes in it."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *tags):
        return [given for tag, given in self.elements if tag in tags]


@pytest.fixture
def drawn(monkeypatch):
    """Drawing takes seconds; most tests need no plots."""
    from regularized.site import pages
    from regularized.site.plots import Plots

    monkeypatch.setattr(pages, "plots_of", lambda *_, **__: Plots({}, ()))


@pytest.mark.parametrize("address", PAGES)
def test_page_is_sound(client, drawn, address):
    """Fails when tags are not closed, ids occur twice, a control has no label, or another site is asked."""
    response = client.get(address)
    assert response.status_code == (404 if address == "/nothing-here" else 200)
    page = Page(response.text)
    assert len(page.ids) == len(set(page.ids))
    assert [given.get("lang") for given in page.all("html")] == ["en"]
    assert len([tag for tag, _ in page.elements if tag == "h1"]) == 1
    assert len(page.all("main")) == 1
    assert page.all("title")
    labels = {given["for"] for given in page.all("label") if "for" in given}
    for given in page.all("input", "select", "textarea"):
        if given.get("type") != "hidden":
            assert given.get("id") in labels, given
    for given in page.all("script", "img", "link", "iframe", "source"):
        loaded = given.get("src") or (given.get("href") if given.get("rel") in ("stylesheet", "icon") else "/")
        assert loaded.startswith("/"), loaded
        assert not loaded.startswith("//")
    for given in page.all("img"):
        assert "alt" in given
    assert all(scope["scope"] in ("col", "row") for scope in page.all("th"))
    # The policy forbids both, so they would be dead.
    assert not any("style" in given or any(name.startswith("on") for name in given) for _, given in page.elements)
    assert "<style" not in response.text
    assert not re.search(r"<script(?![^>]*\bsrc=)", response.text)
    # Places that one can jump to have names that tell them apart.
    regions = [given["aria-label"] for given in page.all("div", "nav") if "aria-label" in given]
    assert len(regions) == len(set(regions)), regions
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(headings)), headings


def test_links_lead_somewhere(client, drawn):
    """Fails when a page links to an address of ours that is not there."""
    seen, wanted = set(), ["/"]
    while wanted:
        address = wanted.pop()
        if address in seen:
            continue
        seen.add(address)
        response = client.get(address)
        if response.status_code in (302, 303):
            wanted.append(response.headers["location"])
            continue
        assert response.status_code == 200, address
        if "text/html" not in response.headers["content-type"] or len(seen) > 120:
            continue
        page = Page(response.text)
        for given in page.all("a", "link"):
            target = urljoin(address, given["href"])
            parts = urlsplit(target)
            if parts.scheme:
                continue
            if parts.path == urlsplit(address).path and parts.fragment:
                assert parts.fragment in page.ids, given["href"]
            elif not parts.query or "page=" in parts.query:
                wanted.append(target.partition("#")[0])
    assert len(seen) > 80


def test_the_first_page_starts_with_what_is_proven(client):
    """Fails when the first page hides failures, or begins with papers that nobody has run."""
    text = client.get("/").text
    measured = {entry.slug for entry in ENTRIES if entry.ledger.is_file()}
    shown = [slug in measured for slug in re.findall(r'<h2><a href="/papers/([^"]+)"', text)]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == min(len(measured), queries.PER_PAGE)
    counted = [count_verdicts(entry.outcomes) for entry in ENTRIES]
    failed = sum(count[Verdict.NO_EFFECT] + count[Verdict.OPPOSITE] for count in counted)
    assert f'<b class="bad">{failed}</b> show no effect or the opposite' in text
    assert f"<b>{sum(count[Verdict.OPEN] for count in counted)}</b> are open" in text
    assert all(f"/families/{family}" in text for family in FAMILIES if any(family in e.card.families for e in ENTRIES))


def test_paper_page_tells_everything(client):
    """Fails when a claim, its verdict, effect, interval, the paper's own numbers, plots, use or citation is missing."""
    card = MEASURED.card
    html = client.get(f"/papers/{MEASURED.slug}").text
    text = " ".join("".join(Page(html).text).split())
    for outcome in MEASURED.outcomes:
        assert outcome.claim.statement in text
        for reported in outcome.claim.reported:
            assert reported.setting in text
    assert len(re.findall(r'<section class="claim panel"', html)) == len(card.claims)
    assert html.count('class="effect"') == sum(o.effect is not None for o in MEASURED.outcomes)
    assert html.count("<svg") >= sum(bool(o.effects) for o in MEASURED.outcomes) + 1
    for part in (card.problem, card.summary, card.when_to_use, card.when_not_to_use, f"reproduce {card.slug}"):
        assert part in text
    assert f"https://arxiv.org/abs/{card.arxiv}" in html
    assert card.official.url in html
    for blocker in card.official.blockers:
        assert f'{card.official.url}/issues/{blocker.issue}"' in html
        assert blocker.breaks in text
    assert f"@misc{{{card.slug}_{card.date.year}," in text
    assert MEASURED.usage.splitlines()[0] in text


def test_known_blockers_of_the_official_code(client):
    """Fails when what stops users of the authors' code is not on the page, or leads to no issue."""
    blocked = next(entry for entry in ENTRIES if entry.card.official and entry.card.official.blockers)
    (blocker, *_) = blocked.card.official.to_dict()["blockers"]
    assert f'href="{blocker["url"]}"' in client.get(f"/papers/{blocked.slug}").text


def test_the_footer_says_how_many_run(client, site, clock):
    """Fails when the foot of the pages says that all papers run, or a number that is not so."""
    runs = sum(entry.implemented for entry in ENTRIES)

    def foot(address):
        return client.get(address).text.partition("<footer")[2]

    for address in ("/", "/about", f"/papers/{WAITING.slug}", "/sign-in", "/no"):
        assert f"{runs} of {len(ENTRIES)} run here" in foot(address), address
        assert "every claim" not in foot(address)
    with site.write.begin() as session:
        store(session, [Incoming("Another", DAY, "arxiv")], now=1)
    clock.now += 60
    assert f"{runs} of {len(ENTRIES) + 1} run here" in foot("/about")


def test_paper_without_code_says_so(client, site, drawn):
    """Fails when a card without code, or an imported paper, looks as if it ran."""
    without_code(site, WAITING.slug)
    assert "No runnable code yet." in client.get(f"/papers/{WAITING.slug}").text
    paper = Incoming("A paper from <elsewhere>", DAY, "arxiv", abstract="What it says.", authors=("Ada", "Bob"))
    with site.write.begin() as session:
        slug = store(session, [paper], now=1)[0].slug
    html = client.get(f"/papers/{slug}").text
    assert "No runnable code yet." in html
    assert "A paper from &lt;elsewhere&gt;" in html
    assert "What it says." in html
    assert "Ada, Bob" in html
    assert "@misc{" in html
    assert "no runnable code yet" in client.get("/new").text


def test_date_navigation(client):
    """Fails when previous and next do not lead to the neighbours that have papers, or a date field leads elsewhere."""
    days = sorted({entry.card.date for entry in ENTRIES})
    html = client.get(f"/day/{days[3]}").text
    assert f'rel="prev" href="/day/{days[2]}"' in html
    assert f'rel="next" href="/day/{days[4]}"' in html
    assert client.get("/day").headers["location"] == f"/day/{days[-1]}"
    assert client.get("/week?date=2026-03-04").headers["location"] == "/week/2026-W10"
    assert client.get("/month?date=2026-03-04").headers["location"] == "/month/2026-03"
    assert client.get("/month?date=nonsense").status_code == 400
    assert client.get("/day/2026-02-30").status_code == 404
    empty = client.get("/day/1990-01-01")
    assert empty.status_code == 200
    assert "No paper is listed for 1 January 1990" in empty.text
    assert f'rel="next" href="/day/{days[0]}"' in empty.text


def test_pages_of_a_list(client):
    """Fails when papers are lost between pages, or a page behind the last one is a success."""
    last = -(-len(ENTRIES) // queries.PER_PAGE)
    slugs = []
    for number in range(1, last + 1):
        response = client.get("/new", params={"page": number})
        slugs += re.findall(r'<h2><a href="/papers/([^"]+)"', response.text)
    assert sorted(slugs) == sorted(entry.slug for entry in ENTRIES)
    assert client.get("/new", params={"page": last + 1}).status_code == 404
    assert client.get("/new", params={"page": 0}).status_code == 400
    assert client.get("/new", params={"page": "x"}).status_code == 400
    assert client.get("/trending", params={"page": 1}).status_code == 200
    assert "Nobody has voted" in client.get("/trending").text


def test_search_page(client):
    """Fails when the search loses its filters, or does not say by what it found."""
    family = MEASURED.card.families[0]
    address = f"/search?q=labels&family={family}&runs=1"
    html = client.get(address).text
    assert f'<option value="{family}" selected>' in html
    assert 'value="1" checked' in html
    assert f'href="/feeds/search.atom?q=labels&amp;family={family}&amp;runs=1"' in html
    assert "Found by words alone: no sentence encoder is installed here." in html
    assert "Nothing fits." in client.get("/search?q=qqqqqq").text
    for wrong in ("family=x", "year=x", "verdict=x", "runs=x", "year=²²²²"):
        assert client.get(f"/search?{wrong}").status_code == 400


def test_errors_are_pages_or_problems(client):
    """Fails when an error is a traceback, has the wrong status, or is HTML where JSON was asked for."""
    near = client.get(f"/papers/{MEASURED.slug[:-1]}")
    assert near.status_code == 404
    assert f'href="/papers/{MEASURED.slug}"' in near.text
    assert client.post("/").status_code == 405
    problem = client.get("/api/v1/nothing")
    assert problem.status_code == 404
    assert problem.headers["content-type"] == "application/problem+json"
    assert set(problem.json()) == {"type", "title", "status", "detail"}


@pytest.mark.parametrize("address", ["/", "/search?q=labels", "/feeds/best.atom", "/api/v1/papers", "/no", "/day"])
def test_head_is_get_without_a_body(client, address):
    """Fails when monitors and link checkers, which ask by HEAD, are refused, or get another answer than readers."""
    got, head = client.get(address), client.head(address)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.items() >= {(name, got.headers[name]) for name in ("content-length",)}
    assert head.headers.get("etag") == got.headers.get("etag")
    assert client.head("/sign-out").status_code == 405


def test_a_slash_at_the_end(client):
    """Fails when /search/ leads to http, to what the Host header says, or to another site."""
    response = client.get("/search/?q=a%20b", headers={"host": "evil.example", "x-forwarded-proto": "https"})
    assert (response.status_code, response.headers["location"]) == (308, "/search?q=a%20b")
    for address in ("/no/", "//evil.example/", "/static/", "/%2Fevil.example/"):
        response = client.get(f"http://testserver{address}")
        assert (response.status_code, "location" in response.headers) == (404, False), address


def test_pages_go_out_compressed(client):
    """Fails when a page of 100 kB is sent as it is."""
    for address in ("/", f"/papers/{ENTRIES[0].slug}", "/feeds/best.atom"):
        response = client.get(address, headers={"accept-encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"
        assert "accept-encoding" in response.headers["vary"].lower()
        assert int(response.headers["content-length"]) < len(response.content) / 2
        assert "content-encoding" not in client.get(address, headers={"accept-encoding": "identity"}).headers


def test_pages_that_a_reader_has_already(person):
    """Fails when an unchanged page is sent again, or a page with a person's name or form can be kept."""
    reader = TestClient(person.app, follow_redirects=False)
    for address in ("/", "/search?q=labels", "/about", f"/papers/{ENTRIES[0].slug}"):
        tag = reader.get(address).headers["etag"]
        again = reader.get(address, headers={"if-none-match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"] == "no-cache"
        own = person.get(address, headers={"if-none-match": tag})
        assert (own.status_code, own.headers.get("etag")) == (200, None)
    assert reader.get("/no", headers={"if-none-match": "*"}).status_code == 404
    assert "etag" not in reader.get("/sign-in").headers


def test_a_defect_is_logged_and_hidden(app, monkeypatch, caplog):
    """Fails when a reader sees our traceback, or the log does not, or the error page lacks the security headers."""

    def broken(*_, **__):
        raise ZeroDivisionError("secret of ours")

    monkeypatch.setattr(queries, "counts", broken)
    response = TestClient(app, raise_server_exceptions=False).get("/")
    assert response.status_code == 500
    assert "secret of ours" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "secret of ours" in caplog.text


def test_number_of_queries_does_not_grow(client, site, drawn):
    """Fails when a list or a page asks one query for each paper, claim or comment (N+1)."""
    asked: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _k, statement, *_: asked.append(statement))

    def count(address):
        client.get(address)
        asked.clear()
        assert client.get(address).status_code == 200
        return len([statement for statement in asked if statement.lstrip().upper().startswith("SELECT")])

    addresses = ["/", "/new", "/month/2026-03", "/search?q=learning", "/compare", "/feeds/new.atom"]
    addresses += ["/api/v1/papers?per_page=100", f"/papers/{MEASURED.slug}", "/api/v1/verdict-changes"]

    def add(numbers):
        papers = [Incoming(f"Learning {i} things", DAY, "arxiv", abstract="On learning.") for i in numbers]
        with site.write.begin() as session:
            store(session, papers, now=1)

    add(range(30))
    before = {address: count(address) for address in addresses}
    assert max(before.values()) <= 12, before
    add(range(30, 90))
    assert {address: count(address) for address in addresses} == before


def test_plots_are_kept_and_clean(tmp_path, monkeypatch):
    """Fails when a plot is drawn anew for every reader, an id occurs twice on a page, or a damaged file stays."""
    from regularized.site import plots

    options = {"package": "regularized.papers", "folder": tmp_path}
    plots._kept.cache_clear()
    drawn = plots_of(MEASURED.slug, "a" * 64, **options)
    assert set(drawn.effects) == {o.claim.id for o in MEASURED.outcomes if o.effects}
    assert drawn.curves
    joined = "".join([*drawn.effects.values(), *(svg for _, svg in drawn.curves)])
    ids = re.findall(r'\bid="([^"]+)"', joined)
    assert len(ids) == len(set(ids))
    assert "style" not in joined
    plots._kept.cache_clear()
    monkeypatch.setattr(plots, "_draw", lambda _entry: pytest.fail("drawn again"))
    assert plots_of(MEASURED.slug, "a" * 64, **options) == drawn
    monkeypatch.undo()
    plots._kept.cache_clear()
    next(tmp_path.glob("*.json")).write_text('{"effects": {"x": "<script/>"}, "curves": []}')
    assert plots_of(MEASURED.slug, "a" * 64, **options) == drawn
    assert plots_of(MEASURED.slug, "../x", **options) == plots_of("nothing", "a" * 64, **options)


def test_svg_of_a_hostile_ledger():
    """Fails when a name in a ledger could bring a script, a link, or a style into a page."""
    hostile = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="a()">'
        '<a xlink:href="javascript:a()"><text>x</text></a><use xlink:href="https://e.com/#x"/>'
        '<foreignObject><p>x</p></foreignObject><path clip-path="url(https://e.com)" style="fill: url(#x); '
        'stroke: red; background: url(https://e.com)" class="evil" d="M0 0"/><set attributeName="onload"/>'
        "<text>&lt;script&gt;</text></svg>"
    )
    clean = safe_svg(hostile)
    assert clean == (
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot"><use /><path d="M0 0" stroke="red" />'
        "<text>&lt;script&gt;</text></svg>"
    )
    assert safe_svg(clean) == clean
