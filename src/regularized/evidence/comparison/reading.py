"""From what people have, files, arrays, frames or data sets, to a :class:`Problem`.

Public names: :func:`problem_of`, :func:`read`.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from regularized.evidence.comparison.images import folder
from regularized.evidence.comparison.problem import Problem
from regularized.evidence.comparison.recipe import Task
from regularized.evidence.comparison.samples import from_samples, has_samples
from regularized.evidence.experiment import Unavailable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["problem_of", "read"]

_MANY = 50  # different values of a text column that still is a category
_FEW = 20  # different whole numbers of a target that still are classes


def problem_of(data: Any, *, target: str | None = None, task: Task | None = None, clean_test: Any = None) -> Problem:
    """A problem from whatever holds the data.

    Args:
        data: (inputs, targets) as tensors, arrays or lists; a data frame; a map-style ``Dataset`` of such pairs, or of
            dictionaries as Hugging Face's, see :func:`~regularized.evidence.comparison.samples.from_samples`; or a
            path, see :func:`read`.
        target: name of the target, of what has names: a frame, a file, dictionaries.
        task: default by the targets: texts, truth values and few whole numbers are classes.
        clean_test: data of the same kind with trusted targets, to judge on.

    Raises:
        ValueError: the data do not say what is what.
        TypeError: nothing that is known.
        Unavailable: a package that reads this kind of file is missing.
    """
    inputs, targets, name = _arrays(data, target)
    others = None if clean_test is None else _arrays(clean_test, target)
    if _is_frame(inputs):
        both, columns = _encoded(inputs, None if others is None else others[0])
        inputs, test_inputs = both
    else:
        columns = ()
        inputs = _as_floats(inputs)
        test_inputs = None if others is None else _as_floats(others[0])
    targets, classes, test_targets = _targets(targets, None if others is None else others[1], task)
    return Problem(inputs, targets, classes, test_inputs, test_targets, name, columns)


def read(path: Path | str, target: str | None = None) -> tuple[Any, Any]:
    """Inputs and targets of a file or folder.

    ``.csv``, ``.tsv`` and ``.parquet`` are tables, ``target`` one of their columns. An ``.npz`` holds two arrays, and
    ``target`` says which holds the targets. A folder holds a folder of images for each class.

    Args:
        path: of the file or folder.
        target: name of the target.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not say what is what.
        Unavailable: pandas, pyarrow or Pillow is missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        return folder(path)
    kind = path.suffix.lower()
    if kind == ".npz":
        return _npz(path, target)
    if kind not in (".csv", ".parquet", ".tsv"):
        raise ValueError(f"{path} is none of .csv, .tsv, .parquet, .npz, or a folder of images by class")
    try:
        import pandas as pd
    except ImportError as error:
        raise Unavailable('tables need pandas: pip install "regularized[compare]"') from error
    try:
        frame = pd.read_parquet(path) if kind == ".parquet" else pd.read_csv(path, sep="\t" if kind == ".tsv" else ",")
    except ImportError as error:
        raise Unavailable('Parquet needs pyarrow: pip install "regularized[compare]"') from error
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {error}") from error
    return _from_frame(frame, target)


def _arrays(data: Any, target: str | None) -> tuple[Any, Any, str]:
    """Inputs, targets, and a name."""
    if isinstance(data, str | Path):
        inputs, targets = read(data, target)
        return inputs, targets, Path(data).name
    if _is_frame(data):
        inputs, targets = _from_frame(data, target)
        return inputs, targets, "data frame"
    if isinstance(data, DataLoader):
        raise TypeError("give the DataLoader's dataset instead: samples are split and shuffled again for each run")
    if isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not isinstance(data, Sized)):
        raise TypeError(f"{type(data).__name__} is read once and in its order; collect its samples: list(dataset)")
    if has_samples(data):
        return *from_samples(data, target), type(data).__name__
    if isinstance(data, Mapping):
        if target is not None and target in data and len(data) == 2:
            return next(value for name, value in data.items() if name != target), data[target], "data"
        parts = [str(name) for name in data]
        raise TypeError(f"data is a mapping of {parts}; give one of its parts (data[...]), or (inputs, targets)")
    if isinstance(data, Sequence) and not isinstance(data, str) and len(data) == 2:
        return data[0], data[1], "data"
    raise TypeError(
        f"data must be (inputs, targets), a data frame, a map-style Dataset, or a path; got {type(data).__name__}"
    )


def _is_frame(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _from_frame(frame: "pd.DataFrame", target: str | None) -> tuple["pd.DataFrame", "pd.Series[Any]"]:
    columns = [str(name) for name in frame.columns]
    if target is None or target not in frame.columns:
        which = "say which column is the target" if target is None else f"there is no column {target!r}"
        raise ValueError(f"{which}; there are {columns[:20]}")
    known = frame[target].notna()
    if not known.all():
        warnings.warn(f"{int((~known).sum())} rows without a target are left out", stacklevel=4)
    return frame.loc[known].drop(columns=[target]), frame.loc[known, target]


def _npz(path: Path, target: str | None) -> tuple[Any, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    names = sorted(arrays)
    if target is None or target not in arrays:
        raise ValueError(f"say which array of {path.name} holds the targets; there are {names}")
    others = [name for name in names if name != target]
    if len(others) != 1:
        raise ValueError(f"{path.name} must hold inputs and targets, two arrays; it holds {names}")
    return arrays[others[0]], arrays[target]


def _encoded(frame: Any, other: Any) -> tuple[tuple[Tensor, Tensor | None], tuple[str, ...]]:
    """A frame, and one of the same columns, as numbers: categories become a column each."""
    import pandas as pd

    if other is not None and list(other.columns) != list(frame.columns):
        different = sorted(set(map(str, frame.columns)) ^ set(map(str, other.columns)))
        raise ValueError(f"the clean test data have other columns, or in another order: {different or 'another order'}")
    blocks: list[Tensor] = []
    others: list[Tensor] = []
    names: list[str] = []
    for column in frame.columns:
        values, theirs = frame[column], None if other is None else other[column]
        if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            blocks.append(_column(values))
            names.append(str(column))
            if theirs is not None:
                others.append(_column(theirs))
            continue
        kinds = sorted(map(str, values.dropna().unique()))
        if len(kinds) > _MANY:
            raise ValueError(
                f"column {column!r} has {len(kinds)} different texts, more than {_MANY}: it is an identifier or free "
                "text. Leave it out, or turn it into numbers (an embedding) first"
            )
        for kind in kinds:
            blocks.append(torch.as_tensor((values.astype(str) == kind).to_numpy(dtype="float32")))
            names.append(f"{column}={kind}")
            if theirs is not None:
                others.append(torch.as_tensor((theirs.astype(str) == kind).to_numpy(dtype="float32")))
    if not blocks:
        raise ValueError("there are no columns beside the target")
    return (torch.stack(blocks, 1), torch.stack(others, 1) if other is not None else None), tuple(names)


def _column(values: Any) -> Tensor:
    return torch.tensor(values.to_numpy(dtype="float32", na_value=np.nan))


def _as_floats(values: Any) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    return tensor.detach().cpu().float()


def _targets(targets: Any, test: Any, task: Task | None) -> tuple[Tensor, tuple[str, ...], Tensor | None]:
    """Targets, names of the classes, targets of the test data."""
    values = _numpy(targets)
    others = None if test is None else _numpy(test)
    if task is None:
        whole = values.dtype.kind in "iu" or (values.dtype.kind == "f" and np.all(values == np.round(values)))
        is_class = values.dtype.kind not in "iuf" or (whole and len(np.unique(values)) <= _FEW)
        task = "classification" if is_class else "regression"
    if task == "regression":
        if values.dtype.kind not in "iufb":
            raise ValueError(f"regression needs numbers as targets, got {values.dtype}")
        return (
            torch.as_tensor(values.astype("float32")),
            (),
            None if others is None else torch.as_tensor(others.astype("float32")),
        )
    kinds, labels = np.unique(values, return_inverse=True)
    classes = tuple(str(kind) for kind in kinds)
    if others is None:
        return torch.as_tensor(labels), classes, None
    places = np.searchsorted(kinds, others).clip(max=len(kinds) - 1)
    if unknown := sorted({str(value) for value in others[kinds[places] != others]}):
        raise ValueError(f"the clean test data have classes that the data do not: {unknown[:10]}")
    return torch.as_tensor(labels), classes, torch.as_tensor(places)


def _numpy(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    array = np.asarray(values)
    return array.astype(str) if array.dtype.kind == "O" else array
