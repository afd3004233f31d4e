"""What theory predicts for a layer's features, as a picture: error over time, and the spectrum that it comes from.

Draws into axes of matplotlib that the caller made, so nothing but torch is imported here.
"""

import math
from typing import Any

import torch

from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow

__all__ = ["plot_dynamics"]


def plot_dynamics(
    dynamics: LinearDynamics,
    curves: Any,
    spectrum: Any | None = None,
    *,
    flow: GradientFlow | None = None,
    held_out: tuple[torch.Tensor, torch.Tensor] | None = None,
    earliest: float = 1e-2,
    latest: float = 1e5,
) -> None:
    """Draw predicted training and test error over time, the best time to stop, and the spectrum.

    Args:
        dynamics: the theory, for example from :meth:`LinearDynamics.from_features`.
        curves: ``matplotlib.axes.Axes`` for the errors.
        spectrum: axes for the histogram of eigenvalues; None draws none.
        flow: the exact course on the data at hand, drawn as dots beside the predicted training error.
        held_out: (features, targets) on which ``flow``'s error is drawn too.
        earliest: first time; default 0.01.
        latest: last time; default 100,000.

    Raises:
        ValueError: ``held_out`` without ``flow``.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> left, right = Figure(figsize=(9, 4), layout="constrained").subplots(1, 2)
        >>> plot_dynamics(LinearDynamics(0.9, noise=0.25), left, right)
        >>> [line.get_label() for line in left.lines][-1], right.get_title()
        ('best time 2.46', '10% of the directions never learn')
    """
    if held_out is not None and flow is None:
        raise ValueError("held_out needs flow=GradientFlow(...), whose error on it is to be drawn")
    t = torch.logspace(math.log10(earliest), math.log10(latest), 200, dtype=torch.float64)
    test, train = dynamics.test_error(t), dynamics.train_error(t)
    curves.plot(t, test, color="#dd6426", label="test error, theory")
    curves.plot(t, train, color="#2f82d9", label="training error, theory")
    if flow is not None:
        few = t[::8]
        curves.plot(few, flow.train_error(few).cpu(), "o", ms=3, color="#2f82d9", label="training error, this data")
        if held_out is not None:
            errors = flow.test_error(*held_out, few).cpu()
            curves.plot(few, errors, "o", ms=3, color="#dd6426", label="held-out error, this data")
    stop = dynamics.optimal_stopping(earliest=earliest, latest=latest)
    if stop.at <= latest:
        curves.axvline(stop.at, color="#8a8f98", linestyle="--", linewidth=1, label=f"best time {stop.at:.3g}")
    curves.set(xscale="log", xlabel="time (learning rate x steps of the summed loss)", ylabel="mean squared error")
    # Late errors may be a hundred times the first ones: what matters is below.
    curves.set_ylim(0.0, min(float(test.max()), 3.0 * float(test[0])) * 1.05)
    curves.legend(fontsize=8)
    if spectrum is not None:
        shown = dynamics.spectrum()
        spectrum.hist(shown.eigenvalues.log10().numpy(), bins=40, weights=shown.masses.numpy(), color="#16a07a")
        spectrum.set(xlabel="log10 eigenvalue", ylabel="share of directions")
        spectrum.set_title(f"{max(0.0, shown.zero):.0%} of the directions never learn", fontsize=9)
