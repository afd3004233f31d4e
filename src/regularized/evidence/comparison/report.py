"""The report of a comparison: one HTML page that needs no other file, and the result as JSON beside it."""

import json
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from regularized.evidence._html import document, section, table
from regularized.evidence._plots import COLOURS
from regularized.evidence._svg import FAINT, INK, figure, inline, plain, style
from regularized.evidence.comparison.result import Arm, Comparison, duration
from regularized.evidence.report import explained, prepare

__all__ = ["write"]


def write(result: Comparison, directory: Path | str) -> Comparison:
    """Write ``report.html`` and ``comparison.json``.

    Args:
        result: the comparison.
        directory: folder; made when missing.

    Returns:
        The comparison, which now says where its report is.

    Raises:
        ReportError: the folder cannot be written to.
    """
    folder = prepare(directory)
    result = replace(result, report=folder / "report.html")
    with explained(folder):
        for name, text in (("report.html", page(result)), ("comparison.json", _json(result.to_dict()))):
            part = folder / f"{name}.part"
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
            part.replace(folder / name)
    return result


def page(result: Comparison) -> str:
    """The whole page."""
    head, rows = result.table()
    strong = [i for i, arm in enumerate(result.arms) if arm.name == result.recommended]
    parts = [
        f"<h1>What helps on {escape(result.plan.data)}?</h1>\n",
        f'<p class="effect">{escape(result.recommendation)}</p>\n',
        section("Effects", f'<div class="panel">{effects_svg(result)}</div>'),
        section(
            "Every arm",
            f'<div class="scroll">{table(head, rows, numeric=range(1, len(head)), strong=strong)}</div>'
            '<p class="soft">Values are means over the splits, on samples that no choice has seen. The intervals are '
            "those of one arm, for splits that share their samples (Nadeau and Bengio); p is corrected for the number "
            "of candidates (Holm). An exclamation mark: surely worse than the plain network. Cost: time of a step over "
            "a plain one, measured in turns.</p>",
        ),
        section("The code", f"<pre>{escape(result.snippet)}</pre>"),
        section("Settings", f'<div class="scroll">{table(["arm", "what it is", "settings"], _settings(result))}</div>'),
        section("What was done", "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in _told(result)) + "</ul>"),
    ]
    return document(f"Comparison: {result.plan.data}", "".join(parts))


def effects_svg(result: Comparison) -> str:
    """The effect of each arm in each split, with its interval, as inline SVG."""
    arms = [arm for arm in result.arms if arm.judged is not None]
    with style(INK, FAINT):
        drawn = figure(7.0, 0.7 + 0.42 * len(arms))
        axes = drawn.subplots()
        axes.axvline(0.0, color=INK, linewidth=0.8)
        for row, arm in enumerate(reversed(arms)):
            _row(axes, row, arm, COLOURS[1 + (len(arms) - 1 - row) % (len(COLOURS) - 1)])
        axes.set_yticks(range(len(arms)), [plain(arm.name) for arm in reversed(arms)])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        unit = f" ({plain(result.about.unit)})" if result.about.unit else ""
        axes.set_xlabel(f"better than plain in {plain(result.metric)}{unit}: dots are splits, the bar is the interval")
        return inline(drawn, "effects", "Effect of each arm over the plain network")


def _row(axes: Any, row: int, arm: Arm, colour: str) -> None:
    judged = arm.judged
    assert judged is not None
    axes.scatter(judged.effects, [row + 0.16] * len(judged.effects), s=20, color=colour, alpha=0.75, linewidths=0)
    axes.plot(judged.interval, [row - 0.12] * 2, color=colour, linewidth=3)
    axes.plot([judged.effect], [row - 0.12], marker="D", markersize=6, color=colour)


def _settings(result: Comparison) -> list[list[str]]:
    rows = []
    for arm in result.arms:
        own = [f"{name} = {value}" for of in arm.settings["own"].values() for name, value in of.items()]
        common = [f"lr = {arm.settings['lr']}", f"weight decay = {arm.settings['weight_decay']}"]
        rows.append([arm.name, arm.title, ", ".join([*common, *own])])
    return rows


def _told(result: Comparison) -> Iterable[str]:
    yield from result.plan.lines()
    yield "judged on clean test data" if result.clean_test else "judged on a part of the data, with its labels as given"
    yield f"it took {duration(result.seconds)}; {result.reused} trainings were there from earlier calls"
    for arm in result.arms:
        if arm.failed:
            yield f"{arm.name}: {arm.failed} trainings diverged or failed"
        if arm.addition is not None:
            over, added = arm.addition
            yield f"{arm.name}: {result.difference(added.effect)} over {over} alone ({result.interval(added)})"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
