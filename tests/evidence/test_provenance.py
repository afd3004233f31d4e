import subprocess
import textwrap

import pytest

from regularized.evidence import provenance
from regularized.evidence.provenance import checkout_state, closure, code_key

EXPERIMENT = '''
"""Docstring."""
from typing import TYPE_CHECKING

from regularized.family import Technique
from regularized.loop import Trainer

if TYPE_CHECKING:
    from regularized.neighbour import Hint


def run(arm):
    """What it does."""
    from regularized import tools  # late

    return Technique(0.5), Trainer, tools
'''
DEEP = """
from importlib import import_module

from regularized.neighbour import Hint

SIZE, REGISTRY = 3, {}
REGISTRY["a"] = 1


def unused(): return Hint


def helper(): return import_module("regularized.deeper"), inner()


def inner(): return SIZE
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of ours, and an experiment that uses it."""
    files = {
        "__init__.py": "",
        "family/__init__.py": "from regularized.family.technique import Technique\nfrom .other import Other",
        "family/technique.py": "from ..deep import helper\nclass Technique:\n    rate = 1.0\n    use = helper\n",
        "family/other.py": "class Other: ...",
        "loop/__init__.py": "_LAZY = {'Trainer': 'regularized.loop.trainer', 'Data': 'regularized.loop.data'}",
        "loop/trainer.py": "class Trainer: ...\nclass Unused: ...",
        "loop/data.py": "class Data: ...",
        "deep.py": DEEP,
        "deeper.py": "from regularized.deep import inner\nRATE = 1\n",
        "tools.py": "",
        "neighbour.py": "class Hint: ...",
        "papers/x/experiment.py": EXPERIMENT,
    }
    root = tmp_path / "src" / "regularized"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(provenance, "_PACKAGE", root)
    return root


NAME = "regularized.papers.x.experiment"


def test_closure_follows_imports_and_looks_through_inits(package):
    """Fails when a neighbour in the same family makes evidence stale, or a late, lazy or relative import is missed."""
    assert set(closure(NAME)) == {
        NAME,
        "regularized.family.technique",
        "regularized.deep",
        "regularized.deeper",
        "regularized.loop.trainer",
        "regularized.tools",
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("papers/x/experiment.py", "0.5", "0.25"),
        ("papers/x/experiment.py", "Technique(0.5), Trainer", "Trainer, Technique(0.5)"),
        ("family/technique.py", "1.0", "1"),
        ("deeper.py", "RATE = 1", "RATE = 2"),
        ("deep.py", "return SIZE", "return 2 * SIZE"),
        ("deep.py", "SIZE, REGISTRY = 3", "SIZE, REGISTRY = 4"),
        ("deep.py", '["a"] = 1', '["a"] = 2'),
        ("deep.py", "from importlib", "from other"),
        ("tools.py", "", "FLAG = True"),
    ],
)
def test_key_changes_with_the_code(package, file, old, new):
    """Fails when old runs would be reused for other code: that is a wrong result shown as evidence."""
    before = code_key(NAME)
    text = (package / file).read_text()
    (package / file).write_text(text.replace(old, new) if old else new)
    assert code_key(NAME) != before


def test_key_ignores_words_layout_and_code_beside(package):
    """Fails when a better docstring, or one more model in a shared file, throws hours of runs away."""
    before = code_key(NAME)
    text = EXPERIMENT.replace("Docstring.", "Other words.").replace("What it does", "More").replace("# late", "# later")
    (package / "papers/x/experiment.py").write_text("# new comment\n" + text.replace("(0.5)", "(\n        0.5\n    )"))
    (package / "family/other.py").write_text("class Other: changed = True")
    (package / "loop/trainer.py").write_text("class Unused: changed = True\nclass New: ...\nclass Trainer: ...")
    (package / "deep.py").write_text(DEEP.replace("return Hint", "return None"))
    (package / "neighbour.py").write_text("class Hint: changed = True")
    assert code_key(NAME) == before


@pytest.mark.parametrize(
    ("plain", "typed"),
    [
        ("def f(x): return x", "def f(x: int) -> 'Step': return x"),
        ("class C:\n def __init__(self): self.x = 1", "class C:\n def __init__(self) -> None: self.x: Step = 1"),
        ("def f(*a, **k):\n y = 1\n return y", "def f(*a: int, **k: str):\n y: int = 1\n return y"),
    ],
)
def test_key_ignores_types_in_functions(plain, typed):
    """Fails when writing down the type of an attribute throws hours of runs away."""
    one, other = (
        list(provenance._tokens(provenance._Untyped().visit(provenance.ast.parse(text)))) for text in (plain, typed)
    )
    assert one == other


def test_fields_of_classes_are_no_mere_types():
    """Fails when a new field of a dataclass changes nothing."""
    one, other = (
        list(provenance._tokens(provenance._Untyped().visit(provenance.ast.parse(text))))
        for text in ("def f():\n class C:\n  x: int", "def f():\n class C:\n  x: int\n  y: int")
    )
    assert one != other


def test_key_does_not_depend_on_fields_that_only_newer_pythons_have():
    """Fails when empty lists count: Python 3.12 adds ``type_params=[]`` to functions, and ledgers go stale."""
    tree = provenance.ast.parse("def f(): return 1")
    before = list(provenance._tokens(tree))
    tree.body[0]._fields = (*tree.body[0]._fields, "type_params")
    tree.body[0].type_params = []
    assert list(provenance._tokens(tree)) == before


def test_unknown_module_is_named():
    """Fails when a typing error in a slug gives the hash of nothing."""
    with pytest.raises(ModuleNotFoundError, match=r"regularized\.papers\.nowhere"):
        code_key("regularized.papers.nowhere")


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_checkout_is_dirty_only_where_the_closure_is_touched(package):
    """Fails when evidence of uncommitted code would be exported, or an unrelated edit keeps good evidence back."""
    top = package.parents[1]
    files = list(closure(NAME).values())
    assert checkout_state(files, package) == ("", False), "no repository, as from a wheel"
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    state = checkout_state(files, package)
    assert len(state.commit) == 40
    assert not state.dirty
    (package / "neighbour.py").write_text("changed")
    (package / "new.py").write_text("new")
    assert not checkout_state(files, package).dirty
    assert checkout_state([*files, package / "new.py"], package).dirty, "untracked"
    assert checkout_state([*files, top.parent / "elsewhere.py"], package).dirty, "outside of the repository"
    (package / "deeper.py").write_text("changed = 1")
    assert checkout_state(files, package).dirty


def test_unreadable_repository_counts_as_dirty(package):
    """Fails when a broken git makes unknown code look committed."""
    (package.parents[1] / ".git").write_text(textwrap.dedent("gitdir: /nowhere"))
    assert checkout_state([package / "deep.py"], package) == ("", True)


def test_environment_says_where_a_run_took_place():
    """Fails when a row could not be traced to versions, machine and commit."""
    about = provenance.environment("regularized.evidence.claims")
    assert {"python", "torch", "numpy", "scikit-learn", "platform", "cpu", "cores", "threads", "device"} <= set(about)
    assert {"commit", "dirty", "package"} <= set(about)
    assert provenance.versions()["torch"] == about["torch"] != ""
