"""Reads a saved listing page of Daily Papers in text form."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["ImportFailed", "Listed", "parse_listing"]


class ImportFailed(ValueError):
    """What was to be read is not what it should be; the message says where."""


_MONTHS = {
    name: i
    for i, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}
_DATE = re.compile(rf"({'|'.join(_MONTHS)}) (\d{{1,2}})(?:, (\d{{4}}))?(?: (\d+))?")
_AUTHORS = re.compile(r"•\s*(\d+) authors?")


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
        if self.year is not None:
            return datetime.date(self.year, self.month, self.day)
        # A day more: the page counts in its own time zone.
        year = saved.year
        while True:
            try:
                date = datetime.date(year, self.month, self.day)
            except ValueError:  # 29 February
                date = datetime.date.max
            if date <= saved + datetime.timedelta(days=1):
                return date
            year -= 1


def parse_listing(text: str, *, source: str = "the page") -> list[Listed]:
    """Read the entries of a saved listing page of Daily Papers in text form.

    An entry is a title, an abstract, how many authors there are or their organisation, a dot, and a date that may be
    followed by the number of comments. What stands before the first entry is the page's head.

    Args:
        text: the page.
        source: what to call it in errors.

    Raises:
        ImportFailed: there is no entry, or one is incomplete; says at which line.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    ends = [i for i, (_, line) in enumerate(lines) if line == "·"]
    entries: list[Listed] = []
    start = _after_head(lines)
    for end in ends:
        number = lines[end][0]
        found = _DATE.fullmatch(lines[end + 1][1]) if end + 1 < len(lines) else None
        if found is None:
            raise ImportFailed(f"{source}, line {number}: there should be a date such as “Mar 2, 2025” after the dot")
        body = lines[start : end - 1]
        if not body or end - 1 < start:
            raise ImportFailed(f"{source}, line {number}: there is no title before this dot")
        who = lines[end - 1][1]
        authors = _AUTHORS.fullmatch(who)
        month, day, year, comments = found.groups()
        entry = Listed(
            title=" ".join(body[0][1].split()),
            abstract="\n\n".join(line for _, line in body[1:]),
            month=_MONTHS[month],
            day=int(day),
            year=int(year) if year else None,
            authors_count=int(authors[1]) if authors else 0,
            organization="" if authors else _once(who),
            comments=int(comments or 0),
            line=body[0][0],
        )
        try:
            entry.on(datetime.date(2100, 12, 31))
        except ValueError:
            raise ImportFailed(f"{source}, line {number + 1}: there is no such day: {found[0]}") from None
        entries.append(entry)
        start = end + 2
    if not entries:
        raise ImportFailed(
            f"{source} has no entry. It should be a listing page of Daily Papers, saved as text: for each paper a "
            "title, an abstract, “• N authors” or an organisation, a line with “·”, and a date"
        )
    return entries


def _after_head(lines: Sequence[tuple[int, str]]) -> int:
    """Where the entries begin: the head of the page ends with its name, its editors, and the day."""
    for i, (_, line) in enumerate(lines[:40]):
        if line == "Daily Papers":
            start = i + 1
            while start < len(lines) and (lines[start][1].startswith("by") or _DATE.fullmatch(lines[start][1])):
                start += 1
            return start
    return 0


def _once(text: str) -> str:
    """An organisation, which a saved page writes twice: for its picture and for its name.

    Examples:
        >>> _once("ByteDance ByteDance"), _once("New York University New York University"), _once("Ai2")
        ('ByteDance', 'New York University', 'Ai2')
    """
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half] if len(words) % 2 == 0 and words[:half] == words[half:] else words)
