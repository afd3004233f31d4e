"""Plots of the shipped runs, as SVG that may stand in a page whose policy allows no inline style.

Drawing takes a second or two for a paper, so drawings are kept in a folder, under names that change with the evidence.
The plots are those of the reports. Here their styles become attributes, and what is not a shape or a text is left out:
the names in a ledger are data, and a page shows nothing that could act.
"""

import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

from sqlalchemy import select

from regularized.papers.catalogue import Entry, UnknownPaper, find
from regularized.site.models import Paper
from regularized.site.state import Site

__all__ = ["Plots", "draw_all", "plots_of", "safe_svg", "undrawn"]

log: logging.Logger = logging.getLogger(__name__)

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_TAGS = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "line", "circle", "polyline"}
_ATTRIBUTES = {
    "aria-label", "clip-path", "d", "height", "id", "role", "transform", "viewBox", "width", "x", "x1", "x2", "y", "y1",
    "y2",
}  # fmt: skip
_STYLES = {
    "fill", "fill-opacity", "font-size", "font-weight", "opacity", "stroke", "stroke-dasharray", "stroke-dashoffset",
    "stroke-linecap", "stroke-linejoin", "stroke-opacity", "stroke-width", "text-anchor",
}  # fmt: skip
_VARIABLES = {"var(--ink)": "ink", "var(--line)": "faint"}
_COLOUR_CLASS = {"fill": "f", "stroke": "s"}
_CLASSES = {f"{prefix}-{name}" for prefix in _COLOUR_CLASS.values() for name in _VARIABLES.values()}
_CURVES = 6
"""Learning curves that a page shows at most; the rest is in the report that the reader can make."""

_STYLE = 2
"""Raised when the same evidence is drawn otherwise, so that all is drawn again."""

# Matplotlib's settings are global: one drawing at a time.
_drawing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Plots:
    """Plots of a paper.

    Args:
        effects: SVG for each claim that has effects, by the claim's name.
        curves: name and SVG of each learning curve.
    """

    effects: dict[str, str]
    curves: tuple[tuple[str, str], ...]


_NONE = Plots({}, ())


def plots_of(slug: str, fingerprint: str, *, package: str, folder: Path) -> Plots:
    """Plots of a paper; none without a ledger.

    Args:
        slug: the paper.
        fingerprint: hash of its card and evidence.
        package: the catalogue.
        folder: where drawings are kept.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        return _NONE
    try:
        entry = find(slug, package)
    except UnknownPaper:
        return _NONE
    return _kept(entry, _file(folder, fingerprint)) if entry.ledger.is_file() else _NONE


def draw_all(site: Site) -> None:
    """Draw what is not drawn yet, so that no reader waits for it."""
    for slug, fingerprint in undrawn(site):
        plots_of(slug, fingerprint, package=site.settings.package, folder=site.settings.folder / "plots")


def undrawn(site: Site) -> list[tuple[str, str]]:
    """Slug and fingerprint of the measured papers without drawings, best proven first."""
    with site.read() as session:
        measured = session.execute(
            select(Paper.slug, Paper.fingerprint)
            .where(Paper.standing >= 2.0, Paper.has_card)
            .order_by(Paper.standing.desc())
        ).all()
    folder = site.settings.folder / "plots"
    return [(slug, fingerprint) for slug, fingerprint in measured if not _file(folder, fingerprint).is_file()]


def _file(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint[:40]}-{_STYLE}.json"


@lru_cache(maxsize=128)
def _kept(entry: Entry, file: Path) -> Plots:
    with _drawing:
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            # Kept drawings are cleaned once more: a page trusts what this function returns.
            curves = tuple((str(name), safe_svg(svg)) for name, svg in saved["curves"])
            return Plots({name: safe_svg(svg) for name, svg in saved["effects"].items()}, curves)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
            log.warning("%s is damaged (%s) and is drawn again", file, error)
        plots = _draw(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"effects": plots.effects, "curves": plots.curves}), encoding="utf-8")
        part.replace(file)
        return plots


def _draw(entry: Entry) -> Plots:
    from regularized.evidence._plots import curve_names, curve_svg, effect_svg

    ledger = entry.load_ledger()
    if ledger is None:
        return _NONE
    result = ledger.to_result(entry.card.claims)
    effects = {
        outcome.claim.id: safe_svg(effect_svg(result, outcome, prefix=f"effect{number}"))
        for number, outcome in enumerate(result.outcomes)
        if outcome.effects
    }
    names = curve_names(result)[:_CURVES]
    curves = tuple(
        (name, safe_svg(curve_svg(result, name, prefix=f"curve{number}"))) for number, name in enumerate(names)
    )
    return Plots(effects, curves)


def safe_svg(svg: str) -> str:
    """SVG without style, script, link or anything else than shapes and texts.

    Args:
        svg: an SVG element that uses the page's variables ``--ink`` and ``--line``.

    Examples:
        >>> print(safe_svg('<svg xmlns="http://www.w3.org/2000/svg" onload="x()"><script>x()</script>'
        ...                '<path d="M 0 0" style="fill: none; stroke: var(--ink); behavior: url(x)"/></svg>'))
        <svg xmlns="http://www.w3.org/2000/svg" class="plot"><path d="M 0 0" fill="none" class="s-ink" /></svg>
    """
    ElementTree.register_namespace("", _SVG[1:-1])
    root = ElementTree.fromstring(svg)
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"not an SVG element: {root.tag}")
    _clean(root)
    root.set("class", "plot")
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element) -> None:
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.removeprefix(_SVG) not in _TAGS:
            element.remove(child)
        else:
            _clean(child)
    given = dict(element.attrib)
    element.attrib.clear()
    for name, value in given.items():
        if name in (f"{_XLINK}href", "href"):
            fine, name = re.fullmatch(r"#[\w.-]+", value) is not None, "href"
        elif name == "clip-path":
            fine = re.fullmatch(r"url\(#[\w.-]+\)", value) is not None
        else:
            fine = name in _ATTRIBUTES or (name in _STYLES and _is_plain(value))
        if fine:
            element.set(name, value)
    classes = [name for name in given.get("class", "").split() if name in _CLASSES]
    for rule in given.get("style", "").split(";"):
        name, _, value = (part.strip() for part in rule.partition(":"))
        if name in _COLOUR_CLASS and value in _VARIABLES:
            classes.append(f"{_COLOUR_CLASS[name]}-{_VARIABLES[value]}")
        elif name in _STYLES and _is_plain(value):
            element.set(name, value)
    if classes:
        element.set("class", " ".join(classes))


def _is_plain(value: str) -> bool:
    return re.fullmatch(r"[\w#.,% ()-]+", value) is not None and "url" not in value.lower()
