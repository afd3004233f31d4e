"""Where records go: Accelerate's trackers, and one of our own that writes lines of JSON."""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType

__all__ = ["JSONLTracker", "resolve_trackers"]


logger = logging.getLogger(__name__)


class JSONLTracker(GeneralTracker):  # type: ignore[misc]
    """One JSON object a line: ``{"step": 50, "task": 1.23, ...}``; the configuration stands in the first line.

    A run that is resumed goes on in the same file, less what an interrupted one had written beyond its checkpoint.

    Args:
        path: the file; its folder is made.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> tracker = JSONLTracker(path)
        >>> tracker.start(); tracker.log({"task": 0.5}, step=10); tracker.finish()
        >>> path.read_text()
        '{"step": 10, "task": 0.5}\\n'
    """

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path: Path = Path(path)
        self._file: TextIO | None = None

    @property
    def tracker(self) -> TextIO | None:
        """The open file."""
        return self._file

    @on_main_process  # type: ignore[untyped-decorator]
    def start(self) -> None:
        """Open the file to append."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the configuration, once a file."""
        if self.path.stat().st_size == 0:
            self._write({"config": dict(values)})

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append one record."""
        self._write({"step": step, **values})

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @on_main_process  # type: ignore[untyped-decorator]
    def rewind(self, step: int) -> None:
        """Forget the records beyond a step, and what is no record: the last line of a killed process, say."""
        if not self.path.is_file():
            return
        kept, lost = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            at = _step(line)
            lost += at is None
            if at is not None and at <= step:
                kept.append(line)
        if lost > 1:
            logger.warning("%s: %d lines are no records and are left out", self.path, lost)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, self.path)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            raise ValueError(f"the tracker of {self.path} is not started")
        # JSON has no NaN: null is what other readers understand.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()


def _step(line: bytes) -> float | None:
    """Step of a record, 0 of the configuration; None of a line that is no whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = (record.get("step") or 0) if isinstance(record, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int | float) else None


def resolve_trackers(trackers: Sequence[str | GeneralTracker], folder: Path | None) -> list[str | GeneralTracker]:
    """Check trackers before the run starts, and build our own.

    Args:
        trackers: ``"jsonl"`` (``folder/log.jsonl``), a name that Accelerate knows such as ``"tensorboard"``, or a
            ``GeneralTracker``.
        folder: folder of those that write files.

    Raises:
        ValueError: a tracker needs ``folder``, or its name is unknown to Accelerate.
        ImportError: the package of a tracker is missing.

    Examples:
        >>> [tracker.path.name for tracker in resolve_trackers(["jsonl"], Path("runs/first"))]
        ['log.jsonl']
    """
    resolved: list[str | GeneralTracker] = []
    for tracker in trackers:
        if isinstance(tracker, str) and tracker in ("jsonl", "tensorboard") and folder is None:
            raise ValueError(f"tracker {tracker!r} writes files; give Logging(..., folder=...)")
        if tracker == "jsonl":
            assert folder is not None
            resolved.append(JSONLTracker(folder / "log.jsonl"))
            continue
        if isinstance(tracker, str) and tracker not in set(LoggerType.list()) - {"all"}:
            raise ValueError(
                f"unknown tracker {tracker!r}; known are 'jsonl' and {sorted({*LoggerType.list()} - {'all'})}"
            )
        if isinstance(tracker, str) and importlib.util.find_spec(tracker) is None:
            hint = 'pip install "regularized[tensorboard]"' if tracker == "tensorboard" else f"install {tracker}"
            raise ImportError(f"tracker {tracker!r} needs a package that is not installed: {hint}")
        resolved.append(tracker)
    return resolved
