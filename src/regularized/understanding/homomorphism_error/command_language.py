"""A small language of commands, for questions of composition: ``jump twice then walk`` means ``JUMP JUMP WALK``.

In the manner of SCAN, as An and Du (2026) use it: four words, two modifiers, a connective, and noise words that mean
nothing. Longer commands than any in training are the test.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count

__all__ = ["MODIFIERS", "VOCABULARY", "WORDS", "commands", "encode"]

WORDS = ("walk", "jump", "look", "turn")
MODIFIERS = ("twice", "thrice")
_NOISE = ("foo", "bar", "baz")
_PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (
    _PAD,
    *sorted([*WORDS, *(word.upper() for word in WORDS), *MODIFIERS, *_NOISE, "then"]),
)
"""All tokens, the padding first; a token's number is its place."""


@allowed(words=count(1), noise=count(0), largest=count(1))
def commands(
    words: int, *, noise: int = 0, largest: int = 1000, seed: int = 0
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Different commands with their meaning, in the order in which they were drawn.

    Args:
        words: words of a command, >= 1; each is modified or not, with equal chances for nothing, twice and thrice.
        noise: noise words that are put in at any place.
        largest: at most so many commands; ten times as many are drawn at most.
        seed: of the draws, as Python's ``random`` makes them (the official order of draws).

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> command, meaning = commands(2, seed=1)[0]
        >>> " ".join(command), " ".join(meaning)
        ('jump twice then walk', 'JUMP JUMP WALK')
    """
    draws = random.Random(seed)
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], None] = {}
    for _ in range(10 * largest):
        if len(found) >= largest:
            break
        chosen = [draws.choice(WORDS) for _ in range(words)]
        modified = [draws.choice((None, *MODIFIERS)) for _ in range(words)]
        command: list[str] = []
        meaning: list[str] = []
        for word, modifier in zip(chosen, modified, strict=True):
            command += ["then"] if command else []
            command += [word] if modifier is None else [word, modifier]
            meaning += [word.upper()] * (1 if modifier is None else 2 + MODIFIERS.index(modifier))
        for _ in range(noise):
            place = draws.randint(0, len(command))
            command.insert(place, draws.choice(_NOISE))
        found[tuple(command), tuple(meaning)] = None
    return list(found)


def encode(sequences: Sequence[Sequence[str]], *, length: int | None = None) -> Tensor:
    """Tokens as numbers, padded behind with 0.

    Args:
        sequences: of words of :data:`VOCABULARY`.
        length: of the result; default the longest.

    Raises:
        ValueError: a word is unknown, or a sequence is longer than ``length``.

    Examples:
        >>> encode([("jump", "twice"), ("walk",)])
        tensor([[ 8, 13],
                [14,  0]])
    """
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    if unknown := {word for sequence in sequences for word in sequence} - set(numbers):
        raise ValueError(f"unknown words {sorted(unknown)}; the language has {list(VOCABULARY[1:])}")
    longest = max(map(len, sequences), default=0)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a sequence has {longest} words, more than length={length}")
    table = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence)] = torch.tensor([numbers[word] for word in sequence])
    return table
