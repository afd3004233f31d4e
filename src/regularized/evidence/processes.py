"""A function in several processes at once, for checks that compare them with one process.

On Linux the processes are forked from a server that has imported torch and its company once, which takes each from
seconds to tenths of a second. The server does nothing but import: a process forked from one that has computed could
inherit locks that nobody opens. Elsewhere each process starts on its own.
"""

import gc
import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

__all__ = ["run_in_processes", "run_launched", "start_method"]

# What takes long to import. Of these, the server loads what the calling process has loaded when the server starts.
_HEAVY = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",  # which the first DistributedDataParallel imports
    "accelerate",
    "transformers",
    "transformers.modeling_utils",
    "transformers.trainer",
    "peft",
    "pytorch_lightning",
    "sklearn",
    "scipy.optimize",
    "regularized.training.trainer",
    "regularized.evidence.contract",
)


def run_in_processes(
    function: Callable[..., None], *arguments: Any, count: int = 2, environment: Mapping[str, str] | None = None
) -> None:
    """Call ``function(rank, *arguments)`` in new processes and wait until all have finished.

    Args:
        function: at the top of a module, since it is sent to the processes.
        arguments: as ``pickle`` can send them.
        count: how many processes; their ranks are 0 ... count - 1.
        environment: variables of the processes, beside those of this one.

    Raises:
        torch.multiprocessing.ProcessException: a process failed; the others are ended, and the message has its
            traceback.
    """
    # The server keeps the environment in which it was started.
    whole = {**os.environ, **(environment or {})}
    start_processes(_call, args=(whole, function, arguments), nprocs=count, start_method=start_method())


def start_method() -> str:
    """How a process starts soonest here, in the words of ``multiprocessing``."""
    if sys.platform != "linux":
        return "spawn"
    mp.set_forkserver_preload([name for name in _HEAVY if name in sys.modules])
    return "forkserver"


def run_launched(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call ``function(*arguments)`` in processes that find each other as a launcher's would: by RANK, WORLD_SIZE, ...

    Each has one thread. The rest is as in :func:`run_in_processes`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(count)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    run_in_processes(_as_rank, function, arguments, count=count, environment=group)


def _as_rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(*arguments)


def _call(rank: int, environment: Mapping[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection need not go through, and so copy, everything that the server imported
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *arguments)
