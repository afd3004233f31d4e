"""Asks arXiv and the Daily Papers, through their clients: with time-outs, retries, and never another host."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from regularized.site.importing import Incoming
from regularized.site.listing import LONGEST_TITLE, ImportFailed
from regularized.site.queries import Period

__all__ = ["ARXIV", "DAILY_PAPERS", "Offline", "arxiv_id", "fetch_arxiv", "fetch_daily"]

ARXIV = "https://export.arxiv.org"
DAILY_PAPERS = "https://huggingface.co"

TIMEOUT = 20.0
"""Seconds to wait for a server."""
TRIES = 3
PAUSE = 1.0
"""Seconds before the second try; twice as many before each further one."""

Result = TypeVar("Result")


class Offline(RuntimeError):
    """A server does not answer; the message says which, and what works without it."""


_ID = re.compile(
    r"(?:https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/|arxiv:)?(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?",
    re.IGNORECASE | re.ASCII,
)


def arxiv_id(text: str) -> str:
    """The identifier in what was typed: the bare one, with version, or an address at arXiv.

    Nothing of an address but the identifier is used: no request goes anywhere else than to arXiv.

    Raises:
        ImportFailed: it is none.

    Examples:
        >>> arxiv_id("2007.00151"), arxiv_id("https://arxiv.org/abs/2007.00151v2"), arxiv_id("arXiv:2007.00151")
        ('2007.00151', '2007.00151', '2007.00151')
    """
    found = _ID.fullmatch(text.strip())
    if found is None:
        raise ImportFailed(f"an arXiv identifier looks like 2007.00151, got {text[:80]!r}")
    return found[1]


def fetch_arxiv(identifier: str, *, endpoint: str = ARXIV) -> Incoming:
    """A paper from arXiv's public API.

    Args:
        identifier: its identifier, see :func:`arxiv_id`.
        endpoint: the server.

    Raises:
        ImportFailed: there is no such paper, or the answer makes no sense.
        Offline: arXiv does not answer.
    """
    import arxiv
    import requests

    client = arxiv.Client(page_size=1, delay_seconds=0.0, num_retries=0)
    client.query_url_format = f"{endpoint}/api/query?{{}}"
    # The client waits for ever and follows redirects to any host; it has no options for either.
    adapter = _only_to(endpoint)
    for scheme in ("http://", "https://"):
        client._session.mount(scheme, adapter)
    wanted = arxiv_id(identifier)

    def ask() -> list[Any]:
        return list(client.results(arxiv.Search(id_list=[wanted], max_results=1)))

    def again(error: Exception) -> bool:
        if isinstance(error, arxiv.HTTPError):
            return int(error.status) >= 500 or error.status == 429
        return isinstance(error, requests.RequestException) and not isinstance(error, requests.exceptions.InvalidURL)

    try:
        found = _patiently(ask, again, server=endpoint)
    except (arxiv.ArxivError, requests.RequestException, ValueError) as error:
        raise ImportFailed(f"{endpoint} gave no paper for {wanted}: {error}") from error
    if not found or not found[0].title:
        raise ImportFailed(f"arXiv has no paper {wanted}")
    result = found[0]
    if len(result.title) > LONGEST_TITLE:
        raise ImportFailed(
            f"{endpoint} gave a title of {len(result.title)} letters for {wanted}; no title has that many"
        )
    names = tuple(author.name for author in result.authors)
    return Incoming(
        title=" ".join(result.title.split()),
        date=result.published.date(),
        source="arxiv",
        abstract=" ".join(result.summary.split()),
        authors=names,
        authors_count=len(names),
        arxiv=wanted,
    )


def fetch_daily(period: Period, *, endpoint: str = DAILY_PAPERS) -> list[Incoming]:
    """The Daily Papers of a day, week or month.

    Args:
        period: which.
        endpoint: the server.

    Raises:
        ImportFailed: the answer makes no sense.
        Offline: the server does not answer.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Nobody's token goes along: these lists are public.
    api = HfApi(endpoint=endpoint, token=False)
    wanted = {"day": "date", "week": "week", "month": "month"}[period.kind]

    def again(error: Exception) -> bool:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            return status >= 500 or status == 429
        return isinstance(error, httpx2.TransportError)

    found: list[Any] = []
    per_page = 100
    with _impatient_hub():
        for number in range(50):

            def ask(number: int = number) -> list[Any]:
                options: dict[str, Any] = {wanted: period.name}
                return list(api.list_daily_papers(**options, p=number, limit=per_page, token=False))

            try:
                part = _patiently(ask, again, server=endpoint)
            except (HfHubHTTPError, httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ImportFailed(f"{endpoint} gave no list for {period.name}: {error}") from error
            found += part
            if len(part) < per_page:
                break
    return [paper for info in found if (paper := _daily(info, period)) is not None]


def _daily(info: Any, period: Period) -> Incoming | None:
    posted = info.published_at or info.submitted_at
    if not info.title or len(info.title) > LONGEST_TITLE or posted is None:
        return None
    day = info.submitted_at.date() if info.submitted_at else posted.date()
    names = tuple(author.name for author in info.authors or () if getattr(author, "name", ""))
    organization = getattr(info.organization, "fullname", "") or getattr(info.organization, "name", "") or ""
    return Incoming(
        title=" ".join(info.title.split()),
        date=posted.date(),
        source="daily",
        abstract=" ".join((info.summary or "").split()),
        authors=names,
        authors_count=len(names),
        organization=organization,
        comments=max(0, int(info.comments or 0)),
        votes=max(0, int(info.upvotes or 0)),
        arxiv=info.id if _ID.fullmatch(str(info.id)) else "",
        code_url=_web_address(info.github_repo),
        listed_on=day if period.first <= day <= period.last else period.first,
    )


def _web_address(text: str | None) -> str:
    """An address that may be linked to; anything else is dropped."""
    parts = urlsplit(text or "")
    fine = parts.scheme in ("http", "https") and parts.hostname and (text or "").isprintable() and len(text or "") < 500
    return text or "" if fine else ""


def _patiently(ask: Callable[[], Result], again: Callable[[Exception], bool], *, server: str) -> Result:
    """Ask a server, and ask it again after a pause where that may help.

    Raises:
        Offline: it did not answer at any try.
    """
    for attempt in range(TRIES):
        try:
            return ask()
        except Exception as error:
            if not again(error):
                raise
            if attempt == TRIES - 1:
                raise Offline(
                    f"{server} does not answer ({type(error).__name__}, {TRIES} tries). Without it: save a listing "
                    "page as text and read it with: regularized papers import FILE"
                ) from error
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _only_to(endpoint: str) -> Any:
    """An adapter of requests with a time-out that speaks to one host alone."""
    from requests.adapters import HTTPAdapter
    from requests.exceptions import InvalidURL

    allowed = urlsplit(endpoint).netloc

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            if urlsplit(request.url).netloc != allowed:
                raise InvalidURL(f"{endpoint} leads to another host: {request.url}")
            return super().send(request, *arguments, **{**options, "timeout": TIMEOUT})

    return Adapter()


@contextmanager
def _impatient_hub() -> Iterator[None]:
    """The hub's client with a time-out and without redirects, which it has no arguments for."""
    import httpx2
    from huggingface_hub.utils._http import default_client_factory, set_client_factory

    set_client_factory(lambda: httpx2.Client(timeout=TIMEOUT, follow_redirects=False))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
