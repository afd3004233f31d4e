"""A technique's own page, as the documentation has it: when to use it and when not, its knobs, its recipes.

It is the same file, ``docs/techniques/SLUG.md``. What the documentation fills in from the
ledger (claims, curves, cost) stands on the site's page of the paper already.
"""

import re
from functools import lru_cache, partial
from itertools import count
from typing import Any

from regularized.papers.catalogue import UnknownPaper, find

__all__ = ["guide"]

_FILLED_IN = re.compile(r"^(?:#+ .*\n+)?\{\{ *\w+(?::\w+)? *\}\} *$", re.MULTILINE)
_ADMONITION = re.compile(r'^(?:!!!|\?\?\?\+?) +(\w+)(?: +"(.*)")? *\n((?: {4}.*\n|\n(?= {4}))+)', re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_CELL = re.compile(r'<(t[hd])(?: style="text-align:(\w+)")?>')
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?")


def guide(slug: str, package: str) -> str:
    """The page of a technique as HTML, for a place below a heading of the second level; empty without one.

    Args:
        slug: the paper.
        package: the catalogue.
    """
    try:
        return _rendered(find(slug, package).page, package)
    except UnknownPaper:
        return ""


@lru_cache(maxsize=256)
def _rendered(text: str, package: str) -> str:
    from markdown_it import MarkdownIt

    text = re.sub(r"\A# .*\n", "", text)  # the page has its title
    text = _IMAGE.sub("", _FILLED_IN.sub("", text))
    text = _ADMONITION.sub(_quoted, text)
    text = _LINK.sub(partial(_linked, package), text)
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = renderer.parse(text)
    _place(tokens)
    html: str = renderer.renderer.render(tokens, renderer.options, {})
    # Long lines of code and wide tables scroll by themselves, and the keyboard reaches them.
    html = _CELL.sub(_cell, html)
    html = html.replace("<pre>", '<pre tabindex="0">')
    number = count(1)
    html = re.sub(
        "<table>",
        lambda _: f'<div class="scroll" tabindex="0" role="region" aria-label="Table {next(number)}"><table>',
        html,
    )
    return html.replace("</table>", "</table></div>")


def _cell(found: re.Match[str]) -> str:
    """A cell without a style of its own, which the site's policy does not allow."""
    tag, aligned = found.groups()
    scope = ' scope="col"' if tag == "th" else ""
    kind = ' class="num"' if aligned == "right" else ""
    return f"<{tag}{scope}{kind}>"


def _place(tokens: list[Any]) -> None:
    """Put headings one level lower, and give them names of their own."""
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + 1, 6)}"


def _quoted(found: re.Match[str]) -> str:
    kind, title, body = found.groups()
    lines = [f"**{title or kind.capitalize()}**", "", *(line[4:] for line in body.splitlines())]
    return "\n".join(f"> {line}".rstrip() for line in lines) + "\n\n"


def _linked(package: str, found: re.Match[str]) -> str:
    """A link to another technique leads to its page here; one to the rest of the documentation is left as words."""
    words, target = found.groups()
    if target.startswith(("https://", "http://")):
        return found[0]
    other = re.fullmatch(r"(?:\.\./techniques/)?(\w+)\.md(?:#.*)?", target)
    try:
        return f"[{words}](/papers/{find(other[1], package).slug})" if other is not None else words
    except UnknownPaper:
        return words
