"""Labels without people: the assistant's own grade, recalibrated by the similarity of answer and reference."""

import warnings

import torch
from torch import Tensor

__all__ = ["checked_grades", "combined_grades"]


def combined_grades(self_evaluation: Tensor, cosine: Tensor, *, highest: int = 9) -> Tensor:
    """Whole grades from both scores: ``round(clip((s_e + 9 max(0, cos)) / 2, 0, 9))``.

    The paper's own rule is not in its repository; this is the plain average of the two on one scale. Half a grade is
    rounded to the even one.

    Args:
        self_evaluation: s_e, (n,): the assistant's expected digit for its answer, seen beside the reference.
        cosine: cosine of the embeddings of answer and reference, (n,); below 0 it counts as 0.
        highest: best grade; default 9.

    Returns:
        (n,) int64.

    Raises:
        ValueError: shapes differ, a score is not in [0, highest], or a cosine not in [-1, 1].

    Examples:
        >>> combined_grades(torch.tensor([8.0, 8.0]), torch.tensor([0.9, -0.2]))
        tensor([8, 4])
    """
    if self_evaluation.shape != cosine.shape:
        raise ValueError(
            f"each answer has one grade and one cosine, got {tuple(self_evaluation.shape)} and {tuple(cosine.shape)}"
        )
    for name, scores, low, high in (("self_evaluation", self_evaluation, 0, highest), ("cosine", cosine, -1, 1)):
        if not bool(((scores >= low - 1e-5) & (scores <= high + 1e-5)).all()):
            raise ValueError(f"{name} must be in [{low}, {high}], got {scores.flatten()[:5].tolist()} ...")
    mean = (self_evaluation + highest * cosine.clamp(min=0.0)) / 2
    return checked_grades(mean.clamp(0, highest).round(), highest=highest)


def checked_grades(grades: Tensor, *, highest: int = 9) -> Tensor:
    """Grades as whole numbers, after looking at them.

    Args:
        grades: (n,), whole numbers of any type.
        highest: best grade; default 9.

    Returns:
        (n,) int64.

    Raises:
        ValueError: a grade is fractional or not in 0 ... ``highest``.

    Warns:
        UserWarning: all grades are equal.

    Examples:
        >>> checked_grades(torch.tensor([0.0, 9.0]))
        tensor([0, 9])
    """
    whole = grades.round()
    wrong = ~((grades == whole) & (grades >= 0) & (grades <= highest))
    if bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"grades must be whole numbers from 0 to {highest}, got {float(grades.flatten()[row]):g} in row {row}; "
            "round and clip them first"
        )
    if grades.numel() > 1 and bool((grades == grades.flatten()[0]).all()):
        warnings.warn(
            f"all {grades.numel()} grades are {int(grades.flatten()[0])}: there is nothing to learn, and no "
            "correlation with them is defined. Are answers of different quality among them?",
            stacklevel=2,
        )
    return grades.to(torch.int64)
