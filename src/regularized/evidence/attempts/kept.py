"""Attempts that lie beside a ledger, in the folder ``attempts`` of the paper.

Public names: :func:`load`, :func:`keep`, :data:`FOLDER`.
"""

import logging
from pathlib import Path

from regularized.evidence.attempts.files import AttemptError, named, read
from regularized.evidence.attempts.form import Attempt, parse
from regularized.evidence.ledger import write

__all__ = ["FOLDER", "keep", "load"]

log: logging.Logger = logging.getLogger(__name__)

FOLDER = "attempts"


def load(paper: Path) -> tuple[Attempt, ...]:
    """Attempts of a paper by name; one that is damaged costs a warning, and the others are as they were.

    Args:
        paper: folder of the paper.
    """
    found = []
    for file in sorted((paper / FOLDER).glob("*.json")):
        try:
            attempt = parse(read(file))
            if file.stem != attempt.name:
                raise AttemptError([f"its name must be {attempt.name}.json: it was renamed, or changed by hand"])
            if attempt.ledger.slug != paper.name:
                raise AttemptError([f"slug: got {attempt.ledger.slug}; needed is {paper.name}, that of its folder"])
        except AttemptError as error:
            log.warning("the attempt %s is left out: %s", named(file), error)
        else:
            found.append(attempt)
    return tuple(found)


def keep(attempt: Attempt, paper: Path) -> Path:
    """Write an attempt beside the ledger, at once or not at all: not the file that came, but what was read of it.

    Args:
        attempt: that fits.
        paper: folder of the paper.

    Returns:
        The file.
    """
    folder = paper / FOLDER
    folder.mkdir(exist_ok=True)
    target = folder / f"{attempt.name}.json"
    write(target, attempt.text)
    return target
