"""The whole method as published: initialisation, growing box, penalties, clipped gradients, verified error."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least, between, count, positive
from regularized.robustness.certified_training.initialisation import interval_init_
from regularized.robustness.certified_training.interval import Scale
from regularized.robustness.certified_training.loss import CertifiedLoss
from regularized.robustness.certified_training.schedule import SmoothedRadius
from regularized.robustness.certified_training.verification import Verification, verify
from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.randomness import mix as mix_seeds
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["FastCertifiedTraining"]

_STATE = ("model", "optimizers", "epochs")


class FastCertifiedTraining:
    """Training for a proof, in some tens of epochs.

    The network should have batch normalisation behind every layer but the last: that is most of the gain.

    Args:
        model: a network that is not trained yet, of operations with an interval rule.
        radius: the one that is wanted at the end, in units of the raw input.
        optimizer: factory; the authors: ``partial(torch.optim.Adam, lr=5e-4)``.
        start: epoch, from 1, in which the radius begins to grow; default 2, the authors' for CIFAR-10.
        length: epochs of growth; the authors: 80 of 160 for CIFAR-10, 20 of 70 for MNIST.
        std: as in :func:`~regularized.robustness.certified_training.linf_box`.
        data_range: as there.
        penalty: as in :class:`~regularized.robustness.certified_training.CertifiedLoss`; default 0.5.
        tolerance: as there; default 0.5.
        initialise: draw the weights by :func:`~regularized.robustness.certified_training.interval_init_`; default True.
        schedule: factor on the learning rate; the authors: ``piecewise({0.75: 0.2, 0.875: 0.04})`` for CIFAR-10.
        clip_norm: of the gradient; default 10, the authors'. None does not clip.
        seed: of the order of the data; default 0.

    Attributes:
        model: the network; an ordinary one at any time.
        optimizers: its optimizer, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: as :class:`~regularized.robustness.certified_training.CertifiedLoss`.

    Examples:
        >>> from functools import partial
        >>> training = FastCertifiedTraining(
        ...     nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        ...     radius=0.1,
        ...     optimizer=partial(torch.optim.Adam, lr=5e-3),
        ...     length=2,
        ...     data_range=(0.0, 1.0),
        ... )
        >>> batches = [(torch.rand(16, 4), torch.randint(3, (16,))) for _ in range(3)]
        >>> [sorted(record) for record in training.fit(batches, epochs=3)][-1]
        ['loss', 'radius']
        >>> training.verify(batches).samples
        48
    """

    @allowed(
        radius=positive("in units of the raw input"),
        start=count(1, "the first epoch"),
        length=count(1, "epoch of growth"),
        penalty=at_least(0.0, "0 switches the penalties off"),
        tolerance=between(0.0, 1.0, "(]"),
        clip_norm=positive().or_none("no clipping"),
    )
    def __init__(
        self,
        model: nn.Module,
        *,
        radius: float,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        start: int = 2,
        length: int,
        std: Scale = 1.0,
        data_range: tuple[Scale, Scale] | None = None,
        penalty: float = 0.5,
        tolerance: float = 0.5,
        initialise: bool = True,
        schedule: Coefficient = 1.0,
        clip_norm: float | None = 10.0,
        seed: int = 0,
    ) -> None:
        if initialise:
            interval_init_(model)
        self.model: nn.Module = model
        self.start, self.length, self.seed = start, length, seed
        self.std, self.data_range = std, data_range
        self.clip_norm = clip_norm
        self.loss: CertifiedLoss = CertifiedLoss(
            model,
            # One batch an epoch until the data are known.
            radius=SmoothedRadius(radius, start=start, length=length, batches_per_epoch=1),
            std=std,
            data_range=data_range,
            penalty=penalty,
            tolerance=tolerance,
        ).to(next(model.parameters()).device)
        self.optimizers: Optimizers = Optimizers(
            [optimizer([p for p in model.parameters() if p.requires_grad])],
            schedule=as_schedule(schedule, name="schedule"),
            names=("the network",),
            remedy="lower the learning rate, or let the radius grow over more epochs",
        )
        self.epochs: Epochs = Epochs(seed)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def largest_radius(self) -> float:
        """The radius that is wanted."""
        return self.loss.radius.largest

    def training_step(self, batch: Any, *, radius: float, progress: Progress) -> Tensor:
        """One optimizer step.

        Args:
            batch: (x, y), see :meth:`regularized.training.step.Batch.of`.
            radius: of this step.
            progress: position in the training, for the learning rate.

        Returns:
            The mean loss, detached, on the device.
        """
        device = next(self.model.parameters()).device
        given = Batch.of(batch).map(lambda t: t.to(device, non_blocking=True))
        if given.targets is None:
            raise ValueError("FastCertifiedTraining needs labels in each batch: yield (x, y)")
        if not self.model.training:
            self.model.train()
        log_probabilities = torch.log_softmax(self.model(given.inputs), dim=-1)
        loss = self.loss.summed(log_probabilities, given.inputs, given.targets, radius=radius) / given.size
        self.optimizers[0].zero_grad()
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizers.step(progress=progress, loss=loss)
        return loss.detach()

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["FastCertifiedTraining"], object] | None = None,
        after_step: Callable[["FastCertifiedTraining"], object] | None = None,
    ) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes.
            epochs: epochs in all; at least ``start + length - 1``, so that the radius is reached.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step.

        Returns:
            For each epoch of this call its mean ``loss``, and the ``radius`` at its end.

        Raises:
            ValueError: the epochs end before the radius is reached.
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``; the weights are those before it.
        """
        reached = self.start + self.length - 1
        if epochs < reached:
            raise ValueError(
                f"the radius is reached after start + length - 1 = {reached} epochs, got epochs={epochs}; train for "
                "more, or give a smaller length"
            )
        source = as_source(data, seed=mix_seeds(self.seed, 0))
        radius = SmoothedRadius(
            self.largest_radius, start=self.start, length=self.length, batches_per_epoch=len(source)
        )

        def step(batch: Batch, *, progress: Progress) -> Tensor:
            return self.training_step(batch, radius=radius(progress), progress=progress)

        return fit_epochs(
            self,
            [Part(source, step)],
            until=epochs,
            record=lambda means: {"loss": means[0].item(), "radius": radius.at(self.epoch * len(source))},
            after_epoch=after_epoch,
            after_step=after_step,
        )

    def verify(self, data: Any, *, radius: float | None = None) -> Verification:
        """Clean and verified error, see :func:`~regularized.robustness.certified_training.verify`.

        Args:
            data: batches (x, y).
            radius: default the largest of the training.
        """
        radius = self.largest_radius if radius is None else radius
        return verify(self.model, data, radius=radius, std=self.std, data_range=self.data_range)

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: the network, its optimizer, and the position, of which the radius is a function.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
            RuntimeError: a step was left half-way.
        """
        return state_of(self, *_STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, of a procedure built with the same settings.

        Raises:
            ValueError: parts of the state are missing, unknown, or of another procedure; nothing is changed then.
        """
        restore(self, state, *_STATE)
