"""Stop before a number that is none reaches the weights, and say whose it was."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.mechanisms.distributed import local_part, world_size
from regularized.training.objective import Objective
from regularized.training.randomness import generators, preserved
from regularized.training.sharded import is_sharded
from regularized.training.step import Step

__all__ = ["FiniteCheck", "NonFiniteLoss", "PendingFlags", "all_finite", "largest_entries", "term_of_gradient"]

logger = logging.getLogger(__name__)

CAUSES = (
    "Usual causes: a learning rate or coefficient that is too high (lower it, or warm it up: warmup(...)), an "
    "exploding gradient (clip_norm=1.0), or NaN in the data"
)


class NonFiniteLoss(FloatingPointError):
    """A loss, its gradient, a rate or a weight was NaN or infinite; the message says which."""


class PendingFlags:
    """Flags of an optimizer step on their way from an accelerator, where looking at once would make the host wait.

    Examples:
        >>> flags = PendingFlags()
        >>> flags.send(["the loss", "a gradient"], torch.tensor([True, False]), NonFiniteLoss)
        >>> try:
        ...     flags.settle()
        ... except NonFiniteLoss as error:
        ...     str(error)
        'a gradient'
    """

    def __init__(self) -> None:
        self._sent: tuple[list[str], Tensor, torch.cuda.Event | None, Callable[[str], NonFiniteLoss]] | None = None

    def send(self, suspects: Iterable[str], fine: Tensor, error: Callable[[str], NonFiniteLoss]) -> None:
        """Send off the flags of a step, asynchronously.

        Args:
            suspects: what the flags are of.
            fine: (suspects,) bool on the device: whether it is finite.
            error: makes the error out of the first suspect that is not.
        """
        event = None
        if fine.is_cuda:
            fine = torch.empty(fine.shape, dtype=torch.bool, pin_memory=True).copy_(fine, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent = (list(suspects), fine, event, error)

    def settle(self) -> None:
        """Read what was sent last, if it was not read yet.

        Raises:
            NonFiniteLoss: it was not finite.
        """
        if self._sent is None:
            return
        (suspects, fine, event, error), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        if guilty := _first(suspects, fine):
            raise error(guilty)

    def forget(self) -> None:
        """Drop what was sent."""
        self._sent = None


class FiniteCheck:
    """The checks of one optimizer step, in the order of the step: losses, rate, gradients; and of what is saved.

    On the CPU each looks at once, and the weights are still those of before the step. On an accelerator looking would
    make the host wait: there the flags of losses and gradients are copied to pinned memory asynchronously and read just
    before the *next* optimizer step and before every checkpoint. The weights of the guilty step are then already
    changed, but no checkpoint holds them. With several processes all of them raise, whoever it happened to.

    Args:
        objective: whose terms are watched.
        model: the model, for the names of its parameters.
        deferred: look one step later, without waiting for the device.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> check = FiniteCheck(Objective({"task": CrossEntropy()}), nn.Linear(2, 2), deferred=False)
        >>> check.losses([torch.tensor(0.5)], step=0)
        >>> try:
        ...     check.losses([torch.tensor(torch.nan)], step=1)
        ... except NonFiniteLoss as error:
        ...     str(error).split(":")[0]
        'not finite in optimizer step 1'
    """

    def __init__(self, objective: Objective, model: nn.Module, *, deferred: bool) -> None:
        self._objective = objective
        self._model = model
        self._deferred = deferred
        self._values: list[tuple[str, Tensor]] = []  # of the present step, where looking is deferred
        self._pending = PendingFlags()

    def losses(self, losses: Sequence[Tensor], step: int) -> None:
        """Take in the losses of an optimizer step's micro-batches.

        Raises:
            NonFiniteLoss: one of them is not finite, in this or another process; or a term's coefficient is not.
        """
        if unruly := self._objective.unruly():
            raise _error(f"term {unruly[0]!r} has the weight {unruly[1]}, which its schedule gave", step)
        if self._deferred:
            self._values = self._suspects(losses)
        elif not _everywhere(math.isfinite(sum(loss.item() for loss in losses))):
            suspects, values = zip(*self._suspects(losses), strict=True)
            raise _error(_first(suspects, _agreed(torch.stack(list(values)))) or "the losses, in their sum", step)

    def rate(self, base: float, factor: float, step: int) -> None:
        """Take in the learning rate of the step.

        Args:
            base: the optimizer's own.
            factor: what the schedule gave.
            step: number of the optimizer step.

        Raises:
            NonFiniteLoss: the product is not finite.
        """
        if not math.isfinite(base * factor):
            raise _error(f"the learning rate, {base:g} times the {factor} that the schedule gave", step)

    def gradients(
        self,
        parameters: Sequence[Tensor],
        step: int,
        *,
        norm: Tensor | None = None,
        blame: Callable[[], str | None] | None = None,
    ) -> None:
        """Look at the gradients, just before the optimizer's step.

        Args:
            parameters: what the optimizer changes.
            step: number of the optimizer step.
            norm: of the whole gradient where it is known, because it was clipped.
            blame: finds the name of the term whose gradient it is, once it is known that there is one; called in all
                processes. Not called where looking is deferred: the weights have changed then.

        Raises:
            NonFiniteLoss: this step (at once) or the step before (deferred) was not finite.
        """
        held = [p for p in parameters if p.grad is not None and p.grad.numel()] if norm is None else []
        grads = [p.grad for p in held if p.grad is not None]
        if self._deferred:
            self.settle()
            norms = largest_entries(grads)
            suspects = [f"the gradient of {name}, of no single term" for name in self._names(held)]
            if norm is not None:
                norms, suspects = [norm], ["the gradient, of no single term"]
            self._watch([*self._values, *zip(suspects, norms, strict=True)], step)
            self._values = []
        elif not _everywhere(math.isfinite(norm.item()) if norm is not None else all_finite(grads)):
            raise _error(self._gradient_of(held, blame), step)

    def saved(self, parameters: Sequence[Tensor], step: int) -> None:
        """Look at the weights before they are written down, and at what is still on its way.

        Args:
            parameters: the weights that were trained.
            step: number of optimizer steps done.

        Raises:
            NonFiniteLoss: they are not finite.
        """
        self.settle()
        weights = [p.detach() for p in parameters if p.numel()]
        if not _everywhere(all_finite(weights), weights[0].device if weights else None):
            bad = [p for p in parameters if not all_finite([p.detach()])]
            which = ", ".join(self._names(bad[:3])) or "a weight of another process"
            when = f"after {step} optimizer steps" if step else "before the first optimizer step"
            raise NonFiniteLoss(f"not finite {when}: {which}; no checkpoint is written. {CAUSES}")

    def settle(self) -> None:
        """Read what is still on its way.

        Raises:
            NonFiniteLoss: it was not finite.
        """
        self._pending.settle()

    def forget(self) -> None:
        """Drop what a run that was interrupted has left on its way."""
        self._values = []
        self._pending.forget()

    def _suspects(self, losses: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        terms = [(f"term {name!r}", value) for name, value in self._objective.active()]
        return [*terms, ("no single term, but their sum", losses[-1].detach())]

    def _watch(self, values: Sequence[tuple[str, Tensor]], step: int) -> None:
        suspects, tensors = zip(*values, strict=True)
        fine = _agreed(torch.stack([value.to(torch.float32) for value in tensors]))
        self._pending.send(suspects, fine, partial(_error, step=step))

    def _gradient_of(self, held: Sequence[Tensor], blame: Callable[[], str | None] | None) -> str:
        term = None
        try:
            term = blame() if blame is not None else None
        except Exception:  # what cannot be explained must be reported all the same
            logger.debug("the search for the term was given up", exc_info=True)
        if term is not None:
            return f"the gradient of term {term!r}, whose value is finite"
        bad = [p for p in held if p.grad is not None and not all_finite([p.grad])]
        which = f"the gradient of {self._names(bad[:1])[0]}" if bad else "the gradient"
        others = [name for name, term in self._objective.terms.items() if callable(getattr(term, "before_step", None))]
        return f"{which}, of no single term" + (f" unless before_step of {others} added it" if others else "")

    def _names(self, parameters: Iterable[Tensor]) -> list[str]:
        names = {id(p): f"parameter {name!r}" for name, p in self._model.named_parameters()}
        names |= {id(p): f"parameter {name!r} of the terms" for name, p in self._objective.terms.named_parameters()}
        return [names.get(id(p), "a parameter") for p in parameters]


def term_of_gradient(
    objective: Objective, model: nn.Module, steps: Iterable[Step], parameters: Iterable[Tensor]
) -> str | None:
    """Which term has a gradient that is not finite: a further pass for each, which leaves no trace.

    Args:
        objective: the terms, of which those are asked that entered the last loss.
        model: the model, whose buffers and generators are put back.
        steps: the micro-batches of the optimizer step, fresh; in several processes each its own.
        parameters: what is differentiated by.

    Returns:
        Its name; None where each by itself is finite.

    Examples:
        >>> from regularized.training import Batch, Progress, Term
        >>> class Root(Term):
        ...     def forward(self, step):
        ...         return (step.logits * 0).square().sum().sqrt()
        >>> model, objective = nn.Linear(2, 2), Objective({"root": Root()})
        >>> batch = Batch.of(torch.ones(3, 2))
        >>> value = objective.loss(Step(model, batch, Progress(0, 1)), objective.counts([batch]))
        >>> bool(value.isfinite()), term_of_gradient(
        ...     objective, model, [Step(model, batch, Progress(0, 1))], model.parameters()
        ... )
        (True, 'root')
    """
    wanted = [p for p in parameters if p.requires_grad]
    names = [name for name, _ in objective.active()]
    fine = dict.fromkeys(names, True)
    with _put_back(model, objective):
        for number, step in enumerate(steps):
            for entry in objective.entries:
                if entry.name not in fine or (entry.per_step and number):
                    continue
                value = entry.term(step)
                if value.requires_grad:
                    found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
                    fine[entry.name] &= all_finite([g for g in found if g is not None])
    return _first(names, _agreed(torch.tensor([0.0 if fine[name] else math.nan for name in names])))


@contextmanager
def _put_back(*modules: nn.Module) -> Iterator[None]:
    """Buffers, generators and the global random state are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    states = [(g, g.get_state()) for module in modules for g in generators(module).values()]
    try:
        with preserved():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for generator, state in states:
            generator.set_state(state)


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite; makes the host wait for the device.

    Examples:
        >>> all_finite([torch.ones(2), torch.tensor([3e38, 3e38])]), all_finite([torch.tensor([1.0, torch.nan])])
        (True, False)
    """
    held = [_entries(tensor) for tensor in tensors if tensor.numel()]
    # One norm is the quick look; it can overflow where no entry has.
    return (
        not held
        or math.isfinite(sum(norm.item() for norm in torch._foreach_norm(held)))
        or all(bool(tensor.isfinite().all()) for tensor in held)
    )


def largest_entries(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The largest magnitude in each tensor, on its device: finite just where all of it is.

    Examples:
        >>> largest_entries([torch.tensor([1.0, -3.0]), torch.tensor([torch.nan, 1.0])])
        [tensor(3.), tensor(nan)]
    """
    held = [_entries(tensor) for tensor in tensors if tensor.numel()]
    return list(torch._foreach_norm(held, math.inf)) if held else []


def _entries(tensor: Tensor) -> Tensor:
    """What a tensor holds; of a sparse gradient the values, of a sharded one those of this process."""
    if is_sharded(tensor):
        part = local_part(tensor)
        return part if part.numel() else part.new_zeros(1)
    return tensor._values() if tensor.is_sparse else tensor


def _everywhere(fine: bool, device: torch.device | None = None) -> bool:
    """Whether it is so in all processes; exchanged on a device."""
    return fine if world_size() == 1 else bool(_agreed(torch.tensor([0.0 if fine else math.nan], device=device)).all())


def _agreed(values: Tensor) -> Tensor:
    """Which of some numbers are finite in every process, on the device of the numbers."""
    fine = values.isfinite()
    if world_size() == 1:
        return fine
    exchanged = fine.to(torch.int32)
    dist.all_reduce(exchanged, dist.ReduceOp.MIN)
    return exchanged.to(torch.bool)


def _first(suspects: Sequence[str], fine: Tensor) -> str | None:
    return next((name for name, good in zip(suspects, fine.tolist(), strict=True) if not good), None)


def _error(guilty: str, step: int) -> NonFiniteLoss:
    return NonFiniteLoss(f"not finite in optimizer step {step}: {guilty}. {CAUSES}")
