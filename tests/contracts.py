"""What papers offer to the contract, collected so that one that does not load costs its own tests alone."""

from typing import Any

from regularized.papers.catalogue import Entry

__all__ = ["BROKEN", "offered"]

BROKEN: dict[str, Exception] = {}
"""Why the contract of a paper could not be collected; `tests/test_contract.py` fails for each of them."""


def offered(entry: Entry) -> list[Any]:
    """Subjects of a paper, or nothing where its code does not load."""
    try:
        return list(entry.contract().subjects())
    except Exception as error:
        BROKEN[entry.slug] = error
        return []
