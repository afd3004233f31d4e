"""A training log and its phases as a picture: accuracies over steps, scores of the neurons, a colour for each phase.

Draws into axes of matplotlib that the caller made, so nothing but torch is imported here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from regularized.understanding.grokking.phases import Phase, TrainingPhases

__all__ = ["plot_grokking"]

_LINES = {
    "train": ("#2f82d9", "-", "training, labels as given"),
    "memorized": ("#c46bab", "--", "corrupted labels"),
    "test": ("#dd6426", "-", "test"),
}
_COLOURS = {
    Phase.CONFUSION: "#ffffff",
    Phase.MEMORIZATION: "#c46bab",
    Phase.TRANSITION: "#8a8f98",
    Phase.GENERALIZATION: "#16a07a",
    Phase.COEXISTENCE: "#c6941c",
    Phase.PARTIAL_INVERSION: "#4fb3d9",
    Phase.FULL_INVERSION: "#16a07a",
    Phase.FORGETTING: "#40444b",
}


def plot_grokking(log: Iterable[Mapping[str, float]], axes: Any, *, phases: TrainingPhases | None = None) -> None:
    """Draw the accuracies of a log over its steps, the mean score of the neurons, and the phases behind them.

    Args:
        log: records, see :func:`~regularized.understanding.grokking.detect_phases`.
        axes: ``matplotlib.axes.Axes``.
        phases: of the same log; None draws none.

    Raises:
        ValueError: the log is empty.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> plot_grokking([{"step": 0, "train": 0.1, "test": 0.0}, {"step": 5, "train": 1.0, "test": 0.1}], axes)
        >>> [line.get_label() for line in axes.lines]
        ['training, labels as given', 'test']
    """
    records = list(log)
    if not records:
        raise ValueError("the log is empty: there is nothing to draw")
    steps = [record["step"] for record in records]
    for name, (colour, style, label) in _LINES.items():
        if all(name in record for record in records):
            axes.plot(steps, [record[name] for record in records], style, color=colour, label=label)
    if all("ipr" in record for record in records):
        axes.plot(steps, [record["ipr"] for record in records], ":", color="#16a07a", label="mean IPR of the neurons")
    for phase, start, end in phases.spans() if phases is not None else ():
        axes.axvspan(start, end, color=_COLOURS[phase], alpha=0.12, linewidth=0)
        axes.annotate(
            phase.value, (start, 1.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=25, va="bottom"
        )
    axes.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
