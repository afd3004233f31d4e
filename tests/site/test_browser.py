"""A person's way through the site, in the system's Chromium: with and without JavaScript, on a wide screen and a phone.

Screenshots go to the folder of the variable REGULARIZED_SCREENSHOTS, where it is set.
"""

import dataclasses
import os
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest
import uvicorn
from sqlalchemy import delete, select
from tests.site.helpers import Outbox, settings_in, something_new, without_code

from regularized.papers.catalogue import load_catalogue
from regularized.papers.search import search
from regularized.site.app import create_app
from regularized.site.database import open_database
from regularized.site.digest import write_digests
from regularized.site.limits import count_try
from regularized.site.mail import Mailer
from regularized.site.models import Comment, LoginSession, Paper, Person, Report
from regularized.site.moderation import Moderation
from regularized.site.plots import plots_of
from regularized.site.state import Site
from regularized.site.templating import environment

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
ENTRIES = load_catalogue()
QUESTION = "my labels are wrong"
PAPER = next(entry for entry in search(QUESTION, ENTRIES) if entry.ledger.is_file())
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-gpu-rasterization",
        ]
        try:
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        except sync_api.Error as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def plots(filled, tmp_path_factory):
    """Drawings of the paper that is looked at, made once."""
    folder = tmp_path_factory.mktemp("drawn") / "plots"
    engine = open_database(f"sqlite:///{filled}")
    with engine.connect() as connection:
        fingerprint = connection.execute(select(Paper.fingerprint).where(Paper.slug == PAPER.slug)).scalar_one()
    engine.dispose()
    plots_of(PAPER.slug, fingerprint, package="regularized.papers", folder=folder)
    return folder


@pytest.fixture
def served(filled, plots, tmp_path, clock):
    """The site on a port of this machine."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = settings_in(tmp_path, url=url, clock=clock)
    shutil.copy(filled, tmp_path / "site.sqlite")
    shutil.copytree(plots, tmp_path / "plots")
    engine = open_database(settings.database)
    site = Site(settings, engine, environment(), Mailer(settings), None)
    server = uvicorn.Server(uvicorn.Config(create_app(site), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield site
    server.should_exit = True
    thread.join(20)
    listener.close()
    engine.dispose()


@dataclasses.dataclass
class Visit:
    """A page of the browser, and everything that went wrong in it."""

    page: object
    url: str
    outbox: Outbox
    name: str
    wrong: list

    def goto(self, path):
        self.page.goto(self.url + path)

    def link(self, part):
        text = self.outbox.messages()[-1].get_body(("plain",)).get_content()
        return next(link for link in re.findall(rf"{re.escape(self.url)}(\S+)", text) if part in link)

    def look(self, name):
        """Nothing sticks out to the side; a picture is kept where somebody wants to look."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.viewport_size["width"], (name, width)
        if folder := os.environ.get("REGULARIZED_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}_{self.name}.png")


@pytest.fixture
def visit(browser, served):
    """Opens a page; at the end nothing may have gone wrong in any of them."""
    opened = []

    def start(name, viewport=WIDE, scheme="light", scripts=True):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=scripts)
        context.set_default_timeout(120_000)
        page = context.new_page()
        url = served.settings.url
        found = Visit(page, url, Outbox(served), name, [])
        page.on("console", lambda m: found.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.wrong.append(str(error)))
        page.on("request", lambda r: found.wrong.append(r.url) if not r.url.startswith(url) else None)
        opened.append((context, found))
        return found

    yield start
    for context, found in opened:
        context.close()
        assert found.wrong == [], found.name


def journey(visit: Visit, site, clock):
    """Find by problem, read the evidence, sign in from the outbox, vote, comment, subscribe, unsubscribe."""
    page = visit.page
    visit.goto("/")
    visit.look("first")
    page.get_by_label("Your problem, in your words").fill(QUESTION)
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="papers for").wait_for()
    visit.look("search")
    page.get_by_role("link", name=PAPER.card.title).click()
    page.get_by_role("heading", level=1, name=PAPER.card.title).wait_for()
    page.wait_for_load_state()  # the heading is there before the end of a long page
    assert page.locator(".claim").count() == len(PAPER.card.claims)
    page.get_by_role("heading", name=PAPER.card.claims[0].statement).scroll_into_view_if_needed()
    visit.look("evidence")
    # -- sign in
    page.get_by_role("link", name="Sign in to comment").click()
    page.get_by_label("Your e-mail address").fill("ada@example.org")
    visit.look("sign_in")
    page.get_by_role("button", name="Send the link").click()
    page.get_by_role("heading", name="Look into your mailbox").wait_for()
    visit.goto(visit.link("/sign-in/link"))
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", level=1, name=PAPER.card.title).wait_for()
    # -- vote and comment
    page.get_by_role("button", name=re.compile("Vote")).click()
    page.locator("#vote button[aria-pressed=true]").wait_for()
    page.get_by_label("Your comment").fill("The interval is **narrow** here.\n\n- five seeds")
    page.get_by_role("button", name="Comment", exact=True).click()
    page.locator(".comment strong", has_text="narrow").wait_for()
    page.locator(".comment").scroll_into_view_if_needed()
    visit.look("discussion")
    visit.goto("/trending")
    page.get_by_role("link", name=PAPER.card.title).wait_for()
    visit.look("trending")
    # -- the digest
    visit.goto("/digest")
    assert page.get_by_label("Your e-mail address").input_value() == "ada@example.org"
    page.get_by_label("daily").check()
    visit.look("digest")
    page.get_by_role("button", name="Subscribe").click()
    page.get_by_role("heading", name="Look into your mailbox").wait_for()
    visit.goto(visit.link("/digest/confirm"))
    page.get_by_role("button", name="Confirm").click()
    page.get_by_role("heading", name="You are subscribed").wait_for()
    clock.now += 24 * 3600
    something_new(site, clock, PAPER.slug)
    assert write_digests(site).written == 1
    visit.goto(visit.link("/digest/unsubscribe"))
    page.get_by_role("button", name="Unsubscribe").click()
    page.get_by_role("heading", name="You are unsubscribed").wait_for()
    visit.look("unsubscribed")


@pytest.mark.parametrize(
    ("name", "viewport", "scheme", "scripts"),
    [
        ("wide_light", WIDE, "light", True),
        ("phone_dark", PHONE, "dark", True),
        ("wide_light_without_scripts", WIDE, "light", False),
    ],
)
def test_journey(visit, served, clock, name, viewport, scheme, scripts):
    """Fails when a step of a person's way does not work, another site is asked, or the policy blocks our own."""
    if scripts:
        journey(visit(name, viewport, scheme), served, clock)
    else:
        visited = visit(name, viewport, scheme, scripts)
        visited.page.evaluate = lambda _code: 0  # no script runs there, not even ours
        journey(visited, served, clock)


def test_without_a_mouse(visit):
    """Fails when the keyboard reaches something that it cannot see, or cannot skip the header."""
    visited = visit("keyboard")
    page = visited.page
    visited.goto(f"/papers/{PAPER.slug}")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    for _ in range(12):
        page.keyboard.press("Tab")
        box = page.evaluate(
            "(() => { const e = document.activeElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);"
            " return [r.width * r.height, s.outlineStyle, !!e.closest('main')]; })()"
        )
        assert box[0] > 0
        assert box[1] != "none"
        assert box[2]


def test_search_while_typing_and_copying(visit):
    """Fails when htmx does not replace the results, loses the focus, or the copy button does nothing."""
    visited = visit("typing")
    page = visited.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visited.goto("/search")
    field = page.get_by_role("searchbox", name="Your problem, in your words")
    field.press_sequentially("annotators disagree", delay=5)
    page.get_by_role("heading", name=re.compile("for “annotators disagree”")).wait_for()
    assert page.evaluate("document.activeElement.id") == "q"
    page.wait_for_url(re.compile(r"\?q=annotators.disagree"))
    page.get_by_label("has code that runs").check()
    page.wait_for_url(re.compile("runs=1"))
    assert field.input_value() == "annotators disagree"
    visited.goto(f"/papers/{PAPER.slug}")
    button = page.locator("button[data-copy=command]")
    button.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").strip() == f"regularized reproduce {PAPER.slug}"


def signed_in(visited, path):
    """A page, seen by somebody who has signed in by the link in the message."""
    page = visited.page
    visited.goto(f"/sign-in?next={path}")
    page.get_by_label("Your e-mail address").fill("ada@example.org")
    page.get_by_role("button", name="Send the link").click()
    page.get_by_role("heading", name="Look into your mailbox").wait_for()
    visited.goto(visited.link("/sign-in/link"))
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(re.compile(re.escape(path) + "$"))
    return page


def test_an_error_inside_a_page_deletes_nothing(visit, served, clock, monkeypatch):
    """Fails when a limit, an ended session or a defect takes away a form, what was typed in it, or the results."""
    visited = visit("errors")
    page = signed_in(visited, f"/papers/{PAPER.slug}")
    said = page.locator("#discussion > form [data-problem]")
    with served.write.begin() as session:
        person = session.scalars(select(Person.id)).one()
        for _ in range(10):
            count_try(session, f"comment {person}", most=10, seconds=600, now=served.settings.now)
    comment = page.get_by_label("Your comment")
    comment.fill("What I have typed")
    page.get_by_role("button", name="Comment", exact=True).click()
    said.get_by_text("Too many tries").wait_for()
    assert said.get_attribute("role") == "alert"
    assert comment.input_value() == "What I have typed"
    assert page.evaluate("document.activeElement.id") == "comment-button"
    # -- what works is counted in the header, and said
    clock.now += 600
    page.get_by_role("button", name="Comment", exact=True).click()
    page.locator(".comment", has_text="What I have typed").wait_for()
    page.locator("#to-discussion", has_text="Discussion 1").wait_for()
    page.locator("#facts", has_text="1 comment").wait_for()
    assert page.get_by_role("status").filter(has_text="Your comment is there.").count() == 1
    assert comment.input_value() == said.inner_text() == ""
    # -- a session that has ended: nothing is lost on the way to a new one
    comment.fill("Not lost")
    with served.write.begin() as session:
        session.execute(delete(LoginSession))
    page.get_by_role("button", name="Comment", exact=True).click()
    said.get_by_text("not signed in any more").wait_for()
    assert comment.input_value() == "Not lost"
    page.get_by_role("button", name=re.compile("Vote")).click()
    page.locator("#vote [data-problem]", has_text="not signed in any more").wait_for()
    said.get_by_role("link", name="Sign in again").click()
    signed_in(visited, f"/papers/{PAPER.slug}")
    assert comment.input_value() == "Not lost"
    # -- a defect in the search
    visited.goto("/search?q=labels")
    first = page.locator("#results .paper h3").first.inner_text()

    def broken(*_arguments, **_options):
        raise RuntimeError("broken for a test")

    monkeypatch.setattr("regularized.site.pages.search.find", broken)
    page.get_by_role("searchbox").fill("noise")
    page.locator(".filters [data-problem]", has_text="our fault").wait_for()
    assert page.locator("#results .paper h3").first.inner_text() == first
    told = "Failed to load resource: the server responded with a status of"
    expected = sorted({line.split(told)[1].split()[0] for line in visited.wrong if told in line})
    assert expected == ["401", "429", "500"]
    visited.wrong[:] = [line for line in visited.wrong if told not in line]


def test_side_by_side_sorts_and_fits(visit):
    """Fails when a column does not sort by its numbers, both ways and empty cells last, or a page does not fit."""
    visited = visit("sorting")
    page = visited.page
    visited.goto("/compare")
    assert len({link.bounding_box()["y"] for link in page.locator(".links a").all()}) == 1  # at 1280 pixels
    column = "[...document.querySelectorAll('.compare tbody tr')].map((row) => row.cells[%d].innerText.trim())"
    head = page.locator(".compare thead th").nth(3)
    before = page.evaluate(column % 3)
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        cells = page.evaluate(column % 3)
        assert sorted(cells) == sorted(before)
        numbers = [float(cell.split()[0]) for cell in cells if cell != "–"]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert "–" not in cells[: len(numbers)]
    names = page.locator(".compare thead th").nth(0)
    names.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    titles = [cell.lower() for cell in page.evaluate(column % 0)]
    assert titles == sorted(titles)
    for address in ("/compare", "/leaders", "/api"):
        visited.goto(address)
        for width in (320, 768, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (address, width)


CONTRAST = """
() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const lum = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll("a, p, li, td, th, dt, dd, h1, h2, h3, button, label, span, b, code")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(back(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) bad.push(e.tagName + ": " + e.textContent.trim().slice(0, 30));
  }
  return bad;
}
"""


LISTS = {
    "best": "/",
    "new": "/new",
    "trending": "/trending",
    "day": f"/day/{PAPER.card.date}",
    "family": f"/families/{PAPER.card.families[0]}",
    "search_page": "/search?q=labels",
}
TEXTS = {
    "paper": f"/papers/{PAPER.slug}",
    "waiting": f"/papers/{ENTRIES[-1].slug}",
    "compare": "/compare",
    "leaders": "/leaders",
    "changes": "/changes",
    "about": "/about",
}
FORMS = {
    "feeds": "/feeds",
    "api": "/api",
    "sign_in": "/sign-in",
    "digest": "/digest",
    "submit": "/submit",
    "nothing": "/nothing-here",
}
OF_A_PERSON = {
    "own_page": "/me",
    "own_problems": "/me/problems",
    "moderation": "/moderation",
    "commented": f"/papers/{PAPER.slug}",
}
ROOMS = (
    ("wide_light", WIDE, "light"),
    ("wide_dark", WIDE, "dark"),
    ("phone_dark", PHONE, "dark"),
    ("phone_light", PHONE, "light"),
)


@pytest.mark.parametrize("kinds", [LISTS, TEXTS, FORMS, OF_A_PERSON], ids=["lists", "texts", "forms", "of_a_person"])
def test_looks_and_for_everybody(visit, served, kinds):
    """Fails when a page is wider than its screen, or has a text that is too pale to read (WCAG AA).

    Or when who listens to it, sees little or uses no mouse cannot: axe's rules. A page is loaded once and looked at on
    both screens in both schemes. Of axe's rules a scheme decides contrast alone, so that the others need not be asked
    in both.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe").Axe()
    visited = visit("looks")
    page = visited.page
    without_code(served, ENTRIES[-1].slug)
    if kinds is OF_A_PERSON:
        signed_in(visited, f"/papers/{PAPER.slug}")
        page.get_by_label("Your comment").fill("`code`, a [link](https://example.org) and\n\n> a quotation: $x^2$")
        page.get_by_role("button", name="Comment", exact=True).click()
        page.locator(".comment").wait_for()
        with served.write.begin() as session:
            acting = Moderation(session, "command line", served.settings.now)
            person = session.scalars(select(Person)).one()
            acting.appoint(person.email, on=True, reason="A test")
            comment = session.scalars(select(Comment.id)).one()
            session.add(Report(comment_id=comment, person_id=person.id, reason="A test", at=served.settings.now))
    every = {"resultTypes": ["violations"]}
    contrast = every | {"runOnly": ["color-contrast"]}
    found = {}
    for kind, address in kinds.items():
        visited.goto(address)
        widths = set()
        for name, viewport, scheme in ROOMS:
            visited.name = name
            page.set_viewport_size(viewport)
            page.emulate_media(color_scheme=scheme)
            visited.look(kind)
            assert page.evaluate(CONTRAST) == [], (kind, name)
            results = axe.run(page, options=contrast if viewport["width"] in widths else every).response
            widths.add(viewport["width"])
            for violation in results["violations"]:
                found[kind, name, violation["id"]] = [node["html"][:160] for node in violation["nodes"][:3]]
    assert found == {}
    visited.wrong[:] = [text for text in visited.wrong if "nothing" not in kinds or "404" not in text]
