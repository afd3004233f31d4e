"""Files that commands keep beside the module that they looked at: ``bench.json``, ``contract.json``. Loads no torch.

Public names: :func:`keep`, :func:`read_kept`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["keep", "read_kept"]


def keep(content: Mapping[str, Any], module_name: str, file_name: str, *, path: Path | None = None) -> Path:
    """Write what a command found, with the code and the environment that it is true of.

    Args:
        content: for JSON; ``format`` and the day stand in it.
        module_name: the module that was looked at.
        file_name: beside it.
        path: another file to write to.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    from importlib.util import find_spec

    from regularized.evidence.provenance import code_key, environment

    if path is None:
        spec = find_spec(module_name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no module {module_name!r}", name=module_name)
        path = Path(spec.origin).with_name(file_name)
    whole = {**content, "code_key": code_key(module_name), "environment": environment(module_name)}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_kept(path: Path, key: str, parse: Callable[[Any], Any], *, command: str) -> dict[str, Any] | None:
    """What :func:`keep` wrote, its rows parsed; None where nothing was kept.

    Args:
        path: the file.
        key: under which its rows stand.
        parse: from one row as JSON has it.
        command: that makes the file again.

    Raises:
        ValueError: the file is damaged or cannot be read; the message says how to make it again.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content[key] = [parse(row) for row in content[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); write it again with `{command}`") from error
    return content
