"""Shows how far a matrix of runs is, on standard error: a bar in a terminal, a line a run in a log.

Public names: ``display(title, total, done, shown=...)``, a context manager that gives a :class:`Display`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from regularized.evidence.pool import Answer, Job

__all__ = ["Display", "display"]


class Display(Protocol):
    """Is told every answer of a pool."""

    def show(self, job: Job, answer: Answer) -> None:
        """Take note of an answer: a run has started, or has ended one way or another."""
        ...


class _Silent:
    def show(self, job: Job, answer: Answer) -> None:
        pass


class _Lines:
    """A line for each finished run, for logs."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        if done:
            print(f"{title}: {done} of {total} runs are there from earlier calls", file=sys.stderr, flush=True)

    def show(self, job: Job, answer: Answer) -> None:
        if answer["status"] == "started":
            return
        self._done += 1
        outcome = f"{answer['seconds']:.1f} s" if answer["status"] == "done" else answer["error"]
        print(f"[{self._done}/{self._total}] {_name(job)}: {outcome}", file=sys.stderr, flush=True)


class _Bar:
    """A bar over the whole matrix with the runs that are under way."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task
        self._active: dict[str, None] = {}

    def show(self, job: Job, answer: Answer) -> None:
        name = _name(job)
        if answer["status"] == "started":
            self._active[name] = None
        else:
            self._active.pop(name, None)
            self._bar.advance(self._task)
            if answer["status"] == "failed":
                self._bar.console.print(f"{name} failed: {answer['error']}", style="red", markup=False, highlight=False)
        self._bar.update(self._task, active=", ".join(self._active).replace("[", r"\["))


def _name(job: Job) -> str:
    if job.label:
        return job.label
    tried = "".join(f" {name}={value}" for name, value in job.overrides.items())
    return f"{job.arm}{tried} seed {job.seed}"


@contextmanager
def display(title: str, total: int, done: int, *, shown: bool = True) -> Iterator[Display]:
    """The fitting display: a bar in a terminal, lines elsewhere, nothing where none is wanted.

    Args:
        title: what is run.
        total: runs of the whole matrix.
        done: runs that are there from earlier calls.
        shown: whether anything is to be shown; default yes.
    """
    if not shown:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines(title, total, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("[bold]{task.description}", markup=True),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[active]}"),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        if done:
            console.print(
                f"{done} of {total} runs are there from earlier calls with the same code, settings and versions"
            )
        task = bar.add_task(title, total=total, completed=done, active="")
        yield _Bar(bar, task)
