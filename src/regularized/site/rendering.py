"""Templates and what they need: what goes into HTML is escaped unless a filter here says that it is safe."""

import datetime
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from regularized._version import __version__
from regularized.evidence.numbers import number
from regularized.papers.card import FAMILIES
from regularized.site.responses import has_this, tag_of
from regularized.site.state import Site
from regularized.site.visitors import Visitor

__all__ = ["STATIC", "environment", "moment", "page", "said", "with_query"]

_FOLDER = Path(__file__).parent
STATIC = _FOLDER / "static"

_BADGES = {
    "holds": "holds",
    "smaller than promised": "smaller",
    "no effect shown": "fails",
    "opposite": "fails",
    "open": "open",
    "not run": "none",
}


def environment(*, static: bool = False) -> Environment:
    """The templates.

    Args:
        static: for pages that stand alone: without search, feeds, and what people do.
    """
    found = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=lambda name: name is None or not name.endswith(".txt"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(FAMILIES=FAMILIES, version=__version__, static=_static, standing_alone=static)
    found.filters.update(
        badge=lambda verdict: _BADGES.get(verdict, "none"),
        day=_day,
        moment=moment,
        number=number,
        person=lambda person: person.name or f"reader {person.id}",
        short=_short,
        trusted=Markup,
        with_query=with_query,
        plural=lambda count, one, many="": f"{count} {one if count == 1 else many or one + 's'}",
    )
    return found


def page(
    site: Site, request: Request, visitor: Visitor | None, template: str, *, status: int = 200, **values: Any
) -> Response:
    """Render a page; 304 without it where a reader who is nobody in particular has this one.

    Args:
        site: the site.
        request: the request.
        visitor: who asks; None on pages that do not care.
        template: name of the template.
        status: status code.
        values: what the template shows.
    """
    papers, runs = visitor.totals if visitor is not None else (0, 0)
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    text = site.templates.get_template(template).render(
        {
            "visitor": visitor,
            "person": visitor.person if visitor else None,
            "path": request.url.path,
            "here": here,
            "query": "",
            "site_url": site.settings.url,
            "status": status,
            "papers_in_all": papers,
            "papers_that_run": runs,
            **values,
        }
    )
    response = HTMLResponse(text, status)
    if visitor is not None:
        visitor.keep(response)
        # What is shown to a person is nobody else's: no cache on the way may keep it.
        if visitor.person or visitor.key:
            response.headers["cache-control"] = "private, no-store"
        else:
            tag = tag_of(bytes(response.body))
            own = {"cache-control": "no-cache", "etag": tag}
            if status == 200 and has_this(request, tag):
                return Response(status_code=304, headers=own)
            response.headers.update(own)
    return response


def said(
    site: Site,
    request: Request,
    visitor: Visitor,
    title: str,
    message: str,
    *,
    status: int = 200,
    link: tuple[str, str] = ("/", "Best proven papers"),
) -> Response:
    """A page that says one thing, and where to go from there."""
    return page(
        site, request, visitor, "said.html", status=status, **{"title": title, "message": message, "link": link}
    )


@lru_cache(maxsize=64)
def _static(name: str) -> str:
    """Address of a file that may be kept for ever: it changes with the file."""
    return f"/static/{name}?{hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def _day(day: datetime.date) -> str:
    return f"{day.day} {day:%b %Y}"


def moment(seconds: int) -> str:
    """A point in time, in words."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def _short(text: str, most: int = 320) -> str:
    """The beginning of a text, to the end of a word.

    Examples:
        >>> _short("one two three", 9)
        'one two …'
    """
    if len(text) <= most:
        return text
    return text[: most - 1].rpartition(" ")[0] + " …"


def with_query(path: str, query: Mapping[str, Any], **changed: Any) -> str:
    """An address with parameters; those that are None or empty are left out.

    Args:
        path: the path.
        query: parameters.
        changed: parameters that replace those.

    Examples:
        >>> with_query("/search", {"q": "a b", "page": 3}, page=4)
        '/search?q=a+b&page=4'
    """
    given = {name: value for name, value in {**query, **changed}.items() if value not in (None, "", False)}
    return quote(path) + (f"?{urlencode(given)}" if given else "")
