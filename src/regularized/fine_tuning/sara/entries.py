"""Train chosen entries of a model's parameters and nothing else, at the memory of those entries.

The parameters stay where and what they are: real ones, with their names, in the model's ``state_dict``; the forward
pass is the model's own. The chosen entries are *also* one flat vector, the leaf that an optimizer trains:

- as soon as the backward pass has finished the gradient of one parameter, a hook gathers the chosen entries of it into
  the vector's gradient and frees the dense one, so that at most one dense gradient is alive at a time;
- after the optimizer's step the vector is written into the parameters, in place.

So the entries that are not chosen have neither gradient nor optimizer state, and keep their bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Segment",
    "SparseEntries",
    "checksum",
    "checksum_of_rest",
    "master_dtype",
    "read_entries",
    "write_entries",
]

# Shapes: K chosen entries at first, k of them that are still trained, T parameters.

_CHUNK = 1 << 20
_MULTIPLIER, _INCREMENT = -7046029254386353131, 1442695040888963407  # of a 64-bit congruential generator


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which entries of a parameter are trained: float64 for float64, float32 for everything below.

    Examples:
        >>> master_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def read_entries(parameter: Tensor, index: Tensor) -> Tensor:
    """Entries of a tensor.

    Args:
        parameter: any shape.
        index: (K,) int32 or int64, positions in row-major order.

    Returns:
        (K,) copies, of the type of ``parameter``.

    Examples:
        >>> read_entries(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 2]))
        tensor([2, 3])
    """
    return parameter.detach().reshape(-1).index_select(0, index)


@torch.no_grad()
def write_entries(parameter: Tensor, index: Tensor, values: Tensor) -> None:
    """Write entries of a tensor in place.

    Args:
        parameter: any shape.
        index: (K,) int32 or int64, positions in row-major order, each once.
        values: (K,); converted to the type of ``parameter``.

    Examples:
        >>> x = torch.zeros(2, 2)
        >>> write_entries(x, torch.tensor([1]), torch.tensor([5.0]))
        >>> x
        tensor([[0., 5.],
                [0., 0.]])
    """
    values = values.to(parameter.dtype)
    if parameter.is_contiguous():
        parameter.detach().view(-1).scatter_(0, index.long(), values)
    else:  # channels_last, say: row-major order is not that of the memory
        parameter.copy_(parameter.reshape(-1).scatter(0, index.long(), values).view(parameter.shape))


def checksum(entries: Tensor, positions: Tensor | None = None) -> int:
    """A 64-bit sum over the bits of entries, each times an odd number that depends on its position.

    Computed where the tensor is, in one pass. It tells different weights from each other; it is no protection against
    an adversary. Checksums of disjoint sets of entries add up (modulo 2^64).

    Args:
        entries: floating point; (K,), or of any shape without ``positions``.
        positions: (K,) where they stand in their tensor, in row-major order; default 0, 1, 2, ...

    Examples:
        >>> checksum(torch.ones(2, 2)) == checksum(torch.ones(4)) != checksum(torch.zeros(4))
        True
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[entries.element_size()]
    flat = entries.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        if positions is None:
            place = torch.arange(start, start + len(part), device=flat.device)
        else:
            place = positions[start : start + _CHUNK].long()
        total += (part.view(bits).long() * (place * _MULTIPLIER + _INCREMENT | 1)).sum()
    return int(total.item())


def checksum_of_rest(parameter: Tensor, index: Tensor) -> int:
    """Checksum of all entries of a tensor but those at ``index``.

    Examples:
        >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
        >>> checksum_of_rest(x, torch.tensor([1])) == checksum_of_rest(y, torch.tensor([1]))
        True
    """
    return _wrapped(checksum(parameter) - checksum(read_entries(parameter, index), index))


@dataclass(slots=True)
class Segment:
    """One parameter's place in the flat vector.

    Args:
        name: name of the parameter in the model.
        parameter: the parameter itself.
        first: its entries among the K that were chosen.
        live: its entries among the k that are still trained.
        frozen: checksum of its entries that were not chosen.
    """

    name: str
    parameter: nn.Parameter
    first: slice
    live: slice
    frozen: int


class SparseEntries(nn.Module):
    """Chosen entries of parameters, all on one device and of one master type, as one trainable vector.

    Args:
        parameters: by name.
        chosen: called with each parameter; returns which entries are trained, a bool tensor of its shape.
        dtype: master type.
        late: name of a parameter whose dense gradient is kept until :meth:`collect`; see there.

    Attributes:
        values: (k,) parameter, what the optimizer trains.
        segments: the parameters and their places.

    Raises:
        RuntimeError: in the backward pass, where ``values`` have moved since the last :meth:`write`; from
            ``load_state_dict``, where the state is of other parameters, or of other weights in them.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> entries = SparseEntries(dict(layer.named_parameters()), lambda p: p.abs() < 9)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> layer.weight.grad is None, entries.values.grad.tolist()
        (True, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        >>> with torch.no_grad():
        ...     _ = entries.values.zero_()
        >>> entries.write()
        >>> layer(torch.ones(1, 3)).tolist()
        [[0.0, 0.0]]
    """

    index: Tensor
    base: Tensor
    live: Tensor

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        chosen: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        late: str | None = None,
    ) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        found = []
        position = 0
        for name, parameter in parameters.items():
            index = chosen(parameter).reshape(-1).nonzero().squeeze(1)
            where = slice(position, position + len(index))
            frozen = checksum_of_rest(parameter, index)
            self.segments.append(Segment(name, parameter, where, where, frozen))
            found.append(index if parameter.numel() >= 2**31 else index.int())
            position = where.stop
        # Positions are int32 where they fit: they are the largest thing beside the vector itself.
        self.register_buffer("index", torch.cat(found), persistent=False)
        start = torch.cat([read_entries(s.parameter, self.index[s.first]).to(dtype) for s in self.segments])
        self.register_buffer("base", start, persistent=False)
        self.register_buffer("live", torch.ones(position, dtype=torch.bool, device=start.device), persistent=False)
        self.values: nn.Parameter = nn.Parameter(start.clone())
        self._index = self.index  # of the live entries
        self._gradient: Tensor | None = None
        self._late = late
        self._handles: list[RemovableHandle] = []
        self._listen()

    # -- gradients in, values out -----------------------------------------------------------------

    def _listen(self) -> None:
        """Hook the parameters that have live entries; freeze the others."""
        self._ignore()
        for segment in self.segments:
            parameter, late = segment.parameter, segment.name == self._late
            alive = segment.live.stop > segment.live.start
            parameter.requires_grad_(alive or late)
            parameter.grad = None
            if late:
                self._handles.append(parameter.register_hook(partial(self._masked, segment)))
            elif alive:
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._collect, segment)))
        self._written = self.values._version

    def _ignore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _collect(self, segment: Segment, _: Tensor) -> None:
        if self.values._version != self._written:
            raise RuntimeError(
                "the optimizer has moved the trained entries, but nobody has written them into the model: it is not "
                "known here. Say so once, before training: sara.bind(optimizer)"
            )
        self.gather(segment)

    def _masked(self, segment: Segment, gradient: Tensor) -> Tensor:
        live = segment.live.stop - segment.live.start
        return gradient * self.dense(segment, gradient.new_ones(live))

    def gather(self, segment: Segment) -> None:
        """Move a parameter's dense gradient into the vector's."""
        dense = segment.parameter.grad
        if dense is None:
            return
        segment.parameter.grad = None
        if dense.is_sparse:
            dense = dense.to_dense()
        part = read_entries(dense, self._index[segment.live])
        self.gradient()[segment.live].add_(part)

    def gradient(self) -> Tensor:
        """(k,) the vector's gradient; zeros, in a buffer that is kept, where it has none."""
        if self.values.grad is None:
            if self._gradient is None or self._gradient.shape != self.values.shape:
                self._gradient = torch.zeros_like(self.values, requires_grad=False)
            else:
                self._gradient = self._gradient.to(self.values).zero_()
            self.values.grad = self._gradient
        return self.values.grad

    def collect(self) -> None:
        """Gather the gradient of the ``late`` parameter.

        ``DistributedDataParallel`` must hold one parameter at least. It gets the smallest one: that one's dense
        gradient, masked, stays until the processes have exchanged it.
        """
        for segment in self.segments:
            if segment.name == self._late:
                self.gather(segment)

    def write(self) -> None:
        """Write the vector into the parameters."""
        for segment in self.segments:
            if segment.live.stop > segment.live.start:
                write_entries(segment.parameter, self._index[segment.live], self.values.detach()[segment.live])
        self._written = self.values._version

    def release(self) -> None:
        """Take the hooks away; the parameters are plain ones again."""
        self._ignore()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseEntries":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._index = self.index[self.live]
        self._gradient = None
        self._written = self.values._version
        return self

    # -- the set shrinks ---------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, still: Tensor) -> None:
        """Go on with a part of the live entries; the others stay at their present values.

        Args:
            still: (k,) bool.
        """
        self.live[self.live.clone()] = still
        self.values.data = self.values.data[still]
        self.values.grad = None
        self._place()

    def _place(self) -> None:
        """Recompute where the live entries of each parameter are."""
        self._index = self.index[self.live]
        counts = torch.stack([self.live[s.first].sum() for s in self.segments]).tolist()
        position = 0
        for segment, count in zip(self.segments, counts, strict=True):
            segment.live = slice(position, position + count)
            position += count
        self._listen()

    # -- what is known of the entries --------------------------------------------------------------

    def dense(self, segment: Segment, values: Tensor) -> Tensor:
        """A tensor of the parameter's shape with the live entries' ``values`` (of this segment) and zeros elsewhere."""
        out = torch.zeros(segment.parameter.shape, dtype=values.dtype, device=values.device)
        write_entries(out, self._index[segment.live], values)
        return out

    def pick(self, segment: Segment, dense: Tensor) -> Tensor:
        """The live entries of a tensor of the parameter's shape."""
        return read_entries(dense, self._index[segment.live])

    @torch.no_grad()
    def current(self) -> Tensor:
        """(K,) present values of all entries that were ever chosen."""
        now = torch.cat([read_entries(s.parameter, self.index[s.first]).to(self.base.dtype) for s in self.segments])
        now[self.live] = self.values.detach()
        return now

    # -- state of constant shape: also a set that has shrunk loads into a fresh one ------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "values"] = self.current()
        destination[prefix + "base"] = self.base
        destination[prefix + "live"] = self.live
        destination[prefix + "mask"] = torch.cat([_packed(self.index[s.first], s.parameter) for s in self.segments])
        destination[prefix + "frozen"] = torch.tensor([s.frozen for s in self.segments], dtype=torch.int64)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("values", "base", "live", "mask", "frozen")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        missing_keys += missing
        if missing:
            return
        values, base, live, mask, frozen = (cast(Tensor, state_dict[prefix + name]) for name in names)
        problem = self._unfit(mask, frozen, values)
        if problem:
            error_msgs.append(problem)
            return
        device = self.values.device
        pieces = [
            _unpacked(part, s.parameter).to(device)
            for part, s in zip(mask.split([_bytes(s.parameter) for s in self.segments]), self.segments, strict=True)
        ]
        position = 0
        for piece, segment in zip(pieces, self.segments, strict=True):
            segment.first = slice(position, position + len(piece))
            position += len(piece)
        self.index = torch.cat(pieces)
        self.base = base.to(device).clone()
        self.live = live.to(device).clone()
        values = values.to(device)
        with torch.no_grad():
            for segment in self.segments:
                write_entries(segment.parameter, self.index[segment.first], values[segment.first])
            self.values.data = values[self.live].clone()
            self.values.grad = None
        self._place()

    def _unfit(self, mask: Tensor, frozen: Tensor, values: Tensor) -> str:
        """Why a state does not fit; empty where it does."""
        sizes = [_bytes(s.parameter) for s in self.segments]
        if mask.numel() != sum(sizes) or frozen.numel() != len(self.segments):
            return (
                f"the state has masks of {mask.numel()} bytes for {frozen.numel()} parameters; the model needs "
                f"{sum(sizes)} bytes for {len(sizes)} ({self.segments[0].name!r}, ...): it belongs to another model or "
                "selection"
            )
        for segment, part, expected in zip(self.segments, mask.split(sizes), frozen.tolist(), strict=True):
            index = _unpacked(part, segment.parameter).to(segment.parameter.device)
            if checksum_of_rest(segment.parameter, index) != expected:
                return (
                    f"{segment.name}: the weights that are not trained differ from those that the state was saved "
                    "with; load the same pretrained weights"
                )
        return "" if len(values) == int(_bits(mask)) else "the state is damaged: mask and values differ in number"


def _bits(masks: Tensor) -> Tensor:
    """Number of ones in packed masks, a scalar."""
    return torch.stack([(masks >> bit & 1).sum() for bit in range(8)]).sum()


def _bytes(parameter: Tensor) -> int:
    return -(-parameter.numel() // 8)


def _packed(index: Tensor, parameter: Tensor) -> Tensor:
    """Positions as a mask of one bit an entry, the lowest bit first."""
    mask = torch.zeros(8 * _bytes(parameter), dtype=torch.uint8, device=index.device)
    mask[index.long()] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=index.device)
    return (mask.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpacked(packed: Tensor, parameter: Tensor) -> Tensor:
    bits = torch.stack([packed >> bit & 1 for bit in range(8)], dim=1).reshape(-1)[: parameter.numel()]
    index = bits.nonzero().squeeze(1)
    return index if parameter.numel() >= 2**31 else index.int()


def _wrapped(number: int) -> int:
    """A number modulo 2^64, as a signed one."""
    return (number + 2**63) % 2**64 - 2**63
