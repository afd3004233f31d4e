"""Processes that wait for each other: for how long, and which one it was that did not come."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["PeerError", "Peers"]

PATIENCE = 10.0  # seconds that those who are still there give each other to say so


class PeerError(RuntimeError):
    """Another process failed, or does not answer; the message has its number."""


class Peers:
    """The processes of a training, which must all fail where one of them does.

    A process that fails says so in the store by which the processes found each other. One that waits in vain (until
    ``timeout``, or until the connection breaks) looks there for who failed, and who says nothing.

    Args:
        rank: number of this process.
        world: number of processes; with 1 nothing is done.
        timeout: seconds that a process waits for the others, in every exchange; None is what the process group was
            started with, half an hour where nobody said otherwise.

    Examples:
        >>> with Peers(0, 1, None).together():
        ...     pass
    """

    _numbers = itertools.count()

    def __init__(self, rank: int, world: int, timeout: float | None) -> None:
        self._rank, self._world, self._timeout = rank, world, timeout
        self._number = next(self._numbers)  # the same in every process, as trainers are built in the same order
        self._runs = itertools.count()
        if world > 1 and timeout is not None:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))

    @contextmanager
    def together(self) -> Iterator[None]:
        """For the time of a run: errors are told to the others, and an exchange that failed names who was missing.

        Raises:
            PeerError: another process failed, or does not answer.
        """
        run = f"regularized/{self._number}/{next(self._runs)}"
        try:
            yield
        except BaseException as error:
            if self._world == 1:
                raise
            waited = _is_of_exchange(error)
            found = self._roll_call(run, "" if waited else f"{type(error).__name__}: {error}", wait=waited)
            if not waited:
                raise
            raise PeerError(f"process {self._rank} waited for the others in vain: {found}") from error

    def _roll_call(self, run: str, said: str, *, wait: bool) -> str:
        """Tell the others why this process stops; the answers in words."""
        answers: dict[int, str] = {self._rank: said}
        patience = min(PATIENCE, self._timeout or PATIENCE) if wait else 1.0

        def ask() -> None:
            store = distributed_c10d.PrefixStore(run, distributed_c10d._get_default_store())
            store.set(str(self._rank), said)
            until = time.monotonic() + patience
            while wait and len(answers) < self._world and time.monotonic() < until:
                for rank in set(range(self._world)) - answers.keys():
                    if store.check([str(rank)]):
                        answers[rank] = store.get(str(rank)).decode()
                time.sleep(0.05)

        # The store itself may hang, where the process that holds it was stopped.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(patience + 1.0)
        silent = sorted(set(range(self._world)) - answers.keys())
        words = [f"process {rank} failed ({text})" for rank, text in sorted(answers.items()) if text]
        words += [f"process {rank} does not answer: it was stopped or killed, or is somewhere else" for rank in silent]
        return "; ".join(words) or "all are there, and the exchange failed all the same"


def _is_of_exchange(error: BaseException) -> bool:
    """Whether an error is that of an exchange between processes; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
