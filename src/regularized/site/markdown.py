"""Comments: Markdown to HTML that is safe to show.

The renderer knows no raw HTML, and what it makes goes through an allow-list besides: neither alone would be enough for
text that strangers write.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from regularized.site.formulas import ATTRIBUTES, TAGS, mathml

__all__ = ["LONGEST_HTML", "render"]

_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h4", "hr", "li", "ol", "p", "pre", "s", "strong", "table", "tbody",
    "td", "th", "thead", "tr", "ul", *TAGS,
}  # fmt: skip


LONGEST_HTML = 64_000
"""Characters of HTML from one comment, before its links are marked: several times what people write."""

# What lets a short text become a long page: rows of a table are filled up to the width of its head, an address that is
# given once stands wherever it is referred to, and each letter of a formula is an element.
_REPEATING = ["table", "reference", "math_inline", "math_block"]


@lru_cache(maxsize=2)
def _renderer(*, repeating: bool = True) -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    # Images would be requests to other sites, which see every reader: they stay text.
    options = {"html": False, "linkify": False}
    known = MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable(["image", "html_block"])
    # "$5 and $6" are prices.
    known.use(dollarmath_plugin, allow_digits=False, allow_labels=False, double_inline=True, renderer=_formula)
    return known if repeating else known.disable(_REPEATING)


def _formula(latex: str, options: Mapping[str, Any]) -> str:
    return mathml(latex.strip(), block=bool(options.get("display_mode")))


def render(text: str) -> str:
    """HTML of a comment; one that would become a very long page has no tables, references and formulas.

    ``$a_i$`` and ``$$a_i$$`` are formulas.

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
        attributes={"a": {"href", "title"}, **ATTRIBUTES},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow ugc noopener noreferrer",
    )
