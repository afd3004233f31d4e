"""What a whole comparison costs: runs, memory and time, each figure with its source, and none where nobody has said.

Time and memory are measured ones where the shipped runs are of that scale. For the original set-ups, which nobody has
run here, time is what the card states and memory what the code asks of a GPU before it begins.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regularized.evidence.experiment import seeds_of
from regularized.papers.catalogue import Entry, load_catalogue

__all__ = ["Cost", "Figure", "asked_memory", "costs", "total"]

_SIZE = re.compile(r"GPU of (\d+(?:\.\d+)?) (GB|GiB)")
_BYTES = {"GB": 1e9, "GiB": 2.0**30}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and who says so.

    Args:
        value: the number; None where it is unknown.
        source: who says so, where; what was looked at, where it is unknown.
    """

    value: float | None
    source: str

    def __str__(self) -> str:
        return "unknown" if self.value is None else f"{self.value:,.3g}" if self.value < 1e3 else f"{self.value:,.0f}"


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a paper's comparison.

    Args:
        slug: the paper.
        scale: of what size.
        arms: how many arms it has.
        seeds: with how many seeds each is run.
        gpu: whether code of the paper asks for a CUDA GPU, at whatever scale.
        gigabytes: memory that a run needs, 1e9 bytes each: of the GPU where one is asked for, else of the process.
        hours: of all runs one after the other, each on one such machine.
    """

    slug: str
    scale: str
    arms: int
    seeds: int
    gpu: bool
    gigabytes: Figure
    hours: Figure

    @property
    def runs(self) -> int:
        """How many runs there are: every arm with every seed."""
        return self.arms * self.seeds

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; what is unknown is null."""
        return asdict(self) | {"runs": self.runs}


def costs(entries: Iterable[Entry] | None = None, *, scale: str = "paper") -> list[Cost]:
    """The cost of each paper that has the scale, by name.

    Args:
        entries: papers; default all that run here.
        scale: ``"paper"`` (default) or another scale of the experiments.

    Examples:
        >>> from regularized.papers.catalogue import find
        >>> (cost,) = costs([find("cast")])
        >>> cost.runs == cost.arms * cost.seeds, cost.gigabytes.value
        (True, 145.0)
    """
    if entries is None:
        entries = [entry for entry in load_catalogue() if entry.implemented]
    found = [_cost(entry, scale) for entry in sorted(entries, key=lambda entry: entry.slug)]
    return [cost for cost in found if cost is not None]


def total(found: Iterable[Cost]) -> str:
    """The sum in a sentence; hours only of those whose time is known, so that it is a lower bound."""
    found = list(found)
    known = [cost for cost in found if cost.hours.value is not None]
    runs = f"{sum(cost.runs for cost in found):,} runs of {len(found)} papers"
    if not known:
        return f"{runs}; the time of none is known"
    hours = Figure(sum(cost.hours.value or 0.0 for cost in known), "")
    rest = f"; the time of the other {len(found) - len(known)} is unknown" if len(known) < len(found) else ""
    return f"{runs}; those of {len(known)} take {hours} hours on one machine{rest}"


def asked_memory(folder: Path) -> tuple[bool, Figure]:
    """Whether the code of a paper asks for a GPU, and the most memory that it asks of one: read, not run.

    Args:
        folder: the paper's.

    Returns:
        Whether it does, and the memory in gigabytes with file and line.
    """
    asked: list[Figure] = []
    gpu = False
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node, value in _demands(tree):
            gpu = True
            if value:
                asked.append(Figure(value, f"{folder.name}/{file.name}, line {node.lineno}, asks for it"))
    nothing = "the code asks for a GPU of any size" if gpu else "the code asks for no GPU"
    return gpu, max(asked, key=lambda figure: figure.value or 0.0, default=Figure(None, nothing))


def _demands(tree: ast.Module) -> Iterator[tuple[ast.expr, float]]:
    """Calls of ``need_gpu`` and refusals in words, with the gigabytes that they name, or 0."""
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need_gpu":
            sizes = [k.value.value for k in node.keywords if k.arg == "gigabytes" and isinstance(k.value, ast.Constant)]
            yield node, float(sizes[0]) if sizes and isinstance(sizes[0], int | float) else 0.0
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            size = _SIZE.search(node.value)
            if size is not None:
                yield node, float(size[1]) * _BYTES[size[2]] / 1e9
            elif "CUDA GPU" in node.value:
                yield node, 0.0


def _cost(entry: Entry, scale: str) -> Cost | None:
    known: dict[str, Any] | None = entry.memory.recall(f"{entry.slug} cost {scale}", lambda: _find_out(entry, scale))
    if known is None:
        return None
    figures = {name: Figure(**known[name]) for name in ("gigabytes", "hours")}
    return Cost(**{**known, **figures})


def _find_out(entry: Entry, scale: str) -> dict[str, Any] | None:
    experiment = entry.experiment()
    if scale not in experiment.SCALES:
        return None
    gpu, gigabytes = asked_memory(entry.folder)
    arms, seeds = len(experiment.ARMS), seeds_of(experiment).count
    hours = Figure(None, "nobody has said")
    stated = entry.card.paper_scale if scale == "paper" else None
    if stated is not None:
        hours = Figure(stated.hours * (arms * seeds if stated.each == "run" else 1), stated.source)
    ledger = entry.load_ledger()
    if ledger is not None and ledger.scale == scale:
        where = f"ledger.json: {len(ledger.runs)} runs on {ledger.environment.get('cpu', 'a machine')}"
        hours = Figure(sum(run.seconds for run in ledger.runs) / 3600, where)
        gigabytes = Figure(max(run.peak_memory for run in ledger.runs) / 1e9, where)
    elif scale != "paper":
        gigabytes = Figure(None, "nobody has measured it")
    cost = Cost(entry.slug, scale, arms, seeds, gpu, gigabytes, hours)
    return asdict(cost)
