"""What the rounds did: a report of each, and the audit trail of every label."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["LabelEvent", "RoundReport", "write_trail"]


@dataclass(frozen=True, slots=True)
class LabelEvent:
    """One change of one label: the audit trail is a list of these.

    Args:
        round: round in which it happened, from 0.
        sample: position in the pool.
        label: the class; -1 where a pseudo-label was withdrawn.
        origin: ``"initial"``, ``"oracle"``, ``"corrected"``, ``"pseudo"``, ``"withdrawn"``, or ``"set aside"`` for a
            certified sample that training leaves out from then on.
        weight: weight of a pseudo-label, 1 for a certified one, 0 for what was withdrawn or set aside.
    """

    round: int
    sample: int
    label: int
    origin: str
    weight: float


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a round did.

    Args:
        round: its number, from 0.
        asked: samples that the oracle labelled.
        certified: samples with a certified label afterwards.
        pseudo: samples with a pseudo-label of positive weight.
        withdrawn: pseudo-labels of the round before that are gone.
        set_aside: certified samples that training leaves out from this round on.
        objective: self-paced objective of the pool, without the classifiers' norm.
    """

    round: int
    asked: tuple[int, ...]
    certified: int
    pseudo: int
    withdrawn: int
    set_aside: tuple[int, ...]
    objective: float


def write_trail(trail: Sequence[LabelEvent], path: Path | str) -> None:
    """Write the audit trail as CSV: round, sample, label, origin, weight."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(LabelEvent.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(event) for event in trail)
