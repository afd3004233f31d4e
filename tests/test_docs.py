"""Docs that run: every Python block of every page is executed, every command that a page names exists."""

import re
from pathlib import Path

import pytest

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
def test_python_block_runs(page, line, code, tmp_path, monkeypatch):
    """Each block stands alone, as a reader would paste it; it runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


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


def test_every_implemented_paper_has_a_page():
    """A technique without a page cannot be used by a practitioner, and a page must show what was measured."""
    from regularized.papers.catalogue import load_catalogue

    for entry in load_catalogue():
        if entry.implemented:
            text = (ROOT / "docs" / "techniques" / f"{entry.slug}.md").read_text(encoding="utf-8")
            for marker in ("evidence", "bench"):
                assert f"{{{{ {marker}:{entry.slug} }}}}" in text
