"""What a paper offers to be checked: the smallest settings in which its technique works."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["AnySubject", "DiagnosticSubject", "NotApplicable", "ProcedureSubject", "Subject", "Terms", "needs_gpu"]

Terms: TypeAlias = Mapping[str, nn.Module]

_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class NotApplicable(Exception):
    """A check has nothing to look at here. That is neither passed nor failed, and is shown with its reason.

    Args:
        reason: why, as a sentence without a full stop.

    Examples:
        >>> print(NotApplicable("surgery has no coefficient"))
        surgery has no coefficient
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def needs_gpu(why: str) -> None:
    """End a check where there is no GPU.

    Args:
        why: what it needs one for.

    Raises:
        NotApplicable: this machine has none.
    """
    if not torch.cuda.is_available():
        raise NotApplicable(f"this machine has no GPU, {why}")


_NO_OFF = NotApplicable("no zero coefficient is declared")
_NO_PART = NotApplicable("no part to compile is declared")


@dataclass(frozen=True, slots=True)
class Subject:
    """The smallest setting in which a technique's terms train.

    Everything here must be a function at the top of a module: the two-process checks send it to other processes.

    Args:
        name: what it is, for test ids.
        model: builds the plain model; a seed is set before each call.
        terms: the terms with the technique switched on.
        plain: the terms of plain training.
        data: ``data(n, seed)`` gives a dictionary with ``inputs``, ``targets`` and ``index`` of n samples; ``index``
            is 0 ... n - 1.
        off: the terms with the technique's coefficient 0, which must equal plain training bit for bit; or why there is
            no such coefficient.
        part: builds the plain part (a loss, a layer) and example arguments, for ``torch.compile``; or why there
            is none.
        optimizer: factory called with parameter groups; default SGD with momentum.
    """

    name: str
    model: Callable[[], nn.Module]
    terms: Callable[[], Terms]
    plain: Callable[[], Terms]
    data: Callable[[int, int], Mapping[str, Tensor]]
    off: Callable[[], Terms] | NotApplicable = _NO_OFF
    part: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]] | NotApplicable = _NO_PART
    optimizer: Callable[..., torch.optim.Optimizer] = _SGD


@dataclass(frozen=True, slots=True)
class ProcedureSubject:
    """The smallest setting of a whole procedure (several networks or phases).

    Args:
        name: what it is, for test ids.
        build: builds the procedure, fresh; a seed is set before each call.
        plain: builds the same with the idea switched off: what training must not end at.
        train: ``train(procedure, epochs)`` trains for so many further epochs.
        weights: what the procedure has learned, by name; nothing of its settings.
    """

    name: str
    build: Callable[[], Any]
    plain: Callable[[], Any]
    train: Callable[[Any, int], None]
    weights: Callable[[Any], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class DiagnosticSubject:
    """The smallest setting of a diagnostic: something that looks at a model and must not touch it.

    Args:
        name: what it is, for test ids.
        model: builds the model that is looked at; a seed is set before each call.
        report: ``report(model)`` gives the findings as tensors by name, on the model's device or the CPU.
    """

    name: str
    model: Callable[[], nn.Module]
    report: Callable[[nn.Module], Mapping[str, Tensor]]


AnySubject: TypeAlias = Subject | ProcedureSubject | DiagnosticSubject
