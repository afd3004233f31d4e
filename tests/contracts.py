"""What papers offer to the contract, collected so that one that does not load costs its own tests alone."""

from typing import Any

from regularized.papers.catalogue import Entry

__all__ = ["BROKEN", "is_of_small_images", "offered"]

BROKEN: dict[str, Exception] = {}
"""Why the contract of a paper could not be collected; `tests/test_contract.py` fails for each of them."""


def offered(entry: Entry) -> list[Any]:
    """Subjects of a paper, or nothing where its code does not load."""
    try:
        return list(entry.contract().subjects())
    except Exception as error:
        BROKEN[entry.slug] = error
        return []


def is_of_small_images(entry: Entry) -> bool:
    """Whether a paper's experiment is made of the kit for small images."""
    return any("regularized.evidence.classification" in file.read_text("utf-8") for file in entry.folder.glob("*.py"))
