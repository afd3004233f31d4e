"""Tables for notebooks, which show an object by the HTML that it gives."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as HTML; nothing in a cell becomes markup.

    Args:
        head: names of the columns.
        rows: cells; numbers to five digits, None as nothing.

    Examples:
        >>> html_table(["a<b"], [[0.123456], [None]])
        '<table><thead><tr><th>a&lt;b</th></tr></thead><tbody><tr><td>0.12346</td></tr><tr><td></td></tr></tbody></table>'
    """
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
