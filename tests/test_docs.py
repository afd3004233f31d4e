"""Docs that run: every Python block of every page is executed, every command that a page names exists."""

import importlib.util
import json
import logging
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import griffe
import pytest

from regularized.evidence.bench_rows import BenchRow
from regularized.evidence.claims import Attempted, Claim, Outcome, Verdict
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue
from regularized.papers.guide import advise

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("[A-Z]*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str):
    for page in dict.fromkeys(PAGES):
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                line = text[: match.start()].count("\n") + 2
                yield pytest.param(page, line, match["code"], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("page", "line", "code"), list(blocks("python")))
def test_python_block_runs(page, line, code, tmp_path, monkeypatch, capsys):
    """Each block stands alone, as a reader would paste it; it runs in an empty folder.

    The first of a technique's page is what `regularized show` prints: it ends by saying what came of it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})
    text = page.read_text(encoding="utf-8")
    if page.parent.name == "techniques" and text.index("```python\n") == text.index(f"```python\n{code}"):
        assert capsys.readouterr().out.strip(), "the first block prints nothing: add a print(...) of what came of it"


@pytest.mark.parametrize(("page", "line", "code"), list(blocks("bash")))
def test_commands_exist(page, line, code):
    """Fails when a page names a command or a make target that was renamed."""
    import typer

    from regularized.cli.__main__ import app

    known = set(typer.main.get_command(app).commands)
    for command in re.findall(r"^(?:\S*/)?regularized ([a-z-]+)", code, re.MULTILINE):
        assert command in known, f"{page}:{line}: `regularized {command}`"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}:{line}: `make {target}`"


@pytest.mark.parametrize(("page", "line", "code"), [each for each in blocks("bash") if each.values[2].startswith("#!")])
def test_scripts_are_bash(page, line, code):
    """Fails when a script that a page tells to save, such as the one for Slurm, is none; or there is none any more."""
    done = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
    assert not done.returncode, f"{page}:{line}: {done.stderr}"


def test_every_variable_is_documented():
    """Fails when the program reads a variable that no page explains, or a page explains one that nothing reads."""
    named = re.compile(r"\bREGULARIZED_[A-Z_]*[A-Z]\b")
    read = {name for path in (ROOT / "src").rglob("*.py") for name in named.findall(path.read_text(encoding="utf-8"))}
    pages = [ROOT / "docs" / "command_line.md", ROOT / "docs" / "use" / "site.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    short = {f"REGULARIZED_SMTP{name}" for name in re.findall(r"`(_[A-Z]+)`", text)}
    assert read == set(named.findall(text)) | short


def test_docstrings_say_what_is_there(caplog):
    """Fails when a docstring names an argument or a field that does not exist, or is not laid out as griffe reads it.

    griffe is what the API pages are built with, and its warnings fail that build. This takes seconds, a build minutes.
    """

    def read(thing):
        sections = thing.docstring.parsed if thing.docstring else ()
        if thing.is_class and "NamedTuple" in map(str, thing.bases):  # of fields griffe says nothing
            named = {
                field.name for section in sections if section.kind.value == "attributes" for field in section.value
            }
            assert named <= set(thing.members), f"{thing.path} has no {sorted(named - set(thing.members))}"
        return 1 + sum(read(member) for member in thing.members.values() if not member.is_alias)

    with caplog.at_level(logging.WARNING):
        package = griffe.load("regularized", search_paths=[ROOT / "src"], docstring_parser="google")
        assert read(package) > 1000
    assert not caplog.messages, "\n".join(caplog.messages)


def test_every_implemented_paper_has_a_page():
    """A technique without a page cannot be used by a practitioner, and a page must show what was measured."""
    for entry in load_catalogue():
        if entry.implemented:
            text = (ROOT / "docs" / "techniques" / f"{entry.slug}.md").read_text(encoding="utf-8")
            for marker in ("evidence", "bench"):
                assert f"{{{{ {marker}:{entry.slug} }}}}" in text


# -- the table of what is smaller or cheaper ---------------------------------------------------------


@pytest.fixture(scope="module")
def hooks():
    """What mkdocs builds the pages with; it lies beside them, and is no package."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "_site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paper(tmp_path, *, outcomes=(), rows=(), implemented=True, hardware="any machine"):
    (tmp_path / "bench.json").write_text(json.dumps({"rows": [row.to_dict() for row in rows]}), encoding="utf-8")
    card = SimpleNamespace(hardware=hardware)
    return SimpleNamespace(slug="mine", card=card, implemented=implemented, folder=tmp_path, outcomes=outcomes)


def claimed(name, metric, least, effect):
    claim = Claim(name, "s", metric, "higher", "plain", name, smallest_effect=least, differs=("x",), unit="points")
    return Outcome(claim, Verdict.HOLDS, effect=effect, interval=(effect - 1, effect + 1))


def test_what_is_cheaper_in_columns(hooks, tmp_path, monkeypatch):
    """Fails when a figure is put into the wrong column, or other claims stand beside the one of what it costs."""
    rows = [
        BenchRow("mine", "LM", 1.0, 1.2, 1.2, (1.1, 1.3), None, 0.7, 10, size_bytes=(2e6, 5e5)),
        BenchRow("mine", "inference, 1 image", 1.0, 0.4, 0.4, (0.3, 0.5), None, 0.9, 10),
    ]
    outcomes = [
        claimed("close", "test_accuracy", -2.0, -0.5),
        claimed("better", "test_accuracy", 1.0, 3.0),
        claimed("short", "file_bits", 0.5, 0.6),
        claimed("other", "largest_residual", 0.5, 0.8),
    ]
    papers = [paper(tmp_path, outcomes=outcomes, rows=rows, hardware=hardware) for hardware in ("any machine", "")]
    monkeypatch.setattr(hooks, "load_catalogue", lambda: papers)
    lines = hooks._cheaper("../").splitlines()
    assert len(lines) == 3  # one without hardware saves nothing
    size, quality, step, inference, hardware = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert size.startswith("0.25 x, 2.00 MB to 500.0 kB: LM<br>`short` over `plain`: +0.6 points")
    assert size.endswith("peak of a step 0.70 x: LM")
    assert quality.startswith("`close` over `plain`: -0.5 points ([-1.5, 0.5])")
    assert "<br>" not in quality
    assert (step, inference, hardware) == ("1.20 x: LM", "0.40 x: inference, 1 image", "any machine")


def test_what_is_cheaper_and_not_measured(hooks, tmp_path, monkeypatch):
    """Fails when what nobody has measured is left empty, or a paper without code is said to run."""
    nothing = [paper(tmp_path), paper(tmp_path, implemented=False)]
    monkeypatch.setattr(hooks, "load_catalogue", lambda: nothing)
    runs, card = hooks._cheaper("../").splitlines()[2:]
    assert runs.count("not measured") == 4
    assert "card only" in card


def test_a_strangers_words_are_no_markup(hooks):
    """Fails when who sent an attempt can write into a page, or attempts at a contested claim are left out."""
    claim = Claim("c", "s", "m", "higher", "a", "b", smallest_effect=1.0)
    stranger = {"by": "<b>| [x](y) {{ guide }}", "where": "`here`", "apart": "old"}
    said = (
        Attempted("shipped", Verdict.HOLDS, 2.0, (1.5, 2.5), (0, 1)),
        Attempted("x-1", Verdict.NO_EFFECT, 0.1, (-1.0, 0.5), (100, 101), **stranger),
    )
    table = hooks._attempts([Outcome(claim, Verdict.CONTESTED, attempts=said)])
    row = table.splitlines()[-1]
    assert row.count("|") == 9
    assert not set("<[]{}()") & set(row.replace("[-1, 0.5]", ""))
    assert "does not count: old" in row
    assert "100 to 101" in row
    assert hooks._attempts([Outcome(claim, Verdict.HOLDS, attempts=said[:1])]) == ""


def test_the_guide_names_every_technique_in_the_order_of_its_evidence(hooks):
    """Fails when a technique is left out of a problem that its card names, or one without evidence is first."""
    sections = re.split(r"^## ", hooks._guide("../"), flags=re.MULTILINE)[1:]
    families = {words[0].upper() + words[1:]: family for family, words in FAMILIES.items()}
    catalogue = load_catalogue()
    for section in sections:
        family = families[section.splitlines()[0]]
        wanted = [entry for entry in catalogue if entry.implemented and family in entry.card.families]
        rows = [line.split(" | ") for line in section.splitlines() if re.match(r"\| (?:\d+|–) \|", line)]
        assert sorted(re.search(r"techniques/(\w+)\.md", row[1])[1] for row in rows) == sorted(e.slug for e in wanted)
        ranks = [row[0].removeprefix("| ") for row in rows]
        assert ranks == [*map(str, range(1, len(ranks) - ranks.count("–") + 1)), *["–"] * ranks.count("–")]
        assert all("**holds**" in row[3] for row, rank in zip(rows, ranks) if rank != "–")


def test_advice_on_a_technique_that_kept_no_promise():
    """Fails when a technique of which nothing holds is recommended, or the claim that failed is not shown."""
    held, failed = claimed("one", "m", 1.0, 3.0), replace(claimed("two", "m", 1.0, 0.1), verdict=Verdict.OPPOSITE)
    mixed = SimpleNamespace(slug="mixed", implemented=True, outcomes=(failed, held), folder=Path("/nowhere"))
    worse = SimpleNamespace(slug="worse", implemented=True, outcomes=(failed,), folder=Path("/nowhere"))
    for paper in (mixed, worse):
        paper.card = SimpleNamespace(families=["overfitting"])
    first, last = advise("overfitting", [worse, mixed])
    assert (first.entry, first.rank, first.kept, first.broken, first.cost) == (mixed, 1, held, failed, None)
    assert (last.entry, last.rank, last.kept, last.broken) == (worse, None, None, failed)


def test_the_contract_says_who_can_enter_a_comparison(hooks):
    """Fails when a paper can neither be compared nor says why, or pairs that exclude each other are left out."""
    page = hooks._contract("../")
    table = page.partition("## Who takes part in comparisons")[2]
    for entry in load_catalogue():
        if entry.implemented:
            (row,) = [line for line in table.splitlines() if line.startswith(f"| [{entry.slug}](")]
            assert "enters as `" in row or "cannot: " in row
    assert "each takes the place of the task's loss" in table
    assert "`label_smoothing` + `mixup`" in table


def test_integrations_are_those_of_the_contract(hooks):
    """Fails when a paper is left out, or a technique that refuses shards passes for one that trains with them."""
    page = hooks._integrations("../")
    for entry in load_catalogue():
        if entry.implemented:
            assert f"[{entry.slug}](../techniques/{entry.slug}.md)" in page, entry.slug
    table, _, why = page.partition("## Why not")
    column = table.splitlines()[0].split(" | ").index("FSDP2")
    cells = {line.split("[")[1].split("]")[0]: line.split(" | ") for line in table.splitlines() if "| [" in line[:4]}
    lists = re.findall(r"^\| FSDP2 \| refused: .* \| (.*) \|$", why, re.MULTILINE)
    refused = {slug for slugs in lists for slug in slugs.split(", ")}
    passed = {slug for slug, row in cells.items() if row[column].isdigit()}
    assert passed
    assert passed.isdisjoint(refused)
    assert {slug for slug, row in cells.items() if row[column] == "–"} <= refused


def test_every_paper_of_compression_is_in_the_table(hooks):
    """Fails when a technique for smaller models lands without saying on which hardware it saves anything."""
    table = hooks._cheaper("../")
    for entry in load_catalogue():
        if "compression" in entry.card.families:
            assert f"[{entry.slug}](" in table, entry.slug
