"""Tasks whose answers can be checked, as strings over one alphabet; here sums.

A task gives what fine-tuning on two losses needs: prompts, demonstrations, of which a share may be wrong, and a reward
of 1 for a right answer. Rewards are computed for a whole batch, on its device. The other task is the game of points,
:mod:`regularized.alignment.amft.points`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, between, count

__all__ = ["ALPHABET", "END", "Demonstrations", "Sums", "decode", "encode", "powers"]

ALPHABET = "0123456789+-*/()>=;"
"""The tokens, by their ids."""

END = ALPHABET.index(";")
"""The token that ends an answer."""


def encode(texts: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids (N, T), filled up with :data:`END`.

    Args:
        texts: of the letters of :data:`ALPHABET`.
        length: T; default that of the longest.

    Examples:
        >>> encode(["1+2=", "3;"])
        tensor([[ 1, 10,  2, 17],
                [ 3, 18, 18, 18]])
    """
    length = max(map(len, texts)) if length is None else length
    return torch.tensor([[ALPHABET.index(letter) for letter in text.ljust(length, ";")] for text in texts])


def decode(tokens: Tensor) -> list[str]:
    """Texts of token ids (N, T), without what stands behind the first end.

    Examples:
        >>> decode(encode(["12;;"]))
        ['12']
    """
    return ["".join(ALPHABET[i] for i in row).split(";", 1)[0] for row in tokens.tolist()]


class Demonstrations(NamedTuple):
    """Prompts with an answer each.

    Attributes:
        prompts: (N, L).
        answers: (N, T), each ends with :data:`END`.
    """

    prompts: Tensor
    answers: Tensor


class Sums:
    """Sums of numbers: ``17+08=`` is answered by ``25;``.

    Args:
        terms: numbers that are added; default 2.
        digits: of each; default 2.

    Raises:
        ValueError: there is no term, or a number has not 1 to 9 digits.

    Examples:
        >>> sums = Sums()
        >>> prompts = sums.prompts(3, torch.Generator().manual_seed(0))
        >>> shown = sums.demonstrate(prompts, torch.Generator().manual_seed(0))
        >>> decode(prompts)[0], decode(shown.answers)[0]
        ('44+39=', '83')
        >>> sums.reward(*shown)
        tensor([1., 1., 1.])
    """

    @allowed(terms=count(1), digits=between(1, 9, whole=True))
    def __init__(self, terms: int = 2, *, digits: int = 2) -> None:
        self.terms: int = terms
        self.digits: int = digits
        self.answer_length: int = len(str(terms * (10**digits - 1))) + 1

    def prompts(self, number: int, generator: torch.Generator) -> Tensor:
        """Prompts (N, L), drawn uniformly.

        Args:
            number: N.
            generator: draws them.
        """
        drawn = torch.randint(10**self.digits, (number, self.terms), generator=generator)
        return encode(["+".join(f"{n:0{self.digits}d}" for n in row) + "=" for row in drawn.tolist()])

    def values(self, prompts: Tensor) -> Tensor:
        """(N,) the sums of some prompts."""
        place = self.digits + 1
        digits = torch.stack([prompts[:, place * i : place * i + self.digits] for i in range(self.terms)], dim=1)
        return (digits * powers(10, self.digits, prompts).flip(0)).sum(dim=(1, 2))

    def reward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """(N,): 1 for the sum, without a zero in front, and an end; else 0.

        Args:
            prompts: (N, L).
            answers: (N, T).
        """
        value = self.values(prompts)[:, None]
        places = powers(10, self.answer_length - 1, prompts).flip(0)
        digits = value // places % 10
        length = (value >= places).sum(dim=1, keepdim=True).clamp_min(1)
        at = torch.arange(answers.shape[1], device=answers.device)[None, :]
        wanted = digits.gather(1, (at + digits.shape[1] - length).clamp(0, digits.shape[1] - 1))
        right = torch.where(at < length, answers == wanted, torch.where(at == length, answers == END, True))
        return (right.all(dim=1) & (answers.shape[1] > length[:, 0])).float()

    def demonstrate(self, prompts: Tensor, generator: torch.Generator, *, wrong: float = 0.0) -> Demonstrations:
        """Answers to some prompts.

        Args:
            prompts: (N, L).
            generator: decides what is wrong, and how.
            wrong: share that is answered by another number; default 0.
        """
        values = self.values(prompts)
        most = self.terms * (10**self.digits - 1)
        other = (values + torch.randint(1, most + 1, values.shape, generator=generator)) % (most + 1)
        values = torch.where(torch.rand(len(values), generator=generator) < wrong, other, values)
        return Demonstrations(prompts, encode([f"{value};" for value in values.tolist()], self.answer_length))


def powers(base: int, number: int, like: Tensor) -> Tensor:
    """``base`` to the power of 0 ... number - 1, int64, on the device of ``like``."""
    return torch.tensor([base**i for i in range(number)], device=like.device)
