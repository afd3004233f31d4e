"""What a technique costs, as measured: rows, and the file beside a paper that keeps them. Loads no torch.

Public names: :class:`BenchRow`, :func:`departures`, :func:`save`, :func:`load`. Measured by
:mod:`regularized.evidence.bench`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regularized.evidence.kept import keep, read_kept

__all__ = ["BenchRow", "departures", "load", "save"]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Measured cost of a technique at one size.

    Args:
        slug: paper.
        size: workload.
        plain_ms: median time of a plain step, milliseconds.
        method_ms: median time of a step with the technique, milliseconds.
        ratio: median of the paired ratios method / plain; of several processes, the median of theirs.
        ratio_interval: lowest and highest ratio of the processes; of one process, the 95 % bootstrap interval over its
            pairs.
        floor: the least ratio that the technique's necessary work allows, from its sheet.
        peak_memory_ratio: peak memory of a fresh process that takes method steps over one that takes plain steps, each
            less what importing torch and the library takes; on a GPU the ratio of the allocator's peaks. None where it
            was not asked for.
        pairs: number of timed pairs.
        note: what to know when reading the row.
        processes: how many fresh processes measured it.
        peak_bytes: the two peaks, plain and method, where they were measured.
        size_bytes: bytes of what is kept of the plain and of the method's model, where a workload says so.
    """

    slug: str
    size: str
    plain_ms: float
    method_ms: float
    ratio: float
    ratio_interval: tuple[float, float]
    floor: float | None
    peak_memory_ratio: float | None
    pairs: int
    note: str = ""
    processes: int = 1
    peak_bytes: tuple[float, float] | None = None
    size_bytes: tuple[float, float] | None = None

    @property
    def size_ratio(self) -> float | None:
        """What is kept of the method's model over what is kept of the plain one, in bytes."""
        return None if self.size_bytes is None else self.size_bytes[1] / self.size_bytes[0]

    def has_left(self, saved: "BenchRow") -> bool:
        """Whether this figure lies outside of what the processes of a saved row gave, by more than they differ.

        Not outside of their lowest and highest alone: of five processes and a sixth just like them, the sixth is the
        lowest or the highest of all in one case of three. A row of one process says nothing about others.

        Examples:
            >>> saved = BenchRow("slug", "small", 1.0, 1.2, 1.2, (1.1, 1.3), None, None, 50, processes=5)
            >>> [BenchRow("slug", "small", 1.0, r, r, (r, r), None, None, 10).has_left(saved) for r in (0.8, 1.4, 1.6)]
            [True, False, True]
        """
        low, high = saved.ratio_interval
        return saved.processes > 1 and not low - (high - low) <= self.ratio <= high + (high - low)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**fields, "size_ratio": self.size_ratio}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "BenchRow":
        """What :meth:`to_dict` wrote."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        fields.pop("size_ratio", None)  # follows from the bytes
        return cls(**fields)


def departures(rows: Iterable[BenchRow], saved: Mapping[str, Any] | None) -> Iterator[str]:
    """What to say of rows that have left what was saved.

    Args:
        rows: of today.
        saved: from :func:`load`.
    """
    if saved is None:
        return
    before = {row.size: row for row in saved["rows"]}
    for row in rows:
        if row.size in before and row.has_left(before[row.size]):
            low, high = before[row.size].ratio_interval
            yield (
                f"{row.size}: {row.ratio:.3f} today, {low:.3f} to {high:.3f} in {before[row.size].processes} processes "
                f"on {saved['measured']} ({saved['environment'].get('cpu') or 'a processor of unknown type'})"
            )


def save(rows: Sequence[BenchRow], module_name: str, path: Path | None = None) -> Path:
    """Write measured rows, with where and when they were measured, to ``bench.json`` beside the bench module.

    Args:
        rows: from :func:`bench`.
        module_name: the bench module.
        path: another file to write to.

    Returns:
        The file.
    """
    from datetime import UTC, datetime

    content = {
        "format": 2,
        "measured": datetime.now(UTC).date().isoformat(),
        "rows": [row.to_dict() for row in rows],
    }
    return keep(content, module_name, "bench.json", path=path)


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote, with ``rows`` as :class:`BenchRow`; None where nothing was saved.

    Raises:
        ValueError: the file is damaged; the message says how to make it again.
    """
    return read_kept(path, "rows", BenchRow.from_dict, command="regularized bench SLUG --save")
