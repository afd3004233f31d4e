import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from regularized.evidence import _plots, report
from regularized.evidence.claims import Claim


def test_json_has_the_promised_keys_and_is_strict(claim, make_result, make_runs):
    """Fails when a script that relies on the documented keys breaks, or NaN makes the output invalid JSON."""
    runs = make_runs()
    runs[0] = replace(runs[0], metrics={"accuracy": float("nan")})
    data = json.loads(json.dumps(report.to_json(make_result([claim], runs)), allow_nan=False))
    assert list(data)[:7] == ["slug", "scale", "seeds", "claims", "arms", "report", "seconds"]
    assert (data["slug"], data["scale"], data["seeds"], data["report"]) == ("paper", "laptop", 10, None)
    (first,) = data["claims"]
    assert list(first)[:8] == ["id", "statement", "metric", "baseline", "method", "effect", "interval", "verdict"]
    assert data["arms"]["plain"]["accuracy"] == pytest.approx([None, *[70.0 + 0.1 * k for k in range(1, 10)]])


def test_json_holds_what_was_measured(claim, make_result, make_runs):
    """Fails when effect, interval or order of seeds are mixed up on the way out."""
    data = report.to_json(make_result([claim], list(reversed(make_runs()))))
    (first,) = data["claims"]
    assert first["effect"] == pytest.approx(5.0)
    assert first["interval"] == pytest.approx([5.0, 5.0])
    assert first["verdict"] == "holds"
    assert data["arms"]["better"]["accuracy"] == pytest.approx([75.0 + 0.1 * k for k in range(10)])
    single = report.to_json(make_result([claim], seeds=1))["claims"][0]
    assert single["interval"] == [None, None]
    assert single["verdict"] == "open"


def test_table_shows_verdict_failures_and_reuse(claim, make_result):
    """Fails when something that a person must see is left out of the terminal."""
    out = io.StringIO()
    result = make_result([claim], notes=("Mind [this].",))
    report.print_table(result, Console(file=out, width=140, color_system=None))
    text = out.getvalue()
    for shown in (
        "Better is better <at> the end & after.",
        "+5 points",
        "[5, 5]",
        "+2 points",
        "holds",
        "control seed 1 failed: RuntimeError",
        "Mind [this].",
        "3 of 30 runs were made by earlier calls",
        "│ accuracy │ better  │ 75.45 │  75.00 │   75.90 │",
    ):
        assert shown in text, f"{shown!r} is missing in\n{text}"


class Page(HTMLParser):
    """Collects what a page refers to, its ids and whether its tags are balanced."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def written(claim, tmp_path, make_result):
    hostile = replace(
        claim, id="two", metric="validation", statement="<script>alert('x')</script> & \"more\"", relative=True
    )
    result = make_result([claim, hostile], notes=("<img src=x onerror=alert(1)>",))
    return report.write(result, tmp_path / "out", title="A <b>paper</b>"), result


def test_the_page_stands_alone(written):
    """Fails when opening a report makes a request, or a plot is missing because it lies in another file."""
    text = written[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links), page.links
    assert not re.search(r"@import|url\((?!#)", text)
    names = re.findall(r"https?://[^\s\"'<)]+", text)
    assert set(names) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, not addresses"
    assert page.tags.count("svg") == 3, "two effects and one learning curve"
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links)


def test_nothing_measured_or_written_becomes_markup(written):
    """Fails when a statement, an error message or a note can run a script in the reader's browser."""
    page = Page(written[0].read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(page.tags)


def test_the_page_shows_what_a_sceptic_asks_for(written):
    """Fails when per-seed values, the paper's own numbers, settings, tuning or environment are left out."""
    text = written[0].read_text(encoding="utf-8")
    for shown in (
        "holds",
        "70.40",
        "81.88",
        "89.15",
        "table 2",
        "rate = 0.2",
        "points = 8",
        "torch",
        "seed 1001",
        "Seen on digits",
    ):
        assert shown in text, shown
    assert "Not run with the best setting found here: plain" in text


def test_plots_are_saved_and_the_same_each_time(written, tmp_path):
    """Fails when a report has no plot files, their bytes change with the clock, or one is drawn that nobody wants."""
    file, result = written
    assert result.report == file
    assert (file.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (file.parent / "curves.svg").read_bytes()
    again = report.write(result, tmp_path / "again", title="A <b>paper</b>")
    assert (again.parent / "curves.svg").read_bytes() == svg
    assert again.read_text() == file.read_text()
    (tmp_path / "one").mkdir()
    assert _plots.save_curves(result, tmp_path / "one", formats=["svg"]) == list((tmp_path / "one").iterdir())


def test_a_comparison_in_which_everything_failed_is_still_reported(claim, tmp_path, make_result):
    """Fails when the report of a failure fails itself."""
    result = make_result([claim], runs=[], tuning=None)
    text = report.write(result, tmp_path).read_text(encoding="utf-8")
    assert "not run" in text
    assert "RuntimeError: &lt;b&gt;bad" in text
    report.print_table(result, Console(file=io.StringIO()))


def test_odd_names_do_not_break_plots(tmp_path, make_result, make_runs):
    """Fails when an arm or curve named like mathematics or markup stops the report."""
    odd = [
        replace(
            run, arm={"plain": "_x$y^", "better": "<a>", "control": "c"}[run.arm], curves={"a_b$": [(0, 1.0), (1, 2.0)]}
        )
        for run in make_runs()
    ]
    claim = Claim("c", "s", "accuracy", "higher", "_x$y^", "<a>", smallest_effect=1.0)
    text = report.write(make_result([claim], odd, arms=("_x$y^", "<a>", "c")), tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert "&lt;a&gt;" in text


def test_text_that_is_no_text_does_not_cost_the_report(claim, tmp_path, make_result, make_runs):
    """Fails when half a surrogate pair or a control character, from an odd file name, costs the report."""
    odd = "loss \udc80\x00\x1b$ of_x"
    runs = [
        replace(run, metrics={odd: 1.0 + run.seed}, curves={odd: [(0, 1.0)]}, curve_unit=odd, environment={"cpu": odd})
        for run in make_runs()
    ]
    result = make_result([replace(claim, metric=odd, unit=odd)], runs, notes=(odd,))
    file = report.write(result, tmp_path)
    Page(file.read_text(encoding="utf-8"))
    ElementTree.parse(tmp_path / "curves.svg")
    report.print_table(result, Console(file=io.StringIO()))


def test_a_rule_of_tuning_is_escaped(claim, tmp_path, make_result):
    """Fails when what a ledger says of its tuning becomes markup in the reader's browser."""
    result = make_result([claim])
    hostile = "<script>alert(1)</script>"
    result.tuning = replace(result.tuning, direction=hostile, metric=hostile)
    assert "script" not in Page(report.write(result, tmp_path).read_text(encoding="utf-8")).tags


def test_a_unit_that_looks_like_markup_is_shown(claim, make_result):
    """Fails when a unit in brackets stops the table, or is swallowed by it."""
    out = io.StringIO()
    report.print_table(make_result([replace(claim, unit="[/x]")]), Console(file=out, width=160, color_system=None))
    assert "+5 [/x]" in out.getvalue()


def test_where_no_report_can_be_written_is_told(claim, tmp_path, make_result, read_only):
    """Fails when a place that is no folder, a full or a read-only disk leaks a bare OSError."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/null")):
        with pytest.raises(report.ReportError, match=r"cannot write a report to .*--report"):
            report.prepare(place)
        with pytest.raises(report.ReportError):
            report.write(make_result([claim]), place)
    code = "import sys; from regularized.evidence.report import prepare; prepare(sys.argv[1])"
    done = read_only(tmp_path, [sys.executable, "-c", code, str(tmp_path)])
    assert "ReportError: cannot write a report to" in done.stderr
    assert "Read-only" in done.stderr
    assert report.prepare(tmp_path / "new" / "folder") == (tmp_path / "new" / "folder").resolve()
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_grid_of_plots_has_no_empty_frame(tmp_path, make_result, make_runs, claim, count, monkeypatch):
    """Fails when an odd number of curves leaves the axes of a plot that does not exist."""
    shown = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: shown.append([a.axison for a in figure.axes])
    )
    curves = {name: [(0, 1.0), (1, 2.0)] for name in "abc"[:count]}
    _plots.save_curves(make_result([claim], [replace(run, curves=curves) for run in make_runs()]), tmp_path)
    assert all(sum(axes) == count for axes in shown)
    assert shown
