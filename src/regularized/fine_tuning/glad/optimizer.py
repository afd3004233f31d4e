"""GLAD: each step of few-shot tuning is steered by a second gradient, taken a little uphill of the weights.

For pretrained models that are tuned on a few samples and must stay good on what they were not tuned on. The gradient at
weights pushed uphill (that of sharpness-aware minimisation) points to flat regions; it serves as a *reference* for the
ordinary gradient of the same batch. Cost: the loss twice a step. Memory: one gradient and one copy of what is trained.

    Peng, Wang, Liu, Chen, "GLAD: Generalizable Tuning for Vision-Language Models", 2025, arXiv 2507.13089 (ICCV 2025
    workshop MMFM). Official repository: github.com/YuqiPeng77/GLAD at 5abbe70 (MIT), which holds no code.

==========  ==============  ==================================================================
paper       here            meaning
==========  ==============  ==================================================================
g           ``gradients``   gradient of the loss at the weights, over all trained tensors
eps         --              rho g / |g|: the step uphill, with one norm over all tensors
g_s         ``reference``   gradient of the same loss on the same batch at weights + eps
rho         ``rho``         length of the step uphill, >= 0
lambda      ``lam``         how much the reference counts
==========  ==============  ==================================================================

*A reconstruction.* The paper's formula was not to be had: its abstract says only that the second gradient is a
reference which steers the first. :func:`steer` offers three readings. ``"interpolate"`` is the default since it
contains plain training (``lam=0``) and SAM (``lam=1``); it is the gradient-norm penalty of Zhao et al. 2022, too.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.ascent import ascent_direction, frozen_statistics, moved
from regularized.mechanisms.ranges import allowed, at_least, count
from regularized.training.randomness import rng_state, set_rng_state
from regularized.training.sharded import check_whole

__all__ = ["GLAD", "steer"]

Mode: TypeAlias = Literal["interpolate", "project", "steer"]
Closure: TypeAlias = Callable[[], Any]

MODES = ("interpolate", "project", "steer")
_STATE = "glad"
_RECIPE = """\
    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    loss = optimizer.step(closure)      # calls it twice
or, to clip or unscale in between,
    loss = optimizer.backward(closure)  # leaves the steered gradient in .grad
    optimizer.step()"""


def steer(
    gradients: Sequence[Tensor],
    reference: Sequence[Tensor],
    *,
    mode: Mode = "interpolate",
    lam: float = 0.5,
    per_tensor: bool = False,
) -> list[Tensor]:
    """One gradient steered by another one.

    - ``"interpolate"``: ``(1 - lam) g + lam g_s``.
    - ``"project"``: where the two point apart, ``<g, g_s> < 0``, the part of g against g_s is taken out (as in PCGrad
      and ProGrad); else g as it is. Does not look at ``lam``.
    - ``"steer"``: ``g + lam |<g, g_s>| / |g_s|^2 g_s``: the projection of g on g_s is added, always along g_s.

    Args:
        gradients: g, one or more tensors.
        reference: g_s, of the same shapes.
        mode: which reading of the paper; default ``"interpolate"`` (ours, the paper's formula is unconfirmed).
        lam: weight of the reference, in [0, 1] for ``"interpolate"``, >= 0 for ``"steer"``; default 0.5 (ours).
        per_tensor: one inner product for each tensor instead of one over all; default False.

    Returns:
        New tensors like ``gradients``. Multiplying both gradients by a constant multiplies them by it.

    Raises:
        ValueError: unknown mode, or ``lam`` outside its range.

    Examples:
        >>> g, flat = [torch.tensor([1.0, 1.0])], [torch.tensor([-2.0, 0.0])]
        >>> steer(g, flat), steer(g, flat, mode="project"), steer(g, flat, mode="steer")
        ([tensor([-0.5000,  0.5000])], [tensor([0., 1.])], [tensor([0.5000, 1.0000])])
    """
    _check(mode, lam)
    gradients, reference = list(gradients), list(reference)
    with torch.no_grad():
        if mode == "interpolate":
            return list(torch._foreach_lerp(gradients, reference, lam))
        along = _inner_products(gradients, reference, per_tensor)
        # A reference of zero has an inner product of zero with everything: any positive divisor will do.
        square = _inner_products(reference, reference, per_tensor).clamp_min(torch.finfo(along.dtype).tiny)
        share = -along.clamp_max(0) / square if mode == "project" else lam * along.abs() / square
        added = torch._foreach_mul(reference, list(share.unbind()) if per_tensor else share)
        # A tensor without dimensions would otherwise take the type of the inner product.
        return [t.to(g.dtype) for t, g in zip(torch._foreach_add(gradients, added), gradients, strict=True)]


def _inner_products(a: list[Tensor], b: list[Tensor], per_tensor: bool) -> Tensor:
    """Inner product of all tensors together, a scalar, or (T,) of each pair; in float32 at least."""
    dtype = torch.float32
    for tensor in a:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if per_tensor:
        return torch.stack([torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype)) for x, y in zip(a, b)])
    flat_a, flat_b = (torch.cat([x.reshape(-1).to(dtype) for x in tensors]) for tensors in (a, b))
    return torch.dot(flat_a, flat_b)


class GLAD(torch.optim.Optimizer):
    """An optimizer that steps along the steered gradient of two passes; wraps any other one.

    It shares parameter groups and state with the wrapped optimizer, so that learning rate schedules see one optimizer::

        optimizer = GLAD(torch.optim.AdamW(model.parameters(), lr=2e-4))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

    The closure computes the loss of a batch and calls ``backward()``. It is called twice, with the same random numbers,
    so dropout hides the same units. It may be a whole window of micro-batches (gradient accumulation): the step uphill
    is then that of the whole batch. It must not draw the batch itself. Gradients are cleared before each call. With
    ``DistributedDataParallel`` let both calls exchange gradients, as they do by themselves, with ``no_sync`` for all
    micro-batches but the last: then all processes take one step uphill, and the result is that of one process.

    To clip, or to unscale fp16 gradients, in between::

        loss = optimizer.backward(closure)      # both passes with scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    A common factor of both gradients changes neither the step uphill nor how they are combined. A gradient that is not
    finite stays so and reaches the scaler; the weights are put back whatever comes. Only *dense* gradients.

    Do not use it where the time of a step is the limit: it doubles it (1 + 1/k with ``every=k``). And start small:
    a ``rho`` of 0.5 did harm in our trials.

    Args:
        base: an optimizer over the trained parameters (of the adapters, say).
        rho: length of the step uphill, >= 0; default 0.05, the usual one of SAM (unconfirmed for GLAD).
        lam: weight of the reference gradient, see :func:`steer`; default 0.5 (ours; unconfirmed). With 0, as with
            ``rho=0``, there is no second pass: the base optimizer bit for bit, in every mode.
        combine: ``"interpolate"``, ``"project"`` or ``"steer"``, see :func:`steer`; default ``"interpolate"``.
        per_tensor: inner products for each tensor instead of over all; default False.
        every: take the second pass at every k-th step only, the first one included; default 1.
        model: whose batch normalisation keeps its running statistics in the second pass; default None, for models
            without.

    Attributes:
        base: the wrapped optimizer. ``rho`` and ``lam`` may be changed between steps.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: a setting outside its range, none of the parameters is trainable, or they are in shards.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = GLAD(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> def closure():
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> bool(optimizer.step(closure) > optimizer.step(closure))
        True
    """

    base: torch.optim.Optimizer

    @allowed(rho=at_least(0.0, remedy="0 is plain training"), every=count(1, remedy="1 is every step"))
    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        lam: float = 0.5,
        combine: Mode = "interpolate",
        per_tensor: bool = False,
        every: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        # torch's own __init__ would set up groups and state of its own; what it sets up for hooks is shared below.
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(
                f"base must be a torch optimizer over the trained parameters, got {type(base).__name__}; for example "
                "GLAD(torch.optim.AdamW(parameters, lr=2e-4))"
            )
        _check(combine, lam)
        if not any(p.requires_grad for group in base.param_groups for p in group["params"]):
            raise ValueError(
                "none of the optimizer's parameters requires a gradient: the adapters were not injected, or were "
                "frozen afterwards. Call add_lora(model) first, and give the optimizer the parameters that require one"
            )
        check_whole((p for group in base.param_groups for p in group["params"]), "the optimizer")
        for name, value in vars(base).items():
            if name.startswith("_optimizer_"):  # the dictionaries of hooks
                setattr(self, name, value)
        self.base = base
        self.rho = rho
        self.lam = lam
        self.combine: Mode = combine
        self.per_tensor = per_tensor
        self.every = every
        self.model = model
        self._steps = 0
        self._ready = False  # .grad holds what the base optimizer is to step along
        self._looked = False  # for a gradient scaler in the closure

    # -- one optimizer outside -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the base optimizer."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base optimizer."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the base optimizer."""
        return self.base.defaults

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"GLAD({self.base!r}, rho={self.rho}, lam={self.lam}, combine={self.combine!r}, every={self.every})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. :meth:`backward` does it by itself."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and under ``"glad"`` the settings and the number of steps."""
        return {**self.base.state_dict(), _STATE: {**self._settings(), "steps": self._steps}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; settings are those of the saved optimizer afterwards.

        Raises:
            ValueError: it is the state of a plain optimizer.
        """
        if _STATE not in state_dict:
            raise ValueError(
                "this state was saved by a plain optimizer; to go on from it, load it into the wrapped one: "
                "optimizer.base.load_state_dict(state)"
            )
        own = dict(state_dict[_STATE])
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != _STATE})
        self._steps = int(own.pop("steps"))
        for name in self._settings():
            setattr(self, name, own[name])
        self._ready = False

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rho", "lam", "combine", "per_tensor", "every")}

    # -- two gradients, one step -------------------------------------------------------------------------

    def backward(self, closure: Closure) -> Any:
        """Both passes; afterwards ``.grad`` of each parameter holds the steered gradient.

        Args:
            closure: computes the loss, calls ``backward()``, returns the loss.

        Returns:
            What the closure returned at the weights themselves.

        Raises:
            RuntimeError: the closure gave no parameter a gradient.
        """
        due = self.rho > 0 and self.lam > 0 and self._steps % self.every == 0
        before = rng_state() if due else {}
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            raise RuntimeError(
                "the closure left no gradient in any parameter of this optimizer; it must call loss.backward(), and "
                f"must not clear gradients after it:\n{_RECIPE}"
            )
        if due:
            gradients = _copies(parameters)
            self.zero_grad()
            after = rng_state()
            set_rng_state(before)  # the same dropout masks
            try:
                with (
                    moved(parameters, ascent_direction(gradients, self.rho)),
                    frozen_statistics(self.model),
                    torch.enable_grad(),
                ):
                    closure()
            finally:
                set_rng_state(after)
            reference = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            steered = steer(gradients, reference, mode=self.combine, lam=self.lam, per_tensor=self.per_tensor)
            for parameter, gradient in zip(parameters, steered, strict=True):
                parameter.grad = gradient
        self._ready = True
        return loss

    def step(self, closure: Closure | None = None) -> Any:
        """Step along the steered gradient.

        Args:
            closure: as for :meth:`backward`, which is then called first; None after :meth:`backward`.

        Returns:
            The loss at the weights before the step; None without a closure.

        Raises:
            RuntimeError: neither a closure nor a :meth:`backward` before; or the closure scales its loss by a
                ``GradScaler`` that it names, whose factor nobody would take out again.
        """
        loss = None
        if closure is not None:
            if not self._looked:
                _refuse_scaler(closure)
                self._looked = True
            loss = self.backward(closure)
        elif not self._ready:
            raise RuntimeError(f"GLAD needs two gradients of the same batch, hence a closure:\n{_RECIPE}")
        self.base.step()
        self._ready = False
        self._steps += 1
        return loss


def _check(mode: str, lam: float) -> None:
    if mode not in MODES:
        raise ValueError(f"the gradients can be combined by {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "interpolate" and not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must be in [0, 1] to interpolate (0 plain training, 1 SAM), got {lam}")
    if not lam >= 0.0:
        raise ValueError(f"lam must be >= 0 (0 is plain training), got {lam}")


def _copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the gradients: the originals may be views of buckets that the next pass overwrites (DDP)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    copies = [torch.empty_like(g) for g in gradients]
    torch._foreach_copy_(copies, gradients)
    return copies


def _refuse_scaler(closure: Closure) -> None:
    try:
        names = inspect.getclosurevars(closure)
    except (TypeError, ValueError):  # not a Python function
        return
    for name, value in {**names.globals, **names.nonlocals}.items():
        if isinstance(value, torch.amp.GradScaler) and value.is_enabled():
            raise RuntimeError(
                f"the closure uses the gradient scaler {name!r}: step(closure) would step along gradients that are "
                "still scaled. Call loss = optimizer.backward(closure), then scaler.unscale_(optimizer) if you clip, "
                "then scaler.step(optimizer) and scaler.update()"
            )
