"""The HTML report of a comparison: one page, nothing outside it, everything escaped."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from regularized.evidence import pictures, sounds
from regularized.evidence._plots import arm_colour, curve_names, curve_svg, effect_svg
from regularized.evidence.attachments import Attachment, as_text
from regularized.evidence.claims import BADGES, Outcome, Verdict, counts_text, effect_text, interval_text
from regularized.evidence.numbers import aligned, number
from regularized.evidence.results import ReproduceResult, TuningResult

__all__ = ["document", "page", "section", "table"]

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1d2127; --soft: #59616d; --line: #d5d9e0;
  --good: #0b6b3a; --good-bg: #dcf3e5; --bad: #a32012; --bad-bg: #fbe3df; --open: #7a5200; --open-bg: #fbeecb; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181d; --panel: #1e2228; --ink: #e7eaee; --soft: #a2abb8; --line: #3a414c;
  --good: #7fdca6; --good-bg: #12351f; --bad: #ff9d8f; --bad-bg: #43170f; --open: #f2cb6c; --open-bg: #3b2d08; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; line-height: 1.4; font-weight: 600; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem; margin:
0 0 1rem; } .claim { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.25rem; align-items:
start; } .figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.figures .panel { margin: 0; padding: .8rem; }
@media (max-width: 46rem) { .claim { grid-template-columns: minmax(0, 1fr); } }
svg { display: block; width: 100%; height: auto; }
figure { margin: 0 0 1rem; } figure img { display: block; width: 100%; image-rendering: pixelated; }
.badge { display: inline-block; border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; font-weight: 600;
white-space: nowrap; } .holds { color: var(--good); background: var(--good-bg); } .smaller { color: var(--ink);
background: var(--open-bg); } .fails { color: var(--bad);
background: var(--bad-bg); } .contested { color: var(--bad); border: 1px dashed var(--bad); }
.open { color: var(--open); background: var(--open-bg); } .none { color: var(--soft);
border: 1px solid var(--line); } .effect { font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums;
margin: .5rem 0 0; } .arm { white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.best td { font-weight: 650; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .88em; }
pre { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .45rem; }
.note { border-left: 3px solid var(--open); padding-left: .8rem; }
"""


def page(result: ReproduceResult, *, title: str) -> str:
    """The whole page."""
    parts = [
        _head(result, title),
        *(f'<p class="note">{escape(note)}</p>' for note in result.notes),
        section("Claims", "".join(_claim(result, outcome, i) for i, outcome in enumerate(result.outcomes))),
        section("Learning curves", _curves(result)),
        section("Pictures", _figures(pictures.of(result), result.seeds[0], _image)),
        section("Sounds", _figures(sounds.of(result), result.seeds[0], _audio)),
        section("Every value", _values(result)),
        section("Settings", _settings(result)),
        section("How the settings were chosen", _tuning(result, result.tuning) if result.tuning else ""),
        section("Runs that failed", "".join(_failures(result))),
        section("Where and with what", _environment(result)),
    ]
    return document(f"{title}: {result.scale} scale", "".join(parts))


def document(title: str, body: str) -> str:
    """A page of its own around HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _figures(attachments: Sequence[Attachment], seed: int, element: Callable[[str, str], str]) -> str:
    """Attachments of the first seed, in the page itself; an element is made of a file in base64 and a label."""
    shown = []
    for one in attachments:
        label = escape(f"{one.arm}: {one.name.replace('_', ' ')}, seed {seed}")
        shown.append(
            f"<figure>{element(as_text(one.path.read_bytes()), label)}<figcaption>{label}</figcaption></figure>"
        )
    return "".join(shown)


def _image(data: str, label: str) -> str:
    return f'<img src="data:image/png;base64,{data}" alt="{label}">'


def _audio(data: str, _label: str) -> str:
    return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def _head(result: ReproduceResult, title: str) -> str:
    command = f"regularized reproduce {result.slug} --scale {result.scale} --seeds {len(result.seeds)}"
    command += f" --first {result.seeds[0]}" if result.own_block else ""
    dates = sorted(run.created[:10] for run in result.runs)
    when = f", {dates[0]}" if dates else ""
    if dates and dates[-1] != dates[0]:
        when += f" to {dates[-1]}"
    badges = " ".join(_badge(outcome.verdict) for outcome in result.outcomes)
    return (
        f"<h1>{escape(title)}</h1>\n<p>{badges}</p>\n"
        f'<p class="soft">{escape(result.scale)} scale, {len(result.arms)} arms × {len(result.seeds)} seeds'
        f"{escape(when)}. Make it yourself: <code>{escape(command)}</code></p>\n"
    )


def _claim(result: ReproduceResult, outcome: Outcome, position: int) -> str:
    claim = outcome.claim
    lines = [f"<h3>{escape(claim.statement)}</h3>", f"<p>{_badge(outcome.verdict)}</p>"]
    lines.append(f'<p class="effect">{escape(effect_text(claim, outcome.effect))}</p>')
    if outcome.interval is not None:
        lines.append(f"<p>95 % interval {escape(interval_text(claim, outcome))} over {len(outcome.effects)} seeds</p>")
    better = "higher" if claim.direction == "higher" else "lower"
    lines.append(
        f'<p class="soft">{escape(claim.metric)} ({better} is better) of {_arm(result, claim.method)} over '
        f"{_arm(result, claim.baseline)}; {escape(counts_text(claim))}.</p>"
    )
    if outcome.problem:
        lines.append(f'<p class="note">{escape(outcome.problem)}</p>')
    if claim.note:
        lines.append(f'<p class="soft">{escape(claim.note)}</p>')
    plot = effect_svg(result, outcome, prefix=f"effect{position}") if outcome.effects else ""
    others = _attempts(outcome) if len(outcome.attempts) > 1 else ""
    return (
        f'<div class="panel"><div class="claim"><div>{"".join(lines)}</div><div>{plot}</div></div>'
        f"{others}{_reported(result, outcome)}</div>\n"
    )


def _attempts(outcome: Outcome) -> str:
    """What each attempt to measure a claim says."""
    rows = [
        [
            one.name,
            ", ".join(filter(None, [one.by, one.where, one.when])),
            f"{one.seeds[0]} to {one.seeds[-1]}" if one.seeds else "–",
            effect_text(outcome.claim, one.effect),
            interval_text(outcome.claim, one),
            one.verdict.value,
            "; ".join(filter(None, [one.beside, one.apart])),
        ]
        for one in outcome.attempts
    ]
    heading = ["attempt", "who, where, when", "seeds", "effect", "95 % interval", "verdict", "beside the shipped runs"]
    return f'<div class="scroll">{table(heading, rows, numeric=(3, 4))}</div>'


def _reported(result: ReproduceResult, outcome: Outcome) -> str:
    """The paper's own numbers, with ours in the first line."""
    claim = outcome.claim
    if not claim.reported:
        return ""
    ours = [
        f"here, {result.scale} scale",
        *(number(_mean(result.values(arm, claim.metric))) for arm in (claim.baseline, claim.method)),
        f"mean of {len(outcome.seeds)} seeds",
    ]
    rows = [ours] + [[r.setting, number(r.baseline), number(r.method), r.source] for r in claim.reported]
    heading = ["setting", f"baseline ({claim.baseline})", f"method ({claim.method})", "source"]
    return f'<div class="scroll">{table(heading, rows, numeric=(1, 2))}</div>'


def _curves(result: ReproduceResult) -> str:
    figures = [
        f'<div class="panel">{curve_svg(result, name, prefix=f"curve{i}")}</div>'
        for i, name in enumerate(curve_names(result))
    ]
    if not figures:
        return ""
    band = "the band its 95 % interval at each point" if len(result.seeds) > 1 else "one seed has no band"
    return f'<p class="soft">The line is the mean over seeds, {band}.</p><div class="figures">{"".join(figures)}</div>'


def _values(result: ReproduceResult) -> str:
    if not result.runs:
        return ""
    rows: list[list[str]] = []
    for metric in result.metrics:
        measured = {arm: result.values(arm, metric) for arm in result.arms}
        show = aligned([value for values in measured.values() for value in values])
        rows.extend(
            [metric, arm, show(_mean(values)), *(show(value) for value in values)]
            for arm, values in measured.items()
            if any(value is not None for value in values)
        )
    heading = ["metric", "arm", "mean", *(f"seed {seed}" for seed in result.seeds)]
    cost = [
        [arm, number(_mean([run.seconds for run in runs])), number(_mean([run.peak_memory / 2**20 for run in runs]))]
        for arm in result.arms
        if (runs := result.runs_of(arm))
    ]
    cost_heading = ["cost of a run", "seconds", "peak memory of the process (MiB)"]
    return (
        f'<div class="scroll">{table(heading, rows, numeric=range(2, len(heading)), dots=(result, 1))}</div>'
        '<div class="scroll" style="margin-top:1.25rem">'
        f"{table(cost_heading, cost, numeric=(1, 2), dots=(result, 0))}</div>"
    )


def _settings(result: ReproduceResult) -> str:
    if not result.runs:
        return ""
    used = {arm: runs[0].settings for arm in result.arms if (runs := result.runs_of(arm))}
    shared = {
        name: value
        for name, value in result.runs[0].settings.items()
        if all(name in settings and settings[name] == value for settings in used.values())
    }
    text = f"<p>All arms: <code>{escape(_compact(shared))}</code></p>"
    rows = [
        [arm, _compact({name: value for name, value in settings.items() if name not in shared})]
        for arm, settings in used.items()
    ]
    return f'{text}<div class="scroll">{table(["arm", "settings"], rows, code=(1,), dots=(result, 0))}</div>'


def _tuning(result: ReproduceResult, tuning: TuningResult) -> str:
    show = aligned([value for trial in tuning.trials for value in trial.values])
    rows = [
        [
            trial.arm,
            _compact(trial.overrides),
            show(trial.mean),
            *(show(value) for value in trial.values),
            "best" if trial.best else "",
        ]
        for trial in tuning.trials
    ]
    heading = ["arm", "setting", f"mean {tuning.metric}", *(f"seed {seed}" for seed in tuning.seeds), ""]
    numeric = range(2, 3 + len(tuning.seeds))
    best = {i for i, trial in enumerate(tuning.trials) if trial.best}
    off = [arm for arm, same in tuning.agrees.items() if not same]
    note = f'<p class="note">Not run with the best setting found here: {escape(", ".join(off))}.</p>' if off else ""
    return (
        f'<p class="soft">The same number of trials for each arm, chosen by {escape(tuning.metric)} '
        f"({escape(tuning.direction)} is better), with seeds that are no evidence.</p>{note}"
        f'<div class="scroll">{table(heading, rows, numeric=numeric, code=(1,), strong=best, dots=(result, 0))}</div>'
    )


def _failures(result: ReproduceResult) -> Iterable[str]:
    for failure in result.failures:
        run = escape(f"{failure.arm} seed {failure.seed}: {failure.error}")
        yield (f"<details><summary>{run}</summary><pre>{escape(failure.traceback)}</pre></details>")


def _environment(result: ReproduceResult) -> str:
    data = ", ".join(dict.fromkeys(f"seed {run.seed}: {run.data}" for run in result.runs if run.data))
    if len({run.data for run in result.runs}) == 1:
        data = f"{result.runs[0].data}, the same for all runs"
    about: dict[str, Any] = {
        "experiment": result.module_name,
        "code key": result.code_key,
        "data": data,
        **result.environment,
        "runs from earlier calls": f"{result.reused} of {len(result.runs)}",
        "seconds of this call": number(result.seconds),
    }
    machines = {
        _compact({k: v for k, v in run.environment.items() if k not in ("commit", "dirty")}) for run in result.runs
    }
    if len(machines) > 1:
        about["note"] = f"the runs come from {len(machines)} environments; this is the first"
    rows = [[name, str(value)] for name, value in about.items() if value not in ("", None)]
    return f'<div class="scroll">{table(["", ""], rows, code=(1,))}</div>'


def section(title: str, body: str) -> str:
    """A part of a page; nothing where it is empty."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _badge(verdict: Verdict) -> str:
    return f'<span class="badge {BADGES[verdict]}">{escape(verdict.value)}</span>'


def _arm(result: ReproduceResult, arm: str) -> str:
    return f'<span class="arm">{_dot(result, arm)}<strong>{escape(arm)}</strong></span>'


def _dot(result: ReproduceResult, arm: str) -> str:
    return f'<span class="dot" style="background:{arm_colour(result, arm)}"></span>' if arm in result.arms else ""


def table(
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numeric: Iterable[int] = (),
    code: Iterable[int] = (),
    strong: Iterable[int] = (),
    dots: tuple[ReproduceResult, int] | None = None,
) -> str:
    """A table of plain text cells; ``dots`` puts an arm's colour before the names in that column."""
    right, mono, best = set(numeric), set(code), set(strong)

    def cell(column: int, text: str) -> str:
        inner = f"<code>{escape(text)}</code>" if column in mono else escape(text)
        if dots is not None and column == dots[1]:
            inner = _dot(dots[0], text) + inner
        return f"<td{_class('n', column in right)}>{inner}</td>"

    head = "".join(f"<th{_class('n', i in right)}>{escape(text)}</th>" for i, text in enumerate(heading))
    body = "".join(
        f"<tr{_class('best', i in best)}>{''.join(cell(j, text) for j, text in enumerate(row))}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if any(heading) else ''}<tbody>{body}</tbody></table>"


def _compact(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in settings.items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _class(name: str, wanted: bool) -> str:
    return f' class="{name}"' if wanted else ""
