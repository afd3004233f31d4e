"""A small vocabulary learnt from a text: byte pair encoding (Sennrich et al. 2016) on bytes; no text is unknown.

Pure Python, no file, and deterministic: the same text gives the same ids on every machine. Half a megabyte is learnt
from in a second or two.
"""

import heapq
import re
from collections import Counter, defaultdict
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["BytePairs"]

# A word with the space before it, a number, a run of marks, white space: pairs are merged inside of these alone.
_PIECE = re.compile(r" ?[^\W\d]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")
_BYTES = 256


class BytePairs:
    """Byte pair encoding with a vocabulary of ``size`` ids: the 256 bytes, and the pairs merged most often.

    Args:
        text: to learn from.
        size: of the vocabulary, 256 or more. It becomes smaller where the text has no pair left that occurs twice.

    Examples:
        >>> pairs = BytePairs("low lower lowest " * 10, 260)
        >>> pairs.encode("lowest").tolist()
        [257, 101, 115, 116]
        >>> pairs.decode(pairs.encode("völlig neu"))
        'völlig neu'
    """

    def __init__(self, text: str, size: int) -> None:
        if size < _BYTES:
            raise ValueError(
                f"a vocabulary has the {_BYTES} bytes and what is merged: size must be 256 or more, got {size}"
            )
        self._rank: dict[tuple[int, int], int] = _learnt_merges(text, size - _BYTES)
        self._bytes: list[bytes] = [bytes([byte]) for byte in range(_BYTES)]
        for left, right in self._rank:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._known: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    def encode(self, text: str) -> Tensor:
        """Ids of a text, (n,) int64."""
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            known = self._known.get(piece)
            if known is None:
                known = self._known[piece] = self._merged(list(piece.encode("utf-8")))
            ids += known
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """The text of ids; a cut character becomes a replacement character."""
        return b"".join(self._bytes[number] for number in ids.tolist()).decode("utf-8", errors="replace")

    def _merged(self, ids: list[int]) -> list[int]:
        """The earliest learnt merge first, until none is left."""
        never = len(self._rank)
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda pair: self._rank.get(pair, never))
            if pair not in self._rank:
                break
            ids = _joined(ids, pair, _BYTES + self._rank[pair])
        return ids


def _learnt_merges(text: str, count: int) -> dict[tuple[int, int], int]:
    """The merges in the order in which they were learnt, with their numbers."""
    pieces = Counter(_PIECE.findall(text))
    words = [list(piece.encode("utf-8")) for piece in pieces]
    weights = list(pieces.values())
    occurrences: Counter[tuple[int, int]] = Counter()
    places: dict[tuple[int, int], set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in pairwise(word):
            occurrences[pair] += weights[number]
            places[pair].add(number)
    # Counts only fall for a pair that exists; one that is out of date goes back with its count of today.
    queue = [(-times, pair) for pair, times in occurrences.items()]
    heapq.heapify(queue)
    rank: dict[tuple[int, int], int] = {}
    while queue and len(rank) < count:
        times, pair = heapq.heappop(queue)
        if -times != occurrences[pair]:
            if occurrences[pair] > 1:
                heapq.heappush(queue, (-occurrences[pair], pair))
            continue
        if -times < 2:
            break
        new = _BYTES + len(rank)
        rank[pair] = new - _BYTES
        changed = set()
        for number in places.pop(pair):
            for old in pairwise(words[number]):
                occurrences[old] -= weights[number]
            words[number] = _joined(words[number], pair, new)
            for now in pairwise(words[number]):
                occurrences[now] += weights[number]
                if new in now:
                    places[now].add(number)
                    changed.add(now)
        for now in changed:
            heapq.heappush(queue, (-occurrences[now], now))
    return rank


def _joined(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Every occurrence of a pair replaced, from the left."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        if at + 1 < len(ids) and (ids[at], ids[at + 1]) == pair:
            out.append(new)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out
