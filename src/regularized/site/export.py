"""The catalogue as static pages: what anybody may read, without people, from any file server or from the disk.

The pages are those of the site, asked for one after the other along their links. Addresses become files, and links
become relative. A link that leads nowhere is an error here, not a surprise for a reader.
"""

import asyncio
import html
import re
from collections import deque
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from posixpath import relpath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from regularized.site.state import Site
from regularized.site.templating import STATIC, environment

__all__ = ["ExportError", "Exported", "export", "file_of"]

_LINK = re.compile(r'(?P<name>\s(?:href|src|action))="(?P<address>/[^"]*)"')
_ASSETS = ("site.css", "site.js", "icon.svg")
_MOST_REDIRECTS = 3


class ExportError(RuntimeError):
    """The pages cannot be written; the message says why."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Args:
        pages: pages.
        files: all files.
    """

    pages: int
    files: int


def file_of(address: str) -> str:
    """The file of an address.

    Examples:
        >>> [file_of(address) for address in ("/", "/papers/mixup", "/new?page=2", "/static/site.css?1a2b")]
        ['index.html', 'papers/mixup.html', 'new.page-2.html', 'static/site.css']
    """
    parts = urlsplit(address)
    path = unquote(parts.path).strip("/")
    if path.startswith("static/"):
        return path
    query = "".join(f".{name}-{value}" for name, value in parse_qsl(parts.query))
    if not re.fullmatch(r"[\w./-]*", path + query) or ".." in path + query:
        raise ExportError(f"{address} cannot be the name of a file")
    return f"{path or 'index'}{query}.html"


def export(site: Site, folder: Path) -> Exported:
    """Write all pages.

    Args:
        site: an open site.
        folder: a new or empty folder.

    Raises:
        ExportError: the folder holds something, or a link leads nowhere.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} must be a new or an empty folder")
    pages = _collect(replace(site, templates=environment(static=True)))
    for name in _ASSETS:
        _write(folder / "static" / name, (STATIC / name).read_bytes())
    for file, text in pages.items():
        _write(folder / file, text.encode())
    return Exported(len(pages), len(pages) + len(_ASSETS))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _collect(site: Site) -> dict[str, str]:
    """Text of every page that can be reached from the first, by file."""
    from regularized.site.app import create_app

    app = create_app(site)
    texts: dict[str, tuple[str, str]] = {}
    leads_to: dict[str, str] = {}
    found = {"/"}
    waiting = deque(found)
    while waiting:
        address = waiting.popleft()
        target, text = _fetch(app, address)
        leads_to[address] = target
        if file_of(target) in texts:
            continue
        texts[file_of(target)] = (target, text)
        for link in _LINK.finditer(text):
            linked = html.unescape(link["address"]).partition("#")[0]
            if linked and not linked.startswith("/static/") and linked not in found:
                found.add(linked)
                waiting.append(linked)
    return {file: _relative(file, text, leads_to) for file, (_, text) in texts.items()}


def _relative(file: str, text: str, leads_to: dict[str, str]) -> str:
    def changed(link: re.Match[str]) -> str:
        address, _, fragment = html.unescape(link["address"]).partition("#")
        target = relpath(file_of(leads_to.get(address, address)), start=str(Path(file).parent))
        return f'{link["name"]}="{html.escape(target)}{"#" + html.escape(fragment) if fragment else ""}"'

    return _LINK.sub(changed, text)


def _fetch(app: Any, address: str) -> tuple[str, str]:
    """Where an address leads to, and the page there."""
    for _ in range(_MOST_REDIRECTS):
        status, headers, body = asyncio.run(_ask(app, address))
        if status not in (301, 302, 303, 307, 308):
            break
        address = headers["location"]
    if status != 200 or not headers["content-type"].startswith("text/html"):
        raise ExportError(f"a page links to {address}, which answers {status} {headers.get('content-type', '')}")
    return address, body.decode()


async def _ask(app: Any, address: str) -> tuple[int, dict[str, str], bytes]:
    """Ask the application as a server would, without one."""
    parts = urlsplit(address)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(parts.path),
        "raw_path": parts.path.encode(),
        "query_string": parts.query.encode(),
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 80),
    }
    status, headers, body = 500, {}, b""

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, headers, body
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            body += message.get("body", b"")

    await app(scope, receive, send)
    return status, headers, body
