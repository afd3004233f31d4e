"""The house: imports go downward only, parts need torch alone, and nothing is said twice."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

import regularized
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue, public_names

PACKAGE = Path(regularized.__file__).parent
ROOT = PACKAGE.parents[1]
STOREYS = {
    "mechanisms": 0,
    "training": 1,
    **dict.fromkeys(FAMILIES, 2),
    "evidence": 3,
    "papers": 4,
    "cli": 5,
    "site": 5,
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
# The roof: only the package itself, which passes names of all storeys on when they are asked for.
ROOF = {PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "_version.py"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Read(NamedTuple):
    """What the rules ask of a file, read once.

    Attributes:
        imports: dotted names that it imports, wherever in it; relative ones resolved.
        top: first parts of the names that it imports when it is loaded.
        words: of its names and strings; docstrings and comments may give examples.
    """

    imports: tuple[str, ...]
    top: frozenset[str]
    words: frozenset[str]


@cache
def read(path: Path) -> Read:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    imported = tuple(_imports(path, nodes)) if path.is_relative_to(PACKAGE) else ()
    top = {name.split(".")[0] for node in tree.body for name in _named(node)}
    return Read(imported, frozenset(top), frozenset(_words(nodes)))


def imports(path: Path) -> tuple[str, ...]:
    return read(path).imports


def _imports(path: Path, nodes: Iterable[ast.AST]) -> Iterator[str]:
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            yield target
            yield from (f"{target}.{alias.name}" for alias in node.names)


def _named(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _words(nodes: Iterable[ast.AST]) -> Iterator[str]:
    docstrings = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\w+", node.value)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from re.findall(r"\w+", node.module)
        elif isinstance(node, ast.alias | ast.FunctionDef | ast.ClassDef):
            yield from re.findall(r"\w+", node.name)


def storey(module: str) -> int | None:
    parts = module.split(".")
    return STOREYS.get(parts[1]) if parts[0] == "regularized" and len(parts) > 1 else None


def test_every_folder_has_a_storey():
    """Fails when a folder is added that the order of the house does not know."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(STOREYS)


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in ROOF], ids=module_of)
def test_imports_go_downward(path):
    """Fails when a storey imports one above it, inside a function or for types only as well."""
    own = storey(module_of(path))
    assert own is not None
    upward = {name for name in imports(path) if (storey(name) or 0) > own}
    assert not upward, f"{module_of(path)} imports {sorted(upward)}"


def folder_of_paper(module: str) -> str | None:
    """``regularized.<problem>.<slug>`` for a module inside a paper's folder."""
    parts = module.split(".")
    inside = len(parts) >= 3 and parts[1] in FAMILIES and PACKAGE.joinpath(*parts[1:3]).is_dir()
    return ".".join(parts[:3]) if inside else None


def test_a_paper_imports_no_other_paper():
    """Fails when a paper's folder reaches into another's, or a problem's shared file into any paper's.

    What two papers need belongs into ``mechanisms/`` or flat into the problem's folder.
    """
    reaching = set()
    for path in SOURCES:
        module = module_of(path)
        if storey(module) == STOREYS[next(iter(FAMILIES))]:
            own = folder_of_paper(module)
            others = {folder_of_paper(name) for name in imports(path)} - {None, own}
            reaching |= {(module, other) for other in others}
    assert not reaching, sorted(reaching)


def test_the_rule_knows_the_papers_folders():
    """Fails when the rule above looks for folders where there are none, and so can never fail."""
    assert folder_of_paper("regularized.fine_tuning.sorsa.peft") == "regularized.fine_tuning.sorsa"
    assert folder_of_paper("regularized.fine_tuning.peft_host") is None
    assert sum(path.name == "__init__.py" and folder_of_paper(module_of(path)) is not None for path in SOURCES) >= 10


def test_no_module_imports_one_that_imports_it():
    """Fails when two modules need each other, however late: neither can then be read, or moved, without the other."""
    modules = {module_of(path): path for path in SOURCES if path not in ROOF}
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for module, path in modules.items():
        # `from package import module` also names the package, which imports its modules to pass their names on.
        named = {name for name in imports(path) if name in modules and not module.startswith(f"{name}.")}
        below = {name for name in named if not any(other.startswith(f"{name}.") for other in named)}
        sorter.add(module, *below)
    sorter.prepare()


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if (storey(module_of(path)) or 0) in (0, 2) and path not in ROOF], ids=module_of
)
def test_techniques_import_torch_alone(path):
    """Fails when a technique or a mechanism imports numpy, accelerate, or anything else than torch."""
    allowed = {*sys.stdlib_module_names, "torch", "regularized"}
    others = {name.split(".")[0] for name in imports(path)} - allowed
    # An extra may be imported where it is used, never when the module is loaded.
    top = read(path).top
    assert not others & top, f"{module_of(path)} imports {sorted(others & top)}"
    assert not others & {"numpy", "scipy", "sklearn", "accelerate", "rich", "matplotlib"}


def test_techniques_load_with_torch_alone():
    """Fails when a technique cannot be imported where only torch is installed.

    What a card names in its own folder stands on the evidence and is no technique.
    """
    # numpy: torch loads it itself wherever it is, and a procedure's loop saves the state of its random numbers.
    needed = {"torch", "numpy"}
    above = STOREYS["evidence"]
    blocked = sorted({_import_name(name) for name in _requirements()} - needed)
    assert {"accelerate", "rich", "typer", "sklearn", "matplotlib", "transformers"} <= set(blocked)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import importlib
for module, name in {sorted((m, name) for name, m in public_names().items() if (storey(m) or 0) < above)!r}:
    getattr(importlib.import_module(module), name)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _requirements() -> set[str]:
    requirements = metadata.requires("regularized") or []
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements} - {"regularized"}


def _import_name(distribution: str) -> str:
    return {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}.get(distribution, distribution.replace("-", "_"))


def test_importing_the_package_loads_nothing():
    """Fails when `import regularized` loads anything that is not of the standard library."""
    code = (
        "import sys; before = set(sys.modules); import regularized; regularized.__version__\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["regularized"], done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in regularized.__all__ if name != "__version__"])
def test_names_of_the_package_exist(name):
    """Fails when a lazy name at the top leads nowhere."""
    assert getattr(regularized, name).__name__ == name


# -- nothing twice ------------------------------------------------------------------------------

# Expected answers of the search are the slugs themselves; what arms of some papers do is one test's subject.
MAY_NAME_PAPERS = {ROOT / "tests" / "papers" / name for name in ("test_search.py", "test_image_experiments.py")}


@pytest.fixture(scope="module")
def words() -> dict[Path, frozenset[str]]:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    return {path: read(path).words for path in files if path not in MAY_NAME_PAPERS}


# A slug that is an ordinary word occurs everywhere.
TELLING = [entry for entry in load_catalogue() if entry.implemented and "_" in entry.slug]


@pytest.mark.parametrize("entry", TELLING, ids=lambda entry: entry.slug)
def test_a_paper_is_named_in_its_own_files_alone(entry, words):
    """Fails when adding a paper meant editing a list somewhere: only its module, folder and tests may name it."""
    modules = {name.rpartition(".")[0] for name in entry.card.implementation.names}
    bases = {PACKAGE.parent.joinpath(*module.split(".")) for module in modules}
    own = {base.with_suffix(".py") for base in bases}
    folders = {entry.folder, *(base for base in bases if base.name == entry.slug)}
    own_tests = tuple(f"test_{stem}" for stem in (entry.slug, *(path.stem for path in own)))
    naming = {
        path
        for path, said in words.items()
        if entry.slug in said
        and path not in own
        and not folders & set(path.parents)
        and path.parent.name != entry.slug
        and not path.stem.startswith(own_tests)
    }
    assert not naming, sorted(str(path.relative_to(ROOT)) for path in naming)
