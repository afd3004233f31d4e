"""Notebooks of ``gallery/`` as pages: each is executed when the site is built, and shown with what came out.

They lie in the repository without outputs, so that none is of yesterday's code. What a cell prints, what its last line
is (as a table, where it has one for notebooks) and what it draws stands below it. No package of Jupyter is needed.
"""

import ast
import contextlib
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[1] / "gallery"


@dataclass
class Cell:
    """A cell and what came of it.

    Args:
        kind: ``"markdown"`` or ``"code"``.
        source: its text.
        printed: what it printed.
        html: what its last line is, as HTML.
        text: the same as text, where it has no HTML.
        figures: what it drew, as SVG.
    """

    kind: str
    source: str
    printed: str = ""
    html: str = ""
    text: str = ""
    figures: list[str] = field(default_factory=list)


def execute(path: Path) -> list[Cell]:
    """Run a notebook from its first cell to its last, in an empty folder.

    Args:
        path: the notebook.
    """
    cells = [Cell(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, cell in enumerate(cells):
                if cell.kind == "code":
                    _run(cell, names, f"{path.name}, cell {number}")
        finally:
            os.chdir(before)
    return cells


def _run(cell: Cell, names: dict[str, Any], where: str) -> None:
    tree = ast.parse(cell.source, filename=where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, where, "exec"), names)
        value = eval(compile(ast.Expression(last.value), where, "eval"), names) if last is not None else None
    cell.printed = out.getvalue()
    if value is not None and not cell.source.rstrip().endswith(";"):
        as_html = getattr(value, "_repr_html_", None)
        cell.html = as_html() if callable(as_html) else ""
        cell.text = "" if cell.html else repr(value)
    cell.figures = _figures()


def _figures() -> list[str]:
    """What was drawn, as SVG; closed afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for number in plt.get_fignums():
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "gallery"}):
            plt.figure(number).savefig(buffer, format="svg", metadata={"Date": None})
        drawn.append(buffer.getvalue())
    plt.close("all")
    return drawn


def as_markdown(cells: list[Cell], name: str) -> tuple[str, dict[str, str]]:
    """A notebook as a page, and its figures by their names.

    Args:
        cells: executed.
        name: of the notebook.
    """
    parts, figures = [], {}
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if printed := (cell.printed + cell.text).rstrip():
            parts.append(f"```text\n{printed}\n```")
        if cell.html:
            parts.append(re.sub(r"\n\s*\n", "\n", cell.html))
        for svg in cell.figures:
            file = f"{name}-{len(figures)}.svg"
            figures[file] = svg
            parts.append(f"![What the cell above draws]({file})")
    parts.append(f"*[The notebook]({name}.ipynb), executed when this page was built.*")
    return "\n\n".join(parts) + "\n", figures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and one that lists them."""
    listed = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = execute(path)
        text, figures = as_markdown(cells, path.stem)
        files.append(File.generated(config, f"gallery/{path.stem}.md", content=text))
        for name, svg in figures.items():
            files.append(File.generated(config, f"gallery/{name}", content=svg))
        title, _, rest = cells[0].source.partition("\n")
        listed.append(f"- [{title.removeprefix('# ')}]({path.stem}.md). {' '.join(rest.split())}")
    files.append(
        File.generated(config, "gallery/index.md", content="# Gallery of notebooks\n\n" + "\n".join(listed) + "\n")
    )
    return files
