"""Reads a saved listing page of Daily Papers in text form."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["LONGEST_TITLE", "ImportFailed", "Listed", "Listing", "PageDay", "parse_listing", "read_listing"]

LONGEST_TITLE = 300
"""Letters of the longest title that is taken for one; those of papers have some 100."""


class ImportFailed(ValueError):
    """What was to be read is not what it should be; the message says where."""


_MONTHS = {
    name: i
    for i, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}
_DATE = re.compile(rf"({'|'.join(_MONTHS)}) (\d{{1,2}})(?:, (\d{{4}}))?(?: ([\d.,]+[kKmM]?))?")
_AUTHORS = re.compile(r"•\s*([\d.,]+[kKmM]?) authors?")
# What stands where a date should, and is none: it is not the next title.
_LIKE_A_DATE = re.compile(
    rf"(?i)(?:{'|'.join(_MONTHS)})[a-z]*\.? \d|\d{{1,2}} (?:{'|'.join(_MONTHS)})|\d+[-/.]\d+[-/.]\d|\d+ \w+ ago$"
    r"|yesterday$|today$"
)
_NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)([kKmM]?)")
_ARROWS = " <>‹›«»←→|•"
_LARGEST = 10_000_000  # more comments or authors than any paper has
# What saved pages have between head and first title, and below the last entry.
_MENUS = """
new today yesterday tomorrow day daily week weekly month monthly year time range trending hot top popular recent
recently newest oldest published likes upvotes previous prev next latest sort order by date filter filters all view
show more less load reset clear and or sign log in up out join subscribe search papers community upvote vote
comments submit login signup menu home datasets models spaces docs pricing enterprise company tos terms of service
privacy policy cookies contact help about careers website solutions collections blog posts buckets inference posters
theme settings
"""
_PARAGRAPH = 200  # letters: an abstract, no title and no menu
_MENU_LINE = 40  # letters at most
_NAVIGATION = frozenset(_MENUS.split())


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of a listing page, as it stands there.

    Args:
        title: title.
        abstract: abstract.
        month: month when it was posted.
        day: day of that month.
        year: its year; None where the page leaves it out, which means the year when the page was saved.
        authors_count: how many authors; 0 where the page names an organisation instead.
        organization: that organisation.
        comments: discussion entries.
        line: line of the title.
    """

    title: str
    abstract: str
    month: int
    day: int
    year: int | None
    authors_count: int = 0
    organization: str = ""
    comments: int = 0
    line: int = field(default=0, compare=False)

    def on(self, saved: datetime.date) -> datetime.date:
        """The date, for a page that was saved on a day.

        Examples:
            >>> Listed("t", "", 1, 26, None).on(datetime.date(2026, 3, 2)).isoformat()
            '2026-01-26'
            >>> Listed("t", "", 12, 30, None).on(datetime.date(2026, 1, 2)).isoformat()
            '2025-12-30'
        """
        return _full(self.year, self.month, self.day, saved)


@dataclass(frozen=True, slots=True)
class PageDay:
    """The day in a page's head.

    Args:
        month: its month.
        day: day of that month.
        year: its year; None where the page leaves it out.
    """

    month: int
    day: int
    year: int | None

    def on(self, saved: datetime.date) -> datetime.date:
        """The date, for a page that was saved on a day."""
        return _full(self.year, self.month, self.day, saved)


@dataclass(frozen=True, slots=True)
class Listing:
    """A listing page as it was read.

    Args:
        entries: what could be read, in order.
        faults: what could not, and why, with its line.
        day: the page's own day; None where it has none.
    """

    entries: Sequence[Listed]
    faults: Sequence[str] = ()
    day: PageDay | None = None


def read_listing(text: str, *, source: str = "the page", saved: datetime.date | None = None) -> Listing:
    """Read a saved listing page of Daily Papers in text form, and say what of it cannot be read.

    An entry is a title, an abstract, how many authors there are or their organisation, a dot, and a date that may be
    followed by the number of comments. What stands before the first entry is the page's head.

    Args:
        text: the page.
        source: what to call it in errors.
        saved: when it was saved: a later day is a fault; default any day will do.

    Raises:
        ImportFailed: there is nothing that looks like an entry.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    start, day = _head(lines)
    start = _first_title(lines, start)
    entries: list[Listed] = []
    faults: list[str] = []
    for end in (i for i, (_, line) in enumerate(lines) if line == "·"):
        entry, fault = _entry(lines, start, end, saved)
        if entry is not None:
            entries.append(entry)
        else:
            faults.append(f"{source}, {fault}")
        # A date that is missing leaves the next title in its place.
        has_date = end + 1 < len(lines) and _LIKE_A_DATE.match(lines[end + 1][1])
        start = end + 2 if has_date else end + 1
    if not entries and not faults:
        raise ImportFailed(
            f"{source} has no entry. It should be a listing page of Daily Papers, saved as text: for each paper a "
            "title, an abstract, “• N authors” or an organisation, a line with “·”, and a date"
        )
    start = _after_navigation(lines, start)
    if start < len(lines):
        number, title = lines[start]
        faults.append(f"{source}, line {number}: the file ends within an entry: “{title[:80]}”")
    return Listing(entries, faults, day)


def parse_listing(text: str, *, source: str = "the page") -> list[Listed]:
    """Entries of a saved listing page all of which can be read; see :func:`read_listing`.

    Args:
        text: the page.
        source: what to call it in errors.

    Raises:
        ImportFailed: there is no entry, or one cannot be read; says at which line.
    """
    page = read_listing(text, source=source)
    if page.faults:
        raise ImportFailed(page.faults[0])
    return list(page.entries)


def _entry(
    lines: Sequence[tuple[int, str]], start: int, end: int, saved: datetime.date | None
) -> tuple[Listed, None] | tuple[None, str]:
    """The entry whose dot stands at ``end``, or what is wrong with it."""
    number = lines[end][0]
    body = lines[start : max(start, end - 1)]
    title = " ".join(body[0][1].split()) if body else ""
    told = f" (“{title[:80]}”)" if title else ""
    found = _DATE.fullmatch(lines[end + 1][1]) if end + 1 < len(lines) else None
    if found is None:
        return None, f"line {number}: there should be a date such as “Mar 2, 2025” after the dot{told}"
    if not title:
        return None, f"line {number}: there is no title before this dot"
    if len(title) > LONGEST_TITLE:
        return None, f"line {body[0][0]}: no title has {len(title)} letters, {LONGEST_TITLE} at most{told}"
    who = lines[end - 1][1]
    authors = _AUTHORS.fullmatch(who)
    month, day, year, comments = found.groups()
    counts = [_count(text) for text in (authors[1] if authors else "0", comments or "0")]
    if None in counts:
        return None, f"line {number}: there is no such number of authors or comments{told}"
    entry = Listed(
        title=title,
        abstract="\n\n".join(line for _, line in body[1:]),
        month=_MONTHS[month],
        day=int(day),
        year=int(year) if year else None,
        authors_count=counts[0] or 0,
        organization="" if authors else _once(who),
        comments=counts[1] or 0,
        line=body[0][0],
    )
    try:
        date = entry.on(saved or datetime.date(2100, 12, 31))
    except ValueError:
        return None, f"line {number + 1}: there is no such day: {found[0]}{told}"
    if date.year < 1900 or date.year > 2999 or (saved is not None and (date - saved).days > 1):
        return None, f"line {number + 1}: {found[0]} cannot be on a page saved on {saved or 'any day'}{told}"
    return entry, None


def _head(lines: Sequence[tuple[int, str]]) -> tuple[int, PageDay | None]:
    """Where the head of the page ends, which is with its name, its editors, and the day; and that day."""
    for i, (_, line) in enumerate(lines[:40]):
        if line == "Daily Papers":
            start, day = i + 1, None
            while start < len(lines):
                found = _DATE.fullmatch(lines[start][1])
                if found and found[4] is None:
                    month, number, year = _MONTHS[found[1]], int(found[2]), found[3]
                    if _is_day(int(year) if year else 2000, month, number):
                        day = PageDay(month, number, int(year) if year else None)
                elif not lines[start][1].startswith("by"):
                    break
                start += 1
            return start, day
    return 0, None


def _first_title(lines: Sequence[tuple[int, str]], start: int) -> int:
    """Where the first entry begins: below all menus, of which nobody knows all words.

    A title stands right above its abstract. So short lines above a line that is followed by a paragraph are menus,
    whatever they say, and that line is a title, even of words that menus have. Without such a paragraph words decide.
    """
    end = next((i for i in range(start, len(lines)) if lines[i][1] == "·"), len(lines))
    # The line above the dot names authors or an organisation.
    text = next((i for i in range(start + 1, end - 1) if len(lines[i][1]) >= _PARAGRAPH), None)
    if text is None:
        return _after_navigation(lines, start)
    title = text - 1
    while title > start and lines[title][1].endswith("."):  # a short paragraph: no title ends so
        title -= 1
    while start < title and len(lines[start][1]) <= _MENU_LINE:
        start += 1
    return start


def _after_navigation(lines: Sequence[tuple[int, str]], start: int) -> int:
    """The first line from one on that is more than signs and words of the page's own menus."""
    while start < len(lines):
        line = lines[start][1]
        # Not all signs: a title may be an emoji.
        words = line.lower().strip(_ARROWS).split()
        if not _NAVIGATION.issuperset(words) and _DATE.fullmatch(line.strip(_ARROWS)) is None:
            break
        start += 1
    return start


def _count(text: str) -> int | None:
    """A number as pages write it; None when it is none, or larger than any.

    Examples:
        >>> _count("7"), _count("1,234"), _count("1.2k"), _count("1,2"), _count("9" * 5000)
        (7, 1234, 1200, None, None)
    """
    found = _NUMBER.fullmatch(text) if len(text) <= 12 else None
    if found is None:
        return None
    number = round(float(found[1].replace(",", "")) * {"": 1, "k": 1000, "m": 1_000_000}[found[2].lower()])
    return number if number <= _LARGEST else None


def _is_day(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


def _full(year: int | None, month: int, day: int, saved: datetime.date) -> datetime.date:
    """A date whose year may be left out: then the last such day up to the day after ``saved``.

    Raises:
        ValueError: there is no such day.
    """
    if year is not None:
        return datetime.date(year, month, day)
    # Eight years without a 29 February occur, around 1900. A day more: the page counts in its own time zone.
    for back in range(9):
        if saved.year - back >= 1 and _is_day(saved.year - back, month, day):
            date = datetime.date(saved.year - back, month, day)
            if (date - saved).days <= 1:
                return date
    raise ValueError(f"there is no day {day} of month {month}")


def _once(text: str) -> str:
    """An organisation, which a saved page writes twice: for its picture and for its name.

    Examples:
        >>> _once("ByteDance ByteDance"), _once("New York University New York University"), _once("Ai2")
        ('ByteDance', 'New York University', 'Ai2')
    """
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half] if len(words) % 2 == 0 and words[:half] == words[half:] else words)
