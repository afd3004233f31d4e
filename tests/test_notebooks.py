"""What a notebook shows: histories, claims, results and comparisons as tables; and the gallery, executed."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from regularized.evidence.claims import Claim, Outcome, Verdict
from regularized.evidence.results import ReproduceResult
from regularized.training import Checkpoints, CrossEntropy, TensorData, Trainer

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "gallery").glob("*.ipynb"))

X, Y = torch.randn(16, 3), torch.arange(16) % 2


def trainer(folder):
    return Trainer(
        nn.Linear(3, 2),
        terms={"task": CrossEntropy()},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        evaluate=lambda model: {"accuracy": 0.25},
        checkpoints=Checkpoints(folder),
    )


def test_a_history_is_a_list_and_a_table(tmp_path):
    """Fails when a history is no list any more, or a resumed one is a plain list that a notebook prints as such."""
    trainer(tmp_path).fit(TensorData(X, Y, batch_size=8), epochs=3, max_steps=4)
    history = trainer(tmp_path).fit(TensorData(X, Y, batch_size=8), epochs=3, resume=True)
    assert history == [{"epoch": float(e), "step": 2.0 * e, "accuracy": 0.25} for e in (1, 2, 3)]
    table = history._repr_html_()
    assert table.count("<tr>") == 4
    assert "<th>accuracy</th>" in table


def test_claims_as_a_table():
    """Fails when a statement becomes markup, or the reason of an open claim is left out."""
    claim = Claim("c", "Better <b> at once", "m", "higher", "a", "b", smallest_effect=2.0, unit="points")
    outcome = Outcome(claim, Verdict.OPEN, effect=2.1, interval=(1.0, 3.0))
    table = outcome._repr_html_()
    assert "Better &lt;b&gt; at once" in table
    assert "open: surely neither at least +2 points nor less" in table
    result = ReproduceResult("slug", "m", "laptop", (0,), ("a", "b"), (outcome, outcome), ())
    assert result._repr_html_().count("b over a") == 2


@pytest.fixture(scope="module")
def gallery():
    """What executes the notebooks when the site is built; it lies beside the pages, and is no package."""
    pytest.importorskip("mkdocs", reason='needs the extra "docs"')
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "_site" / "gallery.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_something(gallery, path):
    """Fails when a notebook does not run on the code of today, shows no table, draws nothing, or keeps old outputs."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in stored["cells"]), "strip the outputs: the site makes them"
    text, figures = gallery.as_markdown(gallery.execute(path), path.stem)
    assert text.startswith("# ")
    assert "<table>" in text
    assert figures
    assert all(f"]({name})" in text and "<svg" in svg for name, svg in figures.items())


def test_a_cell_that_fails_fails_the_build(gallery, tmp_path):
    """Fails when a notebook that does not run becomes a page all the same."""
    cells = [{"cell_type": "code", "source": [text]} for text in ("x = 1\nprint(x)\nx + 1", "1 / 0")]
    (tmp_path / "good.ipynb").write_text(json.dumps({"cells": cells[:1]}))
    (tmp_path / "bad.ipynb").write_text(json.dumps({"cells": cells}))
    (cell,) = gallery.execute(tmp_path / "good.ipynb")
    assert (cell.printed, cell.text, cell.html, cell.figures) == ("1\n", "2", "", [])
    with pytest.raises(ZeroDivisionError):
        gallery.execute(tmp_path / "bad.ipynb")
