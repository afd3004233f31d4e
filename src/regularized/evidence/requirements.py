"""What a scale needs and a machine may lack: each refusal says what is missing, for what, and how to get it."""

from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import torch

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.experiment import Unavailable

__all__ = ["need_files", "need_gpu", "need_package"]


def need_gpu(why: str, *, gigabytes: float = 0.0) -> torch.device:
    """The CUDA GPU.

    Args:
        why: what it is for, as a sentence begins: ``"the paper scale trains ResNet-34 for 150 epochs"``.
        gigabytes: memory that it must have; default any.

    Raises:
        Unavailable: there is none, or a smaller one.

    Examples:
        >>> import pytest, torch
        >>> if not torch.cuda.is_available():
        ...     with pytest.raises(Unavailable, match="trains for a week and needs a CUDA GPU; none is here"):
        ...         need_gpu("the paper scale trains for a week")
    """
    size = f" of {gigabytes:g} GB" if gigabytes else ""
    if not torch.cuda.is_available():
        raise Unavailable(f"{why} and needs a CUDA GPU{size}; none is here. Run it on a machine that has one")
    found = torch.cuda.get_device_properties(0).total_memory / 1e9
    if found < gigabytes:
        raise Unavailable(f"{why} and needs a CUDA GPU{size}; this one has {found:.0f} GB")
    return torch.device("cuda")


def need_package(module: str, install: str) -> ModuleSpec:
    """Where a package lies; it is not imported.

    Args:
        module: its name in an import statement.
        install: the command that installs it.

    Raises:
        Unavailable: it is not installed.

    Examples:
        >>> need_package("json", "part of Python").name
        'json'
    """
    spec = find_spec(module)
    if spec is None:
        raise Unavailable(f"{module} is not installed: {install}")
    return spec


def need_files(wanted: Mapping[str, str], *, folder: Path | None = None) -> Path:
    """The folder in which the files or folders of an original set-up lie.

    Args:
        wanted: by path below the folder, what it is and where it comes from.
        folder: default :func:`~regularized.evidence.datasets.folder.data_folder`.

    Raises:
        Unavailable: with all that is missing.

    Examples:
        >>> import pytest
        >>> with pytest.raises(Unavailable, match="glue/CoLA"):
        ...     need_files({"glue/CoLA": "GLUE's CoLA as tab-separated files (gluebenchmark.com)"})
    """
    folder = data_folder() if folder is None else folder
    if missing := [f"{folder / path}: {what}" for path, what in wanted.items() if not (folder / path).exists()]:
        raise Unavailable(
            f"not here: {'; '.join(missing)}. Put it there, or set REGULARIZED_DATA to the folder that has it"
        )
    return folder
