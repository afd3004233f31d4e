"""What tests of several storeys share so that the same is not computed a hundred times."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regularized.evidence import worker_process
from regularized.papers import catalogue
from regularized.papers.memory import Memory, folder

WARM_WORKER = Path(__file__).parent / "evidence" / "warm_worker.py"


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are compiled anew in each run, once for all its workers.

    torch keeps them from run to run and takes them as they are, whatever instructions the processor of this run has.
    """
    if not hasattr(config, "workerinput"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = kernels = tempfile.mkdtemp(prefix="kernels-")
        config.add_cleanup(lambda: shutil.rmtree(kernels, ignore_errors=True))


@pytest.fixture
def in_shards() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Gives a network back in shards, as the one process of its group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield partial(fully_shard, mesh=mesh)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory) -> Iterator[str]:
    """Address of the server that forks workers; see warm_worker.py."""
    address = str(tmp_path_factory.mktemp("workers") / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-P", str(WARM_WORKER), str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=os.environ | worker_process._ENVIRONMENT,
        )
    yield address
    server.communicate()


@pytest.fixture
def warm_workers(fork_server, monkeypatch) -> None:
    """Workers start in milliseconds instead of seconds."""
    monkeypatch.setenv("WARM_WORKERS", fork_server)
    monkeypatch.setattr(worker_process, "PROGRAM", WARM_WORKER)


@pytest.fixture
def tell_what_is_known() -> Callable[[], None]:
    """Puts what this process knows of the catalogue into the cache folder of the moment.

    Commands that a test starts with a home of their own need not find it out each, which takes seconds.
    """

    def tell() -> None:
        known = catalogue._read_cards(catalogue.PACKAGE).memory
        for entry in catalogue.load_catalogue():
            assert entry.missing is not None
        kept = Memory(folder() / known._file.name, known._stamp)
        kept._known, kept._is_new = known._known, True
        kept.save()

    return tell
