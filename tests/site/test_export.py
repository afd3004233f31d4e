"""The catalogue as static pages: complete, without a dead link, and without a request to anywhere else."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.site.helpers import settings_in

from regularized.papers.catalogue import load_catalogue
from regularized.site import pages
from regularized.site.database import open_database
from regularized.site.export import ExportError, export
from regularized.site.mail import Mailer
from regularized.site.plots import Plots
from regularized.site.state import Site
from regularized.site.templating import environment

ENTRIES = load_catalogue()
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 10 10"><path d="M 0 0"/></svg>'


class Links(HTMLParser):
    """Links, sources and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        elif "src" in given or tag == "link":
            self.loaded.append(given.get("src") or given["href"])


@pytest.fixture(scope="module")
def exported(filled, tmp_path_factory):
    """The shipped catalogue, written once; drawing takes its time and is tested elsewhere."""
    folder = tmp_path_factory.mktemp("export")
    settings = settings_in(folder)
    shutil.copy(filled, folder / "site.sqlite")
    engine = open_database(settings.database)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "plots_of", lambda *_a, **_k: Plots({}, (("loss", SVG),)))
        site = Site(settings, engine, environment(), Mailer(settings), None)
        written = export(site, folder / "pages")
        with pytest.raises(ExportError, match="empty"):
            export(site, folder / "pages")
    engine.dispose()
    files = {file.relative_to(folder / "pages").as_posix(): file for file in (folder / "pages").rglob("*.html")}
    assert written.pages == len(files)
    return folder / "pages", {name: Links(file.read_text(encoding="utf-8")) for name, file in files.items()}


def test_everything_is_there(exported):
    """Fails when a paper, a list, or what it says of a paper is left out."""
    folder, found = exported
    assert {f"papers/{entry.slug}.html" for entry in ENTRIES} <= set(found)
    assert {"index.html", "new.html", "compare.html", "about.html"} <= set(found)
    entry = next(entry for entry in ENTRIES if entry.ledger.is_file())
    page = (folder / "papers" / f"{entry.slug}.html").read_text(encoding="utf-8")
    for claim in entry.card.claims:
        assert f'id="claim-{claim.id}"' in page
    assert "<svg" in page


def test_no_link_is_dead(exported):
    """Fails when a link leads to no file or no place in it, or to the root of a server that is not there."""
    folder, found = exported
    for name, page in found.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                assert link not in page.loaded, (name, link)
                continue
            assert not parts.scheme, (name, link)
            assert not parts.path.startswith("/"), (name, link)
            target = (folder / name).parent / unquote(parts.path) if parts.path else folder / name
            file = target.resolve()
            assert file.is_file(), (name, link)
            assert file.is_relative_to(folder.resolve())
            if parts.fragment:
                assert parts.fragment in found[file.relative_to(folder.resolve()).as_posix()].ids, (name, link)


def test_nobody_is_asked_for_anything(exported):
    """Fails when a page has a form, or words that need somebody who answers."""
    _, found = exported
    for name, page in found.items():
        assert not {"form", "input", "textarea"} & page.tags, name


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_it_opens_from_the_disk(exported):
    """Fails when a page that lies on a disk asks the network, lacks its style, or its links do not open."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    folder, _ = exported
    entry = next(entry for entry in ENTRIES if entry.ledger.is_file())
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto((folder / "index.html").as_uri())
        assert page.evaluate("getComputedStyle(document.querySelector('.top')).display") != "inline"
        page.get_by_role("link", name="Side by side").click()
        page.get_by_role("link", name=entry.card.title).first.click()
        page.get_by_role("heading", level=1, name=entry.card.title).wait_for()
        page.get_by_role("link", name=re.compile("Best proven")).first.click()
        page.wait_for_url("**/index.html")
        browser.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(Path(folder).as_uri())] == []
    assert len(asked) > 8
