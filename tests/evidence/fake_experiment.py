"""An experiment of known effect that costs nothing: "better" adds about 5 to what "plain" measures with the same seed.

Environment variables make it misbehave, for tests of what the runner does then.
"""

import os
import time

import numpy as np

from regularized.evidence.experiment import Measurements, Tuning, Unavailable, data_fingerprint

SCALES = {"smoke": {"points": 3}, "laptop": {"points": 8}, "paper": {"points": 100}}
ARMS = {"plain": {"rate": 0.1}, "better": {"rate": 0.2}, "control": {"rate": 0.1}}
GAIN = {"plain": 0.0, "better": 5.0, "control": 0.0}
TUNING = Tuning(
    metric="validation",
    direction="higher",
    grids={"plain": [{"rate": 0.1}, {"rate": 0.3}], "better": [{"rate": 0.1}, {"rate": 0.2}]},
    seeds=(1000, 1001),
)


def run(arm, seed, scale, *, rate=None):
    if scale == "paper":
        raise Unavailable("ImageNet is not here: put it in REGULARIZED_DATA")
    if os.environ.get("FAKE_FAIL") == f"{arm}/{seed}":
        raise RuntimeError("the loss went to <heaven>")
    if os.environ.get("FAKE_DIE") == f"{arm}/{seed}":
        os.kill(os.getpid(), 9)
    if os.environ.get("FAKE_READ") == f"{arm}/{seed}":
        input("are you sure? ")
    time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
    print("noise on standard output")
    rng = np.random.default_rng(seed)
    rate = ARMS[arm]["rate"] if rate is None else rate
    end = 70.0 + rng.normal() + GAIN[arm] + 0.5 * np.random.default_rng([seed, len(arm)]).normal()
    if os.environ.get("FAKE_NAN") == f"{arm}/{seed}":
        end = float("nan")
    points = SCALES[scale]["points"]
    return Measurements(
        metrics={"accuracy": end, "validation": -((rate - ARMS[arm]["rate"]) ** 2) + 0.001 * rng.normal()},
        curves={
            "accuracy": [(x, end - 20.0 / (x + 1) + 0.3 * rng.normal()) for x in range(points)],
            "loss": [(x, 2.0 / (x + 1) + 0.02 * rng.normal()) for x in range(points)],
        },
        data=data_fingerprint(np.array([seed, float(os.environ.get("FAKE_OTHER_DATA") == arm)])),
    )
