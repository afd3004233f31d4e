"""Files of scikit-learn estimators: what was fitted as JSON, weights as safetensors; nothing in them is run."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["read_estimator", "write_estimator"]


def write_estimator(
    folder: Path | str, name: str, estimator: object, about: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Path:
    """Write ``NAME.json`` and ``NAME.safetensors``.

    Args:
        folder: made when missing.
        name: of the files, without ending.
        estimator: whose they are.
        about: for JSON.
        weights: by name.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"class": type(estimator).__name__, **about}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / f"{name}.safetensors")
    return folder


@contextmanager
def read_estimator(
    folder: Path | str, name: str, cls: type[object]
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What :func:`write_estimator` wrote, to be put into an estimator inside.

    Args:
        folder: where it lies.
        name: of the files, without ending.
        cls: of the estimator.

    Yields:
        What was said about it, and its weights.

    Raises:
        ValueError: it is another estimator's or damaged, also where that shows only inside.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_estimator(folder, "mean", [], {"value": 2}, {})
        ...     with read_estimator(folder, "mean", list) as (about, weights):
        ...         about["value"], weights
        (2, {})
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if about["class"] != cls.__name__:
            raise ValueError(f"it holds a {about['class']}")
        yield about, load_file(folder / f"{name}.safetensors")
    except (KeyError, TypeError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no {cls.__name__} that can be read: {error}") from error
