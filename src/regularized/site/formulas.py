"""Formulas in comments: LaTeX to MathML, which browsers show by themselves; no script and no request is needed."""

from html import escape, unescape
from typing import Any
from xml.etree import ElementTree

__all__ = ["ATTRIBUTES", "LONGEST_FORMULA", "TAGS", "mathml"]

LONGEST_FORMULA = 500
"""Characters of one formula; a longer one is shown as it was typed."""

TAGS = {
    "math", "menclose", "mfrac", "mi", "mn", "mo", "mover", "mpadded", "mphantom", "mroot", "mrow", "mspace", "msqrt",
    "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover",
}  # fmt: skip

ATTRIBUTES: dict[str, set[str]] = {
    "math": {"display"},
    "mi": {"mathvariant"},
    "mo": {"fence", "form", "stretchy"},
    "mspace": {"width"},
    "mstyle": {"displaystyle"},
    "mtable": {"columnalign"},
}


def mathml(latex: str, *, block: bool = False) -> str:
    """A formula as MathML; what is none, or is too long, as text between its dollars.

    Args:
        latex: the formula, as a stranger typed it.
        block: whether it stands on a line of its own.

    Examples:
        >>> mathml("a_i")
        '<math display="inline"><mrow><msub><mi>a</mi><mi>i</mi></msub></mrow></math>'
        >>> mathml("{")
        '<code>${$</code>'
    """
    from latex2mathml import converter

    dollars = "$$" if block else "$"
    typed = f"<code>{escape(dollars + latex + dollars)}</code>"
    if len(latex) > LONGEST_FORMULA:
        return typed
    try:
        root: Any = converter.convert_to_element(latex, display="block" if block else "inline")
        _make_safe(root)
    except Exception:  # the converter raises many kinds of errors, index errors among them; none is worth a page
        return typed
    return ElementTree.tostring(root, encoding="unicode")


def _make_safe(root: Any) -> None:
    """Known elements and attributes alone. The converter writes text of its own as entities, and that of others raw."""
    for node in root.iter():
        node.text = unescape(node.text) if node.text else None
        allowed = ATTRIBUTES.get(node.tag, set())
        node.attrib = {name: value for name, value in node.attrib.items() if name in allowed}
        if node.tag not in TAGS:
            node.tag = "mrow"
