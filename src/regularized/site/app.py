"""Puts the web application together: pages, and what stands around every request."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Match

from regularized._version import __version__
from regularized.site import (
    api,
    discussion,
    feeds,
    moderation_pages,
    observing,
    own_page,
    pages,
    signing_in,
    submissions,
    subscriptions,
)
from regularized.site.database import THREADS
from regularized.site.encoder_folder import encoder_folder
from regularized.site.encoding import Encoding
from regularized.site.limits import TooOften
from regularized.site.middleware import BodyLimit, Headers, PlainText, ProxyCheck, security_headers
from regularized.site.opening import open_site
from regularized.site.outbox import Sender
from regularized.site.pages import BadRequest, NotFound
from regularized.site.rendering import page as render
from regularized.site.responses import Head
from regularized.site.security import local_path
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.templating import STATIC
from regularized.site.visitors import Forbidden, SignInNeeded, visitor_of

__all__ = ["create_app", "from_environment"]

log: logging.Logger = logging.getLogger(__name__)

_TITLES = {
    400: "That cannot be asked",
    401: "Sign in first",
    403: "Not allowed",
    404: "There is no such page",
    405: "Not allowed here",
    409: "Not now",
    413: "Too large",
    422: "Something is missing",
    429: "Too many tries",
    500: "Something went wrong",
    503: "Not now",
}


def from_environment() -> FastAPI:
    """The application of a worker process, which opens the site by itself."""
    return create_app(open_site(Settings.from_environment()), background=True)


def create_app(site: Site, *, background: bool = False) -> FastAPI:
    """The application.

    Args:
        site: an open site.
        background: whether threads send what waits in the outbox and load the encoder, for as long as the application
            lives.

    Raises:
        SettingsError: the folder of the encoder holds no model.
    """
    folder = encoder_folder(site.settings.encoder) if background else None

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        observing.open_access_log(site.settings.access_log)
        threads: list[Sender | Encoding] = [Sender(site)] if background else []
        threads += [Encoding(site, folder)] if folder else []
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.stop()
        site.engine.dispose()

    app = FastAPI(
        title="regularized",
        version=__version__,
        summary="Papers on regularized training, and what could be measured of their claims.",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # its redirect repeats the Host header, and knows nothing of https; ours is a path
        lifespan=life,
    )
    app.state.site = site
    for part in (
        pages,
        signing_in,
        discussion,
        own_page,
        moderation_pages,
        submissions,
        subscriptions,
        observing,
        feeds,
        api,
    ):
        app.include_router(part.router)
    app.mount("/static", _Static(directory=STATIC))
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    # The last that is added is the first that sees a request.
    app.add_middleware(PlainText)
    app.add_middleware(BodyLimit)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=6)
    app.add_middleware(Head)
    app.add_middleware(ProxyCheck, settings=site.settings)
    app.add_middleware(Headers, secure=site.settings.secure)
    app.state.metrics = observing.Metrics()
    app.add_middleware(observing.Observed, metrics=app.state.metrics)
    return app


class _Static(StaticFiles):
    """Files whose address changes with them, so that they may be kept."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """The file."""
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


# -- errors -------------------------------------------------------------------------------------


def _error(
    request: Request,
    status: int,
    message: str,
    *,
    suggestions: tuple[str, ...] = (),
    link: tuple[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error as a page, or as JSON (RFC 9457) from the API."""
    title = _TITLES.get(status, "Something went wrong")
    if request.url.path.startswith("/api/"):
        body = {"type": "about:blank", "title": title, "status": status, "detail": message}
        return JSONResponse(body, status, headers, media_type="application/problem+json")
    site = request.app.state.site
    response: Response = render(
        site,
        request,
        visitor_of(request, site) if status < 500 else None,  # where we have failed, the database may have, too
        "error.html",
        status=status,
        **{"title": title, "message": message, "suggestions": suggestions, "link": link},
    )
    response.status_code = status
    response.headers.update(headers or {})
    return response


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotFound)
    return _error(request, 404, str(error), suggestions=error.suggestions)


async def _bad_request(request: Request, error: Exception) -> Response:
    return _error(request, 422 if request.url.path.startswith("/api/") else 400, str(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
    return _error(request, 422 if request.url.path.startswith("/api/") else 400, problems)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and (elsewhere := _without_slash(request)):
        return RedirectResponse(elsewhere, 308)
    message = "There is nothing at this address." if error.status_code == 404 else str(error.detail)
    return _error(request, error.status_code, message, headers=dict(error.headers or {}))


def _without_slash(request: Request) -> str:
    """The page that was meant by its address with a slash behind it; empty where there is none."""
    path = request.url.path.rstrip("/")
    scope = {**request.scope, "path": path}
    if path == request.url.path or not any(r.matches(scope)[0] == Match.FULL for r in request.app.router.routes):
        return ""
    query = f"?{request.url.query}" if request.url.query else ""
    return local_path(f"{quote(path)}{query}", default="")


async def _forbidden(request: Request, error: Exception) -> Response:
    return _error(request, 403, f"Nothing was changed: {error}. Load the page again and send it once more.")


async def _too_often(request: Request, error: Exception) -> Response:
    assert isinstance(error, TooOften)
    message = f"Too many tries in a short time. Wait {error.wait} seconds and try again."
    return _error(request, 429, message, headers={"retry-after": str(error.wait)})


async def _sign_in(request: Request, error: Exception) -> Response:
    assert isinstance(error, SignInNeeded)
    elsewhere = f"/sign-in?next={quote(error.goes_to)}"
    if "hx-request" in request.headers:
        # A part of a page asks, and follows redirects by itself: what was typed must not give way to another page.
        message = "You are not signed in any more, and nothing was changed. What you typed is still here."
        return _error(request, 401, message, link=(elsewhere, "Sign in again"))
    return RedirectResponse(elsewhere, 303)


async def _at_once(request: Request, error: Exception) -> Response:
    log.warning("%s %s: %s", request.method, request.url.path, error)
    return _error(request, 409, "Something was changed at the same moment, and this was not. Send it once more.")


async def _defect(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    # This answer comes from outside of all middleware.
    headers = security_headers(secure=request.app.state.site.settings.secure)
    return _error(request, 500, "This is our fault, and it is in the log.", headers=headers)


_HANDLERS: dict[Any, Any] = {
    NotFound: _not_found,
    BadRequest: _bad_request,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Forbidden: _forbidden,
    TooOften: _too_often,
    SignInNeeded: _sign_in,
    IntegrityError: _at_once,
    StaleDataError: _at_once,
    Exception: _defect,
}
