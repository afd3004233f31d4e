"""The weight of a mixture of two losses, moved by a meta-gradient and by entropy."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regularized.alignment.amft.meta_gradient import NORMALIZE, Grads, Normalize, ahead, meta_gradient
from regularized.alignment.amft.mixing import Moved, gradients_of, mixture, set_gradient, weighted
from regularized.mechanisms.ranges import allowed, at_least, count, finite, share
from regularized.training.progress import Progress

__all__ = ["MetaWeightController"]


class MetaWeightController:
    """Learns the share mu of one loss beside another, while both are trained.

    Every ``every`` steps mu moves in the direction in which a held-out loss falls faster, one step ahead
    (:func:`~regularized.alignment.amft.meta_gradient`); at every step it moves towards the first loss where the
    policy's entropy is below its target. The mixture is then made with the new mu. Any two losses will do, a task and a
    regularizer for instance; without a policy, ``entropy_lr=0`` leaves the second rule out.

    A step costs one backward pass through the mixture; one with a meta-gradient costs one for each loss, and the
    held-out loss with its backward pass. Nothing is read from the device between two of these. One process: gradients
    are not exchanged.

    Args:
        init: mu of the start; default 0.5 (class of the code, README; its configuration has 0.8).
        meta_lr: eta_mu >= 0; default 0.05, ours, for ``"cosine"``: ten meta steps of full agreement cross the range.
            The paper's 1e-4 goes with ``"none"``. 0 switches the meta-gradient off.
        entropy_lr: eta_H >= 0; default 5e-4 (code). 0 switches the second rule off.
        bounds: mu_min and mu_max; default 0.05 and 0.95 (paper). Equal ends fix mu: (1, 1) trains the first loss alone.
        every: k, steps from one meta-gradient to the next, the first step included; default 20 (code).
        normalize: ``"cosine"`` (default, ours) or ``"none"`` (paper), see
            :func:`~regularized.alignment.amft.meta_gradient`. At the published rates ``"none"`` moves mu by some 1e-10.
        look_ahead: take the held-out gradient behind the step, as derived (default); False takes it at the present
            weights, as the code does: no copy of the weights, an error of the order of ``lr``.

    Attributes:
        steps: calls of :meth:`backward` so far.
        target_entropy: H*, or None.

    Raises:
        ValueError: a setting is outside its range, or the bounds are not in order.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> def towards(x, y):
        ...     return lambda: (w - torch.tensor([x, y])).square().sum()
        >>> good, bad, held_out = towards(1.0, 0.0), towards(0.0, 1.0), towards(1.0, 0.1)
        >>> controller = MetaWeightController(entropy_lr=0.0, every=1)
        >>> moved = controller.backward(sft=good(), rl=bad(), params=[w], val_loss=held_out, lr=0.1)
        >>> controller.mu.item() > 0.5, w.grad[0].abs().item() > w.grad[1].abs().item()
        (True, True)
    """

    @allowed(
        init=share("the share of the first loss"),
        meta_lr=at_least(0.0, "0 switches the meta-gradient off"),
        entropy_lr=at_least(0.0, "0 switches the rule of entropy off"),
        every=count(1, "steps from one meta-gradient to the next"),
        normalize=NORMALIZE,
    )
    def __init__(
        self,
        init: float = 0.5,
        *,
        meta_lr: float = 0.05,
        entropy_lr: float = 5e-4,
        bounds: tuple[float, float] = (0.05, 0.95),
        every: int = 20,
        normalize: Normalize = "cosine",
        look_ahead: bool = True,
    ) -> None:
        low, high = bounds
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"bounds must be in order and in [0, 1], got {bounds}; the paper has (0.05, 0.95)")
        self.init: float = float(init)
        self.meta_lr: float = meta_lr
        self.entropy_lr: float = entropy_lr
        self.low: float = float(low)
        self.high: float = float(high)
        self.every: int = every
        self.normalize: Normalize = normalize
        self.look_ahead: bool = look_ahead
        self.steps: int = 0
        self.target_entropy: float | None = None
        self._mu = torch.tensor(self.init, dtype=torch.float64)
        self._warned = False

    @property
    def mu(self) -> Tensor:
        """The weight of the last step, or the initial one; 0-d, float64. ``.item()`` waits for the device."""
        return self._mu

    @property
    def uses_entropy(self) -> bool:
        """Whether the rule of entropy is on, and a target has to be set."""
        return bool(self.entropy_lr)

    def set_target_entropy(self, entropy: Tensor | float) -> None:
        """Set H*, once, after the warm-up; see :func:`~regularized.alignment.amft.mean_entropy`.

        Raises:
            ValueError: it is not finite.
        """
        self.target_entropy = _finite_entropy(float(entropy))

    # -- the two rules ----------------------------------------------------------------------

    def update(self, *, meta: Tensor | float | None = None, entropy: Tensor | float | None = None) -> Moved:
        """Move mu: ``clip(mu + eta_mu g_mu + eta_H (H* - H), mu_min, mu_max)``.

        :meth:`backward` calls it. On an accelerator an entropy that is not finite is found at the next meta step.

        Args:
            meta: g_mu, of a held-out *utility*; None where it is not a meta step.
            entropy: H of the present policy; needed unless ``entropy_lr`` is 0.

        Returns:
            What moved mu; the loss in it is 0.

        Raises:
            RuntimeError: no target was set.
            ValueError: the entropy is missing, or not finite.

        Examples:
            >>> controller = MetaWeightController(0.8, entropy_lr=0.01)
            >>> controller.set_target_entropy(2.0)
            >>> round(controller.update(entropy=1.0).mu.item(), 6)  # below its target: towards imitation
            0.81
        """
        by_meta = torch.zeros_like(self._mu)
        by_entropy = torch.zeros_like(self._mu)
        if meta is not None and self.meta_lr:
            by_meta = self.meta_lr * torch.as_tensor(meta, dtype=torch.float64, device=self._mu.device)
        if self.entropy_lr:
            if self.target_entropy is None:
                raise RuntimeError(
                    "no target entropy was set; call set_target_entropy(mean_entropy(...)) after the warm-up, or give "
                    "entropy_lr=0"
                )
            if entropy is None:
                raise ValueError("give the entropy of the policy, the mean of token_entropy(logits), or entropy_lr=0")
            if not isinstance(entropy, Tensor) or entropy.device.type == "cpu":
                _finite_entropy(float(entropy))
            now = torch.as_tensor(entropy, dtype=torch.float64, device=self._mu.device).detach()
            by_entropy = self.entropy_lr * (self.target_entropy - now)
        self._mu = (self._mu + by_meta + by_entropy).clamp(self.low, self.high)
        return Moved(self._mu, by_meta, by_entropy, torch.zeros(()))

    # -- the step ---------------------------------------------------------------------------

    def needs(self, progress: Progress) -> tuple[bool, bool]:
        """Whether a step needs the first loss, and the second one: by the bounds, whatever the position.

        Args:
            progress: not used.
        """
        return self.high > 0.0, self.low < 1.0

    @property
    def due(self) -> bool:
        """Whether the next step takes a meta-gradient, and so needs a held-out loss."""
        return bool(self.meta_lr) and self.low < self.high and self.steps % self.every == 0

    def backward(
        self,
        *,
        sft: Tensor | None,
        rl: Tensor | None,
        params: Iterable[Tensor],
        entropy: Tensor | float | None = None,
        val_loss: Callable[[], Tensor] | None = None,
        lr: float | None = None,
        progress: Progress | None = None,
    ) -> Moved:
        """Move mu, and set ``.grad`` of the parameters to the gradient of ``(1 - mu) rl + mu sft``.

        Clip, and let the optimizer step, afterwards. The graphs of both losses are freed.

        Args:
            sft: L_SFT, a scalar with its graph: the loss that mu multiplies. None where the bounds give it no weight.
            rl: L_RL, the other one. They may share a forward pass.
            params: what is trained. A parameter that one loss does not reach counts as zero there.
            entropy: H of the present policy.
            val_loss: computes the held-out loss anew; called on meta steps alone, see :attr:`due`.
            lr: eta, the learning rate of this step, for the look-ahead and for ``normalize="none"``.
            progress: not used.

        Returns:
            What moved mu, and the mixed loss.

        Raises:
            ValueError: a loss reaches none of the parameters; on a meta step ``val_loss`` or ``lr`` is missing, or the
                held-out loss is one of those that are trained.
            RuntimeError: no target entropy was set.

        Warns:
            UserWarning: ``lr`` is 0, where the meta-gradient is a multiple of it.
        """
        params = list(params)
        if params and self._mu.device != params[0].device:
            self._mu = self._mu.to(params[0].device)
        if self.due and sft is not None and rl is not None:
            moved = self._meta_step(sft, rl, params, entropy, val_loss, lr)
        else:
            moved = self.update(entropy=entropy)
            mixed = self._mixed(sft, rl)
            set_gradient(mixed, params)
            moved = moved._replace(loss=mixed.detach())
        self.steps += 1
        return moved

    def _mixed(self, sft: Tensor | None, rl: Tensor | None) -> Tensor:
        return weighted(sft, rl, self._mu, imitate=self.high > 0.0, explore=self.low < 1.0)

    def _meta_step(
        self,
        sft: Tensor,
        rl: Tensor,
        params: Sequence[Tensor],
        entropy: Tensor | float | None,
        val_loss: Callable[[], Tensor] | None,
        lr: float | None,
    ) -> Moved:
        if val_loss is None:
            raise ValueError(
                f"step {self.steps} takes a meta-gradient and needs val_loss, a function that computes a held-out "
                "loss; or give meta_lr=0"
            )
        lr = self._checked_rate(lr)
        g_sft = gradients_of("sft", sft, params, retain_graph=True)  # they may share a forward pass
        g_rl = gradients_of("rl", rl, params)
        g_val = self._held_out(val_loss, params, mixture(g_sft, g_rl, self._mu), lr, (sft, rl))
        meta = meta_gradient(g_val, g_sft, g_rl, lr=lr, normalize=self.normalize)
        moved = self.update(meta=meta, entropy=entropy)
        if not math.isfinite(moved.mu.item()):
            raise ValueError(
                f"mu became {moved.mu.item()}: the meta-gradient is not finite, or an entropy since the last one; "
                "compute entropies from log_softmax, and look for a held-out loss that is not finite"
            )
        for p, g in zip(params, mixture(g_sft, g_rl, moved.mu), strict=True):
            p.grad = g
        return moved._replace(loss=((1.0 - moved.mu) * rl.detach() + moved.mu * sft.detach()).to(sft.dtype))

    def _checked_rate(self, lr: float | None) -> float:
        needed = self.look_ahead or self.normalize == "none"
        if lr is None:
            if needed:
                raise ValueError("give lr, the learning rate of the step: optimizer.param_groups[0]['lr']")
            return 1.0
        if self.normalize == "none" and lr == 0.0 and not self._warned:
            self._warned = True
            warnings.warn(
                "the meta-gradient is a multiple of the learning rate, which is 0: mu cannot move by it. Start the "
                "controller behind the warm-up of the rate, or give normalize='cosine'",
                stacklevel=4,
            )
        return lr

    def _held_out(
        self,
        val_loss: Callable[[], Tensor],
        params: Sequence[Tensor],
        step: Grads,
        lr: float,
        trained: tuple[Tensor, Tensor],
    ) -> Grads:
        def gradients() -> Grads:
            loss = val_loss()
            if any(loss is one for one in trained):
                raise ValueError(
                    "val_loss returned one of the losses that are trained, whose graph is gone; compute it anew, on "
                    "held-out data"
                )
            return gradients_of("val_loss", loss, params)

        if not self.look_ahead:
            return gradients()
        with ahead(params, step, lr=lr):
            return gradients()

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """mu, H* and the number of steps; ``torch.load(..., weights_only=True)`` reads it."""
        return {"mu": self._mu.clone(), "target_entropy": self.target_entropy, "steps": self.steps}

    def check_state(self, state: Mapping[str, Any], path: str = "controller") -> None:
        """Refuse what is no state of a controller, or one of other bounds.

        Raises:
            ValueError: keys are missing or unknown, or mu lies outside of the bounds here.
        """
        if state.keys() != {"mu", "target_entropy", "steps"}:
            raise ValueError(f"{path}: a state has mu, target_entropy and steps, this one has {sorted(state)}")
        mu = float(state["mu"])
        if state["steps"] and not self.low <= mu <= self.high:
            raise ValueError(
                f"{path}: mu is {mu:g} in the state, outside of the bounds {(self.low, self.high)} here; build it with "
                "the bounds that it had"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.check_state(state)
        self._mu = torch.as_tensor(state["mu"], dtype=torch.float64).clone()
        target = state["target_entropy"]
        self.target_entropy = None if target is None else float(target)
        self.steps = int(state["steps"])


_ENTROPY = finite("in nats", "the logarithm of a probability of 0 gives NaN: use log_softmax")


def _finite_entropy(value: float) -> float:
    _ENTROPY("entropy", value)
    return value
