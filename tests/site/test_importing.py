"""Getting papers in: the saved page to the letter, arXiv and the Daily Papers from a server that replays answers."""

import datetime
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import func, select

from regularized.papers.catalogue import load_catalogue
from regularized.papers.search import with_joined
from regularized.site import queries, remote
from regularized.site.importing import Incoming, dated, store
from regularized.site.listing import LONGEST_TITLE, ImportFailed, parse_listing, read_listing
from regularized.site.models import Paper
from regularized.site.queries import Period
from regularized.site.remote import Offline, arxiv_id, fetch_arxiv, fetch_daily
from regularized.site.sync import sync_catalogue

ENTRIES = load_catalogue()
PAGE = (Path(__file__).parent / "daily_papers_page.txt").read_text(encoding="utf-8")
SAVED = datetime.date(2026, 3, 2)

# Read off the page by a person, for entries of every form: without year, with year, with comments, with organisation.
BY_HAND = {
    "Representational Homomorphism Predicts and Improves Compositional Generalization In Transformer Language Model": (
        "2026-01-26", 2, "", 0),
    "CREAM: Consistency Regularized Self-Rewarding Language Models": ("2024-10-16", 8, "", 0),
    "AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance": ("2025-08-09", 3, "", 2),
    "DreamID-Omni: Unified Framework for Controllable Human-Centric Audio-Video Generation": (
        "2026-02-12", 0, "ByteDance", 4),
    "HESTIA: A Hessian-Guided Differentiable Quantization-Aware Training Framework for Extremely Low-Bit LLMs": (
        "2026-01-28", 5, "", 0),
    "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models": (
        "2024-08-21", 1, "", 0),
    "Low-Precision Training of Large Language Models: Methods, Challenges, and Opportunities": ("2025-05-02", 9, "", 3),
    "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs": (
        "2025-05-31", 4, "", 0),
}  # fmt: skip


# -- the saved page -----------------------------------------------------------------------------


def test_the_saved_page_comes_out_right():
    """Fails when a title, date, number of authors, organisation or number of comments of the 44 is wrong."""
    read = {entry.title: entry for entry in parse_listing(PAGE)}
    assert len(read) == 44
    for title, (date, authors, organization, comments) in BY_HAND.items():
        entry = read[title]
        assert entry.on(SAVED).isoformat() == date
        assert (entry.authors_count, entry.organization, entry.comments) == (authors, organization, comments)
    # The cards were written from the papers, except for number of comments and organisation.
    for entry in ENTRIES:
        if entry.card.title in read:
            listed = read[entry.card.title]
            assert listed.on(SAVED) == entry.card.date
            assert listed.comments == entry.card.comments
            assert listed.authors_count in (0, entry.card.authors_count)
    assert sum(entry.comments for entry in read.values()) == 13
    assert [entry.title for entry in read.values() if entry.organization] == [
        "DreamID-Omni: Unified Framework for Controllable Human-Centric Audio-Video Generation"
    ]
    assert all(900 < len(entry.abstract) < 2500 for entry in read.values())
    assert read["Pre-training under infinite compute"].abstract.startswith("Since compute grows much faster than")
    assert all(line not in entry.abstract for entry in read.values() for line in ("\n·", "• ", "Daily Papers"))


def test_known_entries_are_matched(site):
    """Fails when importing the page doubles a paper of the catalogue, or changes what its card says."""
    with site.write.begin() as session:
        before = session.scalar(select(func.count()).select_from(Paper))
        stored = store(session, dated(session, parse_listing(PAGE), SAVED), now=5)
    assert {row.outcome for row in stored} <= {"known", "updated"}
    with site.read() as session:
        assert session.scalar(select(func.count()).select_from(Paper)) == before == len(ENTRIES)
        for entry in ENTRIES:
            paper = queries.by_slug(session, entry.slug)
            assert (paper.title, paper.date, paper.authors_count) == (
                entry.card.title,
                entry.card.date,
                entry.card.authors_count,
            )
            assert paper.listed_comments == entry.card.comments
            assert paper.abstract
    with site.write.begin() as session:
        again = store(session, dated(session, parse_listing(PAGE), SAVED), now=6)
    assert {row.outcome for row in again} == {"known"}


def test_page_into_an_empty_catalogue(site):
    """Fails when new entries are lost, doubled by a second import, or said to run."""
    with site.write.begin() as session:
        for table in reversed(Paper.metadata.sorted_tables):
            session.execute(table.delete())
        stored = store(session, dated(session, parse_listing(PAGE), SAVED), now=5)
        assert [row.outcome for row in stored] == ["added"] * 44
        assert len({row.slug for row in stored}) == 44
    with site.write.begin() as session:
        again = store(session, dated(session, parse_listing(PAGE), SAVED), now=6)
        assert [row.slug for row in again] == [row.slug for row in stored]
        assert {row.outcome for row in again} == {"known"}
        for title, (date, authors, organization, comments) in BY_HAND.items():
            paper = session.scalars(select(Paper).where(Paper.title == title)).one()
            assert (paper.date.isoformat(), paper.authors_count) == (date, authors)
            assert (paper.organization, paper.listed_comments) == (organization, comments)
            assert not paper.runs


def test_year_that_the_page_leaves_out(site):
    """Fails when a page that is imported a year later dates its papers a year too late."""
    entries = parse_listing(PAGE)
    with site.read() as session:
        late = {paper.title: paper.date for paper in dated(session, entries, datetime.date(2029, 7, 1))}
    for title, (date, *_) in BY_HAND.items():
        assert late[title].isoformat() == date


ENTRY = "A title\n\nAn abstract.\n\nMore of it.\n\n  • 2 authors\n·\nFeb 29, 2024 7\n"


def test_forms_of_an_entry():
    """Fails on an entry alone on its page, on paragraphs, or on a leap day."""
    (entry,) = parse_listing(ENTRY)
    assert (entry.title, entry.abstract) == ("A title", "An abstract.\n\nMore of it.")
    assert (entry.on(SAVED).isoformat(), entry.authors_count, entry.comments) == ("2024-02-29", 2, 7)
    (entry,) = parse_listing(
        ENTRY.replace(", 2024", "").replace("  • 2 authors", "New York University New York University")
    )
    assert (entry.on(SAVED).isoformat(), entry.organization) == ("2024-02-29", "New York University")
    (entry,) = parse_listing(ENTRY.replace("2 authors", "1 author").replace("\n", "\r\n"))
    assert entry.authors_count == 1


@pytest.mark.parametrize(
    ("page", "what"),
    [
        ("", "no entry"),
        ("<html>", "no entry"),
        (ENTRY.replace("Feb 29, 2024 7", "yesterday"), "line 8: there should be a date"),
        (ENTRY.replace("Feb 29, 2024 7", ""), "there should be a date"),
        (ENTRY.replace("2024", "2023"), "there is no such day"),
        ("·\nFeb 2, 2024", "no title"),
        ("Daily Papers\n\n  • 2 authors\n·\nFeb 2, 2024", "no title"),
    ],
)
def test_what_is_no_listing(page, what):
    """Fails when a wrong file is imported in part, or the message does not say what is wrong where."""
    with pytest.raises(ImportFailed, match=what):
        parse_listing(page, source="x.txt")


BAD = {
    "Feb 30": "no such day",
    "Feb 30, 2024": "no such day",
    "Dec 31, 9999": "cannot be on a page",
    "Mar 4, 2026": "cannot be on a page",
    "Jan 1, 0001": "cannot be on a page",
    "Jan 1, 0000": "no such day",
    "Jan 2, 2026 1,2": "no such number",
    f"Jan 2, 2026 {'9' * 5000}": "no such number",
    "Jan 2, 2026 99999999999": "no such number",
    "last week": "there should be a date",
    "": "there should be a date",
}


@pytest.mark.parametrize(("date", "what"), BAD.items(), ids=[date[:20] or "none" for date in BAD])
def test_one_bad_entry_is_said_and_the_others_read(date, what):
    """Fails when a day that there is not loops for ever, or one entry takes others with it or goes in itself."""
    page = read_listing(f"{ENTRY}\nBad one\n\nText.\n\n• 2 authors\n·\n{date}\n\n{ENTRY}", saved=SAVED)
    # "last week" is no form of a date that is known: the line counts as the next title.
    assert [entry.title for entry in page.entries] == ["A title", "last week" if date == "last week" else "A title"]
    (fault,) = page.faults
    assert what in fault
    assert "“Bad one”" in fault


@pytest.mark.parametrize(("told", "count"), [("1,234", 1234), ("1.2k", 1200), ("3K", 3000), ("1m", 1_000_000)])
def test_numbers_as_pages_write_them(told, count):
    """Fails when a much discussed paper refuses the file."""
    (entry,) = parse_listing(ENTRY.replace("2024 7", f"2024 {told}").replace("2 authors", f"{told} authors"))
    assert (entry.comments, entry.authors_count) == (count, count)


def test_navigation_is_no_title():
    """Fails when words of the page's menus become the title of its first paper, or an emoji is taken for one."""
    head = "Daily Papers\n\nbyAK and the research community\n\nMar 2\n\n"
    menu = "Previous\n\n‹ Mar 1\n\nTrending Papers\n\nDay\nWeek\nMonth\n→\n"
    page = read_listing(f"{head}{menu}{ENTRY}\nPrevious\nNext\nCompany\nTOS\n")
    assert ([entry.title for entry in page.entries], page.faults) == (["A title"], [])
    assert page.entries[0].abstract == "An abstract.\n\nMore of it."
    assert page.day.on(SAVED) == datetime.date(2026, 3, 2)
    assert read_listing(ENTRY.replace("A title", "\U0001f525")).entries[0].title == "\U0001f525"


LONG = f"{'An abstract of a paper as they are. ' * 8}\n"


@pytest.mark.parametrize(
    ("menu", "title"),
    [
        ("Sort by trending\nFilter\n", "A title"),  # words that are known
        ("Quoi de neuf ?\nNach Datum sortieren\nGet them by mail.\n", "A title"),  # and others
        ("Trending\n", "Search and Filter Models"),  # a title of the menus' words
        ("", "Trending Papers"),
        ("", "Attention"),
        ("By the community\n", "A title\n\nIn short."),  # an abstract whose first paragraph is short
    ],
)
@pytest.mark.parametrize("head", ["", "Daily Papers\nbyAK and the research community\nMar 2\n"])
def test_menus_of_any_words(head, menu, title):
    """Fails when a menu becomes the title of a page's first paper, or a title is taken for a menu."""
    (entry,) = parse_listing(head + menu + ENTRY.replace("A title", title).replace("An abstract.\n", LONG))
    assert entry.title == title.partition("\n")[0]
    assert entry.abstract.startswith("In short." if "\n" in title else "An abstract of")


def test_the_words_of_menus_where_an_abstract_is_short():
    """Fails when the first paper of a page with a short abstract is called "Sort by trending"."""
    menu = "Sort by trending\nFilter by date\nTerms of Service\n"
    assert [entry.title for entry in parse_listing(menu + ENTRY)] == ["A title"]


def test_a_title_without_end():
    """Fails when a paragraph, or a whole file without line breaks, goes in as a title."""
    for letters, faults in ((LONGEST_TITLE, 0), (LONGEST_TITLE + 1, 1), (100_000, 1)):
        page = read_listing(ENTRY.replace("A title", "T" * letters) + ENTRY)
        assert (len(page.entries), len(page.faults)) == (2 - faults, faults)
        assert all(f"no title has {letters} letters" in fault and len(fault) < 300 for fault in page.faults)


def test_a_file_that_was_cut_off():
    """Fails when the half of a file goes in without a word."""
    whole = len(read_listing(PAGE).entries)
    lines = PAGE.splitlines()
    last = max(i for i, line in enumerate(lines) if line == "·")
    for end in (last + 1, last, last - 1, last - 3):
        page = read_listing("\n".join(lines[:end]))
        assert len(page.entries) == whole - 1
        assert len(page.faults) == 1
        with pytest.raises(ImportFailed, match=r"within an entry|there should be a date"):
            parse_listing("\n".join(lines[:end]))


def test_the_pages_own_day(site, client):
    """Fails when the papers of a page do not stand on its day, or the next catalogue takes them from there."""
    page = read_listing(PAGE)
    late = datetime.date(2026, 11, 30)
    with site.write.begin() as session:
        store(session, dated(session, page.entries, late, own_day=page.day), now=5)
    shown = [client.get("/day/2026-03-02", params={"page": number}).text for number in (1, 2, 3)]
    assert all(f'href="/papers/{entry.slug}"' in "".join(shown) for entry in ENTRIES)
    with site.write.begin() as session:
        for paper in session.scalars(select(Paper)):
            paper.fingerprint = "changed"
        sync_catalogue(session, ENTRIES, now=6)
        assert {paper.listed_on for paper in session.scalars(select(Paper))} == {SAVED}
        again = store(session, dated(session, page.entries, late, own_day=page.day), now=7)
    assert {row.outcome for row in again} == {"known"}


def test_the_end_of_the_calendar(site, client):
    """Fails when a period or a paper at the end of the calendar breaks pages."""
    with site.write.begin() as session:
        store(session, [Incoming("Far away", datetime.date.max, "daily")], now=5)
    for address in ("/day/9999-12-31", "/week/9999-W52", "/month/9999-12", "/", "/new", "/day/0001-01-01",
                    "/day/2026-03-02", "/feeds/new.atom", "/api/v1/papers"):  # fmt: skip
        assert client.get(address).status_code in (200, 404), address
    assert "Far away" in client.get("/day/9999-12-31").text
    assert "Far away" in client.get("/week/9999-W52").text
    assert client.get("/day", params={"date": "9999-12-31"}).headers["location"] == "/day/9999-12-31"


def test_titles_of_signs_alone(site):
    """Fails when a title without letters doubles at each import, or gets an empty address."""
    for now in (1, 2):
        with site.write.begin() as session:
            stored = store(session, [Incoming("\U0001f525\U0001f525", SAVED, "listing")], now=now)
    assert [row.outcome for row in stored] == ["known"]
    assert re.fullmatch(r"paper-[0-9a-f]{12}", stored[0].slug)


def test_long_words_are_cheap():
    """Fails when what a text costs grows with the square of its length (80,000 letters took minutes)."""
    start = time.process_time()
    assert with_joined("a" * 80_000 + " over-confident") == "a" * 80_000 + " over-confident overconfident"
    with_joined("a-" * 40_000)
    assert time.process_time() - start < 1.0


def test_titles_that_would_share_an_address(site):
    """Fails when two papers get one slug."""
    with site.write.begin() as session:
        same = [Incoming("A " + "long " * 40 + str(i), SAVED, "listing") for i in range(3)]
        slugs = [row.slug for row in store(session, same, now=1)]
    assert len(set(slugs)) == 3
    assert all(len(slug) < 80 for slug in slugs)


def test_later_sources_complete_a_paper(site):
    """Fails when what one source knows is lost to what another does not."""
    with site.write.begin() as session:
        store(session, [Incoming("A new paper", SAVED, "listing", authors_count=2, comments=3)], now=1)
        full = Incoming("A NEW paper", SAVED, "arxiv", abstract="Text.", authors=("Ada", "Bob"), arxiv="2603.00001")
        assert [row.outcome for row in store(session, [full], now=2)] == ["updated"]
        assert [row.outcome for row in store(session, [full], now=3)] == ["known"]
        paper = session.scalars(select(Paper).where(Paper.arxiv == "2603.00001")).one()
        assert (paper.listed_comments, paper.authors, paper.abstract) == (3, ["Ada", "Bob"], "Text.")
        assert (paper.added_at, paper.changed_at) == (1, 2)


# -- arXiv and the Daily Papers -----------------------------------------------------------------


class Replay(ThreadingHTTPServer):
    """A server that answers as it is told, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, list[tuple[int, str, str]]] = {}
        self.over = threading.Event()

    def handle_error(self, *_):
        """A client that gave up waiting is what some tests want."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Replay

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.headers.append(dict(self.headers))
        answers = self.server.answers[urlsplit(self.path).path]
        status, kind, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if kind == "slow":
            self.server.over.wait(60.0)
        self.send_response(status)
        if status in (301, 302):
            self.send_header("location", body)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    replay = Replay()
    thread = threading.Thread(target=replay.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield replay
    replay.over.set()
    replay.shutdown()
    replay.server_close()


def arxiv_feed(*entries: str) -> str:
    """An answer of arXiv's API, as its manual shows it."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom">'
        '<link href="http://arxiv.org/api/query?id_list=x" rel="self" type="application/atom+xml"/>'
        "<title>ArXiv Query</title><id>http://arxiv.org/api/x</id><updated>2026-03-02T00:00:00-05:00</updated>"
        f'<opensearch:totalResults xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">{len(entries)}'
        "</opensearch:totalResults>"
        '<opensearch:startIndex xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">0</opensearch:startIndex>'
        '<opensearch:itemsPerPage xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">1</opensearch:itemsPerPage>'
        f"{''.join(entries)}</feed>"
    )


ARXIV_ENTRY = """<entry><id>http://arxiv.org/abs/2603.01234v2</id><updated>2026-03-04T10:00:00Z</updated>
<published>2026-03-01T17:59:46Z</published><title>A Title
  over Two Lines &amp; More</title><summary>  An abstract
over two lines.
</summary><author><name>Ada Lovelace</name></author><author><name>Émilie du Châtelet</name></author>
<link href="http://arxiv.org/abs/2603.01234v2" rel="alternate" type="text/html"/>
<category term="cs.LG" scheme="http://arxiv.org/schemas/atom"/></entry>"""

DAILY = {
    "paper": {
        "id": "2603.04321",
        "authors": [
            {"_id": "1", "name": "Ada Lovelace", "hidden": False},
            {"_id": "2", "name": "Bob", "hidden": False},
        ],
        "publishedAt": "2026-02-27T18:00:00.000Z",
        "title": "A Daily Paper",
        "summary": "What it\nsays.",
        "upvotes": 12,
        "discussionId": "abc",
    },
    "publishedAt": "2026-03-02T03:00:00.000Z",
    "title": "A Daily Paper",
    "summary": "What it\nsays.",
    "numComments": 3,
    "submittedBy": {"_id": "3", "fullname": "C", "name": "c", "type": "user", "isPro": False},
    "organization": {"_id": "4", "name": "acme", "fullname": "Acme Labs", "avatar": ""},
    "githubRepo": "https://github.com/acme/daily",
}


def test_a_paper_from_arxiv(server, site):
    """Fails when a field of arXiv's answer is misread, or a version becomes part of the identifier."""
    server.answers["/api/query"] = [(200, "application/atom+xml", arxiv_feed(ARXIV_ENTRY))]
    paper = fetch_arxiv("2603.01234", endpoint=server.url)
    assert paper == Incoming(
        title="A Title over Two Lines & More",
        date=datetime.date(2026, 3, 1),
        source="arxiv",
        abstract="An abstract over two lines.",
        authors=("Ada Lovelace", "Émilie du Châtelet"),
        authors_count=2,
        arxiv="2603.01234",
    )
    assert parse_qs(urlsplit(server.asked[0]).query)["id_list"] == ["2603.01234"]
    with site.write.begin() as session:
        assert store(session, [paper], now=1)[0].slug == "arxiv-2603.01234"
        assert store(session, [paper], now=2)[0].outcome == "known"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(server, status):
    """Fails when one bad answer ends the command."""
    good = (200, "application/atom+xml", arxiv_feed(ARXIV_ENTRY))
    server.answers["/api/query"] = [(status, "text/plain", "busy"), (status, "text/plain", "busy"), good]
    assert fetch_arxiv("2603.01234", endpoint=server.url).title.startswith("A Title")
    assert len(server.asked) == 3


def test_offline_is_said(server):
    """Fails when a server that is down shows as a traceback, is asked for ever, or the message helps nobody."""
    server.answers["/api/query"] = [(503, "text/plain", "busy")]
    with pytest.raises(Offline, match=r"does not answer.*papers import FILE"):
        fetch_arxiv("2603.01234", endpoint=server.url)
    assert len(server.asked) == remote.TRIES
    nobody = "http://127.0.0.1:9"
    with pytest.raises(Offline, match="127"):
        fetch_arxiv("2603.01234", endpoint=nobody)
    with pytest.raises(Offline, match="127"):
        fetch_daily(Period("day", SAVED), endpoint=nobody)


def test_a_silent_server_is_not_waited_for(server, monkeypatch):
    """Fails when a client has no time-out."""
    monkeypatch.setattr(remote, "TRIES", 1)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    server.answers["/api/query"] = [(200, "slow", "")]
    server.answers["/api/daily_papers"] = [(200, "slow", "")]
    for fetch in (lambda: fetch_arxiv("2603.01234", endpoint=server.url),
                  lambda: fetch_daily(Period("day", SAVED), endpoint=server.url)):  # fmt: skip
        with pytest.raises(Offline):
            fetch()


def test_nonsense_from_a_server(server):
    """Fails when an answer that is no answer is stored, or asked for again and again."""
    server.answers["/api/query"] = [(200, "application/atom+xml", arxiv_feed())]
    with pytest.raises(ImportFailed, match=r"no paper 2603\.01234"):
        fetch_arxiv("2603.01234", endpoint=server.url)
    server.answers["/api/query"] = [(400, "text/plain", "bad")]
    with pytest.raises(ImportFailed, match="400"):
        fetch_arxiv("2603.01234", endpoint=server.url)
    server.answers["/api/daily_papers"] = [(200, "text/html", "<html>")]
    with pytest.raises(ImportFailed, match="2026-03-02"):
        fetch_daily(Period("day", SAVED), endpoint=server.url)
    server.answers["/api/daily_papers"] = [(404, "application/json", "{}")]
    with pytest.raises(ImportFailed, match="404"):
        fetch_daily(Period("day", SAVED), endpoint=server.url)


def test_the_daily_papers(server, site):
    """Fails when a field of the answer is misread, or a paper lands on another day's list."""
    server.answers["/api/daily_papers"] = [(200, "application/json", json.dumps([DAILY]))]
    (paper,) = fetch_daily(Period("day", SAVED), endpoint=server.url)
    assert paper == Incoming(
        title="A Daily Paper",
        date=datetime.date(2026, 2, 27),
        source="daily",
        abstract="What it says.",
        authors=("Ada Lovelace", "Bob"),
        authors_count=2,
        organization="Acme Labs",
        comments=3,
        votes=12,
        arxiv="2603.04321",
        code_url="https://github.com/acme/daily",
        listed_on=SAVED,
    )
    assert parse_qs(urlsplit(server.asked[0]).query)["date"] == ["2026-03-02"]
    assert "authorization" not in {name.lower() for name in server.headers[0]}
    with site.write.begin() as session:
        store(session, [paper], now=1)
        page = queries.list_papers(session, filters=queries.Filters(period=Period("day", SAVED)))
    assert [listed.title for listed in page.papers] == ["A Daily Paper"]


def test_all_pages_of_a_week(server):
    """Fails when a long week ends after its first page."""
    many = [{**DAILY, "title": f"Paper {i}", "paper": {**DAILY["paper"], "id": f"2603.{i:05}"}} for i in range(130)]
    server.answers["/api/daily_papers"] = [
        (200, "application/json", json.dumps(many[:100])),
        (200, "application/json", json.dumps(many[100:])),
    ]
    papers = fetch_daily(Period.parse("week", "2026-W10"), endpoint=server.url)
    assert len({paper.arxiv for paper in papers}) == 130
    asked = [parse_qs(urlsplit(path).query) for path in server.asked]
    assert [query["week"] for query in asked] == [["2026-W10"]] * 2
    assert [query["p"] for query in asked] == [["0"], ["1"]]


def test_hostile_entries_are_made_harmless(server):
    """Fails when an address of another kind becomes a link, or a missing field ends the import."""
    hostile = [
        {**DAILY, "githubRepo": "javascript:alert(1)"},
        {
            **DAILY,
            "githubRepo": None,
            "organization": None,
            "numComments": -5,
            "paper": {**DAILY["paper"], "id": "../x"},
        },
        {**DAILY, "title": None},
        {**DAILY, "title": "T" * (LONGEST_TITLE + 1)},
    ]
    server.answers["/api/daily_papers"] = [(200, "application/json", json.dumps(hostile))]
    first, second = fetch_daily(Period("day", SAVED), endpoint=server.url)
    assert first.code_url == ""
    assert (second.arxiv, second.comments, second.organization) == ("", 0, "")


def test_a_redirect_to_another_host_is_not_followed(server):
    """Fails when a server could send us to addresses inside the network (SSRF)."""
    inside = Replay()
    threading.Thread(target=inside.serve_forever, args=(0.01,), daemon=True).start()
    inside.answers["/secret"] = [(200, "application/json", "[]")]
    server.answers["/api/query"] = [(302, "text/plain", f"{inside.url}/secret")]
    server.answers["/api/daily_papers"] = [(302, "text/plain", f"{inside.url}/secret")]
    with pytest.raises(ImportFailed, match="another host"):
        fetch_arxiv("2603.01234", endpoint=server.url)
    with pytest.raises(ImportFailed):
        fetch_daily(Period("day", SAVED), endpoint=server.url)
    assert inside.asked == []
    inside.shutdown()
    inside.server_close()


NO_IDENTIFIERS = """
http://169.254.169.254/latest
2603.01234@evil.com
https://evil.com/2603.01234
2603.1
file:///etc/passwd
2603.01234&id_list=2603.01235
https://arxiv.org.evil.com/abs/2603.01234
２６０３.０１２３４"""


@pytest.mark.parametrize("text", [*NO_IDENTIFIERS.splitlines(), "a" * 10000])
def test_what_is_no_identifier(text):
    """Fails when what somebody types decides where a request goes (SSRF)."""
    with pytest.raises(ImportFailed, match="looks like"):
        arxiv_id(text)
