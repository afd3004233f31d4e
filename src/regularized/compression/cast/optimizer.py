"""CAST's optimizer: Adam that pulls what lies outside an N:M pattern to zero, more and more over the run.

For a pretrained model that shall end with an exact N:M pattern (2:4 runs fast on GPUs) and can be trained on for some
time. All weights are trained to the end and the forward pass is dense; the pattern, drawn from the magnitudes every few
steps, tells the optimizer alone which weights to shrink. What is shrunk can come back. At the end it has gone, and
cutting it costs nothing.

    Huang, Hu, Zhu, Chen, "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large
    Language Models", 2025, arXiv 2509.25996 (v1). No official code.

============  =======================  ===========================================================================
paper         here                     meaning
============  =======================  ===========================================================================
W             a weight, (R, C)         of a linear layer, R outputs by C inputs
N:M           ``pattern``              of M neighbours along the inputs N stay
m             ``state["mask"]``        True for the N largest ``|W|`` of each group
T_1           ``mask_every``           steps from one drawing of the mask to the next
t, T          ``steps``, ``total_steps``  optimizer steps done, and of the whole training
alpha         --                       t / T: grows from 0, so that the first step decays nothing
lambda        ``l1``                   strength of the L1 decay, of the order of the gradients
mu            ``state["exp_avg"]``     mean of the gradients alone; no decay ever enters it
m_t           --                       mu where m is True, ``(1 - alpha) mu + alpha lambda sign(W)`` elsewhere
v             ``state["exp_avg_sq"]``  mean of m_t squared
A             ``ScaledLinear.scale``   (R, n) factors of n blocks of columns, :mod:`regularized.compression.cast.layer`
eta           ``CAST.eta``             share of the dense teacher, :mod:`regularized.compression.cast.loss`
============  =======================  ===========================================================================

The paper's name for this optimizer, AdamS, is taken by others (Adam with stable weight decay, in pytorch_optimizer).
Where it is silent or says two things: alpha is t / T with t from 0 (its algorithm 1), ties keep exactly N weights, and
parameters without a pattern take the same step with ``m_t = mu``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from regularized.compression.cast.pattern import Pattern, check_pattern, semi_structured_mask
from regularized.mechanisms.ranges import Choice, allowed, at_least, between, count, positive
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.training.finite import NonFiniteLoss, PendingFlags
from regularized.training.progress import Coefficient, Progress, as_schedule

__all__ = ["SecondMoment", "SparseAdamW", "decay_budget"]

SecondMoment: TypeAlias = Literal["momentum", "gradient"]


@allowed(lr=positive(), total_steps=count(1))
def decay_budget(lr: float, total_steps: int, schedule: Coefficient = 1.0) -> float:
    """How far a weight outside the pattern can be pulled in the whole run, ``sum of lr_t t / T``.

    Where the decay has the upper hand, the step divides it by its own size, so that a weight moves by the learning rate
    whatever ``l1`` is. If the budget is below the size of the weights that have to go, the final cut destroys the
    model: raise the rate or the number of steps, not ``l1``.

    Args:
        lr: learning rate, > 0.
        total_steps: optimizer steps of the whole training, at least 1.
        schedule: factor on the rate, a number or a function of :class:`~regularized.training.progress.Progress`;
            default 1.

    Raises:
        ValueError: a rate or a number outside its range.

    Examples:
        >>> round(decay_budget(2e-5, 7500), 4)  # the paper's rate and steps; weights of LLaMA2-7B are about 0.02
        0.075
        >>> from regularized.training.progress import linear
        >>> round(decay_budget(2e-5, 7500, linear(1.0, 0.0)), 4)
        0.025
    """
    factor = as_schedule(schedule, name="schedule")
    return lr * sum(factor(Progress(t, total_steps)) * t for t in range(total_steps)) / total_steps


class SparseAdamW(torch.optim.Optimizer):
    """Adam with a growing L1 decay of the weights outside an N:M pattern.

    It differs from Adam in three ways: the decay is selective and grows with ``t / T``; it never enters the momentum,
    so that a weight which comes back finds its own gradients there; and the second moment is that of the *momentum*
    with its decay. The last makes steps longer: about the learning rate at each weight, where Adam's are a fourth of it
    under noise, and the very first is ``1 / (1 - beta1)`` times as long as Adam's. Warm up, and let the rate fall
    towards the end: weights outside the pattern end at about the size of the last rate.

    A parameter group with ``pattern=(N, M)`` is pulled towards it; one without takes the same steps without decay.
    :meth:`~regularized.compression.cast.CAST.param_groups` makes both. Masks are part of the state, kept with the
    weight itself, and a mask that is missing or has another shape is an error, never a silent step of Adam.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate; the paper trains LLaMA2-7B with 2e-5.
        l1: lambda, >= 0; 4e-7 there. Of the order of a gradient's entry, which depends on the model: tune it. It says
            when the decay overcomes the gradient; how far it reaches is for the rate, see :func:`decay_budget`.
        total_steps: T, optimizer steps of the whole training; 7,500 there. One more is an error.
        pattern: for groups that name none; default None, no pattern.
        mask_every: T_1, steps between drawings of the mask; default 10 (paper).
        betas: of the two moments; default (0.9, 0.999) (the paper gives none).
        eps: default 1e-8 (the paper gives none).
        weight_decay: decoupled L2 decay as in AdamW, of all weights; default 0 (the paper gives none).
        second_moment: of the ``"momentum"`` (default, paper: algorithm 1, line 18) or of the ``"gradient"``, as Adam.
            With the latter and without a pattern every step is that of ``torch.optim.AdamW``, bit for bit.

    Attributes:
        steps: optimizer steps done; part of the state.

    Raises:
        ValueError: a setting outside its range; a weight that has no such groups; bfloat16 or float16 weights with a
            decay below their resolution; loading the state of a run with other ``total_steps`` or another pattern.
        RuntimeError: at a step: beyond ``total_steps``, or without a mask that fits.
        NonFiniteLoss: a weight is NaN where a mask is drawn; on a GPU it is told at the next drawing.

    Warns:
        UserWarning: before the first step, when even at a constant rate the decay cannot reach the median weight that
            is to go; both numbers are given.
        NoEffectWarning: no group has a pattern.

    Examples:
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = SparseAdamW(
        ...     [{"params": [layer.weight], "pattern": (2, 4)}, {"params": [layer.bias]}],
        ...     lr=1e-2, l1=1e-2, total_steps=200,
        ... )
        >>> for x in torch.randn(200, 16, 8):
        ...     (layer(x) - x[:, :4]).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> mask = optimizer.masks()[layer.weight]
        >>> bool(layer.weight[~mask].abs().max() < 0.05 < 0.9 < layer.weight[mask].abs().max())
        True
    """

    @allowed(
        lr=at_least(0.0),
        l1=at_least(0.0, "of the order of a gradient's entry"),
        total_steps=count(1, "the optimizer steps of the whole training"),
        mask_every=count(1, "steps between drawings of the mask", "the paper uses 10"),
        eps=at_least(0.0),
        weight_decay=at_least(0.0),
        second_moment=Choice("momentum", "gradient"),
    )
    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        l1: float,
        total_steps: int,
        pattern: Pattern | None = None,
        mask_every: int = 10,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: SecondMoment = "momentum",
    ) -> None:
        for position, beta in enumerate(betas):
            between(0.0, 1.0, "[)")(f"betas[{position}]", beta)
        self._flags = PendingFlags()
        self._began = False
        defaults = {
            "lr": lr,
            "l1": l1,
            "total_steps": total_steps,
            "pattern": pattern,
            "mask_every": mask_every,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flags = PendingFlags()
        self._began = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; with ``pattern`` their weights are looked at first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        if group["total_steps"] != self.param_groups[0]["total_steps"]:
            raise ValueError(
                f"all groups must have one number of total_steps, got {self.param_groups[0]['total_steps']} and "
                f"{group['total_steps']}"
            )
        if group["pattern"] is None:
            return
        check_pattern(group["pattern"])
        for weight in group["params"]:
            semi_structured_mask(weight[:1] if weight.ndim == 2 else weight, group["pattern"])  # raises
            if type(weight).__name__ == "DTensor":
                raise ValueError(
                    "a weight with a pattern is sharded (DTensor), which separates it from its mask; train it with DDP"
                )
            resolution = torch.finfo(weight.dtype).eps
            if weight.dtype in (torch.bfloat16, torch.float16) and group["l1"] < resolution:
                raise ValueError(
                    f"l1 of {group['l1']:g} is below the resolution {resolution:.2g} of {weight.dtype} weights, which "
                    "would not move; keep float32 master weights, and compute in autocast"
                )

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def masks(self) -> dict[Tensor, Tensor]:
        """The mask of each weight that has a pattern, as drawn last: (R, C) bool by parameter; none before a step."""
        return {p: self.state[p]["mask"] for group in self._patterned() for p in group["params"] if p in self.state}

    def _patterned(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["pattern"] is not None)

    # -- the step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; where it is due, new masks are drawn first, of the weights that the gradients were taken at.

        Args:
            closure: computes the loss and the gradients, and returns the loss; default none.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: all ``total_steps`` are done, or a mask does not fit its weight.
            NonFiniteLoss: a weight is NaN.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done, total = self.steps, self.param_groups[0]["total_steps"]
        if done >= total:
            raise RuntimeError(
                f"all total_steps={total} are done: the decay's share t / T would exceed 1. Build the optimizer with "
                "the number of steps that the whole training has"
            )
        self._draw_masks(done)
        if not self._began:
            self._began = True
            self._warn()
        for group in self.param_groups:
            _step_group(group, self.state, alpha=done / total)
        return loss

    def _draw_masks(self, done: int) -> None:
        """New masks for the weights that are due, with a look for NaN, which has no place in any order."""
        drawn = []
        for group in self._patterned():
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state or done % group["mask_every"] == 0:
                    drawn.append(p)
                    state["mask"] = semi_structured_mask(p, group["pattern"])
                elif "mask" not in state or state["mask"].shape != p.shape:
                    there = tuple(state["mask"].shape) if "mask" in state else None
                    raise RuntimeError(
                        f"a weight of shape {tuple(p.shape)} has a pattern, but a mask of shape {there}; its state was "
                        "lost or sharded on the way. Load a whole state_dict() of this optimizer"
                    )
        if not drawn:
            return
        fine = torch.stack([~p.isnan().any() for p in drawn])
        names = [f"a weight of shape {tuple(p.shape)}" for p in drawn]
        self._flags.settle()  # of the drawing before
        self._flags.send(names, fine, _not_a_number)
        if not fine.is_cuda:
            self._flags.settle()

    def _warn(self) -> None:
        """Say before the first step what cannot work."""
        if not any(True for _ in self._patterned()):
            warnings.warn(
                "no parameter group has a pattern, so nothing becomes sparse; give the groups of "
                "CAST(model).param_groups(), or pattern=(2, 4)",
                NoEffectWarning,
                stacklevel=5,
            )
        for group in self._patterned():
            medians = [p[~self.state[p]["mask"]].abs().median() for p in group["params"] if p in self.state]
            if not medians:
                continue
            # Of the layers' medians: one over all weights would take memory for all of them.
            median = float(torch.stack([m.to(medians[0].device) for m in medians]).median())
            # Under a schedule the rate of the first step may be small: the rate that the group was built with counts.
            budget = decay_budget(max(float(group["lr"]), self.defaults["lr"]), group["total_steps"])
            if budget < median:
                warnings.warn(
                    f"even at a constant rate the decay can pull a weight by {budget:.3g} in {group['total_steps']} "
                    f"steps, but the median weight outside the pattern is {median:.3g}: the final cut would destroy "
                    "the model. Raise lr or total_steps; l1 does not help (see decay_budget)",
                    stacklevel=5,
                )

    # -- state ---------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`, bit for bit.

        Raises:
            ValueError: the saved run has other ``total_steps`` or another pattern, which would change what is decayed
                and how much.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"]):
            for name in ("total_steps", "pattern"):
                here, there = own[name], saved.get(name)
                if _plain(here) != _plain(there):
                    raise ValueError(
                        f"the state is of a run with {name}={there}, this optimizer has {here}; build it as it was "
                        "there"
                    )
        super().load_state_dict(dict(state_dict))
        self._began = bool(self.state)
        self._flags.forget()
        for state in self.state.values():
            if "mask" in state:  # torch turns all state to the type of the weight
                state["mask"] = state["mask"].to(torch.bool)


def _plain(pattern: Any) -> Any:
    return list(pattern) if isinstance(pattern, tuple) else pattern


def _not_a_number(what: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"{what} holds NaN where its mask was to be drawn; the training has diverged: lower the learning rate, and go "
        "on from an earlier checkpoint"
    )


def _step_group(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], *, alpha: float) -> None:
    """Weights with a mask one after the other, so that what a step holds besides is of the largest alone."""
    plain = []
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError("SparseAdamW is for sparse weights, not for sparse gradients; use dense ones")
        state = states[p]
        if "exp_avg" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        if "mask" in state:
            _masked_step(group, p, p.grad, state, alpha)
        else:
            plain.append(p)
    if plain:
        _plain_steps(group, plain, [states[p] for p in plain])


def _factors(group: Mapping[str, Any], step: int) -> tuple[float, float]:
    """The rate over the first moment's bias, and the root of the second's."""
    beta1, beta2 = group["betas"]
    return float(group["lr"]) / (1 - beta1**step), (1 - beta2**step) ** 0.5


def _masked_step(
    group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: Mapping[str, Any], alpha: float
) -> None:
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    direction = weight.sign().mul_(alpha * group["l1"]).add_(mean, alpha=1 - alpha)
    torch.where(state["mask"], mean, direction, out=direction)
    of = direction if group["second_moment"] == "momentum" else gradient
    square.mul_(beta2).addcmul_(of, of, value=1 - beta2)
    rate, root = _factors(group, state["step"])
    if group["weight_decay"]:
        weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
    weight.addcdiv_(direction, square.sqrt().div_(root).add_(group["eps"]), value=-rate)


def _plain_steps(group: Mapping[str, Any], parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
    """All at once, by the operations of torch's own Adam in their order."""
    beta1, beta2 = group["betas"]
    gradients = [p.grad for p in parameters if p.grad is not None]
    means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - float(group["lr"]) * group["weight_decay"])
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    of = means if group["second_moment"] == "momentum" else gradients
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, of, of, 1 - beta2)
    factors = [_factors(group, state["step"]) for state in states]
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [root for _, root in factors])
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(parameters, means, roots, [-rate for rate, _ in factors])
