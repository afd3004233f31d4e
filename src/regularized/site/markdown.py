"""Comments: Markdown to HTML that is safe to show.

The renderer knows no raw HTML, and what it makes goes through an allow-list besides: neither alone would be enough for
text that strangers write.
"""

from functools import lru_cache
from typing import Any

__all__ = ["LONGEST_HTML", "render"]

_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h4", "hr", "li", "ol", "p", "pre", "s", "strong", "table", "tbody",
    "td", "th", "thead", "tr", "ul",
}  # fmt: skip


LONGEST_HTML = 64_000
"""Characters of HTML from one comment, before its links are marked: several times what people write."""

# What lets a short text become a long page: rows of a table are filled up to the width of its head, and an address that
# is given once stands wherever it is referred to.
_REPEATING = ["table", "reference"]


@lru_cache(maxsize=2)
def _renderer(*, repeating: bool = True) -> Any:
    from markdown_it import MarkdownIt

    # Images would be requests to other sites, which see every reader: they stay text.
    options = {"html": False, "linkify": False}
    known = MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable(["image", "html_block"])
    return known if repeating else known.disable(_REPEATING)


def render(text: str) -> str:
    """HTML of a comment; one that would become a very long page has no tables and no references.

    Args:
        text: Markdown.

    Examples:
        >>> print(render("*fine* <b>x</b> [a](javascript:x)").strip())
        <p><em>fine</em> &lt;b&gt;x&lt;/b&gt; [a](javascript:x)</p>
    """
    import nh3

    html = _renderer().render(text)
    if len(html) > LONGEST_HTML:
        html = _renderer(repeating=False).render(text)
    for level in "123456":
        # A comment is below the headings of its page.
        html = html.replace(f"<h{level}>", "<h4>").replace(f"</h{level}>", "</h4>")
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes={"a": {"href", "title"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow ugc noopener noreferrer",
    )
