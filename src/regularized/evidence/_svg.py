"""What plots are drawn with: figures without a display, one style, SVG that takes a page's colours and font."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAINT", "INK", "figure", "inline", "plain", "style"]

# Stand-ins for the page's own colours: matplotlib wants a colour, the page puts its variable there.
INK, FAINT = "#010203", "#040506"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"}


def plain(text: str) -> str:
    """Text that matplotlib takes neither for mathematics nor, with its underscore in front, for nothing.

    What SVG may not hold (control characters, half a surrogate pair) is written as an escape.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown.replace("$", r"\$").replace("_", " ").strip()


def figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches."""
    # Not pyplot: no global state, no display, works in any thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def style(ink: str, faint: str) -> Iterator[None]:
    """Colours and fonts of a plot; ``ink`` for what is read, ``faint`` for lines."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: small, sharp, can be searched
        "svg.hashsalt": "regularized",  # the same result gives the same file
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "text.color": ink,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "legend.labelcolor": ink,
    }
    with rc_context(settings):
        yield


def inline(figure: "Figure", prefix: str, label: str) -> str:
    """SVG for a page: no prolog, no metadata, ids of its own, the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: ([^;'\"]*?)[\d.]+px [^;\"]*", lambda m: _font(m.group(0)), svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # The size comes from the page; the viewBox keeps the proportions.
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)


def _font(rule: str) -> str:
    """matplotlib lists thirty fonts for each text; the page has one."""
    found = re.match(r"font: (.*?)([\d.]+px) ", rule)
    assert found is not None
    return f"font: {found.group(1)}{found.group(2)} var(--font)"


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)
