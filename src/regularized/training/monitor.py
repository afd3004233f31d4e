"""What a person sees of a run: means of the terms, the rate, a bar. Tensors are read at log steps only."""

import logging
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regularized.training.progress import Progress

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

REFRESH = 0.2  # seconds between two moves of the bar


class Monitor:
    """Means of the terms between two log steps, and a progress bar.

    Args:
        every: optimizer steps between two records; 0 keeps none.
        bar: show a progress bar on standard error; None shows one where that is a terminal.
        main: whether this process is the one that talks.

    Examples:
        >>> with Monitor(every=2, bar=False, main=True) as monitor:
        ...     monitor.start(Progress(0, 4))
        ...     for step in range(2):
        ...         record = monitor.step(Progress(step, 4), [("task", torch.tensor(float(step)))], rate=0.1)
        >>> record["task"]
        0.5
    """

    def __init__(self, *, every: int, bar: bool | None, main: bool) -> None:
        self.every = every
        self._show = main and (sys.stderr.isatty() if bar is None else bar)
        self._bar: Any = None
        self._task: Any = None
        self._kept: dict[str, list[Tensor]] = {}
        self._since = (0, 0.0)
        self._moved = 0.0

    def start(self, progress: Progress) -> None:
        """Begin (or go on) at a position."""
        self._kept.clear()
        self._since = (progress.step, time.perf_counter())
        if self._show:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError as error:
                raise ImportError(
                    "the progress bar needs rich: pip install rich, or Logging(progress_bar=False)"
                ) from error
            self._bar = Bar(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "", total=progress.total_steps, completed=progress.step, epoch="", rate="", terms=""
            )
            self._bar.start()

    def step(self, progress: Progress, values: Iterable[tuple[str, Tensor]], rate: float) -> dict[str, float] | None:
        """Take in one optimizer step; at a log step, the record of the steps since the last one.

        Args:
            progress: position of the step that was just made.
            values: mean of each term, on the device.
            rate: learning rate of the step.
        """
        record = None
        done = progress.step + 1
        if self.every:
            for name, value in values:
                self._kept.setdefault(name, []).append(value)
            if done % self.every == 0 or done == progress.total_steps:
                record = self._record(progress, rate)
        if self._bar is not None:
            now = time.perf_counter()
            if now - self._moved > REFRESH or record:
                self._moved = now
                self._bar.update(self._task, completed=done, epoch=f"{progress.epoch + 1}/{progress.total_epochs}")
                if record:
                    terms = "  ".join(f"{name} {record[name]:.4g}" for name in self._kept)
                    self._bar.update(self._task, rate=f"{record['steps_per_second']:.1f} steps/s", terms=terms)
        if record:
            self._kept.clear()
        return record

    def _record(self, progress: Progress, rate: float) -> dict[str, float]:
        means = torch.stack([torch.stack(values).float().mean() for values in self._kept.values()])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        now = time.perf_counter()
        step, since = self._since
        self._since = (progress.step + 1, now)
        record = dict(zip(self._kept, means.tolist(), strict=True))
        record["learning_rate"] = rate
        record["epoch"] = float(progress.epoch)
        record["steps_per_second"] = (progress.step + 1 - step) / max(now - since, 1e-9)
        logger.info("step %d/%d: %s", progress.step + 1, progress.total_steps, _text(record))
        return record

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Tell the result of an evaluation."""
        logger.info("evaluated after step %d: %s", step, _text(metrics))
        if self._bar is not None:
            self._bar.console.print(f"after step {step}: {_text(metrics)}", highlight=False)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
