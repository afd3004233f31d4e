"""What the contract suite checks of the random teacher: the term."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from regularized.evidence.contract import Classification, Subject, plain
from regularized.evidence.models import seeded
from regularized.self_supervised.random_teacher.teacher import RandomTeacher
from regularized.self_supervised.random_teacher.term import MatchRandomTeacher

FEATURES, CLASSES = 5, 3
TASK = Classification(FEATURES, CLASSES, hidden=(8,), random_labels=True)


def fixed_teacher() -> nn.Module:
    """A teacher that is the same whatever the seed."""
    return seeded(7, TASK.model)


def _terms() -> Mapping[str, nn.Module]:
    return {**plain(), "match": MatchRandomTeacher(fixed_teacher())}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "match": MatchRandomTeacher(fixed_teacher(), weight=0.0)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    inputs = TASK.data(8, 1)["inputs"].requires_grad_()
    return RandomTeacher(TASK.model(), fixed_teacher()), (inputs,)


def subjects() -> list[Subject]:
    """The term beside a supervised loss, as a control."""
    return [Subject("term", model=TASK.model, terms=_terms, off=_off, plain=plain, data=TASK.data, part=_part)]
