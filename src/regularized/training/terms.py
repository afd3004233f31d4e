"""Terms: what a step's loss is the sum of.

A term is an ``nn.Module`` with ``forward(step) -> Tensor``, the *sum* of its loss over the items of the batch, as a
scalar. The loop divides the sums once by the global count of the items, so that gradient accumulation, an uneven last
batch and several processes give the result of one process with the whole batch.

Optional attributes:

- ``weight``: a number or a schedule; default 1.
- ``count(batch) -> int | Tensor``: what is counted; default the number of samples.
- ``per_step``: True for a penalty that does not look at the batch (on weights, say). Its ``forward`` returns the value
  itself; it is computed once an optimizer step, whatever the accumulation.
- ``is_task``: True for a term that stands in the place of the task, as ``CrossEntropy`` does: two of them are told.
- ``contributes``: False for a term that only operates on the model or the batch; its ``forward`` is not called.
- ``taps``: names of submodules whose outputs the term reads by ``step.hidden(name)``.
- ``sharding``: what the term needs of weights in shards (FSDP2): ``"forward"``, ``"weights"`` or ``"gradients"``, see
  :mod:`regularized.training.sharded`. One that says nothing is refused there; ``unsharded`` may say why it must be.
- ``strong_convexity(model) -> dict``: modulus that the term adds in each parameter with the coefficient 1, by name.

Optional moments, found by name and called in the order of the terms:

- ``attach(model)``: surgery on the model, before the optimizer is built; idempotent.
- ``reset()``: at the start of each run: let go of what an interrupted optimizer step left behind outside the module's
  state (an open hook, a width that is drawn). What the term remembers stays.
- ``param_groups(model)``: parameter groups of its own (dictionaries as an optimizer takes them).
- ``transform(batch) -> batch``: before the forward pass.
- ``before_step(step)``: once an optimizer step, gradients unscaled and clipped.
- ``after_step(step)``: once an optimizer step, parameters updated.
- ``epoch_start(progress)``; ``task_start(task)``, ``task_end(task)`` (continual learning).
- ``merge(model)``: leave a plain model behind.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, between
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Batch, Step

__all__ = ["CrossEntropy", "Loss", "Ridge", "Term"]


class Term(nn.Module):
    """Base class for terms; a convenience, not a condition: any module of the same form is a term.

    Args:
        weight: coefficient of the term in the loss; a number or a function of
            :class:`~regularized.training.progress.Progress`.

    Examples:
        >>> class Confidence(Term):
        ...     def forward(self, step):
        ...         p = step.log_probabilities.exp()
        ...         return (p * step.log_probabilities).sum()
        >>> from regularized.training.progress import Progress
        >>> round(Confidence()(Step(nn.Identity(), Batch.of(torch.zeros(2, 2)), Progress(0, 1))).item(), 4)
        -1.3863
    """

    per_step: bool = False
    contributes: bool = True
    taps: tuple[str, ...] = ()

    def __init__(self, *, weight: Coefficient = 1.0) -> None:
        super().__init__()
        as_schedule(weight, name="weight")
        self.weight = weight

    def count(self, batch: Batch) -> int | Tensor:
        """Number of items that ``forward`` sums over; the number of samples unless a term says otherwise."""
        return batch.size

    def forward(self, step: Step) -> Tensor:
        """Sum of the loss over the items of the batch; a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(step)")


class CrossEntropy(Term):
    """Cross-entropy of the logits with class labels.

    Logits (B, C) with targets (B,), or (B, L, C) with (B, L), over the last dimension; targets may be soft, with the
    shape of the logits. Counted are the targets that are not ``ignore_index``.

    Args:
        label_smoothing: share of the target mass spread evenly over the classes, in [0, 1); default 0.
        ignore_index: label that is left out; default -100, as in torch.
        shift: predict the *next* position, as causal language models do; default False.
        weight: coefficient; default 1.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> model, batch = nn.Linear(3, 2), Batch.of((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> term = CrossEntropy()
        >>> mean = term(Step(model, batch, Progress(0, 1))) / term.count(batch)
        >>> torch.allclose(mean, F.cross_entropy(model(batch.inputs), batch.targets))
        True
    """

    sharding = "forward"

    @allowed(label_smoothing=between(0.0, 1.0, "[)"))
    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        shift: bool = False,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.shift = shift

    def _labels(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets

    def count(self, batch: Batch) -> int | Tensor:
        """Number of labels that are not ignored."""
        if batch.targets is None:
            raise ValueError("CrossEntropy needs targets; yield (x, y), or a mapping with `targets` or `labels`")
        targets = self._labels(batch.targets)
        if targets.is_floating_point():
            return targets.numel() // targets.shape[-1]
        return (targets != self.ignore_index).sum()

    def forward(self, step: Step) -> Tensor:
        """Sum of the cross-entropy over the labels; logits and targets as in the class."""
        targets = self._labels(step.targets)
        log_p = step.log_probabilities
        if self.shift:
            log_p = log_p[:, :-1]
        classes = log_p.shape[-1]
        if targets.is_floating_point() or self.label_smoothing:
            # cross_entropy of log-probabilities: log_softmax leaves what is normalised unchanged up to rounding.
            soft = targets.is_floating_point()
            return F.cross_entropy(
                log_p.reshape(-1, classes),
                targets.reshape(-1, classes) if soft else targets.reshape(-1),
                reduction="sum",
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index if not soft else -100,
            )
        return F.nll_loss(
            log_p.reshape(-1, classes), targets.reshape(-1), ignore_index=self.ignore_index, reduction="sum"
        )


class Loss(Term):
    """Any per-sample loss of logits and targets as a term.

    Args:
        function: called as ``function(logits, targets)``; returns one value a sample, shape (B,), such as a torch loss
            with ``reduction="none"``.
        weight: coefficient; default 1.

    Raises:
        ValueError: the function returned another shape, for example a mean.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> term = Loss(lambda z, y: (z.squeeze(-1) - y).square())
        >>> step = Step(nn.Linear(3, 1), Batch.of((torch.zeros(2, 3), torch.zeros(2))), Progress(0, 1))
        >>> term(step).shape
        torch.Size([])
    """

    sharding = "forward"

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, weight: Coefficient = 1.0) -> None:
        super().__init__(weight=weight)
        self.function = function

    def forward(self, step: Step) -> Tensor:
        """Sum of the per-sample losses."""
        values = self.function(step.logits, step.targets)
        if values.shape != (step.batch.size,):
            raise ValueError(
                f"the loss of a term must return one value a sample, shape ({step.batch.size},); got "
                f"{tuple(values.shape)}. Give a torch loss reduction='none' and take the mean over further dimensions "
                "yourself"
            )
        return torch.sum(values)


class Ridge(Term):
    """Half the squared norm of parameters, ``1/2 ||w||^2``: weight decay as a term (L2, Tikhonov).

    As a term, rather than the optimizer's ``weight_decay``, its coefficient can be scheduled, logged and learnt, and it
    means the same under every optimizer. With the coefficient ``a``, a loss that is convex in these parameters becomes
    ``a``-strongly convex.

    Args:
        parameters: dotted names of the parameters as in ``model.named_parameters()``; default all that are trained.
        weight: coefficient, a number >= 0 or a schedule; as SGD with that ``weight_decay`` and without the term.

    Raises:
        ValueError: a coefficient below 0, or no name; at the call: the model has no such parameter, or none is trained.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.constant_(model.weight, 3.0), nn.init.zeros_(model.bias)
        >>> Ridge(weight=0.1)(Step(model, Batch.of(torch.zeros(1, 1)), Progress(0, 1)))
        tensor(9., grad_fn=<MulBackward0>)
    """

    per_step = True
    sharding = "weights"

    def __init__(self, parameters: Iterable[str] | None = None, *, weight: Coefficient) -> None:
        super().__init__(weight=weight)
        if not callable(weight) and weight < 0:
            raise ValueError(f"weight of Ridge must be >= 0, got {weight}; 0 switches it off")
        if isinstance(parameters, str):
            raise ValueError(f"parameters must be several names, for example [{parameters!r}], got one string")
        self.parameter_names: tuple[str, ...] | None = None if parameters is None else tuple(dict.fromkeys(parameters))
        if self.parameter_names == ():
            raise ValueError("parameters holds no name; leave it out for all parameters that are trained")

    @classmethod
    def per_tensor(cls, model: nn.Module, *, weight: Coefficient) -> dict[str, Self]:
        """A term for each parameter that is trained, so that each has a coefficient of its own.

        Args:
            model: the model.
            weight: the coefficient of each.

        Returns:
            Terms by name: ``ridge_`` and the parameter's name with ``_`` for each dot.

        Examples:
            >>> list(Ridge.per_tensor(nn.Linear(3, 2), weight=1e-3))
            ['ridge_weight', 'ridge_bias']
        """
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        terms = {"ridge_" + name.replace(".", "_"): cls([name], weight=weight) for name in names}
        if len(terms) < len(names):
            raise ValueError(f"two of the parameters {names} would share a term's name; name the terms yourself")
        return terms

    def covered(self, model: nn.Module) -> dict[str, Tensor]:
        """The penalised parameters by name.

        Args:
            model: the model; tensors that ``torch.func.functional_call`` put in place of its parameters count, too.
        """
        named = dict(model.named_parameters())
        if self.parameter_names is not None:
            if missing := [name for name in self.parameter_names if name not in named]:
                raise ValueError(f"Ridge: the model has no parameter {missing}; it has {list(named)}")
            return {name: named[name] for name in self.parameter_names}
        return {name: p for name, p in named.items() if p.requires_grad or not isinstance(p, nn.Parameter)}

    def strong_convexity(self, model: nn.Module) -> dict[str, float]:
        """Modulus of strong convexity in each parameter that the term adds with the coefficient 1."""
        return dict.fromkeys(self.covered(model), 1.0)

    def forward(self, step: Step) -> Tensor:
        """Half the sum of squares; in float32 at least."""
        squares = [
            p.square().sum(dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.covered(step.model).values()
        ]
        if not squares:
            raise ValueError("Ridge: the model has no parameter that is trained")
        total = squares[0]
        for square in squares[1:]:
            total = total + square.to(total.device)
        return 0.5 * total
