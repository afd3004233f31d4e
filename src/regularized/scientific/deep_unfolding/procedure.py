"""Incremental training of unfolded algorithms: layer by layer, each time from a better start.

All layers at once start far from a good sequence of steps. So the first layer is trained alone, then the first two
together, and so on; every step sees fresh signals. (The usual schedule for trainable step sizes; that of the paper
could not be read.)
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least, between, count, positive
from regularized.scientific.deep_unfolding.layer import Unfolded, UnfoldedIHT, UnfoldedISTA
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.training.sharded import check_whole

__all__ = ["BernoulliGaussian", "IncrementalTraining"]


class BernoulliGaussian:
    """Sparse signals and their noisy measurements, drawn afresh at each call.

    Args:
        matrix: A, (M, N).
        density: probability of an entry not to be zero, in (0, 1]; default 0.1.
        noise: variance of the noise on a measurement, >= 0; default 0.01.
        seed: of the draws; their state is in the ``state_dict``.

    Raises:
        ValueError: density or noise is outside its range.

    Examples:
        >>> x, y = BernoulliGaussian(torch.eye(4), density=0.5)(3)
        >>> x.shape, y.shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """

    @allowed(density=between(0.0, 1.0, "(]"), noise=at_least(0.0))
    def __init__(self, matrix: Tensor, *, density: float = 0.1, noise: float = 0.01, seed: int = 0) -> None:
        self.matrix = matrix
        self.density = density
        self.noise = noise
        self.generator: torch.Generator = torch.Generator(matrix.device).manual_seed(seed)

    def __call__(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` signals (B, N) and their measurements (B, M)."""
        rows, columns = self.matrix.shape
        like: dict[str, Any] = {"generator": self.generator, "dtype": self.matrix.dtype, "device": self.matrix.device}
        x = torch.randn(size, columns, **like)
        x = x * (torch.rand(size, columns, **like) < self.density)
        v = torch.randn(size, rows, **like)
        return x, x @ self.matrix.T + math.sqrt(self.noise) * v


class IncrementalTraining:
    """Train an unfolded network layer by layer; resumes exactly from its ``state_dict``.

    Generation t trains the steps of the first t layers on the output of layer t. Signals come from the sampler, new
    ones for each step; the optimizer goes on from generation to generation.

    Args:
        network: for example :class:`~regularized.scientific.deep_unfolding.UnfoldedISTA`.
        sampler: ``sampler(batch_size) -> (x, y)``; with an objective as loss, x is not looked at and may be None. A
            ``generator`` that it has is saved and restored.
        loss: ``"supervised"``: mean squared error to x; or an objective, called as ``loss(output, y)`` for one value a
            signal.
        steps_per_layer: optimizer steps of each generation; default 60 (ours; the literature has 200 to 500).
        batch_size: signals a step; default 150 (ours).
        lr: learning rate of Adam; default 0.01 (ours).
        freeze_prefix: train the newest layer alone, which costs a third as much or less; default False.

    Attributes:
        generation: layers that are being trained, 0 before the first step.

    Raises:
        ValueError: the loss is unknown, the supervised loss gets no signals, numbers are not positive, or
            weights are in shards.

    Examples:
        >>> matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) / 6**0.5
        >>> network = UnfoldedISTA(matrix, 0.1, layers=3)
        >>> training = IncrementalTraining(network, BernoulliGaussian(matrix), loss=SparseObjective(matrix, 0.1))
        >>> losses = training.fit()
        >>> len(losses), losses[-1] < losses[0]
        (3, True)
    """

    @allowed(steps_per_layer=count(1), batch_size=count(1), lr=positive())
    def __init__(
        self,
        network: Unfolded,
        sampler: Callable[[int], tuple[Tensor | None, Tensor]],
        *,
        loss: Literal["supervised"] | Callable[[Tensor, Tensor], Tensor] = "supervised",
        steps_per_layer: int = 60,
        batch_size: int = 150,
        lr: float = 1e-2,
        freeze_prefix: bool = False,
    ) -> None:
        if isinstance(loss, str) and loss != "supervised":
            raise ValueError(f"loss must be 'supervised' or an objective called as loss(x, y), got {loss!r}")
        if isinstance(loss, SparseObjective):
            _warn_if_not_its_own(network, loss)
        check_whole(network.parameters(), "the network")
        self.network = network
        self.sampler = sampler
        self.loss = loss
        self.steps_per_layer = steps_per_layer
        self.batch_size = batch_size
        self.freeze_prefix = freeze_prefix
        self.optimizer: torch.optim.Adam = torch.optim.Adam(network.parameters(), lr=lr)
        self.generation: int = 0

    def fit(self, *, layers: int | None = None) -> list[float]:
        """Train up to ``layers`` layers (default all) from where training stands.

        Returns:
            The mean loss of each new generation.
        """
        last = len(self.network.steps) if layers is None else layers
        losses = []
        while self.generation < last:
            self.generation += 1
            total = torch.zeros((), device=self.network.steps.device)
            for number in range(self.steps_per_layer):
                total += self.training_step(first=number == 0)
            losses.append(float(total) / self.steps_per_layer)
        return losses

    def training_step(self, *, first: bool = False) -> Tensor:
        """One optimizer step at the present depth on fresh signals; returns the loss, on the device.

        Args:
            first: look whether the output is all zero, in which case nothing can be learned, and warn.
        """
        x, y = self.sampler(self.batch_size)
        depth = max(1, self.generation)
        output = self.network(y, depth=depth, frozen_layers=depth - 1 if self.freeze_prefix else 0)
        if first and not bool(output.any()):
            warnings.warn(
                f"the output of layer {depth} is all zero, so the gradient to the step sizes vanishes; the penalty "
                "is too large for these signals",
                stacklevel=2,
            )
        if callable(self.loss):
            loss = self.loss(output, y).mean()
        elif x is None:
            raise ValueError("loss='supervised' needs the true signals; the sampler gave None for x")
        else:
            loss = F.mse_loss(output, x)
        self.optimizer.zero_grad()
        loss.backward()
        if self.freeze_prefix and self.network.steps.grad is not None:
            # Adam moves on momentum: steps of frozen layers stay only without it.
            before = self.network.steps.detach()[: depth - 1].clone()
            self.optimizer.step()
            with torch.no_grad():
                self.network.steps[: depth - 1] = before
        else:
            self.optimizer.step()
        self.network.clamp_steps_()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, generation, and the sampler's random state; tensors and numbers only."""
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generation": self.generation,
        }
        generator = getattr(self.sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            state["generator"] = generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved training stood."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generation = int(state["generation"])
        generator = getattr(self.sampler, "generator", None)
        if "generator" in state and isinstance(generator, torch.Generator):
            generator.set_state(state["generator"])


def _warn_if_not_its_own(network: Unfolded, objective: SparseObjective) -> None:
    if not isinstance(network, UnfoldedISTA | UnfoldedIHT):
        return
    same = (
        objective.penalty == network.penalty
        and objective.matrix.shape == network.gradient.matrix.shape
        and bool(torch.equal(objective.matrix, network.gradient.matrix))
        and objective.norm == ("l1" if isinstance(network, UnfoldedISTA) else "l0")
    )
    if not same:
        warnings.warn(
            "the objective has another matrix, penalty or norm than the network: its optimum is not what the layers "
            "iterate towards, so objectives cannot be compared",
            stacklevel=4,
        )
