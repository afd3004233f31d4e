"""Two processes that find each other as a launcher would let them: by variables of the environment."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from regularized.evidence.processes import run_in_processes


def run_two(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in two processes with RANK, WORLD_SIZE, ...; raises with the traceback of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run_in_processes(_as_rank, function, arguments, environment=group)


def _as_rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(*arguments)
