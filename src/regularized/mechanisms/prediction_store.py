"""The last prediction for each training sample, at full size, in half precision, or as its largest entries.

A table of N samples x C classes in float32 is 20 MB for CIFAR-100 and 5.1 GB for ImageNet. Each store states the bytes
that it takes and the error that it makes:

===================================  ==================  ============================================================
store                                bytes, ImageNet     error of what is read back
===================================  ==================  ============================================================
``DenseStore(N, C)``                 4 N C = 5.1 GB      none for float32
``DenseStore(.., torch.float16)``    2 N C = 2.6 GB      at most 2^-12 = 0.00025 in any entry
``DenseStore(.., torch.bfloat16)``   2 N C = 2.6 GB      at most 2^-9 = 0.0020 in any entry
``TopKStore(N, C, k=10)``            4 N k = 51 MB       1/(k+1) in any entry at worst; half the L1 distance is at most
                                                         the mass outside the k largest, see :meth:`TopKStore.spread`
===================================  ==================  ============================================================

A row of zeros is one that was never written: predictions sum to 1. A prediction that is not finite is not written.
"""

import abc
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, count
from regularized.mechanisms.sample_history import finite_rows, last_occurrence

__all__ = ["DenseStore", "PredictionStore", "TopKStore"]

# Largest distance from a value in [0, 1] to the next representable one, halved: rounding is to the nearest.
_ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


class PredictionStore(nn.Module, abc.ABC):
    """Rows of class probabilities by sample index; the common part of the stores.

    What it holds are buffers: saved, restored, and moved with the module that owns the store.

    Args:
        num_samples: N, length of the data set that the index counts in.
        num_classes: C.
        dtype: type of the stored values.
        host: keep the table in host memory wherever the module moves, for tables that do not fit the accelerator. Rows
            then travel in both directions, and each write waits for the device once.

    Raises:
        ValueError: ``num_samples`` < 1, ``num_classes`` < 2, or a type other than float64, float32, float16, bfloat16.
    """

    @allowed(num_samples=count(1, "the length of the data set"), num_classes=count(2))
    def __init__(self, num_samples: int, num_classes: int, dtype: torch.dtype, *, host: bool) -> None:
        super().__init__()
        if dtype not in _ROUNDING:
            known = ", ".join(str(d).removeprefix("torch.") for d in _ROUNDING)
            raise ValueError(f"dtype must be one of {known} to hold probabilities, got {dtype}")
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.host = host

    @property
    @abc.abstractmethod
    def max_error(self) -> float:
        """Bound on the absolute error of any entry that is read back, for float32 predictions that sum to 1."""

    @property
    @abc.abstractmethod
    def _table(self) -> Tensor:
        """(N, ...) stored numbers, in a row all zero where never written."""

    @abc.abstractmethod
    def _rows(self, index: Tensor) -> Tensor:
        """(B,) index to (B, C) rows, zero where never written."""

    @abc.abstractmethod
    def _put(self, index: Tensor, rows: Tensor) -> None:
        """Write (B, C) rows; of equal indices the last one is written last."""

    def read(self, index: Tensor) -> Tensor:
        """Rows of some samples.

        Args:
            index: (B,) integers in [0, N).

        Returns:
            (B, C) probabilities, a copy, on the device of ``index``; zeros where the sample was never written.
        """
        device = index.device
        rows = self._rows(index.to(self.device, torch.int64))
        return rows if rows.device == device else _pinned(rows).to(device, non_blocking=True)

    @torch.no_grad()
    def write(self, index: Tensor, probabilities: Tensor) -> None:
        """Replace the rows of some samples; of a sample that occurs twice the last row wins, on every device.

        A row that is not finite is left out: the sample keeps the one that it had.

        Args:
            index: (B,) integers in [0, N).
            probabilities: (B, C), in [0, 1].
        """
        device = self.device
        index = index.to(device, torch.int64)
        rows = probabilities.to(device)
        if device.type != "cpu":
            # index_copy_ on a GPU leaves open which of two equal indices wins; on the CPU it writes in order.
            rows = rows.index_select(0, last_occurrence(index))
        self._put(index, rows)

    def seen(self) -> Tensor:
        """(N,) bool: which samples were ever written."""
        return self._table.ne(0).any(dim=1)

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self._table.device

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"num_samples={self.num_samples}, num_classes={self.num_classes}" + (", host=True" if self.host else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `.to()` and its kin call: a table that stays in host memory ignores them.
        return self if self.host else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class DenseStore(PredictionStore):
    """One number for each sample and class.

    Args:
        num_samples: N, length of the data set that the index counts in.
        num_classes: C.
        dtype: float32 (default; exact), or float16 or bfloat16 for half the memory (in [0, 1] float16 is more exact);
            float64 is for tests.
        host: keep the table in host memory wherever the module moves; default False.

    Attributes:
        predictions: (N, C) buffer; rows are zero where never written.

    Raises:
        ValueError: a size or the type is not allowed, see :class:`PredictionStore`.

    Examples:
        >>> store = DenseStore(num_samples=4, num_classes=2, dtype=torch.float16)
        >>> store.write(torch.tensor([2]), torch.tensor([[0.25, 0.75]]))
        >>> store.read(torch.tensor([0, 2])).tolist(), store.seen().tolist()
        ([[0.0, 0.0], [0.25, 0.75]], [False, False, True, False])
    """

    predictions: Tensor

    def __init__(
        self, num_samples: int, num_classes: int, dtype: torch.dtype = torch.float32, *, host: bool = False
    ) -> None:
        super().__init__(num_samples, num_classes, dtype, host=host)
        self.register_buffer("predictions", torch.zeros(num_samples, num_classes, dtype=dtype))

    @property
    def max_error(self) -> float:
        """Bound on the absolute error of any entry: half the largest spacing of the type in [0, 1]."""
        return _ROUNDING[self.predictions.dtype]

    @property
    def _table(self) -> Tensor:
        return self.predictions

    def _rows(self, index: Tensor) -> Tensor:
        return self.predictions.index_select(0, index)

    def _put(self, index: Tensor, rows: Tensor) -> None:
        rows = finite_rows(rows.to(self.predictions.dtype), self.predictions.index_select(0, index))
        self.predictions.index_copy_(0, index, rows)


class TopKStore(PredictionStore):
    """The k largest probabilities of each sample; what remains to 1 is spread evenly over the other classes.

    Rows that are read back sum to 1, up to rounding. Not in any paper: an approximation of ours for many classes. It
    costs one ``topk`` over (B, C) a step; look at :meth:`spread` to see whether k is large enough.

    Args:
        num_samples: N, length of the data set that the index counts in.
        num_classes: C.
        k: entries that are kept, in [1, C - 1].
        dtype: type of the kept values; default float16.
        host: keep the table in host memory wherever the module moves; default False.

    Attributes:
        values: (N, k) buffer, the largest probabilities.
        classes: (N, k) buffer, their classes; int16 where C allows, otherwise int32.

    Raises:
        ValueError: k is outside [1, C - 1], or see :class:`PredictionStore`.

    Examples:
        >>> store = TopKStore(num_samples=4, num_classes=4, k=1)
        >>> store.write(torch.tensor([3]), torch.tensor([[0.125, 0.625, 0.25, 0.0]]))
        >>> store.read(torch.tensor([3]))
        tensor([[0.1250, 0.6250, 0.1250, 0.1250]])
    """

    values: Tensor
    classes: Tensor

    def __init__(
        self, num_samples: int, num_classes: int, k: int, dtype: torch.dtype = torch.float16, *, host: bool = False
    ) -> None:
        super().__init__(num_samples, num_classes, dtype, host=host)
        if not 1 <= k < num_classes:
            raise ValueError(
                f"k must be in [1, num_classes - 1] = [1, {num_classes - 1}], got {k}; DenseStore keeps all classes"
            )
        self.k = k
        small = num_classes <= torch.iinfo(torch.int16).max
        self.register_buffer("values", torch.zeros(num_samples, k, dtype=dtype))
        self.register_buffer("classes", torch.zeros(num_samples, k, dtype=torch.int16 if small else torch.int32))

    @property
    def max_error(self) -> float:
        """Bound on the absolute error of any entry.

        An entry that is not kept is at most 1/(k+1), since k others are at least as large. It is read as the mean of
        those not kept, which lies in the same range, moved by at most the k roundings of the entries that are kept.
        """
        return 1.0 / (self.k + 1) + self.k * _ROUNDING[self.values.dtype]

    def spread(self) -> Tensor:
        """Mean mass outside the k largest entries over all samples seen, a scalar in [0, 1]; nan when there is none.

        Half the L1 distance between a prediction and what is read back is at most this mass (but for rounding). For use
        between epochs: above a few hundredths, take a larger k.
        """
        kept, seen = self.values.to(torch.float32).sum(dim=1), self.seen()
        return torch.where(seen, (1.0 - kept).clamp(min=0.0), 0.0).sum() / seen.sum()

    @property
    def _table(self) -> Tensor:
        return self.values

    def _rows(self, index: Tensor) -> Tensor:
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        values = self.values.index_select(0, index).to(dtype)
        classes = self.classes.index_select(0, index).to(torch.int64)
        kept = values.sum(dim=1, keepdim=True)
        # Rounded values may sum to a little more than 1: nothing is left then. Nor is there where nothing was written.
        left = (1.0 - kept).clamp_(min=0.0).mul_(kept > 0)
        return left.div_(self.num_classes - self.k).repeat(1, self.num_classes).scatter_(1, classes, values)

    def _put(self, index: Tensor, rows: Tensor) -> None:
        values, classes = rows.topk(self.k, dim=1, sorted=False)
        fine = rows.isfinite().all(dim=1, keepdim=True)
        values = torch.where(fine, values.to(self.values.dtype), self.values.index_select(0, index))
        self.values.index_copy_(0, index, values)
        classes = torch.where(fine, classes.to(self.classes.dtype), self.classes.index_select(0, index))
        self.classes.index_copy_(0, index, classes)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, k={self.k}"


def _pinned(rows: Tensor) -> Tensor:
    # A copy that does not wait needs pinned memory; allocating it needs an accelerator.
    return rows.pin_memory() if rows.device.type == "cpu" and torch.cuda.is_available() else rows
