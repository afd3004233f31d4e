"""What methods with a memory of each training sample share: checking the index, and writing rows with a defined result.

A table has one row a sample. In every step a method reads the rows of the batch and writes new ones. Three things go
wrong in practice: the index is missing or counts within a subset, it is out of range, or the same sample occurs twice
in a batch. All three are caught here where it costs nothing, that is while the index is still on the CPU; on a GPU the
device's own assert reports an index out of range. A fourth is not the table's fault: a prediction that is not finite,
which would stay in the table when the training has long been mended. It is not written.
"""

import warnings

import torch
from torch import Tensor

__all__ = ["check_index", "finite_rows", "last_occurrence", "store_rows"]

_ONE_THREAD = 32768  # torch gives fewer elements than this (its grain size) to one thread, which writes them in order
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_index(index: Tensor | None, num_samples: int, *, owner: str, batch_size: int) -> None:
    """Refuse an index that cannot address the rows of a table; warn of a sample that occurs twice in the batch.

    Types and shapes are always checked. Values are checked only while the index is on the CPU, and not under
    ``torch.compile``: reading them on a GPU would stop the step.

    Args:
        index: (B,) position of each sample in the training set; int64 (or a smaller integer type).
        num_samples: rows of the table, N.
        owner: who needs the index, for the message.
        batch_size: B, from the logits.

    Raises:
        ValueError: there is no index, or its shape is not (B,).
        TypeError: it is not a tensor of integers.
        IndexError: a value is outside [0, N).

    Warns:
        UserWarning: a sample occurs twice in the batch; its last row is kept. By Python's default filter this is shown
            once for each place in the program.

    Examples:
        >>> check_index(torch.tensor([0, 7]), 5, owner="MyLoss", batch_size=2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        IndexError: MyLoss got the index 7, but its table has num_samples=5 rows, so 0 to 4 are allowed. ...
    """
    if index is None:
        raise ValueError(
            f"{owner} needs the dataset index of each sample; wrap your data set with "
            "regularized.training.IndexedDataset, or yield (x, y, index)"
        )
    if not isinstance(index, Tensor):
        raise TypeError(f"{owner} needs the index as a tensor of integers, got {type(index).__name__}")
    if index.dtype not in _INTEGERS:
        raise TypeError(f"{owner} needs an index of integers (int64), got {index.dtype}")
    if index.shape != (batch_size,):
        raise ValueError(
            f"{owner} needs one index a sample, shape ({batch_size},), got {tuple(index.shape)}; "
            "pass the index of this very batch"
        )
    if index.device.type != "cpu" or batch_size == 0 or torch.compiler.is_compiling():
        return
    values = index.tolist()  # for batches of usual size this and a set are quicker than any tensor operation
    low, high = min(values), max(values)
    if low < 0 or high >= num_samples:
        raise IndexError(
            f"{owner} got the index {low if low < 0 else high}, but its table has num_samples={num_samples} rows, so 0 "
            f"to {num_samples - 1} are allowed. num_samples must be the length of the data set that the index counts "
            "in: for a Subset, wrap the Subset itself with IndexedDataset, or keep global indices and give "
            "num_samples=len(whole set)"
        )
    if len(set(values)) < batch_size:
        warnings.warn(
            f"{owner} got the same sample more than once in a batch; the last of its predictions is the one that is "
            "remembered. A sampler that draws with replacement does this",
            UserWarning,
            stacklevel=3,
        )


def store_rows(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write rows into a table and read them back; of a sample that occurs twice the last row wins, on every device.

    A row that is not finite is not written: the sample keeps the one that it had.

    Args:
        table: (N, ...) changed in place.
        index: (B,) integers in [0, N).
        rows: (B, ...) new rows; cast to the type of the table.

    Returns:
        (B, ...) the rows as the table now holds them: equal for equal indices, rounded to the table's type.

    Examples:
        >>> table = torch.zeros(3, 1)
        >>> store_rows(table, torch.tensor([2, 0, 2]), torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [3.0, 2.0, 3.0]
    """
    index = index.long()
    rows = rows.to(table.dtype)
    if table.device.type != "cpu" or rows.numel() >= _ONE_THREAD:
        # Which of two equal indices wins index_copy_ leaves open on a GPU, and on a CPU where it uses several threads.
        rows = rows.index_select(0, last_occurrence(index))
    table.index_copy_(0, index, finite_rows(rows, table.index_select(0, index)))
    return table.index_select(0, index)


def finite_rows(new: Tensor, old: Tensor) -> Tensor:
    """New rows, but the old one wherever the new one holds a NaN or an infinity; without a synchronisation.

    Args:
        new: (B, ...) rows.
        old: (B, ...) rows of the same shape and type.

    Returns:
        (B, ...) rows.

    Examples:
        >>> finite_rows(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.zeros(2, 2)).tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """
    fine = new.isfinite().flatten(1).all(dim=1) if new.ndim > 1 else new.isfinite()
    return torch.where(fine.view(-1, *[1] * (new.ndim - 1)), new, old)


def last_occurrence(index: Tensor) -> Tensor:
    """Position in the batch of the last occurrence of each entry's value; (B,) to (B,), without a synchronisation.

    Examples:
        >>> last_occurrence(torch.tensor([5, 1, 5, 2])).tolist()
        [2, 1, 2, 3]
    """
    ordered, position = torch.sort(index, stable=True)
    return position.index_select(0, torch.searchsorted(ordered, index, right=True) - 1)
