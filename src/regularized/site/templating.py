"""Templates and what they need: what goes into HTML is escaped unless a filter here says that it is safe."""

import datetime
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from regularized._version import __version__
from regularized.evidence.claims import BADGES
from regularized.evidence.numbers import number
from regularized.papers.card import FAMILIES
from regularized.site.models import Person

__all__ = ["STATIC", "environment", "moment", "shown_name", "with_query"]

_FOLDER = Path(__file__).parent
STATIC = _FOLDER / "static"


def environment(*, static: bool = False) -> Environment:
    """The templates.

    Args:
        static: for pages that stand alone: without search, feeds, and what people do.
    """
    found = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=lambda name: name is None or not name.endswith(".txt"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(FAMILIES=FAMILIES, version=__version__, static=_static, standing_alone=static)
    found.filters.update(
        badge=lambda verdict: BADGES.get(verdict, "none"),
        day=_day,
        moment=moment,
        number=number,
        person=shown_name,
        short=_short,
        trusted=Markup,
        with_query=with_query,
        plural=lambda count, one, many="": f"{count} {one if count == 1 else many or one + 's'}",
    )
    return found


@lru_cache(maxsize=64)
def _static(name: str) -> str:
    """Address of a file that may be kept for ever: it changes with the file."""
    return f"/static/{name}?{hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def _day(day: datetime.date) -> str:
    return f"{day.day} {day:%b %Y}"


def moment(seconds: int) -> str:
    """A point in time, in words."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def shown_name(person: Person) -> str:
    """The name under which somebody takes part."""
    return person.name or f"reader {person.id}"


def _short(text: str, most: int = 320) -> str:
    """The beginning of a text, to the end of a word.

    Examples:
        >>> _short("one two three", 9)
        'one two …'
    """
    if len(text) <= most:
        return text
    return text[: most - 1].rpartition(" ")[0] + " …"


def with_query(path: str, query: Mapping[str, Any], **changed: Any) -> str:
    """An address with parameters; those that are None or empty are left out.

    Args:
        path: the path.
        query: parameters.
        changed: parameters that replace those.

    Examples:
        >>> with_query("/search", {"q": "a b", "page": 3}, page=4)
        '/search?q=a+b&page=4'
    """
    given = {name: value for name, value in {**query, **changed}.items() if value not in (None, "", False)}
    return quote(path) + (f"?{urlencode(given)}" if given else "")
