"""Exponential-Golomb code: the code that BackSlash reckons with. Frequent values are short, and no table of lengths.

A value has the rank of its frequency, r = 0, 1, 2, ...; of order k its code word is ``r + 2^k`` in binary, after as
many zeros as that has digits beyond the first k + 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count

__all__ = ["Ranking", "by_frequency", "golomb_decode", "golomb_encode", "golomb_lengths", "rank_symbols"]

ORDER = count(0, "the order of the code", "the papers use 0")


class Ranking(NamedTuple):
    """Whole numbers by their frequency.

    Attributes:
        symbols: (n,) int64, the most frequent first; of equally frequent ones the nearer to zero, the positive first.
        counts: (n,) int64, how often each occurs.
        ranks: position in ``symbols`` of each given number, of their shape.
    """

    symbols: Tensor
    counts: Tensor
    ranks: Tensor


def rank_symbols(numbers: Tensor) -> Ranking:
    """Sort whole numbers by their frequency.

    Args:
        numbers: any shape, int64.

    Examples:
        >>> rank_symbols(torch.tensor([0, -1, 5, 5, 1])).symbols
        tensor([ 5,  0,  1, -1])
    """
    symbols, inverse, counts = numbers.unique(return_inverse=True, return_counts=True)
    order = by_frequency(symbols, counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Ranking(symbols[order], counts[order], place[inverse])


def by_frequency(symbols: Tensor, counts: Tensor) -> Tensor:
    """Where each number goes: the most frequent first, of equals the nearer to zero, of these the positive.

    Args:
        symbols: (n,) int64, different numbers.
        counts: (n,) int64.

    Returns:
        (n,) int64, the positions in that order.
    """
    near = torch.argsort(2 * symbols.abs() + (symbols < 0))
    return near[torch.argsort(counts[near], descending=True, stable=True)]


@allowed(order=ORDER)
def golomb_lengths(ranks: Tensor, *, order: int = 0) -> Tensor:
    """Bits of each code word, ``2 floor(log2(r / 2^k + 1)) + 1 + k``.

    Args:
        ranks: whole numbers from 0, any shape.
        order: k; default 0, the papers'.

    Returns:
        int64, of their shape.

    Examples:
        >>> golomb_lengths(torch.arange(7))
        tensor([1, 3, 3, 5, 5, 5, 5])
    """
    digits = torch.frexp((ranks + 2**order).double()).exponent.long()  # binary digits of r + 2^k
    return 2 * digits - 1 - order


@allowed(order=ORDER)
def golomb_encode(ranks: Tensor, *, order: int = 0) -> bytes:
    """Code words one after the other, the first bit highest; the last byte is filled up with zeros.

    Args:
        ranks: (n,) whole numbers from 0, in the order to be written.
        order: k; default 0.

    Examples:
        >>> golomb_encode(torch.tensor([0, 2, 0])).hex()  # 1 011 1 000
        'b8'
    """
    ends = golomb_lengths(ranks, order=order).cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    bits = torch.zeros(math.ceil(total / 8) * 8, dtype=torch.uint8)
    words = ranks + 2**order
    for digit in range(int(words.max()).bit_length() if len(words) else 0):
        bits[ends[words >> digit & 1 == 1] - 1 - digit] = 1
    values = bits.view(-1, 8).int() * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
    return bytes(values.sum(1).tolist())


@allowed(number=count(0), order=ORDER)
def golomb_decode(data: bytes, number: int, *, order: int = 0) -> Tensor:
    """Read what :func:`golomb_encode` wrote.

    Args:
        data: the bytes.
        number: how many ranks they hold.
        order: k.

    Returns:
        (number,) int64.

    Raises:
        ValueError: there are fewer code words, or one is longer than any that is written.

    Examples:
        >>> golomb_decode(bytes.fromhex("b8"), 3)
        tensor([0, 2, 0])
    """
    bits = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""
    ranks, place = [], 0
    for read in range(number):
        first = bits.find("1", place)
        end = 2 * first - place + 1 + order
        if first < 0 or end > len(bits) or first - place > 62:
            raise ValueError(f"the code ends or breaks after {read:,} of {number:,} values: it is damaged")
        ranks.append(int(bits[first:end], 2) - 2**order)
        place = end
    return torch.tensor(ranks, dtype=torch.int64)
