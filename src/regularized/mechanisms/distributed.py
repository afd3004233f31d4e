"""What every process must know of the others: rows gathered for a shared state, and statistics of the whole batch.

All functions are the identity where there is no process group, so that a technique calls them unconditionally.
"""

import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_or_none",
    "gather_rows",
    "gather_samples",
    "leave_process_group",
    "local_part",
    "rank",
    "sum_over_processes",
    "whole",
    "world_size",
]


def world_size() -> int:
    """Number of processes; 1 without a process group.

    Examples:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group.

    Examples:
        >>> rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def all_or_none(doing: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """What fails in one process fails in all of them, instead of leaving the others waiting for it.

    All processes must enter, and wait at the end for each other: it is a barrier, too. What is inside must not wait for
    other processes itself after a point where one of them can fail.

    Args:
        doing: what is done inside, for the message.
        error: what the processes raise that did not fail themselves.

    Raises:
        error: another process failed; with its number, and what it said.

    Examples:
        >>> with all_or_none("counting"):
        ...     number = 1 + 1
    """
    own: Exception | None = None
    try:
        yield
    except Exception as caught:
        own = caught
    said: list[str | None] = [None if own is None else f"{type(own).__name__}: {own}"]
    if world_size() > 1:
        heard: list[Any] = [None] * world_size()
        dist.all_gather_object(heard, said[0])
        said = heard
    if own is not None:
        raise own
    if failed := [f"process {number} failed ({text})" for number, text in enumerate(said) if text is not None]:
        raise error(f"while {doing}, {'; '.join(failed)}; so all stop")


def leave_process_group() -> None:
    """Leave the process group at the end of a script, together with the other processes.

    ``DistributedDataParallel`` must be gone before the group is: one that outlives it can abort the process when Python
    ends (torch 2.13 on gloo, 19 of 120 processes in a trial, none with this function). So delete models, trainers and
    whatever holds them first; what is left in reference cycles is collected here. Does nothing without a group.

    Examples:
        >>> leave_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def gather_rows(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all processes with their indices, so that every process can write the same state.

    They come in the order of the processes, which is the order of the whole batch where it was split contiguously (as
    :class:`~regularized.training.trainer.Trainer` does): a repeated index is resolved as one process would. Processes
    may hold different numbers of rows, none included; their numbers are exchanged first and read by the host, which on
    a GPU waits for the device once. No gradient flows.

    Args:
        index: (B,) int64, which rows of the state.
        rows: (B, ...) their values.

    Returns:
        Index (S,) and rows (S, ...) with S the sum of B over the processes; the arguments themselves without a process
        group.

    Raises:
        ValueError: index and rows have different lengths.

    Examples:
        >>> index, rows = gather_rows(torch.tensor([4, 2]), torch.zeros(2, 3))
        >>> index.tolist(), rows.shape
        ([4, 2], torch.Size([2, 3]))
    """
    if index.ndim != 1 or rows.ndim < 1 or len(index) != len(rows):
        raise ValueError(f"need index (B,) and rows (B, ...), got shapes {tuple(index.shape)} and {tuple(rows.shape)}")
    if world_size() == 1:
        return index, rows
    sizes = _sizes(index)
    return _gather(index.detach(), sizes), _gather(rows.detach(), sizes)


def gather_samples(samples: Tensor) -> Tensor:
    """Samples of all processes, with a gradient: for statistics of the whole batch (a mean, a covariance).

    Every process gets the whole batch and computes the same value from it. In the backward pass the gradients of all
    processes are summed and each takes its own part; after DDP's averaging of parameter gradients, that is exactly the
    gradient of one process with the whole batch.

    Args:
        samples: (B, ...); B may differ between processes.

    Returns:
        (S, ...) in the order of the processes, S the sum of B; ``samples`` itself without a process group.

    Examples:
        >>> gather_samples(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if world_size() == 1:
        return samples
    gathered: Tensor = _GatherSamples.apply(samples)  # type: ignore[no-untyped-call]
    return gathered


def sum_over_processes(tensors: Sequence[Tensor], *, average: bool = False) -> list[Tensor]:
    """Tensors added up over the processes, all in one exchange. No gradient flows.

    Args:
        tensors: one or more, of the same shapes in every process, on one device.
        average: divide by the number of processes; default False.

    Returns:
        New tensors of the same shapes and types; the tensors themselves without a process group.

    Examples:
        >>> sum_over_processes([torch.ones(2)], average=True)
        [tensor([1., 1.])]
    """
    if world_size() == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    flat = torch.cat([t.detach().flatten().to(dtype) for t in tensors])
    dist.all_reduce(flat)
    if average:
        flat /= world_size()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over the processes (FSDP2), which must all ask; any other one itself.

    Examples:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    # A DTensor is known by its method: its module takes long to import.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast(Tensor, gather())


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded, in the same memory; any other one itself.

    Examples:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else cast(Tensor, part())


class _GatherSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor) -> Tensor:
        sizes = _sizes(samples)
        ctx.start, ctx.size = sum(sizes[: rank()]), len(samples)
        return _gather(samples.detach(), sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, ctx.start, ctx.size)


def _sizes(tensor: Tensor) -> list[int]:
    own = torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device)
    sizes = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own)
    return torch.cat(sizes).tolist()


def _gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    # Collectives want equal shapes: shorter parts are padded, and the padding is cut off again.
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
