"""The two views of a graded answer as token sequences: the same prompt with and without the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.alignment.self_judge.labels import checked_grades
from regularized.mechanisms.ranges import between, check_fields

__all__ = ["RESPONSE", "Answer", "View", "prompt", "view_of"]

RESPONSE = "### Response:\n"
"""What a prompt ends with; the grade follows. The line break keeps the digit a token of its own."""

_GRADE = between(0, 9, meaning="the paper's grades", whole=True).or_none("a grade that is to be found")
_RULE = "Grade the answer with a whole number from 0 (useless) to 9 (perfect). Reply with the number alone."


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is to be graded.

    Args:
        key: name of the sample, by which its two views are aligned.
        question: the instruction x.
        answer: the assistant's answer y.
        reference: a good answer y*; None where there is none, as in use.
        grade: 0 to 9, to learn from; None where it is to be found.

    Raises:
        ValueError: the grade is fractional or not in 0 ... 9.

    Examples:
        >>> Answer("1", "2 + 2?", "5", reference="4", grade=1).grade
        1
    """

    key: str
    question: str
    answer: str
    reference: str | None = None
    grade: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, grade=_GRADE)


def prompt(answer: Answer, *, with_reference: bool) -> str:
    """The words that a judge reads; with and without the reference they differ in that section alone.

    Args:
        answer: what is to be graded.
        with_reference: the teacher's view.

    Raises:
        ValueError: the view needs a reference, and there is none.

    Examples:
        >>> print(prompt(Answer("1", "2 + 2?", "4", reference="four"), with_reference=True))
        Grade the answer with a whole number from 0 (useless) to 9 (perfect). Reply with the number alone.
        <BLANKLINE>
        [Question]
        2 + 2?
        <BLANKLINE>
        [Reference]
        four
        <BLANKLINE>
        [Answer]
        4
        <BLANKLINE>
        ### Response:
        <BLANKLINE>
    """
    sections = [_RULE, f"[Question]\n{answer.question}"]
    if with_reference:
        if answer.reference is None:
            raise ValueError(f"sample {answer.key!r} has no reference; score it with with_reference=False")
        sections.append(f"[Reference]\n{answer.reference}")
    return "\n\n".join([*sections, f"[Answer]\n{answer.answer}", RESPONSE])


@dataclass(frozen=True, slots=True)
class View:
    """One view of several answers, padded at the left, so that all prompts end in the last column; see :func:`view_of`.

    Args:
        keys: names of the samples.
        tokens: (n, L) int64.
        mask: (n, L) bool, False at the padding.
        grades: (n,) int64 in 0 ... 9; None where there are none.

    Raises:
        ValueError: shapes do not fit.

    Examples:
        >>> view = view_of([Answer("1", "2 + 2?", "5")], lambda text: list(text.encode()), with_reference=False)
        >>> view.keys, bool(view.mask.all()), view.grades
        (('1',), True, None)
    """

    keys: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    grades: Tensor | None = None

    def __post_init__(self) -> None:
        n, shape = len(self.keys), tuple(self.tokens.shape)
        graded = None if self.grades is None else tuple(self.grades.shape)
        if len(shape) != 2 or shape[0] != n or self.mask.shape != shape or graded not in (None, (n,)):
            raise ValueError(
                f"a view of {n} answers has tokens and mask ({n}, L) and grades ({n},) or None; got {shape}, "
                f"{tuple(self.mask.shape)} and {graded}"
            )

    def aligned_with(self, other: "View") -> "View":
        """These samples in the order of another view's.

        Args:
            other: the other view.

        Raises:
            ValueError: a key occurs twice, is missing in one view, or has two grades.

        Examples:
            >>> t, m = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)
            >>> View(("a", "b"), t, m).aligned_with(View(("b", "a"), t, m)).keys
            ('b', 'a')
        """
        place = {key: row for row, key in enumerate(self.keys)}
        only = sorted(set(self.keys) ^ set(other.keys))
        if len(place) < len(self.keys) or len(self.keys) != len(other.keys) or only:
            raise ValueError(
                f"two views need the same keys, each once: {len(self.keys)} and {len(other.keys)} samples, in one view "
                f"only: {only[:3]} ({len(only)} in all)"
            )
        rows = torch.tensor([place[key] for key in other.keys])
        grades = None if self.grades is None else self.grades[rows]
        if grades is not None and other.grades is not None and not torch.equal(grades, other.grades):
            row = int((grades != other.grades).nonzero()[0])
            raise ValueError(
                f"sample {other.keys[row]!r} has the grade {int(grades[row])} in one view and {int(other.grades[row])} "
                "in the other; both views learn the same"
            )
        return View(other.keys, self.tokens[rows], self.mask[rows], grades)


def view_of(
    answers: Sequence[Answer],
    encode: Callable[[str], Sequence[int]],
    *,
    with_reference: bool,
    pad_id: int = 0,
    max_length: int = 1024,
    words: Callable[..., str] = prompt,
) -> View:
    """One view of answers as tokens.

    Args:
        answers: to be graded; all with a grade, or none.
        encode: text to token ids: a tokenizer's ``encode``.
        with_reference: which view.
        pad_id: token at the left of shorter ones; it is masked.
        max_length: of a sequence, with two tokens for the grade and the end; default 1,024 (official code). A longer
            one is refused, since cutting it would cut the grade.
        words: makes the text, called like :func:`prompt`, which is the default.

    Returns:
        The view.

    Raises:
        ValueError: there is no answer, a key occurs twice, a prompt is too long, or only some have a grade.

    Examples:
        >>> two = [Answer("a", "1 + 1?", "2", "2", 9), Answer("b", "1 + 2?", "12", "3", 0)]
        >>> view = view_of(two, lambda text: list(text.encode()), with_reference=False)
        >>> view.grades, view.mask[0].sum() < view.mask[1].sum()
        (tensor([9, 0]), tensor(True))
    """
    if not answers:
        raise ValueError("there is no answer to grade")
    keys = tuple(answer.key for answer in answers)
    if len(set(keys)) < len(keys):
        raise ValueError(f"{len(keys)} answers have {len(set(keys))} different keys; each needs one of its own")
    rows = [torch.as_tensor(list(encode(words(answer, with_reference=with_reference)))) for answer in answers]
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    if len(rows[longest]) + 2 > max_length:
        raise ValueError(
            f"sample {keys[longest]!r} has {len(rows[longest])} tokens, and {max_length} hold a prompt of at most "
            f"{max_length - 2} and its grade: shorten the texts, or raise max_length if the model takes more"
        )
    given = [answer.grade for answer in answers if answer.grade is not None]
    if given and len(given) < len(answers):
        raise ValueError(f"{len(given)} of {len(answers)} answers have a grade; grade all of them, or none")
    tokens = torch.full((len(rows), len(rows[longest])), pad_id, dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, -len(row) :] = row
        mask[number, -len(row) :] = True
    return View(keys, tokens, mask, checked_grades(torch.tensor(given)) if given else None)
