"""Speaks the worker's side of the protocol in milliseconds: no torch, no experiment.

``FAKE_DEATHS`` names a folder: as many processes as it has files take one away and are killed while they start. An arm
says how its run ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def say(**answer):
    print(json.dumps(answer), flush=True)


def main():
    json.loads(sys.stdin.readline())
    for death in Path(os.environ["FAKE_DEATHS"]).iterdir():
        death.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if "FAKE_EXIT" in os.environ:
        sys.exit("no such module")
    say(status="ready", code_key="key", environment={})
    for line in sys.stdin:
        arm = json.loads(line)["arm"]
        if arm == "dies" or (arm == "leaves a child" and os.fork()):
            os.kill(os.getpid(), signal.SIGKILL)
        if arm in ("hangs", "leaves a child"):
            time.sleep(3600.0)
        say(status="done", arm=arm)


if __name__ == "__main__":
    main()
