"""Objectives that would train, and not for what was meant: told when they are built, or at their first step.

None of these ends in an error by itself; the loss falls, and nothing was learnt from the labels:

- a loss in the place of a term (``nn.CrossEntropyLoss``, ``EarlyLearningLoss``): its ``forward`` takes logits;
- two terms that are each the task: the labels count twice;
- no term that is the task: penalties alone;
- a causal language model whose labels are its inputs, and a task that does not shift them: it learns to copy.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from regularized.training.step import Batch, Step, takes
from regularized.training.terms import CrossEntropy

__all__ = ["FirstStep", "check_terms"]


def check_terms(terms: Mapping[str, nn.Module]) -> None:
    """Look at the terms of an objective that is being built.

    Args:
        terms: by name.

    Raises:
        TypeError: one is a loss of logits and targets, and no term.

    Warns:
        UserWarning: two of them are each the task.

    Examples:
        >>> import pytest
        >>> with pytest.raises(TypeError, match=r"give CrossEntropy\\(\\) of regularized.training"):
        ...     check_terms({"task": nn.CrossEntropyLoss()})
    """
    for name, term in terms.items():
        if getattr(term, "contributes", True) and not takes(term.forward, None):
            raise TypeError(
                f"term {name!r} must have forward(step); {type(term).__name__} is a loss and takes "
                f"{', '.join(_needed(term))}. Instead, {_remedy(term)}"
            )
    tasks = [name for name, term in terms.items() if _is_task(term)]
    if len(tasks) > 1:
        kinds = " and ".join(f"{name!r} ({type(terms[name]).__name__})" for name in tasks)
        warnings.warn(
            f"terms {kinds} are each the task, so that the labels count {len(tasks)} times: keep one of them "
            "(ProgressiveDistillation and the like stand in the place of CrossEntropy)",
            stacklevel=4,
        )


class FirstStep:
    """Watches the first micro-batch of a training.

    Args:
        terms: by name, those that contribute to the loss.
        step: the micro-batch, before any term has seen it.

    Raises:
        ValueError: from :meth:`close`, see there.
    """

    def __init__(self, terms: Mapping[str, nn.Module], step: Step) -> None:
        self._terms = terms
        self._step = step
        self._batch = step.batch
        self._watched = _Watched.of(step.batch)
        step.batch = self._watched

    def close(self) -> None:
        """Say what was wrong; the step is as it was.

        Raises:
            ValueError: a model of causal language is taught to copy its input.

        Warns:
            UserWarning: no term looked at the targets, or at the batch; or labels are equal to the inputs.
        """
        self._step.batch = self._batch
        self._check_task()
        if any(isinstance(term, CrossEntropy) and not term.shift for term in self._terms.values()):
            self._check_shift()

    def _check_task(self) -> None:
        names, targets = list(self._terms), self._batch.targets
        if targets is not None and not self._watched.was_asked:
            what = "looks at the targets of the batch, so that nothing is learnt from them"
        elif targets is None and all(getattr(term, "per_step", False) for term in self._terms.values()):
            what = "looks at the batch"
        else:
            return
        warnings.warn(
            f"none of the terms {names} {what}. Add the task, such as "
            '{"task": CrossEntropy(), ...}; or, where it is meant, yield batches without targets',
            stacklevel=5,
        )

    def _check_shift(self) -> None:
        ids, targets = _token_ids(self._batch), self._batch.targets
        if ids is None or targets is None or targets.is_floating_point() or targets.shape != ids.shape:
            return
        ignored = next(term.ignore_index for term in self._terms.values() if isinstance(term, CrossEntropy))
        with torch.no_grad():  # where this waits for the device, it does so once a training
            kept = targets != ignored
            is_copy = bool(kept.any()) and bool((targets == ids)[kept].all())
        if not is_copy:
            return
        message = (
            "the labels are the inputs themselves, position by position: the model learns to copy. To predict the next "
            "token give CrossEntropy(shift=True)"
        )
        if _is_causal(self._step.model):
            raise ValueError(message)
        warnings.warn(message, stacklevel=5)


class _Watched(Batch):
    """A batch that knows whether somebody asked for its targets."""

    __slots__ = ("_targets", "was_asked")

    was_asked: bool

    @classmethod
    def of(cls, batch: Batch) -> "_Watched":
        watched = cls(batch.inputs, batch.targets, batch.index, batch.extras, batch.whole)
        watched.was_asked = False
        return watched

    @property
    def targets(self) -> Tensor | None:
        self.was_asked = True
        return self._targets

    @targets.setter
    def targets(self, value: Tensor | None) -> None:
        self._targets = value


def _needed(term: nn.Module) -> list[str]:
    empty = inspect.Parameter.empty
    return [name for name, given in inspect.signature(term.forward).parameters.items() if given.default is empty]


def _is_task(term: nn.Module) -> bool:
    return isinstance(term, CrossEntropy) or bool(getattr(term, "is_task", False))


def _remedy(loss: nn.Module) -> str:
    """What to give in the place of a loss."""
    kind = type(loss)
    if isinstance(loss, nn.CrossEntropyLoss):
        return "give CrossEntropy() of regularized.training"
    if (term := next(_terms_beside(kind), None)) is not None:
        return f"give {term.__name__}(...) of {term.__module__}, which is the same as a term"
    made = f"nn.{kind.__name__}(reduction='none')" if kind.__module__.startswith("torch.nn.") else "your_function"
    return f"give Loss({made}) of regularized.training, which takes one value a sample"


def _terms_beside(loss: type[nn.Module]) -> Iterator[type[Any]]:
    """The term of a technique whose loss this is: of the same name without ``Loss``, in the same package."""
    name = loss.__name__.removesuffix("Loss")
    if name == loss.__name__ or not loss.__module__.startswith("regularized."):
        return
    package = loss.__module__.rpartition(".")[0]
    for module in (loss.__module__, package):
        found = getattr(import_module(module), name, None)
        if isinstance(found, type):
            yield found


def _token_ids(batch: Batch) -> Tensor | None:
    """The input of a language model: integers of shape (B, L)."""
    given = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    is_text = isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point()
    return given if is_text else None


def _is_causal(model: nn.Module) -> bool:
    return any(part in type(model).__name__ for part in ("CausalLM", "LMHeadModel"))
