"""The worker of a comparison, forked from a server that has imported torch once: in tests most of a run is its start.

As a program without arguments it stands in for ``worker.py``: it hands its descriptors and its environment to the
server, and ends as the fork ends. With the descriptor of a listening socket it is the server.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress


def hand_over() -> int:
    """Let the server do it; the exit code of the one that did."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["WARM_WORKERS"])
        socket.send_fds(server, [json.dumps(dict(os.environ)).encode() + b"\n"], [0, 1, 2])
        for descriptor in (0, 1):  # or the other side would wait for this process, too
            os.close(descriptor)
        return int(server.recv(16) or b"1")


def serve(listener: socket.socket) -> None:
    """Fork for everyone who comes, until standard input ends."""
    import numpy  # noqa: F401
    import torch._inductor.config  # noqa: F401  by torch.use_deterministic_algorithms

    from regularized.evidence import experiment, pictures, provenance, worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if not os.fork():
            _work_for(connection)
        connection.close()


def _work_for(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(65536)
    child = os.fork()
    if not child:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        _close(descriptors)
        os.environ.clear()
        os.environ.update(json.loads(message))
        from regularized.evidence.worker import main

        main()
        os._exit(0)
    _close(descriptors)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:  # whoever asked was killed, and means this one
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        connection.sendall(str(code).encode())
    os._exit(0)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    if sys.argv[1:]:
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        code = hand_over()
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
