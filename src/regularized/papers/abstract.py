"""What a paper's abstract claims, and which of our claims test it: so that no headline is left out silently.

A file beside the card, ``papers/<slug>/abstract.toml``, in our own words::

    [[abstract]]
    says = "Prediction can be made twice as fast."
    tested_by = ["prediction_cost"]

    [[abstract]]
    says = "A scaling law predicts sparse performance."
    untested = "It needs models over two orders of size."

Each row has ``tested_by``, ids of the card's claims, or ``untested``, the reason.
"""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regularized.papers.card import CardError

__all__ = ["FILE", "Sentence", "coverage", "load_abstract"]

FILE = "abstract.toml"
_KEYS = {"says", "tested_by", "untested"}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One claim of an abstract.

    Args:
        says: the claim, in our words.
        tested_by: ids of the claims on the card that test it.
        untested: why there is none; empty where there is one.
    """

    says: str
    tested_by: tuple[str, ...] = ()
    untested: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"says": self.says, "tested_by": list(self.tested_by), "untested": self.untested}

    def pairs(self) -> list[dict[str, str | None]]:
        """The same flat: a row for each claim that tests it, or one without a claim and with the reason.

        Examples:
            >>> Sentence("It is fast.", ("speed", "memory")).pairs()[1]
            {'sentence': 'It is fast.', 'claim': 'memory', 'reason': ''}
            >>> Sentence("It is proven.", untested="A theorem.").pairs()
            [{'sentence': 'It is proven.', 'claim': None, 'reason': 'A theorem.'}]
        """
        claims = self.tested_by or (None,)
        return [{"sentence": self.says, "claim": claim, "reason": self.untested} for claim in claims]


def load_abstract(folder: Path, claims: Collection[str]) -> tuple[Sentence, ...]:
    """Read the file in a paper's folder; nothing where there is none.

    Args:
        folder: of the paper.
        claims: ids of its card's claims.

    Raises:
        CardError: the file cannot be read, or a row lacks something, or names a claim that is not on the card.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("abstract")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CardError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise CardError(str(path), ["must hold an array of tables, [[abstract]]"])
    problems = [f"row {number}: {what}" for number, row in enumerate(rows, start=1) for what in _problems(row, claims)]
    if problems:
        raise CardError(str(path), problems)
    return tuple(Sentence(row["says"], tuple(row.get("tested_by", ())), row.get("untested", "")) for row in rows)


def _problems(row: Mapping[str, Any], claims: Collection[str]) -> list[str]:
    found = [f"{key!r} is no key; there are {sorted(_KEYS)}" for key in sorted(row.keys() - _KEYS)]
    if not _is_text(row.get("says")):
        found.append("`says` must be the claim, a sentence")
    tested, untested = row.get("tested_by"), row.get("untested")
    if (tested is None) == (untested is None):
        found.append("give either `tested_by`, ids of claims, or `untested`, the reason")
    if tested is not None:
        if not isinstance(tested, list) or not tested:
            found.append("`tested_by` must be a list of ids of the card's claims")
        elif unknown := [name for name in tested if name not in claims]:
            found.append(f"the card has no claims {unknown}; it has {sorted(claims)}")
    if untested is not None and not _is_text(untested):
        found.append("`untested` must be the reason, a sentence")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) > 3 and value == value.strip()


def coverage(sentences: Sequence[Sentence]) -> str:
    """In words.

    Examples:
        >>> coverage([Sentence("It is fast.", ("speed",)), Sentence("It is proven.", untested="A theorem.")])
        '1 of 2 claims of the abstract are tested'
    """
    tested = sum(bool(sentence.tested_by) for sentence in sentences)
    return f"{tested} of {len(sentences)} claims of the abstract {'is' if len(sentences) == 1 else 'are'} tested"
