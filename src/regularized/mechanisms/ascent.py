"""Steps uphill: the direction in which a loss rises fastest, and weights that are elsewhere for one pass.

Sharpness-aware methods look at the loss a little uphill of where the weights are. What they share is here: one norm
over all tensors, on the device; a step of fixed length along the gradient; weights moved and put back bit for bit; and
batch normalisation whose running statistics do not notice the second pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ascent_direction", "frozen_statistics", "global_norm", "moved"]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, as if they were one vector.

    Args:
        tensors: one or more, of any shapes, on one device.

    Returns:
        Scalar on that device, in float32 at least: the host does not wait for it.

    Examples:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[0.0], [4.0]])])
        tensor(5.)
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    norms: list[Tensor] = list(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    total: Tensor = torch.stack(norms).norm()
    return total


def ascent_direction(gradients: Sequence[Tensor], radius: float, *, eps: float = 1e-12) -> list[Tensor]:
    """The step of length ``radius`` that raises the loss most, to first order: ``radius * g / (|g| + eps)``.

    The length is that of all tensors together. Multiplying the loss by a constant changes nothing, so the gradients may
    carry the factor of a gradient scaler. A zero gradient gives a zero step; one that is not finite a step that is not.

    Args:
        gradients: g, one or more tensors on one device; not changed.
        radius: length of the step, >= 0.
        eps: added to the norm; default 1e-12.

    Returns:
        New tensors of the same shapes and types, without graph.

    Examples:
        >>> ascent_direction([torch.tensor([3.0]), torch.tensor([4.0])], radius=0.5)
        [tensor([0.3000]), tensor([0.4000])]
    """
    with torch.no_grad():
        return list(torch._foreach_mul(list(gradients), radius / (global_norm(gradients) + eps)))


@contextmanager
def moved(parameters: Sequence[Tensor], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Parameters are displaced inside; afterwards they have the very bits that they had.

    They are put back from a copy, not by subtraction, which would leave rounding errors; also when an error comes out.
    Do not use it between a forward pass and its backward pass: a graph that was recorded before sees other weights.

    Args:
        parameters: changed in place.
        offsets: added to them, one for each, of the same shape.

    Examples:
        >>> weight = torch.tensor([0.1])
        >>> with moved([weight], [torch.tensor([2.0])]):
        ...     print(weight)
        tensor([2.1000])
        >>> weight
        tensor([0.1000])
    """
    with torch.no_grad():
        copies = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(copies, list(parameters))
        torch._foreach_add_(list(parameters), list(offsets))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), copies)


@contextmanager
def frozen_statistics(module: nn.Module | None) -> Iterator[None]:
    """Batch normalisation goes on using the statistics of the batch, but its running statistics stay as they are.

    A second forward pass of the same batch would count it twice, and at weights that the model never has.

    Args:
        module: the model; None does nothing.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_statistics(norm):
        ...     _ = norm(torch.randn(8, 2) + 5)
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    norms = [
        part
        for part in (module.modules() if module is not None else ())
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.track_running_stats
    ]
    for norm in norms:  # in training mode this makes it ignore the running statistics altogether
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
