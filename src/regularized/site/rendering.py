"""Renders pages as answers: what every page shows, whether it may be kept, and whether a reader has it already."""

from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from regularized.site.responses import has_this, tag_of
from regularized.site.state import Site
from regularized.site.visitors import Visitor

__all__ = ["page", "said"]


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
