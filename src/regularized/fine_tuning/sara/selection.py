"""Which weights of a model are small: patterns of names, and one threshold over all tensors together."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from regularized.fine_tuning.sara.entries import master_dtype
from regularized.mechanisms.ranges import allowed, between

__all__ = ["below", "check_selection", "magnitude_threshold", "trainable_parameters"]


def below(values: Tensor, threshold: float) -> Tensor:
    """Entries of absolute value below the threshold, compared in float32 at least; bool, of the shape of ``values``.

    Examples:
        >>> below(torch.tensor([-0.5, 1.0, 2.0]), 1.0)
        tensor([ True, False, False])
    """
    return values.detach().to(master_dtype(values.dtype)).abs() < threshold


FRACTION = between(0.0, 1.0, "()", "the share of weights to train")


@allowed(fraction=FRACTION)
@torch.no_grad()
def magnitude_threshold(tensors: Iterable[Tensor], fraction: float) -> float:
    """The threshold below which a fraction of all entries lies in absolute value; exact for float32.

    Found by counting bit patterns, in memory of one tensor: non-negative floats order like their bits.

    Args:
        tensors: any shapes and floating types; an iterable that can be gone through twice.
        fraction: in (0, 1).

    Returns:
        The entry of rank ``round(fraction * N)``, counted from 0: so many lie below it unless there are ties.

    Raises:
        ValueError: ``fraction`` is outside (0, 1), or there are no entries.

    Examples:
        >>> magnitude_threshold([torch.tensor([-1.0, 3.0]), torch.tensor([0.5, -2.0])], 0.5)
        2.0
    """
    every = [tensor.detach() for tensor in tensors]
    total = sum(tensor.numel() for tensor in every)
    if total == 0:
        raise ValueError("magnitude_threshold needs at least one entry")
    left = min(round(fraction * total), total - 1)

    def bits(tensor: Tensor) -> Tensor:
        return tensor.float().abs().view(-1).view(torch.int32) if tensor.is_contiguous() else bits(tensor.contiguous())

    def at(counts: Tensor) -> tuple[int, int]:
        """The bin in which the entry of rank ``left`` is, and how many are before it."""
        below = counts.cumsum(0)
        bin_ = int((below > left).nonzero()[0].item())
        return bin_, int(below[bin_] - counts[bin_])

    high = sum(torch.bincount(bits(t) >> 16, minlength=1 << 15).cpu() for t in every)
    assert isinstance(high, Tensor)
    top, before = at(high)
    left -= before
    low = sum(torch.bincount(b[b >> 16 == top] & 0xFFFF, minlength=1 << 16).cpu() for b in map(bits, every))
    assert isinstance(low, Tensor)
    bottom, _ = at(low)
    return torch.tensor(top << 16 | bottom, dtype=torch.int32).view(torch.float32).item()


def trainable_parameters(
    model: nn.Module, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Parameters by name, each once however often it is shared; those with ``requires_grad=False`` are left out.

    Args:
        model: the model.
        include: patterns of names, as ``fnmatch`` knows them.
        exclude: patterns of names to leave out.

    Raises:
        ValueError: a pattern matches nothing, nothing is left, or the values are quantized, sharded, or not there.

    Examples:
        >>> list(trainable_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), exclude=["*.bias"]))
        ['0.weight', '1.weight']
    """
    include, exclude = tuple(include), tuple(exclude)
    found: dict[str, nn.Parameter] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        wanted = [pattern for pattern in include if fnmatchcase(name, pattern)]
        unwanted = [pattern for pattern in exclude if fnmatchcase(name, pattern)]
        used.update(wanted, unwanted)
        if wanted and not unwanted:
            _check_tensor(name, parameter)
            if parameter.requires_grad:
                found[name] = parameter
    if unused := [pattern for pattern in (*include, *exclude) if pattern not in used]:
        names = [name for name, _ in model.named_parameters()]
        raise ValueError(f"the pattern {unused[0]!r} matches no parameter; there are {names[:8]}, ...")
    if not found:
        raise ValueError(
            "no parameter is left to train: all are excluded or have requires_grad=False; model.requires_grad_(True) "
            "makes them available"
        )
    return found


def check_selection(parameters: Mapping[str, Tensor], count: int, threshold: float) -> None:
    """Make sure that a threshold selects something and, unless it is infinite, not everything.

    Args:
        parameters: the tensors that it was applied to.
        count: how many entries it selects.
        threshold: the threshold.

    Raises:
        ValueError: with the threshold and the quantiles of the absolute values.

    Examples:
        >>> check_selection({"weight": torch.ones(3)}, 2, 1.0)
    """
    total = sum(tensor.numel() for tensor in parameters.values())
    if 0 < count < total or (count and threshold == math.inf):
        return
    stride = max(1, total // 100_000)
    sample = torch.cat([t.detach().reshape(-1)[::stride].float().cpu() for t in parameters.values()])
    shares = (0.01, 0.05, 0.1, 0.2, 0.5)
    quantiles = torch.quantile(sample.abs(), torch.tensor(shares)).tolist()
    table = ", ".join(f"{share:.0%} below {value:.3g}" for share, value in zip(shares, quantiles, strict=True))
    what = "every weight is" if count else "no weight is"
    raise ValueError(
        f"{what} below the threshold {threshold:.4g}; of the absolute values {table}. Choose threshold=... there, or "
        "fraction=0.1" + ("; to train everything, threshold=float('inf')" if count else "")
    )


def _check_tensor(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        raise ValueError(
            f"{name} is quantized ({parameter.dtype}), so its small entries cannot be trained; load the model in "
            f"float32 or bfloat16, or leave it out: exclude=[{name!r}]"
        )
    if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} has no values yet; load the weights first")
    if hasattr(parameter, "placements"):
        raise ValueError(
            f"{name} is sharded (DTensor, FSDP2): the entries of a shard have no place in the whole here. Use DDP, or "
            "one process"
        )
