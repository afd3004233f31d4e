"""What an operator sees of the requests: a line each in the access log, and numbers for Prometheus.

The log has no address of a reader and no words of a search: who must know those has the log of the proxy in front.
"""

import hmac
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import MutableMapping
from logging.handlers import WatchedFileHandler
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import func, select

from regularized.site.dependencies import Read, SiteOf
from regularized.site.middleware import Application, Receive, Scope, Send
from regularized.site.models import Comment, Outgoing, Paper, Person, Report, Vote
from regularized.site.pages import NotFound

__all__ = ["Metrics", "Observed", "open_access_log", "router"]

access_log: logging.Logger = logging.getLogger("regularized.site.access")

router: APIRouter = APIRouter(include_in_schema=False)

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


def open_access_log(file: str) -> None:
    """Write the access log to a file that may be moved away at any time, or to standard error.

    Args:
        file: its path; ``-`` for standard error, empty for none.
    """
    for handler in list(access_log.handlers):
        access_log.removeHandler(handler)
    access_log.propagate = False
    access_log.setLevel(logging.INFO if file else logging.CRITICAL)
    if file:
        # The file is opened again when logrotate has moved it.
        handler = logging.StreamHandler() if file == "-" else WatchedFileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        access_log.addHandler(handler)


class Metrics:
    """Counts of answers and their times, of this process since its start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self._below: Counter[float] = Counter()
        self._seconds = 0.0

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        with self._lock:
            self._answers[method, route, status] += 1
            self._seconds += seconds
            for bound in _BUCKETS:
                if seconds <= bound:
                    self._below[bound] += 1

    def lines(self) -> list[str]:
        """In the format of Prometheus."""
        process = f'process="{os.getpid()}"'
        with self._lock:
            total = self._answers.total()
            found = ["# TYPE regularized_requests_total counter"]
            found += [
                f'regularized_requests_total{{{process},method="{method}",route="{route}",status="{status}"}} {number}'
                for (method, route, status), number in sorted(self._answers.items())
            ]
            found.append("# TYPE regularized_request_seconds histogram")
            found += [
                f'regularized_request_seconds_bucket{{{process},le="{bound}"}} {self._below[bound]}'
                for bound in _BUCKETS
            ]
            found.append(f'regularized_request_seconds_bucket{{{process},le="+Inf"}} {total}')
            found.append(f"regularized_request_seconds_sum{{{process}}} {self._seconds:.6f}")
            found.append(f"regularized_request_seconds_count{{{process}}} {total}")
        return found


class Observed:
    """Counts every answer, and writes a line for it.

    Args:
        app: the application.
        metrics: where it counts.
    """

    def __init__(self, app: Application, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status, size = 500, 0

        async def observed(message: MutableMapping[str, Any]) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - start
            # The pattern of the address, not the address: anybody can ask for any number of those.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count(scope["method"], route, status, seconds)
            path = scope["path"].encode("ascii", "backslashreplace").decode()
            shown = "".join(sign if sign.isprintable() else "?" for sign in path[:200])
            access_log.info("%s %s %s %s %.1f ms", scope["method"], shown, status, size, 1000 * seconds)


@router.get("/metrics")
def metrics_page(site: SiteOf, request: Request, session: Read) -> Response:
    """Numbers for Prometheus, for who knows the token; without one there is no such page."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    token = site.settings.metrics_token
    if not token or not hmac.compare_digest(given.encode(), token.encode()):
        raise NotFound("There is nothing at this address.")
    now = site.settings.now
    waiting = Outgoing.due_at.is_not(None)
    gauges = {
        "papers": select(func.count()).select_from(Paper),
        "papers_that_run": select(func.count()).select_from(Paper).where(Paper.runs),
        "people": select(func.count()).select_from(Person),
        "votes": select(func.count()).select_from(Vote),
        "comments": select(func.count()).select_from(Comment),
        "comments_reported": select(func.count(func.distinct(Report.comment_id))),
        "mail_waiting": select(func.count()).select_from(Outgoing).where(waiting),
        "mail_given_up": select(func.count()).select_from(Outgoing).where(Outgoing.due_at.is_(None)),
        "mail_oldest_seconds": select(now - func.coalesce(func.min(Outgoing.created_at), now))
        .select_from(Outgoing)
        .where(waiting),
    }
    lines = request.app.state.metrics.lines()
    for name, question in gauges.items():
        lines += [f"# TYPE regularized_{name} gauge", f"regularized_{name} {session.scalar(question) or 0}"]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
