"""Whole numbers in few bytes, and back: an entropy coder, its tables, and two coders that need no package.

- ``"range"`` is the range coder of the package constriction, with the frequencies of the numbers themselves: within
  a few bytes of the entropy.
- ``"golomb"`` is the exponential-Golomb code over the ranks of frequency, with which BackSlash reckons. No package.
- ``"lzma"`` is what Python's standard library gives for the plain integers: what one would do without any of this.

The first two need the numbers and their frequencies: tables, one for each group of numbers or one for all, whichever
takes fewer bytes in the end. Everything read is checked against what must be there, before memory is taken for it.
"""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from regularized.compression.generalized_gaussian.golomb import by_frequency, golomb_decode, golomb_encode
from regularized.mechanisms.ranges import Choice, allowed

__all__ = ["CODER", "Coded", "Coder", "as_tensor", "decode", "encode"]

Coder: TypeAlias = Literal["range", "golomb", "lzma"]
CODER = Choice(*get_args(Coder))

_WIDTHS = (torch.int8, torch.int16, torch.int32)
_LARGEST = 2**31 - 1
_ALPHABET = 2**22  # different numbers in a table; a model of constriction has room for 2^24


class Coded(NamedTuple):
    """Groups of whole numbers as bytes.

    Attributes:
        stream: the numbers.
        tables: which numbers there are, and how often; empty where the coder needs none.
    """

    stream: bytes
    tables: bytes


class _Table(NamedTuple):
    """Different numbers in rising order, and how often each occurs; both (n,) int64."""

    symbols: Tensor
    counts: Tensor


@allowed(coder=CODER)
def encode(groups: Sequence[Tensor], *, coder: Coder = "range") -> Coded:
    """Write groups of whole numbers.

    Args:
        groups: int64 on the CPU, of any shapes, none empty, of at most 31 bits.
        coder: see above; default ``"range"``, the smallest.

    Raises:
        ImportError: the range coder is not installed; the message says how to get it.
        ValueError: there are more than 4,194,304 different numbers.

    Examples:
        >>> numbers = torch.randint(-1, 2, (4000,), generator=torch.Generator().manual_seed(0))
        >>> coded = encode([numbers], coder="golomb")
        >>> len(coded.stream)  # 1, 3 and 3 bits, each for a third
        1162
        >>> torch.equal(decode(coded, [4000], coder="golomb")[0], numbers)
        True
    """
    flat = [group.flatten() for group in groups]
    if coder == "lzma":
        together = torch.cat(flat)
        width = next(kind for kind in _WIDTHS if int(together.abs().max()) <= torch.iinfo(kind).max)
        return Coded(lzma.compress(together.to(width).numpy().astype(f"<i{width.itemsize}").tobytes()), b"")
    choices = []
    for tables in ([_table(torch.cat(flat))], [_table(group) for group in flat]):
        shared = tables * len(flat) if len(tables) == 1 else tables
        stream = (_range_encode if coder == "range" else _golomb_encode)(flat, shared)
        choices.append(Coded(stream, _write_tables(tables)))
    return min(choices, key=lambda coded: len(coded.stream) + len(coded.tables))


@allowed(coder=CODER)
def decode(coded: Coded, sizes: Sequence[int], *, coder: Coder = "range") -> list[Tensor]:
    """Read what :func:`encode` wrote.

    Args:
        coded: the bytes.
        sizes: how many numbers each group holds.
        coder: that of the writing.

    Returns:
        (size,) int64 for each group.

    Raises:
        ImportError: the range coder is not installed.
        ValueError: the bytes are damaged, or belong to other sizes. Damage that leaves a valid code is not seen here;
            a file has a checksum.
    """
    if coder == "lzma":
        return _lzma_decode(coded.stream, sizes)
    tables = _read_tables(coded.tables, sizes)
    try:
        return list((_range_decode if coder == "range" else _golomb_decode)(coded.stream, tables, sizes))
    except AssertionError as error:  # how constriction says that its words are no code
        raise ValueError(f"the stream is damaged: {error}") from error


def _table(numbers: Tensor) -> _Table:
    symbols, counts = numbers.unique(return_counts=True)
    if len(symbols) > _ALPHABET:
        raise ValueError(
            f"the weights have {len(symbols):,} different values, and a table takes {_ALPHABET:,}; give a larger step"
        )
    return _Table(symbols, counts)


def _range_encode(groups: Sequence[Tensor], tables: Sequence[_Table]) -> bytes:
    constriction, encoder = _constriction(), _constriction().stream.queue.RangeEncoder()
    for numbers, table in zip(groups, tables, strict=True):
        if len(table.symbols) > 1:  # one number alone costs nothing
            places = torch.searchsorted(table.symbols, numbers).to(torch.int32)
            encoder.encode(places.numpy(), _model(constriction, table))
    words: Any = encoder.get_compressed()
    data: bytes = words.astype("<u4").tobytes()
    return data


def _range_decode(stream: bytes, tables: Sequence[_Table], sizes: Sequence[int]) -> Iterator[Tensor]:
    constriction = _constriction()
    if len(stream) % 4:
        raise ValueError(f"the stream is damaged: {len(stream):,} bytes are no whole number of words of four")
    decoder = constriction.stream.queue.RangeDecoder(as_tensor(stream).numpy().view("<u4").astype("uint32"))
    for table, size in zip(tables, sizes, strict=True):
        if len(table.symbols) == 1:
            yield table.symbols.expand(size).clone()
        else:
            yield table.symbols[torch.from_numpy(decoder.decode(_model(constriction, table), size)).long()]


def _model(constriction: Any, table: _Table) -> Any:
    """The coder's model: it turns frequencies into whole numbers by sums and products alone, alike on all machines."""
    return constriction.stream.model.Categorical(table.counts.double().numpy(), perfect=False)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise ImportError(
            "the coder 'range' is the package constriction, which is not installed: pip install "
            "'regularized[compression]'; or write with coder='golomb' or coder='lzma', which need no package"
        ) from None
    return constriction


def _golomb_encode(groups: Sequence[Tensor], tables: Sequence[_Table]) -> bytes:
    codes = [_ranks(table)[torch.searchsorted(table.symbols, group)] for group, table in zip(groups, tables)]
    return golomb_encode(torch.cat(codes))


def _golomb_decode(stream: bytes, tables: Sequence[_Table], sizes: Sequence[int]) -> Iterator[Tensor]:
    ranks = golomb_decode(stream, sum(sizes))
    for table, part in zip(tables, ranks.split(list(sizes)), strict=True):
        if bool((part >= len(table.symbols)).any()):
            raise ValueError("the stream is damaged: it has numbers that its tables do not have")
        yield table.symbols[by_frequency(table.symbols, table.counts)[part]]


def _ranks(table: _Table) -> Tensor:
    """The rank of frequency of each number of a table."""
    order = by_frequency(table.symbols, table.counts)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks


def _lzma_decode(stream: bytes, sizes: Sequence[int]) -> list[Tensor]:
    number = sum(sizes)
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=2**28)
    try:
        data = decompressor.decompress(stream, max_length=4 * number + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"the stream is damaged: {error}") from error
    width = len(data) // number
    if not decompressor.eof or width not in (1, 2, 4) or len(data) != width * number:
        raise ValueError(f"the stream does not hold {number:,} numbers: it is damaged, or of other weights")
    numbers = torch.from_numpy(as_tensor(data).numpy().view(f"<i{width}").astype("int64"))
    return list(numbers.split(list(sizes)))


def as_tensor(data: bytes) -> Tensor:
    """(n,) uint8, a copy.

    Args:
        data: n bytes.
    """
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


# Tables: for each the number of entries, the numbers as differences, and the frequencies, all as little-endian groups
# of seven bits; compressed together.


def _write_tables(tables: Sequence[_Table]) -> bytes:
    data = bytearray()
    _write(data, len(tables))
    for symbols, counts in tables:
        first = int(symbols[0])
        _write(data, len(symbols))
        _write(data, 2 * first if first >= 0 else -2 * first - 1)
        for value in [*symbols.diff().tolist(), *counts.tolist()]:
            _write(data, value)
    return zlib.compress(bytes(data), 9)


def _read_tables(data: bytes, sizes: Sequence[int]) -> list[_Table]:
    number = sum(sizes)
    decompressor = zlib.decompressobj()
    # Each entry is of a number that occurs, so that a table has no more than there are numbers.
    most = 16 * len(sizes) + 10 * min(number, len(sizes) * _ALPHABET) + 16
    try:
        plain = decompressor.decompress(data, most)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("they are longer than any that fit the sizes, or end early")
        values = iter(_read(plain))
        groups = next(values)
        if groups not in (1, len(sizes)):
            raise ValueError(f"there are {groups} for {len(sizes)} groups")
        tables = [_read_table(values) for _ in range(groups)]
        if any(True for _ in values):
            raise ValueError("something follows behind them")
    except (zlib.error, StopIteration, ValueError) as error:
        raise ValueError(f"the tables are damaged: {str(error) or 'they end early'}") from None
    held = [number] if groups == 1 else sizes
    if [int(table.counts.sum()) for table in tables] != list(held):
        raise ValueError("the tables are damaged, or of other weights: their frequencies do not add up to the sizes")
    return tables * len(sizes) if groups == 1 else tables


def _read_table(values: Iterator[int]) -> _Table:
    length, first = next(values), next(values)
    if not 1 <= length <= _ALPHABET:
        raise ValueError(f"a table has {length} entries")
    start = first // 2 if first % 2 == 0 else -(first + 1) // 2
    steps = [next(values) for _ in range(length - 1)]
    counts = [next(values) for _ in range(length)]
    if 0 in steps or 0 in counts or max(abs(start), abs(start + sum(steps))) > _LARGEST or sum(counts) > 2**62:
        raise ValueError("an entry is out of range")
    symbols = torch.tensor([start, *steps], dtype=torch.int64).cumsum(0)
    return _Table(symbols, torch.tensor(counts, dtype=torch.int64))


def _write(data: bytearray, value: int) -> None:
    while value >= 128:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)


def _read(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if shift > 70:
            raise ValueError("a number has more than 64 bits")
        if byte < 128:
            yield value
            value = shift = 0
    if shift:
        raise ValueError("they end within a number")
