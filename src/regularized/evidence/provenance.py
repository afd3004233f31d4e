"""What produced a measurement: the code it depends on, the versions, the machine, the commit.

Public names: :func:`code_key`, :func:`closure`, :func:`versions`, :func:`environment`, :func:`checkout_state`.

Rows of the store are reused only when the code is the same. "The code" is the experiment's module and every module of
this package that it can reach, found by reading imports, not by running them. Comments, docstrings and layout do not
count, so that a better sentence in a docstring does not make hours of evidence stale.
"""

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from regularized._version import __version__

__all__ = ["CheckoutState", "checkout_state", "closure", "code_key", "environment", "versions"]

_ROOT = "regularized"
_PACKAGE = Path(__file__).parents[1]
_VERSIONED = ("torch", "numpy", "scikit-learn")


class CheckoutState(NamedTuple):
    """Commit of the checkout that code runs from (``""`` when installed from a wheel); whether files differ from it."""

    commit: str
    dirty: bool


def code_key(module_name: str) -> str:
    """Hash of a module and of all of this package that it can reach.

    Changes whenever code changes that the module may run; comments, docstrings and formatting do not change it. The
    same on all supported Python versions.

    Args:
        module_name: an importable module, for example ``"regularized.papers.early_learning.experiment"``.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModuleNotFoundError: there is no such module.

    Examples:
        >>> key = code_key("regularized.evidence.claims")
        >>> len(key), key == code_key("regularized.evidence.claims"), key == code_key("regularized.evidence.statistics")
        (16, True, False)
    """
    digest = hashlib.sha256()
    for name, path in sorted(closure(module_name).items()):
        # The experiment is known by its content alone: its name would tie the key to where a test or a copy lies.
        digest.update(b"\0experiment\0" if name == module_name else f"\0{name}\0".encode())
        digest.update(_content_hash(path, path.stat().st_mtime_ns, path.stat().st_size))
    return digest.hexdigest()[:16]


def closure(module_name: str) -> dict[str, Path]:
    """Files that the code key covers: the module and those of this package that it imports, directly or not.

    Imports inside functions count, those under ``TYPE_CHECKING`` do not. A package's ``__init__`` that merely passes a
    name
    on is looked through: ``from regularized.noisy_labels import EarlyLearningLoss`` leads to that technique's module
    and not to its neighbours, whose changes cannot change the result.

    Examples:
        >>> sorted(closure("regularized.evidence.statistics"))
        ['regularized.evidence.claims', 'regularized.evidence.statistics']
    """
    start = _find(module_name)
    if start is None:
        raise ModuleNotFoundError(f"there is no module {module_name!r} with Python source", name=module_name)
    found = {module_name: start}
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        for imported in _imports(name, found[name]):
            if imported not in found and (path := _find(imported)) is not None:
                found[imported] = path
                waiting.append(imported)
    return found


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
    # Ours is a checkout only with this layout; a wheel inside somebody's own repository is not.
    if package.parent.name != "src" or not (top / ".git").exists():
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


# --- Reading imports ---


def _find(name: str) -> Path | None:
    """Source file of a module, without running it where it is one of ours."""
    if name == _ROOT or name.startswith(f"{_ROOT}."):
        base = _PACKAGE.joinpath(*name.split(".")[1:])
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _imports(module: str, path: Path) -> Iterator[str]:
    """Modules of this package whose code a module can reach in one step."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _statements(_parse(path, path.stat().st_mtime_ns, path.stat().st_size)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if _ours(alias.name))
            case ast.ImportFrom(module=source, names=names, level=level):
                base = _absolute(source, level, package)
                if _ours(base):
                    for alias in names:
                        yield from _defining(base, alias.name)
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[first, *_]):
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and _ours(first.value):
                    yield first.value
            case ast.Dict(values=values) if path.name == "__init__.py":  # a table of names to load when first used
                for value in values:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str) and _ours(value.value):
                        yield value.value


def _defining(package: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Iterator[str]:
    """Modules behind ``from package import name``: looks through an ``__init__`` that passes the name on."""
    if _find(f"{package}.{name}") is not None:
        yield f"{package}.{name}"
        return
    path = _find(package)
    if path is None or (package, name) in seen:
        return
    seen |= {(package, name)}
    targets: list[str] = []
    if path.name == "__init__.py":
        for node in _statements(_parse(path, path.stat().st_mtime_ns, path.stat().st_size)):
            match node:
                case ast.ImportFrom(module=source, level=level, names=names):
                    base = _absolute(source, level, package)
                    for alias in names:
                        if (alias.asname or alias.name) == name and _ours(base):
                            targets.extend(_defining(base, alias.name, seen))
                case ast.Dict():  # a table of lazily loaded names: {"Trainer": "regularized.training.trainer"}
                    for key, value in zip(node.keys, node.values):
                        if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                            target = str(value.value)
                            target = f"{package}{target}" if target.startswith(".") else target
                            if _ours(target) and _find(target) is not None:
                                targets.append(target)
    # Found nowhere: defined right there, or behind an `import *`. The whole module counts.
    yield from targets or [package]


def _ours(name: str) -> bool:
    return name.startswith(f"{_ROOT}.") or name == _ROOT


def _absolute(source: str | None, level: int, package: str) -> str:
    if level == 0:
        return source or ""
    parents = package.split(".")
    base = parents[: len(parents) - level + 1]
    return ".".join([*base, *([source] if source else [])])


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and _names_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def _names_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


# Keyed by time and size, too, so that a file that is edited while the process lives is read again.
@lru_cache(maxsize=1024)
def _parse(path: Path, modified: int, size: int) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


@lru_cache(maxsize=1024)
def _content_hash(path: Path, modified: int, size: int) -> bytes:
    digest = hashlib.sha256()
    for part in _tokens(_parse(path, modified, size)):
        digest.update(part.encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.digest()


def _tokens(node: ast.AST) -> Iterator[str]:
    """A tree in words, without positions and docstrings.

    ``ast.dump`` would do on one Python, but newer ones add fields and drop empty ones: here a field without content is
    left out, so that all agree.
    """
    yield f"({type(node).__name__}"
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            value = _without_docstring(value)
        if value is None or value == [] or field in ("type_comment", "ctx"):
            continue
        yield field
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _tokens(item)
            else:
                yield f"{type(item).__name__} {item!r}"
    yield ")"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:]
    return body
