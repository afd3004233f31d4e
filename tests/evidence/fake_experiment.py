"""An experiment of known effect that costs nothing: "better" adds about 5 to what "plain" measures with the same seed.

Environment variables make it misbehave, for tests of what the runner does then.
"""

import os
import time

import numpy as np

from regularized.evidence.experiment import About, Measurements, Tuning, Unavailable, data_fingerprint

DEFAULTS = {"name": "plain", "rate": 0.1, "best_rate": 0.1, "gain": 0.0}
SCALES = {"smoke": {"points": 3}, "laptop": {"points": 8}, "paper": {"points": 100}}
ARMS = {
    "plain": {},
    "better": {"name": "better", "rate": 0.2, "best_rate": 0.2, "gain": 5.0},
    "control": {"name": "control"},
}
TUNING = Tuning(
    metric="validation",
    direction="higher",
    grids={"plain": [{"rate": 0.1}, {"rate": 0.3}], "better": [{"rate": 0.1}, {"rate": 0.2}]},
    seeds=(1000, 1001),
)


def about(settings):
    return About("fake numbers", 10**6 if settings["points"] == 100 else 1000, "no model", 10**6)


def run(settings, seed):
    arm, rate = settings["name"], settings["rate"]
    if settings["points"] == 100:
        raise Unavailable("ImageNet is not here: put it in REGULARIZED_DATA")
    if os.environ.get("FAKE_FAIL") == f"{arm}/{seed}":
        raise RuntimeError("the loss went to <heaven>")
    if os.environ.get("FAKE_DIE") == f"{arm}/{seed}":
        os.kill(os.getpid(), 9)
    if os.environ.get("FAKE_HANG") == f"{arm}/{seed}":
        time.sleep(3600.0)
    if os.environ.get("FAKE_READ") == f"{arm}/{seed}":
        input("are you sure? ")
    if seed >= int(os.environ.get("FAKE_HOLD", "1000000")):
        time.sleep(3600.0)
    time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
    print("noise on standard output")
    rng = np.random.default_rng(seed)
    end = 70.0 + rng.normal() + settings["gain"] + 0.5 * np.random.default_rng([seed, len(arm)]).normal()
    if os.environ.get("FAKE_NAN") == f"{arm}/{seed}":
        end = float("nan")
    points = settings["points"]
    return Measurements(
        metrics={"accuracy": end, "validation": -((rate - settings["best_rate"]) ** 2) + 0.001 * rng.normal()},
        curves={
            "accuracy": [(x, end - 20.0 / (x + 1) + 0.3 * rng.normal()) for x in range(points)],
            "loss": [(x, 2.0 / (x + 1) + 0.02 * rng.normal()) for x in range(points)],
        },
        data=data_fingerprint(np.array([seed, float(os.environ.get("FAKE_OTHER_DATA") == arm)])),
    )
