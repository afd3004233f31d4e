"""Learning from the Undesirable: a fine-tuned model whose hidden states hardly move under a step that harms it.

For language models (or any network) that are fine-tuned on little data and become brittle. At each step the adapter is
moved a fixed small distance along the gradient, where the loss of the batch is *worse*; the squared distance between
the hidden states there and the present ones is the penalty. The present ones are constants, the move is a constant:
the gradient flows through the displaced pass.

    Nam, Kim, Jeong, "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting", AAAI
    2026, arXiv 2511.13052. Official code: github.com/yunpal/LfU, read file by file at 262ce31 (MIT).

==========  ==================  ====================================================================================
paper       here                meaning
==========  ==================  ====================================================================================
theta       ``trained``         what is fine-tuned: every parameter of the model that needs a gradient
phi         ``aux``             what takes the step: theta itself, a LoRA beside it, or an offset of hidden states
alpha       ``alpha``           length of the step over all of its tensors together, in (0, 1]
h_l, h'_l   ``clean, moved``    (B, T, d) hidden states of layer l, before and after the step
V           ``mask``            (B, T) positions that count: those whose label is not -100
lambda      ``strength``        weight of the penalty, >= 0; goes with the *mean* over d, see below
==========  ==================  ====================================================================================

Paper and code differ: the paper sums over d, but its lambda = 5 goes with the code's mean over d (``reduction``); the
paper steps with a second LoRA, the code with the adapter itself (``aux="self"``, our default, with the paper's step on
the *same* batch; :meth:`LfU.ascend` takes another batch, as the code does). The code edits weights in place between the
forward and the backward pass, which corrupts the clean gradient; we never write to a weight.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regularized.fine_tuning.lfu.penalty import (
    REDUCTION,
    Reduction,
    at_least_one,
    check_states,
    difference,
    positions,
)
from regularized.fine_tuning.lfu.steps import Aux, AuxiliaryLoRA, OwnStep, Steering, auxiliary, published_strength
from regularized.mechanisms.ascent import ascent_direction, global_norm
from regularized.mechanisms.distributed import sum_over_processes, world_size
from regularized.mechanisms.ranges import allowed, at_least, positive
from regularized.mechanisms.replay import HIDDEN_STATES, ForwardRecorder, RecordedForward, find_layers

__all__ = ["LfU"]

# Shapes: B samples, T positions, d width of the hidden states, K layers.

Layers: TypeAlias = Sequence[int | str] | str

IGNORED = -100

ALPHA = positive("the length of the step", "to switch off, set the weight 0")
CLIP_NORM = positive().or_none("no clipping")


class LfU:
    """The regularizer in anybody's loop: record the forward pass, back-propagate the loss, then the penalty.

    ``backward()`` adds the gradient of the penalty to ``.grad``. With the step on the same batch the gradient of the
    loss, which is there anyway, is the direction: two forward and two backward passes in all, one graph at a time. Call
    it once for each optimizer step, after all micro-batches; under DDP after the last, synchronised backward pass. The
    length of the step is then that of the whole batch, over micro-batches and processes. Between ``record`` and
    ``backward`` memory holds the hidden states of all micro-batches, K B T d numbers each.

    In evaluation nothing is different, and nothing is left in the model. Trained parameters should be float32 (as PEFT
    keeps adapters under mixed precision): in bfloat16 most of a small step is lost in rounding. Hooks on the parameters
    do not see the penalty's gradient.

    Not for you if only accuracy on the new data counts and time is short: we saw no gain there.

    Args:
        model: the model, a DDP wrapper of it, or a PEFT model; already with its adapters.
        layers: whose outputs are the hidden states: ``"all"``, the blocks of a transformer; positions or dotted names;
            or ``"hidden_states"``, what a transformers model returns with ``output_hidden_states=True`` (embedding and
            final norm included, as the official code has it). Default ``"all"``.
        aux: what takes the step: ``"self"``, the trained parameters (official code, default); ``"lora"``, a fresh LoRA
            beside every linear layer (paper), see :class:`~regularized.fine_tuning.lfu.AuxiliaryLoRA`;
            ``"steering"``, an offset of each layer's output (paper's RepS), see
            :class:`~regularized.fine_tuning.lfu.Steering`; or such an object.
        alpha: length of the step, in (0, 1]; default 0.1 (table 5: 0.01 is nearly as good, 0.5 destroys the model).
        strength: lambda; default 5 for ``"self"`` and ``"lora"``, 0.1 for ``"steering"`` (official scripts). 0 switches
            everything off, the further passes included.
        reduction: over d, ``"mean"`` (default) or ``"sum"``, see
            :func:`~regularized.fine_tuning.lfu.hidden_state_consistency`.
        clip_norm: largest norm of the whole gradient after ``backward()``; default none. Use it instead of clipping
            before, which would bound the loss's gradient only.

    Attributes:
        model: the model itself.
        norm: norm of the last ascent gradient, on the device; None before.

    Raises:
        ValueError: an argument is outside its range; no hidden states are found.
        RuntimeError: a recorded pass is in evaluation mode or ``no_grad``; nothing was recorded or back-propagated.

    Warns:
        UserWarning: alpha above 1; no valid position, or an ascent gradient that is 0 or not finite (looked at on the
            CPU only, without a sync): the penalty is left out of that step.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> lfu = LfU(model, layers=["1"])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> with lfu.record():
        ...     loss = nn.functional.cross_entropy(model(x), y)
        >>> loss.backward()
        >>> penalty = lfu.backward()
        >>> optimizer.step(); optimizer.zero_grad()
    """

    @allowed(alpha=ALPHA, strength=at_least(0.0).or_none("the published one"), reduction=REDUCTION, clip_norm=CLIP_NORM)
    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = "all",
        aux: Aux = "self",
        alpha: float = 0.1,
        strength: float | None = None,
        reduction: Reduction = "mean",
        clip_norm: float | None = None,
    ) -> None:
        warn_of_long_step(alpha)
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.aux: OwnStep | AuxiliaryLoRA | Steering = auxiliary(aux)
        self.alpha = alpha
        self.strength: float = published_strength(self.aux) if strength is None else strength
        self.reduction: Reduction = reduction
        self.clip_norm = clip_norm
        self.norm: Tensor | None = None
        names = layers if layers == HIDDEN_STATES else find_layers(self.model, layers)
        self.aux.bind(self.model, () if isinstance(names, str) else names)
        if isinstance(self.aux, Steering):
            self.aux.alpha = alpha
        self._recorder = ForwardRecorder(self.model, names)
        self._recorder.listening = False
        self._parameters = tuple(self.model.named_parameters())
        self._window: list[RecordedForward] = []
        self._gradients: list[Tensor] | None = None
        self._warned: set[str] = set()

    # -- the clean pass ------------------------------------------------------------------------------

    @contextmanager
    def record(self, mask: Tensor | None = None) -> Iterator[None]:
        """Forward passes of the model inside count.

        Args:
            mask: (B, T), or (B,), True where a position counts. Default: where the model is called with ``labels`` of
                shape (B, T), those that are not -100; else its ``attention_mask``; else all.

        Raises:
            RuntimeError: the model is in evaluation mode or gradients are off.
            ValueError: no hidden states are there.
        """
        if self.strength == 0:
            yield
            return
        self.listen()
        recorder = self._recorder
        recorder.strict, recorder.mask = True, mask
        try:
            yield
        finally:
            recorder.strict, recorder.mask, recorder.listening = False, None, False
            self._window.extend(recorder.take())

    def listen(self) -> None:
        """Record every training pass from now until :meth:`backward`: for adapters to loops that own the forward."""
        self.aux.start(self.model)
        self._recorder.start()
        self._recorder.listening = True

    def take(self) -> list[RecordedForward]:
        """Passes seen by :meth:`listen` since the last time; give :meth:`keep` those that count."""
        return self._recorder.take()

    def keep(self, recorded: RecordedForward) -> None:
        """Let a pass count."""
        self._window.append(recorded)

    # -- the step ------------------------------------------------------------------------------------

    def ascend(self, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        """Take the direction from another loss, of another batch say; costs a forward and a backward pass.

        ``.grad`` is not touched. The direction is used by the next :meth:`backward`.

        Args:
            loss: called with the model itself; returns a scalar. Under DDP the mean over processes is ascended.

        Returns:
            The loss, detached.
        """
        trained = self._trained()
        listening, self._recorder.listening = self._recorder.listening, False
        started = self._recorder.started
        self.aux.start(self.model)
        self.aux.open()
        try:
            with torch.enable_grad():
                value = loss(self.model)
                variables = self.aux.variables(trained)
                found = torch.autograd.grad(value, variables, allow_unused=True)
        finally:
            self._recorder.listening = listening
            self.aux.settle()
            if not started:
                self.aux.stop()
        gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]
        gradients = sum_over_processes(gradients, average=True)
        self.norm = global_norm(gradients)
        if self.norm.device.type != "cpu":  # one bad batch must not reach the weights, and the host must not wait
            fine = torch.isfinite(self.norm)
            gradients = [torch.where(fine, g, 0.0) for g in gradients]
        self._gradients = gradients
        return value.detach()

    def displacement(self) -> dict[str, Tensor]:
        """The step that :meth:`ascend` has found, by name of what it moves; empty where there was no direction."""
        steps = self._steps(self._trained())
        return {} if steps is None else dict(zip(self.aux.names(self._trained()), steps, strict=True))

    def undesirable(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model after the step that :meth:`ascend` has found; the model itself does not move."""
        steps = self._steps(self._trained())
        if steps is None:
            return self.model(*args, **kwargs)
        listening, self._recorder.listening = self._recorder.listening, False
        started = self._recorder.started
        self.aux.start(self.model)
        try:
            with torch.no_grad():
                tensors = self.aux.displace(self._trained(), steps)
            return self._recorder.call(tensors, *args, **kwargs)
        finally:
            self.aux.settle()
            self._recorder.listening = listening
            if not started:
                self.aux.stop()

    def backward(self, *, strength: float | None = None, scaler: Any = None) -> Tensor:
        """Add the penalty's gradient to ``.grad``; once for each optimizer step, before it is clipped or unscaled.

        Args:
            strength: lambda of this step; default that of the object.
            scaler: the ``torch.amp.GradScaler`` that scaled the loss, where there is one.

        Returns:
            The penalty without lambda, over the whole batch of all processes; scalar, detached, on the device.

        Raises:
            RuntimeError: no pass was recorded, or the loss was not back-propagated before.
            ValueError: ``scaler`` together with ``clip_norm``.
        """
        weight = self.strength if strength is None else strength
        if scaler is not None and self.clip_norm is not None:
            raise ValueError("with a scaler the gradient is still scaled here; unscale and clip it yourself afterwards")
        self._window.extend(self._recorder.take())
        device = next((p.device for _, p in self._parameters), None)
        try:
            if weight == 0:
                return torch.zeros((), device=device)
            if not self._window:
                raise RuntimeError(
                    "no forward pass was recorded; compute the loss inside `with lfu.record():`, through the model "
                    "that LfU was given"
                )
            penalty = self._penalty(weight, scaler)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_([p for _, p in self._parameters if p.grad is not None], self.clip_norm)
            return torch.zeros((), device=device) if penalty is None else penalty
        finally:
            self.reset()

    def reset(self) -> None:
        """Forget what was recorded, and take the hooks off the model."""
        self._window, self._gradients = [], None
        self._recorder.listening = False
        self._recorder.stop()
        self.aux.stop()

    def _penalty(self, weight: float, scaler: Any) -> Tensor | None:
        trained = self._trained()
        steps = self._steps(trained)
        if steps is None:
            return None
        counts = self._counts()
        if counts is None:
            return None
        leaves = self.aux.displace(trained, steps)
        del steps
        together = world_size() > 1
        if not together:  # what flows into a leaf is added to the gradient of its parameter in place
            for leaf, parameter in zip(leaves.values(), trained.values(), strict=True):
                leaf.grad = parameter.grad
        total: Tensor | None = None
        passes, self._window = self._window, []
        while passes:
            recorded = passes.pop()
            then = functools.partial(self._pull, recorded, counts, weight, scaler)
            value = self._recorder.replay(recorded, leaves, then)
            total = value if total is None else total + value
            del recorded, then
        assert total is not None
        if together:
            # Processes run the same layers, so the same leaves have a gradient everywhere.
            used = [(p, leaf.grad) for p, leaf in zip(trained.values(), leaves.values()) if leaf.grad is not None]
            *gradients, total = sum_over_processes([*(g for _, g in used), total])
            for (parameter, _), gradient in zip(used, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        else:
            for leaf, parameter in zip(leaves.values(), trained.values(), strict=True):
                parameter.grad = leaf.grad
        return total

    def _pull(
        self,
        recorded: RecordedForward,
        counts: Sequence[Tensor | float],
        weight: float,
        scaler: Any,
        moved: Mapping[str, Tensor],
    ) -> Tensor:
        """Back-propagate one pass's share of the penalty through the displaced model."""
        shares, gradients = [], []
        layers = len(recorded.hidden)
        with torch.no_grad():
            for (name, clean), count in zip(recorded.hidden.items(), counts, strict=True):
                mask = _mask_of(recorded, clean)
                check_states(clean, moved[name], mask)
                away = difference(clean, moved[name], mask)
                divisor = count * (layers * (clean.shape[-1] if self.reduction == "mean" else 1))
                shares.append(away.square().sum() / divisor)
                # d/dh' of weight |h' - h|^2 / divisor, without building a graph for it.
                gradients.append(away.mul_(2 * weight).div_(divisor))
        if scaler is not None:
            gradients = list(scaler.scale(gradients))
        # Below the first tensor that is trained a state depends on none, and never moves.
        reached = [(h, g.to(h.dtype)) for h, g in zip(moved.values(), gradients, strict=True) if h.requires_grad]
        if not reached:
            self._warn("no hidden state depends on what is trained: name later layers")
        else:
            torch.autograd.backward([h for h, _ in reached], [g for _, g in reached])
        return torch.stack(shares).sum()

    def _steps(self, trained: Mapping[str, nn.Parameter]) -> list[Tensor] | None:
        """``alpha g / |g|`` for each variable of the step, or None where there is no direction."""
        gradients = self._gradients
        if gradients is None:
            variables = self.aux.variables(trained)
            if all(v.grad is None for v in variables):
                raise RuntimeError(
                    "there is no gradient to follow: call loss.backward() before lfu.backward(), or lfu.ascend(...)"
                )
            gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in variables]
            if not isinstance(self.aux, OwnStep):  # parameters of the model have been synchronised by DDP
                gradients = sum_over_processes(gradients, average=True)
            self.norm = global_norm(gradients)
        if self.norm is not None and self.norm.device.type == "cpu":
            norm = self.norm.item()
            if norm == 0 or not math.isfinite(norm):
                self._warn("the ascent gradient is " + ("0" if norm == 0 else f"not finite ({norm})"))
                return None
        return ascent_direction(gradients, self.alpha)

    def _counts(self) -> list[Tensor | float] | None:
        """Valid positions of each layer over the window and the processes; None where it is known to be 0."""
        counts: list[Any] = [
            sum(positions(h, _mask_of(recorded, h)) for recorded, h in ((r, r.hidden[name]) for r in self._window))
            for name in self._window[0].hidden
        ]
        if world_size() > 1:
            device = next(iter(self._window[0].hidden.values())).device
            local = torch.stack([torch.as_tensor(c, dtype=torch.float64, device=device) for c in counts])
            dist.all_reduce(local)
            counts = list(local.float().unbind())
        first = counts[0]
        if (not isinstance(first, Tensor) or first.device.type == "cpu") and first == 0:
            self._warn("no position is valid: every label is ignored")
            return None
        return [at_least_one(count) for count in counts]

    def _trained(self) -> dict[str, nn.Parameter]:
        trained = {name: p for name, p in self._parameters if p.requires_grad}
        if not trained:
            raise ValueError("nothing in the model is trainable: no parameter needs a gradient")
        return trained

    def _warn(self, what: str) -> None:
        kind = what.split(" (")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{what}; the penalty is left out of this step", stacklevel=5)


# -- helpers -------------------------------------------------------------------------------------------


def warn_of_long_step(alpha: float) -> None:
    if alpha > 1:
        warnings.warn(f"alpha={alpha} is a long step: already 0.5 broke the paper's models. Try 0.1", stacklevel=4)


def labels_mask(labels: Any, hidden: Tensor) -> Tensor | None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != hidden.shape[:-1]:
        return None
    return labels != IGNORED


def _mask_of(recorded: RecordedForward, hidden: Tensor) -> Tensor | None:
    """Which positions of these states count: as told, by the labels, or by the padding."""
    if recorded.mask is not None:
        return recorded.mask
    by_labels = labels_mask(recorded.kwargs.get("labels"), hidden)
    if by_labels is not None:
        return by_labels
    attention = recorded.kwargs.get("attention_mask")
    return attention.bool() if isinstance(attention, Tensor) and attention.shape == hidden.shape[:-1] else None
