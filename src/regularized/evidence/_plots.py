"""Plots of a comparison by matplotlib: for a page (SVG that follows its light or dark style) and as files."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from regularized.evidence._svg import FAINT, INK, figure, inline, plain, style
from regularized.evidence.claims import Outcome
from regularized.evidence.results import ReproduceResult
from regularized.evidence.statistics import band

__all__ = ["COLOURS", "arm_colour", "curve_names", "curve_svg", "effect_svg", "save_curves"]

# In the order of Okabe and Ito's palette, which colour-blind readers can tell apart, at a brightness that stands out on
# white and on near-black alike. Baselines come first in ARMS: the first is grey and dashed.
COLOURS = ("#8a8f98", "#2f82d9", "#dd6426", "#16a07a", "#c46bab", "#4fb3d9", "#c6941c", "#a8505f")
_LINES = ("--", "-", "-", "-", "-.", "-.", ":", "-")
_LINES_AGAIN = ((0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)))
"""Lines where all colours are taken once, twice, three times."""
_WIDTH = 4.4
"""Inches of a plot on a page. On a phone's screen its smallest text, of 9 points, then still has 8 pixels."""
_LABEL = 50
"""Letters of a label that fit below a plot."""
_LEGEND_COLUMNS = 2
_LEGEND_NAME = 21
"""Letters of a name of which two fit side by side below a plot."""
_LEGEND_ROW = 0.19
"""Inches."""


def arm_colour(result: ReproduceResult, arm: str) -> str:
    """Colour of an arm, the same in all plots and tables of a result."""
    return COLOURS[result.arms.index(arm) % len(COLOURS)]


def curve_names(result: ReproduceResult) -> list[str]:
    """Names of all learning curves, those of the claims' metrics first."""
    names = dict.fromkeys(name for run in result.runs for name in run.curves)
    first = [outcome.claim.metric for outcome in result.outcomes if outcome.claim.metric in names]
    return list(dict.fromkeys(first) | names)


def curve_svg(result: ReproduceResult, name: str, *, prefix: str) -> str:
    """One learning curve, mean and band for each arm, as inline SVG; ``prefix`` keeps its ids its own."""
    with style(INK, FAINT):
        shown = [arm for arm in result.arms if any(name in run.curves for run in result.runs_of(arm))]
        columns = _LEGEND_COLUMNS if max(map(len, shown), default=0) <= _LEGEND_NAME else 1
        drawn = figure(_WIDTH, 2.6 + _legend_height(len(shown), columns))
        _draw_curve(drawn.subplots(), result, name)
        _legend(drawn, columns)
        return inline(drawn, prefix, f"Learning curves of {name}")


def effect_svg(result: ReproduceResult, outcome: Outcome, *, prefix: str) -> str:
    """The effect of each seed, mean and interval, beside zero and the smallest effect that counts, as inline SVG."""
    claim = outcome.claim
    factor = 100.0 if claim.relative else 1.0
    with style(INK, FAINT):
        drawn = figure(_WIDTH, 1.55)
        axes = drawn.subplots()
        colour = arm_colour(result, claim.method)
        axes.axvline(0.0, color=INK, linewidth=0.8)
        if claim.smallest_effect is not None:
            axes.axvline(factor * claim.smallest_effect, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                "counts from here" if claim.smallest_effect >= 0 else "may lose up to here",
                (factor * claim.smallest_effect, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        # Spread in height, so that seeds of equal effect are all seen.
        heights = [0.62 + 0.2 * (i % 3) / 2 for i in range(len(outcome.effects))]
        axes.scatter([factor * e for e in outcome.effects], heights, s=22, color=colour, alpha=0.75, linewidths=0)
        if outcome.interval is not None:
            axes.plot([factor * end for end in outcome.interval], [0.3, 0.3], color=colour, linewidth=3)
        if outcome.effect is not None:
            axes.plot([factor * outcome.effect], [0.3], marker="D", markersize=7, color=colour)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        unit = "% of the baseline" if claim.relative else claim.unit
        told = (
            f"improvement{f' ({plain(unit)})' if unit else ''}: dots are seeds, the bar is the interval of their mean"
        )
        axes.set_xlabel("\n".join(wrap(told, _LABEL)))
        return inline(drawn, prefix, f"Effect of each seed for {claim.id}")


def save_curves(result: ReproduceResult, folder: Path, *, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write all learning curves to ``curves.png`` and ``curves.svg``, or one of them; nothing when there are none."""
    names = curve_names(result)
    if not names:
        return []
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    in_legend = _LEGEND_COLUMNS * columns
    files = [folder / f"curves.{ending}" for ending in formats]
    with style("#1d2127", "#d5d9e0"):
        drawn = figure(5.2 * columns, 2.9 * rows + _legend_height(len(result.arms), in_legend))
        grid = list(drawn.subplots(rows, columns, squeeze=False).flat)
        for axes, name in zip(grid, names):
            _draw_curve(axes, result, name)
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        _legend(drawn, in_legend)
        drawn.suptitle(plain(f"{result.slug}, {result.scale} scale, {len(result.seeds)} seeds"))
        for file in files:
            options = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 160, "facecolor": "white"}
            drawn.savefig(file, **options)
    return files


def _draw_curve(axes: Any, result: ReproduceResult, name: str) -> None:
    unit = "epoch"
    for position, arm in enumerate(result.arms):
        runs = [run for run in result.runs_of(arm) if name in run.curves]
        if not runs:
            continue
        unit = runs[0].curve_unit
        x, mean, low, high = band([run.curves[name] for run in runs])
        colour = arm_colour(result, arm)
        again = position // len(COLOURS)
        line = _LINES[position] if not again else _LINES_AGAIN[(again - 1) % len(_LINES_AGAIN)]
        axes.plot(x, mean, color=colour, linestyle=line, linewidth=1.8, label=plain(arm))
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_title(plain(name), loc="left")
    axes.set_xlabel(plain(unit))
    axes.grid(axis="y", color=axes.spines["left"].get_edgecolor(), linewidth=0.6)


def _legend_height(arms: int, columns: int) -> float:
    return 0.15 + _LEGEND_ROW * -(-arms // columns)


def _legend(drawn: Any, columns: int) -> None:
    """One for all plots of a figure, below them: among the curves it hides some, and there may be twenty arms."""
    lines = {line.get_label(): line for axes in drawn.axes for line in axes.lines}
    if lines:
        drawn.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
