"""What produced a measurement: the code it depends on, the versions, the machine, the commit.

Public names: :func:`code_key`, :func:`closure`, :func:`versions`, :func:`environment`, :func:`checkout_state`,
:func:`is_checkout`.

Rows of the store are reused only when the code is the same. "The code" is the experiment's module and every function,
class and constant of this package that it can reach, found by reading, not by running. Comments, docstrings and layout
do not count, and neither does what stands beside the code in use: a better sentence, or one more model in a shared
file, does not make hours of evidence stale.
"""

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from regularized._version import __version__

__all__ = ["CheckoutState", "checkout_state", "closure", "code_key", "environment", "is_checkout", "versions"]

_ROOT = "regularized"
_PACKAGE = Path(__file__).parents[1]
_VERSIONED = ("torch", "numpy", "scikit-learn")


class CheckoutState(NamedTuple):
    """Commit of the checkout that code runs from (``""`` when installed from a wheel); whether files differ from it."""

    commit: str
    dirty: bool


def code_key(module_name: str) -> str:
    """Hash of a module and of everything in this package that it can reach.

    Changes whenever code changes that the module may run. Comments, docstrings, formatting, types and code that it
    cannot reach (a new model beside the one it uses) do not change it. The same on all supported Python versions.

    Of an experiment (a module with ``ARMS`` and ``run``) it is what ``run`` can reach. Its tables of settings do not
    count: a run is known by the settings that it got.

    Args:
        module_name: an importable module, for example ``"regularized.papers.early_learning.experiment"``.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModuleNotFoundError: there is no such module.
        ValueError: ``run`` of an experiment reads a table of settings, so that its result would depend on more than
            the settings that it got.

    Examples:
        >>> key = code_key("regularized.evidence.claims")
        >>> len(key), key == code_key("regularized.evidence.claims"), key == code_key("regularized.evidence.statistics")
        (16, True, False)
    """
    digest = hashlib.sha256()
    for name, parts in sorted(_reach(module_name).items()):
        # The experiment is known by its content alone: its name would tie the key to where a test or a copy lies.
        digest.update(f"{'experiment' if name == module_name else name}\0".encode())
        for part in _source(name).text(parts):
            digest.update(part)
    return digest.hexdigest()[:16]


def closure(module_name: str) -> dict[str, Path]:
    """Files that the code key covers, in whole or in part: the module and those of this package that it reaches.

    Examples:
        >>> sorted(closure("regularized.evidence.baselines"))
        ['regularized.evidence.baselines', 'regularized.mechanisms.mixup']
    """
    return {name: _source(name).path for name in _reach(module_name)}


def versions() -> dict[str, str]:
    """Versions that a result depends on: Python without its patch level, torch, numpy, scikit-learn."""
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {name: _installed(name) for name in _VERSIONED}


def environment(module_name: str) -> dict[str, Any]:
    """Where and with what a run took place; imports torch.

    Returns:
        Versions, platform, CPU, usable cores, threads of torch, device, package version, commit and whether files of
        the module's closure differ from it.
    """
    import torch

    state = checkout_state(closure(module_name).values())
    return {
        "package": __version__,
        "commit": state.commit,
        "dirty": state.dirty,
        "python": platform.python_version(),
        **{name: _installed(name) for name in _VERSIONED},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_checkout(package: Path | None = None) -> bool:
    """Whether the package runs from a git checkout of its own, and not from an installation.

    Args:
        package: folder of the package; default where this one was imported from.
    """
    package = (package or _PACKAGE).resolve()
    # Ours is a checkout only with this layout; a wheel inside somebody's own repository is not.
    return package.parent.name == "src" and (package.parents[1] / ".git").exists()


def checkout_state(files: Iterable[Path], package: Path | None = None) -> CheckoutState:
    """Commit of the checkout that the package runs from, and whether any of ``files`` differs from it.

    A file outside the checkout counts as different: no commit can bring it back. So does everything when git cannot be
    asked. A package that was installed from a wheel has no commit and nothing to differ from.

    Args:
        files: the closure of an experiment.
        package: folder of the package; default where this one was imported from.
    """
    package = (package or _PACKAGE).resolve()
    top = package.parents[1]
    if not is_checkout(package):
        return CheckoutState("", False)
    paths = [path.resolve() for path in files]
    outside = any(not path.is_relative_to(top) for path in paths)
    inside = [str(path.relative_to(top)) for path in paths if path.is_relative_to(top)]
    try:
        commit = _git(top, "rev-parse", "HEAD").strip()
        changed = _git(top, "status", "--porcelain", "--untracked-files=all", "--", *inside) if inside else ""
    except (OSError, subprocess.SubprocessError):
        return CheckoutState("", True)
    return CheckoutState(commit, outside or bool(changed.strip()))


def _git(top: Path, *arguments: str) -> str:
    # Without optional locks, or a status in one process makes a commit in another fail.
    command = ["git", "--no-optional-locks", "-C", str(top), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# --- Reading code ---
#
# The unit is a definition at the top of a module (a function, a class, a constant), not the module: shared files of
# models or terms grow all the time, and if each addition made all evidence stale, evidence would soon be ignored.

_WHOLE = "*"  # in place of a name: all of a module
_RUN = "run"
_TABLES = frozenset(
    {"DEFAULTS", "SCALES", "ARMS", "PUBLISHED", "TUNING", "SEEDS", "UNREPEATABLE", "DISPLAY", "PACKAGES"}
)
_Reference = tuple[str, str]  # module and name in it, or _WHOLE


@dataclass(frozen=True, slots=True)
class _Source:
    """A module taken apart.

    Args:
        name: its dotted name.
        path: its file.
        statements: the statements at its top, without its docstring and what only a type checker reads.
        defined: name -> positions of the statements that define it.
        imported: name -> where the import at the top that binds it takes it from.
        always: positions of statements that run whatever is used: calls, loops, assignments to parts of things.
        lazy: for a package, names that a table like ``{"Trainer": "trainer"}`` loads when they are first used.
        words: position -> its statement as it is hashed, once that is known: experiments share most of what they reach.
        references: position -> what its statement refers to, once that is known.
    """

    name: str
    path: Path
    statements: tuple[ast.stmt, ...]
    defined: Mapping[str, Sequence[int]]
    imported: Mapping[str, _Reference]
    always: Sequence[int]
    lazy: Mapping[str, _Reference]
    words: dict[int, bytes] = field(default_factory=dict)
    references: dict[int, tuple[_Reference, ...]] = field(default_factory=dict)

    def positions(self, names: Set[str]) -> list[int]:
        """Statements that make names, without those that they need in turn."""
        if _WHOLE in names:
            return list(range(len(self.statements)))
        return sorted({*self.always, *(i for name in names for i in self.defined.get(name, ()))})

    def text(self, names: Set[str]) -> Iterator[bytes]:
        """What is hashed for names: the statements, and where imported names come from."""
        for position in self.positions(names):
            if position not in self.words:
                self.words[position] = b"".join(map(_hashed, _tokens(self.statements[position])))
            yield self.words[position]
        yield from (_hashed(f"{name} from {self.imported[name]}") for name in sorted(names & set(self.imported)))

    def needs(self, name: str) -> Iterator[_Reference]:
        """What a name refers to in its turn, in this module and elsewhere."""
        for position in self.positions({name}):
            if position not in self.references:
                self.references[position] = tuple(dict.fromkeys(self._referred(self.statements[position])))
            yield from self.references[position]
        if name in self.imported:
            yield self.imported[name]
        if name == _WHOLE:
            yield from self.lazy.values()

    def _referred(self, statement: ast.stmt) -> Iterator[_Reference]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and (node.id in self.defined or node.id in self.imported):
                yield self.name, node.id
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from (target for _, target in _bindings(node, self.name, self.path))
            elif (module := _loaded_by_call(node)) is not None:
                yield module, _WHOLE


def _reach(module_name: str) -> dict[str, set[str]]:
    """Module -> names in it that a module can reach; it counts as a whole, an experiment from ``run`` on."""
    if _find(module_name) is None:
        raise ModuleNotFoundError(f"there is no module {module_name!r} with Python source", name=module_name)
    found: dict[str, set[str]] = {}
    is_experiment = {"ARMS", _RUN} <= set(_source(module_name).defined)
    waiting: list[_Reference] = [(module_name, _RUN if is_experiment else _WHOLE)]
    while waiting:
        module, name = waiting.pop()
        if found.setdefault(module, set()) & {name, _WHOLE}:
            continue
        found[module].add(name)
        for reference in _source(module).needs(name):
            target = reference if reference[0] == module else _resolve(*reference)
            if target is not None:
                waiting.append(target)
    if is_experiment and (read := sorted(found[module_name] & (_TABLES | {_WHOLE}))):
        raise ValueError(
            f"run() of {module_name} reads {', '.join(read)}: a run must depend on nothing but the settings that it "
            "gets and its seed; put what it needs into DEFAULTS or SCALES and read it from its settings"
        )
    return found


def _resolve(module: str, name: str) -> _Reference | None:
    """Where a name of this package is made: looks through packages that pass it on. None for other packages' names."""
    seen: set[_Reference] = set()
    while _ours(module) and (module, name) not in seen:
        seen.add((module, name))
        if name != _WHOLE and _find(f"{module}.{name}") is not None:
            return f"{module}.{name}", _WHOLE
        if _find(module) is None:
            return None
        source = _source(module)
        if name == _WHOLE or name in source.defined:
            return module, name
        if name in source.imported:
            if not _ours(source.imported[name][0]):
                return module, name
            module, name = source.imported[name]
        elif name in source.lazy:
            module, name = source.lazy[name]
        else:
            return module, _WHOLE  # made in a way that cannot be seen by reading: all of it counts
    return None


def _source(name: str) -> _Source:
    path = _find(name)
    assert path is not None
    status = path.stat()
    # Time and size, so that a file that is edited while this process lives is read again.
    return _read(name, path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _read(name: str, path: Path, modified: int, size: int) -> _Source:
    tree = _Untyped().visit(ast.parse(path.read_bytes(), filename=str(path)))
    statements = tuple(_run_time(_without_docstring(tree.body)))
    defined: dict[str, list[int]] = {}
    imported: dict[str, _Reference] = {}
    always: list[int] = []
    for position, statement in enumerate(statements):
        match statement:
            case ast.FunctionDef(name=made) | ast.AsyncFunctionDef(name=made) | ast.ClassDef(name=made):
                defined.setdefault(made, []).append(position)
            case ast.Assign() | ast.AnnAssign() if (names := _assigned(statement)) is not None:
                for made in names:
                    defined.setdefault(made, []).append(position)
            case ast.Import() | ast.ImportFrom():
                for bound, target in _bindings(statement, name, path):
                    # `import a.b` binds `a` alone, and a star binds what reading does not show.
                    if _ours(target[0]) and (bound == _WHOLE or (bound == _ROOT and isinstance(statement, ast.Import))):
                        always.append(position)
                    else:
                        imported[bound] = target
            case _:
                always.append(position)
    return _Source(name, path, statements, defined, imported, always, _lazy_table(name, path, statements))


class _Untyped(ast.NodeTransformer):
    """Takes the types out of functions: they are for readers and checkers, and run nothing.

    Those of a class body stay: a dataclass has its fields from them.
    """

    _inside = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Without the type of what it returns; inside, assignments lose theirs."""
        outer, self._inside = self._inside, True
        node.returns = None
        self.generic_visit(node)
        self._inside = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """A class inside a function has fields, too."""
        outer, self._inside = self._inside, False
        self.generic_visit(node)
        self._inside = outer
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Of a function, or of a lambda, which has none."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """An assignment without its type; a bare declaration is nothing."""
        self.generic_visit(node)
        if not self._inside:
            return node
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def _run_time(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements without the branch that only a type checker reads."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from _run_time(statement.orelse)
        else:
            yield statement


def _assigned(statement: ast.Assign | ast.AnnAssign) -> list[str] | None:
    """Names that an assignment makes; None when it changes a part of something that exists."""
    names: list[str] = []
    waiting: list[ast.expr] = list(statement.targets) if isinstance(statement, ast.Assign) else [statement.target]
    while waiting:
        target = waiting.pop()
        if isinstance(target, ast.Tuple | ast.List):
            waiting.extend(target.elts)
        elif isinstance(target, ast.Name):
            names.append(target.id)
        else:
            return None
    return names


def _bindings(node: ast.Import | ast.ImportFrom, module: str, path: Path) -> list[tuple[str, _Reference]]:
    """Names that an import binds, with what they stand for."""
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name.partition(".")[0], (alias.name, _WHOLE)) for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [(alias.asname or alias.name, (base, alias.name)) for alias in node.names]


def _loaded_by_call(node: ast.AST) -> str | None:
    """Module that ``import_module("...")`` loads, where it is written out."""
    match node:
        case ast.Call(
            func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=name), *_]
        ):
            return str(name)
    return None


def _lazy_table(name: str, path: Path, statements: Sequence[ast.stmt]) -> dict[str, _Reference]:
    found: dict[str, _Reference] = {}
    if path.name == "__init__.py":
        for node in (node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Dict)):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    for module in (str(value.value), f"{name}.{str(value.value).removeprefix('.')}"):
                        if _ours(module) and _find(module) is not None:
                            found[str(key.value)] = (module, str(key.value))
    return found


def _find(name: str) -> Path | None:
    """Source file of a module, without running it where it is one of ours."""
    if _ours(name):
        base = _PACKAGE.joinpath(*name.split(".")[1:])
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _ours(name: str) -> bool:
    return name == _ROOT or name.startswith(f"{_ROOT}.")


def _tokens(node: ast.AST) -> Iterator[str]:
    """A tree in words, without positions and docstrings.

    ``ast.dump`` would do on one Python, but newer ones add fields and drop empty ones: here a field without content is
    left out, so that all agree.
    """
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            value = _without_docstring(value)
        if value is None or value == [] or name in ("type_comment", "ctx"):
            continue
        yield name
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _tokens(item)
            else:
                yield f"{type(item).__name__} {item!r}"
    yield ")"


def _hashed(word: str) -> bytes:
    return word.encode("utf-8", "backslashreplace") + b"\0"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:]
    return body
