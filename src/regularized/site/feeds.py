"""Atom and JSON feeds of every list, problem family and search, and of verdicts that changed; from our own tables."""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy.orm import Session

from regularized.papers.card import FAMILIES
from regularized.site import queries, search
from regularized.site.dependencies import Read, SiteOf
from regularized.site.models import Paper, VerdictChange
from regularized.site.pages import ORDERS, FiltersOf, NotFound
from regularized.site.queries import Filters, Order
from regularized.site.rendering import page as render
from regularized.site.responses import cached
from regularized.site.state import Site
from regularized.site.visitors import VisitorOf

__all__ = ["code_state", "router"]

router: APIRouter = APIRouter(include_in_schema=False)

ENTRIES = 50
"""Entries of a feed."""

_ATOM = "http://www.w3.org/2005/Atom"
_OWN = "urn:regularized:feed:1"
Kind = Literal["atom", "json"]


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a feed: what a reader program needs, whatever the format.

    Args:
        id: address that never changes.
        title: title.
        url: address of the page.
        summary: what it is about.
        published: first posted.
        updated: last change of what we know.
        authors: names; or one entry that says how many there are.
        tags: tags and problem families.
        code: address and state of code.
        verdicts: number of claims with each verdict.
        arxiv: address at arXiv; empty without one.
    """

    id: str
    title: str
    url: str
    summary: str
    published: str
    updated: str
    authors: Sequence[str]
    tags: Sequence[str]
    code: dict[str, str]
    verdicts: dict[str, int]
    arxiv: str = ""


def code_state(paper: Paper) -> str:
    """Whether there is code, in words: ``runs here``, ``authors' code only`` or ``none known``."""
    if paper.runs:
        return "runs here"
    return "authors' code only" if paper.code_url else "none known"


def _entry(site: Site, paper: Paper) -> Entry:
    url = f"{site.settings.url}/papers/{paper.slug}"
    count = paper.authors_count or len(paper.authors)
    return Entry(
        id=f"{site.settings.url}/paper/{paper.id}",
        title=paper.title,
        url=url,
        summary="\n\n".join(text for text in (paper.problem, paper.summary or paper.abstract) if text),
        published=f"{paper.date.isoformat()}T00:00:00Z",
        updated=_time(paper.changed_at),
        authors=paper.authors or ([f"{count} author{'s' if count > 1 else ''}"] if count else []),
        tags=[*paper.families, *paper.tags],
        code={"url": paper.code_url, "state": code_state(paper)},
        verdicts={name: count for name, count in paper.verdicts.items() if count},
        arxiv=f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else "",
    )


def _change(site: Site, change: VerdictChange) -> Entry:
    entry = _entry(site, change.paper)
    title = f"{change.new}: {change.statement}"
    return Entry(
        id=f"{site.settings.url}/verdict/{change.id}",
        title=title,
        url=f"{entry.url}#claim-{change.claim}",
        summary=f"{change.paper.title}\n\nThe verdict was “{change.old}” and is “{change.new}” now.",
        published=_time(change.at),
        updated=_time(change.at),
        authors=entry.authors,
        tags=entry.tags,
        code=entry.code,
        verdicts=entry.verdicts,
        arxiv=entry.arxiv,
    )


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def _feed(site: Site, request: Request, kind: Kind, title: str, home: str, entries: Iterable[Entry]) -> Response:
    found = list(entries)
    own = site.settings.url + request.url.path + (f"?{request.url.query}" if request.url.query else "")
    home = site.settings.url + home
    if kind == "json":
        body = json.dumps(_json(f"regularized: {title}", home, own, found), ensure_ascii=False).encode()
        return cached(request, body, "application/feed+json", age=300)
    return cached(request, _atom(f"regularized: {title}", home, own, found), "application/atom+xml", age=300)


def _json(title: str, home: str, own: str, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "version": "https://jsonfeed.org/version/1.1",
        "title": title,
        "home_page_url": home,
        "feed_url": own,
        "language": "en",
        "items": [
            {
                "id": entry.id,
                "url": entry.url,
                **({"external_url": entry.arxiv} if entry.arxiv else {}),
                "title": entry.title,
                "content_text": entry.summary,
                "summary": entry.summary.partition("\n\n")[0],
                "date_published": entry.published,
                "date_modified": entry.updated,
                "authors": [{"name": name} for name in entry.authors],
                "tags": list(entry.tags),
                "_regularized": {"about": _OWN, "code": entry.code, "verdicts": entry.verdicts},
            }
            for entry in entries
        ],
    }


def _atom(title: str, home: str, own: str, entries: Sequence[Entry]) -> bytes:
    ElementTree.register_namespace("", _ATOM)
    ElementTree.register_namespace("regularized", _OWN)
    feed = ElementTree.Element(f"{{{_ATOM}}}feed")

    def add(parent: ElementTree.Element, name: str, text: str = "", **attributes: str) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, f"{{{_ATOM}}}{name}", attributes)
        element.text = _xml(text) or None
        return element

    add(feed, "id", own)
    add(feed, "title", title)
    add(feed, "updated", max((entry.updated for entry in entries), default="1970-01-01T00:00:00Z"))
    add(feed, "link", rel="self", type="application/atom+xml", href=own)
    add(feed, "link", rel="alternate", type="text/html", href=home)
    add(add(feed, "author"), "name", "regularized")
    for entry in entries:
        node = add(feed, "entry")
        add(node, "id", entry.id)
        add(node, "title", entry.title)
        add(node, "updated", entry.updated)
        add(node, "published", entry.published)
        add(node, "link", rel="alternate", type="text/html", href=entry.url)
        if entry.arxiv:
            add(node, "link", rel="via", href=entry.arxiv)
        if entry.code["url"]:
            add(node, "link", rel="related", href=entry.code["url"], title="code")
        for name in entry.authors:
            add(add(node, "author"), "name", name)
        for tag in entry.tags:
            add(node, "category", term=tag)
        add(node, "summary", entry.summary, type="text")
        ElementTree.SubElement(node, f"{{{_OWN}}}code", state=entry.code["state"], url=entry.code["url"])
        for verdict, count in entry.verdicts.items():
            ElementTree.SubElement(node, f"{{{_OWN}}}claims", verdict=verdict, count=str(count))
    return bytes(ElementTree.tostring(feed, encoding="utf-8", xml_declaration=True))


def _xml(text: str) -> str:
    """Text without the control characters that XML has no way to write."""
    return "".join(letter for letter in text if letter in "\t\n" or " " <= letter < "\ufffe" or letter > "\uffff")


# -- addresses ----------------------------------------------------------------------------------


@router.get("/feeds")
def feeds_page(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """All feeds."""
    found = [(title, f"/feeds/{order}") for order, (title, _, _) in ORDERS.items()]
    found.append(("Verdicts that changed", "/feeds/verdicts"))
    found += [
        (words[0].upper() + words[1:], f"/feeds/family/{family}")
        for family, words in FAMILIES.items()
        if family in queries.families(session)
    ]
    return render(site, request, visitor, "feeds.html", feeds=found)


@router.get("/feeds/search.{kind}")
def search_feed(
    site: SiteOf,
    request: Request,
    session: Read,
    kind: Kind,
    filters: FiltersOf,
    q: Annotated[str, Query(max_length=400)] = "",
) -> Response:
    """A saved search: what fits best, as the page shows it."""
    found = search.find(session, q, filters=filters, per_page=ENTRIES, meaning=site.meaning).page.papers
    words = q or ", ".join(filters.query().values()) or "all papers"
    home = f"/search?{request.url.query}"
    return _feed(site, request, kind, f"search for {words}", home, [_entry(site, paper) for paper in found])


@router.get("/feeds/verdicts.{kind}")
def verdict_feed(site: SiteOf, request: Request, session: Read, kind: Kind) -> Response:
    """Verdicts that became others."""
    changes = queries.verdict_changes(session, limit=ENTRIES)
    return _feed(site, request, kind, "verdicts that changed", "/", [_change(site, change) for change in changes])


@router.get("/feeds/family/{family}.{kind}")
def family_feed(
    site: SiteOf, request: Request, session: Read, family: Annotated[str, Path(max_length=40)], kind: Kind
) -> Response:
    """Papers of a problem family, newest first."""
    if family not in FAMILIES:
        raise NotFound(f"There is no problem family “{family}”.")
    papers = queries.list_papers(session, "new", filters=Filters(family=family), per_page=ENTRIES).papers
    return _feed(
        site, request, kind, FAMILIES[family], f"/families/{family}", [_entry(site, paper) for paper in papers]
    )


@router.get("/feeds/{order}.{kind}")
def list_feed(site: SiteOf, request: Request, session: Read, order: Order, kind: Kind) -> Response:
    """One of the lists."""
    papers = _papers(session, order)
    home = "/" if order == "best" else f"/{order}"
    return _feed(site, request, kind, ORDERS[order][0].lower(), home, [_entry(site, paper) for paper in papers])


def _papers(session: Session, order: Order) -> Sequence[Paper]:
    return queries.list_papers(session, order, per_page=ENTRIES).papers
