"""One run at a time in a folder of checkpoints."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regularized.training.checkpoint import CheckpointError

try:
    import fcntl
except ImportError:  # not a Unix: there is no lock that a killed process would leave open by itself
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, for this process alone.

    The operating system opens the lock when the process ends, however it ends; the file that stays behind means
    nothing. Processes that this one forks do not hold it, so that a worker which outlives a killed run does not stand
    in the way of the next one.

    Raises:
        CheckpointError: another process has it.

    Examples:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp()) / "checkpoints"):
        ...     pass
    """
    if fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"no checkpoint can be written in {folder}: {error}; give a folder that is") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise CheckpointError(
                f"{folder} is in use by another run ({file.read().strip() or 'it does not say which'}): two runs would "
                "delete each other's checkpoints. Wait until it has ended, or give this run another folder"
            ) from error
        except OSError as error:  # a network file system without locks
            logger.warning("%s cannot be locked (%s): make sure that one run at a time writes there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
