"""One step: a batch, one shared forward pass, and everything that is computed from them once.

A :class:`Step` is what terms see. Its forward pass is computed when somebody first asks for it, and only once; so are
the log-probabilities and any further forward that a term asks for.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.training.progress import Progress

__all__ = ["Batch", "Step"]

TARGET_NAMES = ("targets", "labels", "label", "label_ids")  # the last two: columns that transformers renames
INDEX_NAME = "index"


@dataclass(slots=True)
class Batch:
    """What one forward pass is fed with, sorted by role.

    Args:
        inputs: the model's input: a tensor, or a dictionary of keyword arguments of the model.
        targets: what the task compares with; shape (B, ...), or None.
        index: (B,) int64, position of each sample in the training set, or None.
        extras: everything else of the batch, by name.
        whole: samples of the batch that this is a process's part of; None where it is no part.
    """

    inputs: Any
    targets: Tensor | None = None
    index: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    whole: int | None = None

    @classmethod
    def of(cls, raw: Any) -> "Batch":
        """Sort a raw batch: ``x``, ``(x, y)``, ``(x, y, index)``, or a mapping.

        A mapping with ``inputs`` gives the roles by name (``inputs``, ``targets`` or ``labels``, ``index``; the rest
        are extras). A mapping without it is fed to the model as keyword arguments, less ``index`` and ``targets`` or
        ``labels`` (the form of Hugging Face; ``label`` and ``label_ids`` do, too).

        Raises:
            TypeError: the form is none of these, or a model would be fed with texts.

        Examples:
            >>> Batch.of((torch.zeros(2, 3), torch.tensor([0, 1]))).size
            2
        """
        if isinstance(raw, Batch):
            return raw
        if isinstance(raw, Tensor):
            return cls(raw)
        if isinstance(raw, Mapping):
            rest = dict(raw)
            index = rest.pop(INDEX_NAME, None)
            targets = next((rest.pop(name) for name in TARGET_NAMES if name in rest), None)
            if "inputs" in rest:
                return cls(rest.pop("inputs"), targets, index, rest)
            if texts := [name for name, value in rest.items() if _is_text(value)]:
                raise TypeError(
                    f"the model would be fed with texts, in {texts}; tokenize them, or remove the columns before "
                    "(dataset.remove_columns), or give the DataLoader a `collate_fn` that does"
                )
            return cls(rest, targets, index)
        if isinstance(raw, Sequence) and 1 <= len(raw) <= 3:
            return cls(*raw)
        raise TypeError(
            f"a batch must be x, (x, y), (x, y, index) or a mapping, got {type(raw).__name__}"
            + (f" of length {len(raw)}" if isinstance(raw, Sequence) else "")
            + "; give the DataLoader a `collate_fn` that returns one of these"
        )

    @property
    def size(self) -> int:
        """Number of samples B.

        Raises:
            TypeError: there is no tensor among the inputs.
        """
        first = next(_tensors(self.inputs), None)
        if first is None:
            raise TypeError(
                f"the inputs of the batch hold no tensor, they are {type(self.inputs).__name__}; give the DataLoader "
                '(or a data set of Hugging Face: .with_format("torch")) what makes tensors'
            )
        return first.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with ``function`` applied to each tensor in it."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, Mapping):
                return {k: apply(v) for k, v in value.items()}
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*map(apply, value))
            if isinstance(value, tuple | list):
                return type(value)(apply(v) for v in value)
            return value

        return Batch(apply(self.inputs), apply(self.targets), apply(self.index), apply(self.extras), self.whole)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and sequences, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            yield from _tensors(inner)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], str))


def takes(function: Callable[..., Any], /, *positional: Any, **named: Any) -> bool:
    """Whether these arguments fit the signature; True where there is none to look at (a compiled function)."""
    try:
        inspect.signature(function).bind(*positional, **named)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _remedy(model: Callable[..., Any], inputs: Mapping[str, Any]) -> str | None:
    """What to do about a model that could not be fed by name; None where its own error has to say."""
    if isinstance(model, nn.Module) and not takes(model.forward, **inputs):
        return (
            f"a batch that is a mapping feeds the model by name, and forward{inspect.signature(model.forward)} of "
            f"{type(model).__name__} does not take {sorted(inputs)}; rename the columns to its arguments, or give the "
            "DataLoader a `collate_fn` that returns (x, y), or a mapping with `inputs`"
        )
    if lists := [name for name, value in inputs.items() if isinstance(value, list)]:
        return (
            f"{lists} are lists of tensors, which a DataLoader makes of a data set of Hugging Face that has no format; "
            'give it dataset.with_format("torch")'
        )
    return None


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Feed a model: a mapping as keyword arguments, a tuple as positional ones, anything else as the one argument.

    Raises:
        TypeError: the model has no arguments of the mapping's names.
    """
    if isinstance(inputs, Mapping):
        try:
            return model(**inputs)
        except (TypeError, AttributeError) as error:
            if (remedy := _remedy(model, inputs)) is None:
                raise
            raise TypeError(remedy) from error
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


class Step:
    """One (micro-)batch on its way through the model.

    Args:
        model: the model that is trained: the user's own module, also where a wrapper (DDP) is what must be called.
        batch: the batch, already on the model's device.
        progress: position of the optimizer step that this batch belongs to.
        hidden: outputs of tapped submodules by name, filled during the forward pass (see
            :class:`~regularized.mechanisms.taps.Taps`).
        call: how ``(model, inputs)`` is computed; a loop puts its wrapper and its autocast here. Default
            :func:`call_model`.

    Examples:
        >>> step = Step(nn.Linear(3, 2), Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))), Progress(0, 1))
        >>> step.logits.shape, step.logits is step.logits
        (torch.Size([4, 2]), True)
    """

    __slots__ = (
        "_call",
        "_forwards",
        "_grad",
        "_hidden",
        "_log_probabilities",
        "_output",
        "batch",
        "model",
        "progress",
    )

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        progress: Progress,
        hidden: Mapping[str, Tensor] | None = None,
        *,
        call: Callable[[nn.Module, Any], Any] = call_model,
    ) -> None:
        self.model: nn.Module = model
        self.batch: Batch = batch
        self.progress: Progress = progress
        self._hidden = hidden
        self._call = call
        # What is shared must have its graph even if the first who asks (a term of coefficient 0, say) records none.
        self._grad = torch.is_grad_enabled()
        self._output: Any = None
        self._log_probabilities: Tensor | None = None
        self._forwards: dict[tuple[int, int, bool], tuple[Any, Any, Any]] = {}

    @property
    def inputs(self) -> Any:
        """The model's input."""
        return self.batch.inputs

    @property
    def targets(self) -> Tensor:
        """Targets of the batch.

        Raises:
            ValueError: the batch has none.
        """
        if self.batch.targets is None:
            raise ValueError("this batch has no targets; yield (x, y), or a mapping with `targets` or `labels`")
        return self.batch.targets

    @property
    def index(self) -> Tensor:
        """(B,) position of each sample in the training set.

        Raises:
            ValueError: the batch has none.
        """
        if self.batch.index is None:
            raise ValueError(
                "a term needs the dataset index of each sample, but the batch has none; wrap your data set with "
                "regularized.training.IndexedDataset, or yield (x, y, index)"
            )
        return self.batch.index

    @property
    def output(self) -> Any:
        """What the model returns for this batch; the one shared forward pass."""
        if self._output is None:
            if self._grad and not torch.is_grad_enabled():
                with torch.enable_grad():
                    return self.output
            self._output = self._call(self.model, self.batch.inputs)
            if self._hidden is not None:  # a further forward pass would overwrite the taps
                self._hidden = dict(self._hidden)
        return self._output

    @property
    def logits(self) -> Tensor:
        """The output, or its ``logits`` where the model returns a structure (Hugging Face)."""
        output = self.output
        if isinstance(output, Tensor):
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}; a tensor or an object with `logits` is needed"
            )
        return logits

    @property
    def log_probabilities(self) -> Tensor:
        """``log_softmax(logits)`` over the last dimension, in float32 at least; computed once for all who ask."""
        if self._log_probabilities is None:
            if self._grad and not torch.is_grad_enabled():
                with torch.enable_grad():
                    return self.log_probabilities
            logits = self.logits
            dtype = torch.promote_types(logits.dtype, torch.float32)
            self._log_probabilities = F.log_softmax(logits, dim=-1, dtype=dtype)
        return self._log_probabilities

    def hidden(self, name: str) -> Tensor:
        """Output of the submodule ``name`` in the shared forward pass. A term lists it in its ``taps`` attribute."""
        if self._hidden is None:
            raise ValueError(f"no submodule is tapped; list {name!r} in the term's `taps`")
        self.output  # noqa: B018  the taps fill during the forward pass
        try:
            return self._hidden[name]
        except KeyError:
            raise KeyError(
                f"submodule {name!r} was not reached by the forward pass; tapped: {sorted(self._hidden)}"
            ) from None

    def forward(self, inputs: Any, *, model: nn.Module | None = None, grad: bool = True) -> Any:
        """A further forward pass; equal requests (same model, same input object, same ``grad``) are computed once.

        Args:
            inputs: input of the model; asking for the batch's own inputs with the step's own model and ``grad`` gives
                the shared forward pass.
            model: another network, for example an averaged copy; None is the step's own.
            grad: record the graph.
        """
        model = self.model if model is None else model
        if model is self.model and inputs is self.batch.inputs and grad:
            return self.output
        key = (id(model), id(inputs), grad)
        if key not in self._forwards:
            with torch.set_grad_enabled(grad and (self._grad or torch.is_grad_enabled())):
                # Both are kept beside the result, so that their ids cannot be taken over by other objects.
                self._forwards[key] = (model, inputs, self._call(model, inputs))
        return self._forwards[key][2]
