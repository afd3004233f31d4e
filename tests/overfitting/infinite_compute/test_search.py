"""The search around runs and its certificate."""

import math

from regularized.overfitting.infinite_compute.search import GRIDS, box, certify, coordinate_descent, member_settings

BEST = {"epochs": 16, "lr": 3e-3, "weight_decay": 1.6}


def quadratic(calls=None):
    """A convex bowl over the positions on the grids, lowest at BEST."""

    def run(settings):
        if calls is not None:
            calls.append(dict(settings))
        return sum(
            (list(GRIDS[axis]).index(settings[axis]) - list(GRIDS[axis]).index(BEST[axis])) ** 2 for axis in GRIDS
        )

    return run


def test_certificate():
    """Fails when a neighbour is left out, an axis moves with another, or equal counts as better."""
    calls = []
    assert certify(quadratic(calls), BEST).certified
    assert len(calls) == 7
    for axis in GRIDS:
        for neighbour in box(BEST)[1:]:
            if neighbour[axis] != BEST[axis]:
                found = certify(quadratic(), neighbour)
                assert not found.certified
                assert found.better[0] == BEST


def test_flat_is_certified():
    """Fails when a tie rejects: the centre must be no worse, not better."""
    assert certify(lambda settings: 1.0, BEST).certified


def test_edges_cost_fewer_runs():
    """Fails when the repeated centre of an edge is run again."""
    calls = []
    certify(quadratic(calls), {"epochs": 64, "lr": 1e-4, "weight_decay": 0.0})
    assert len(calls) == 4


def test_descent_finds_the_valley_and_runs_nothing_twice():
    """Fails when the descent stops early, or forgets what it has run."""
    calls = []
    found = coordinate_descent(quadratic(calls), {"epochs": 1, "lr": 3e-2, "weight_decay": 6.4})
    assert found.certified
    assert found.center == BEST
    assert found.loss == 0
    assert len(calls) == len({tuple(sorted(call.items())) for call in calls}) == len(found.losses)


def test_a_run_that_diverged_is_only_worse():
    """Fails when an infinite loss stops the search."""
    found = certify(lambda s: math.inf if s["lr"] > 3e-3 else quadratic()(s), BEST)
    assert found.certified


def test_members():
    """Fails when the shift goes the other way, moves the rate, or passes the official ends."""
    assert member_settings(BEST) == {"epochs": 32, "lr": 3e-3, "weight_decay": 0.8}
    assert member_settings({"epochs": 128, "weight_decay": 0.1}) == {"epochs": 128, "weight_decay": 0.1}
    assert member_settings({"epochs": 256, "weight_decay": 0.0}) == {"epochs": 256, "weight_decay": 0.0}
