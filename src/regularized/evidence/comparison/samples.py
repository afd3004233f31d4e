"""Inputs and targets of data sets that are read sample by sample: pairs, or dictionaries as Hugging Face's.

Public names: :func:`from_samples`, :func:`has_samples`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regularized.evidence.comparison.images import is_image, pixels
from regularized.evidence.experiment import Unavailable

__all__ = ["from_samples", "has_samples"]


def has_samples(data: Any) -> bool:
    """Whether this is read by ``data[i]``: a map-style data set, or a list of dictionaries.

    Examples:
        >>> has_samples([{"a": 1.0, "y": 0}, {"a": 2.0, "y": 1}]), has_samples((torch.zeros(3, 2), torch.zeros(3)))
        (True, False)
    """
    if isinstance(data, Mapping | Tensor | np.ndarray | str):
        return False
    if isinstance(data, Sequence):
        return len(data) > 0 and isinstance(data[0], Mapping)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def from_samples(data: Any, target: str | None = None) -> tuple[Any, Any]:
    """Inputs and targets: a tensor (N, ...), or a data frame where samples have a name for each number or word.

    A sample is (input, target), or a dictionary. Of a dictionary, ``target`` names the target; beside it stand numbers,
    truth values and words, which become a table, or one array or image.

    Args:
        data: whose length is known, and whose samples are read by their numbers.
        target: name of the target, for dictionaries.

    Raises:
        TypeError: a sample is neither a pair nor a dictionary.
        ValueError: the names do not say what is what, or samples differ in form.
        Unavailable: pandas is missing.

    Examples:
        >>> x, y = from_samples([{"x": [0.0, 1.0], "label": 1}, {"x": [2.0, 3.0], "label": 0}], "label")
        >>> x.tolist(), y
        ([[0.0, 1.0], [2.0, 3.0]], [1, 0])
    """
    samples = [data[i] for i in range(len(data))]
    if not samples:
        raise ValueError("the data set has no samples")
    if isinstance(samples[0], Mapping):
        return _from_dictionaries(samples, target)
    if not isinstance(samples[0], Sequence) or isinstance(samples[0], str) or len(samples[0]) < 2:
        raise TypeError("the Dataset must give (input, target), or a dictionary, for each index")
    return _stacked([sample[0] for sample in samples], "the inputs"), [_plain(sample[1]) for sample in samples]


def _from_dictionaries(samples: Sequence[Mapping[str, Any]], target: str | None) -> tuple[Any, Any]:
    names = list(samples[0])
    if target is None or target not in names:
        which = "say which column is the target" if target is None else f"there is no column {target!r}"
        raise ValueError(f"{which}; there are {names[:20]}")
    if other := next((sample for sample in samples if sample.keys() != samples[0].keys()), None):
        raise ValueError(f"all samples must have the columns {names}; one has {list(other)}")
    known = [sample for sample in samples if sample[target] is not None]
    if len(known) < len(samples):
        warnings.warn(f"{len(samples) - len(known)} rows without a target are left out", stacklevel=5)
    targets = [_plain(sample[target]) for sample in known]
    columns = {name: [_plain(sample[name]) for sample in known] for name in names if name != target}
    arrays = [name for name, values in columns.items() if any(_is_array(value) for value in values)]
    if not arrays:
        return _frame(columns), targets
    if len(columns) > 1:
        raise ValueError(
            f"beside {target!r} the samples hold {list(columns)}, of which {arrays} are arrays or images: one such "
            "column can be compared on, alone, or several columns of single numbers and words. Leave the others out "
            "(dataset.select_columns), or join them to one"
        )
    return _stacked(columns[arrays[0]], f"column {arrays[0]!r}"), targets


def _plain(value: Any) -> Any:
    """A number that torch or NumPy holds as Python's; anything else as it is."""
    return value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0 else value


def _is_array(value: Any) -> bool:
    return is_image(value) or isinstance(value, Tensor | np.ndarray | list | tuple)


def _frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise Unavailable('tables need pandas: pip install "regularized[compare]"') from error
    return pd.DataFrame(columns)


def _stacked(values: Sequence[Any], what: str) -> Tensor:
    """(N, ...) float32 of arrays of one shape, or of images."""
    if all(map(is_image, values)):
        return pixels(values)
    tensors = [value.detach().cpu() if isinstance(value, Tensor) else value for value in values]
    try:
        arrays = [np.asarray(value, "float32") for value in tensors]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold numbers in every sample, in arrays of one shape or images") from error
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise ValueError(f"{what} must have one shape in all samples; found {sorted(shapes)[:5]}: pad or cut them")
    return torch.as_tensor(np.stack(arrays))
