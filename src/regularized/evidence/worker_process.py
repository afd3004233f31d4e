"""A worker process seen from the one that started it: messages there and back, and its end.

Public names: :class:`WorkerProcess`, :func:`path_of`, :func:`program_of`, :class:`TookTooLong`. What the process does:
:mod:`regularized.evidence.worker`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

__all__ = ["TookTooLong", "WorkerProcess", "path_of", "program_of"]

PROGRAM = Path(__file__).with_name("worker.py")
_TAIL = 4000  # characters of a dead process's last words that are kept
_LOOK_SECONDS = 0.5  # between two looks whether a silent process still lives
_END_SECONDS = 10.0  # for a process that has closed its pipe, to end by itself

# One thread a process: the cores are kept busy by the seeds, and sums come out in one order.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch asks for to be deterministic on CUDA
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}


class TookTooLong(Exception):
    """No answer came within the time that was given."""


def program_of(package: Path) -> Path:
    """The worker of a copy of this package."""
    return package / "evidence" / "worker.py"


def path_of(package: Path) -> list[str]:
    """The path of imports on which a copy of this package stands in the place of this one."""
    own = str(Path(__file__).resolve().parents[2])
    return [str(package.parent), *(entry for entry in sys.path if entry != own)]


class WorkerProcess:
    """A worker process, from its start to :meth:`end`.

    Args:
        program: what it runs; default the worker of this package.

    Raises:
        OSError: the system cannot start a process now.
    """

    def __init__(self, program: Path | None = None) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        # -P keeps the worker's folder off the path: our `statistics` must not stand in for the standard library's.
        command = [sys.executable, "-P", str(program or PROGRAM)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which knows what to keep
            )
        except BaseException:
            self._errors.close()
            raise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, message: Mapping[str, Any], *, seconds: float | None = None) -> dict[str, Any] | None:
        """Send a message and wait for the answer.

        Args:
            message: what JSON can hold.
            seconds: how long to wait; default without end.

        Returns:
            The answer; None when the process is gone, see :meth:`last_words`.

        Raises:
            TookTooLong: there is no answer yet; the process goes on.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        line = self._next_line(seconds)
        if line is None or not line.endswith("\n"):
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> tuple[str, str]:
        """How a process that is gone ended, in a sentence, and the last of what it wrote to standard error."""
        code = self._code()
        self._errors.seek(0)
        return _death(code), self._errors.read()[-_TAIL:]

    @property
    def was_killed(self) -> bool:
        """Whether a process that is gone was ended from outside, or by a fault of the machine."""
        code = self._code()
        return code is not None and code < 0

    def _code(self) -> int | None:
        """Exit code of a process that is gone; None of one that has closed its pipe and does not end."""
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process and those that it started; safe from another thread."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def end(self) -> None:
        """Kill it and close its pipes."""
        self.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):  # a message that nobody read
            self._process.stdin.close()
        # A grandchild that left the group may hold the other pipe open: the thread then ends with it.
        self._reader.join(_END_SECONDS)
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._lines.put(line)
        self._lines.put(None)

    def _next_line(self, seconds: float | None) -> str | None:
        deadline = None if seconds is None else time.monotonic() + seconds
        dead = False
        while True:
            left = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic())
            try:
                return self._lines.get(timeout=max(left, 0.0))
            except Empty:
                # The pipe alone does not tell: a child of the run may outlive the process and hold it open. One more
                # look after the end, for what was written just before it.
                if dead:
                    return None
                dead = self._has_ended()
                if not dead and deadline is not None and time.monotonic() >= deadline:
                    raise TookTooLong from None

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        # Without reaping it: as long as it is a zombie, no other process or group can get its number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _death(code: int | None) -> str:
    if code is None:
        return "the run closed the pipe of its process"
    if code == -9:
        return "the process of the run was killed (signal 9): most often it was out of memory"
    if code < 0:
        return f"the process of the run ended by signal {-code}"
    return f"the process of the run exited with code {code}"
