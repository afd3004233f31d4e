"""Training without labels as a procedure: any loss of inputs alone, its schedule, and a state to go on from.

A pretext is a module called as ``pretext(inputs, progress)``. It returns the loss, or a named tuple that has it as
``loss`` and beside it other scalars to be averaged over the epoch. ``after_step(progress)``, where it has one, is
called behind each step of the optimizer: there slow copies follow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress
from regularized.training.randomness import mix
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["Pretraining"]

_STATE = ("pretext", "optimizers", "epochs")


class Pretraining:
    """The label-free phase: epochs over inputs, one optimizer.

    Args:
        pretext: the module, with the network that is wanted inside.
        optimizer: factory, called with the parameters of ``pretext`` that need a gradient.
        schedule: factor on the learning rate, a number or a function of
            :class:`~regularized.training.progress.Progress`; default 1.
        transform: changes a batch of inputs before the pretext sees it (augmentation), drawing from the global
            generators; default none.
        seed: of data order and of all that is drawn; default 0.

    Attributes:
        pretext: the module.
        optimizers: the optimizer, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: the pretext has nothing to train.

    Examples:
        >>> class Shrink(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(()))
        ...     def forward(self, inputs, progress):
        ...         return (self.scale * inputs).square().mean()
        >>> from functools import partial
        >>> training = Pretraining(Shrink(), optimizer=partial(torch.optim.SGD, lr=0.1))
        >>> records = training.fit([torch.ones(4, 2)], epochs=2)
        >>> [round(record["loss"], 2) for record in records]
        [1.0, 0.64]
    """

    def __init__(
        self,
        pretext: nn.Module,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        trained = [p for p in pretext.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(pretext).__name__} has no parameter that needs a gradient, so nothing is trained")
        self.pretext = pretext
        self.optimizers: Optimizers = Optimizers([optimizer(trained)], schedule=schedule, names=("the pretext",))
        self.transform = transform
        self.seed = seed
        self.epochs: Epochs = Epochs(seed)
        self._names: tuple[str, ...] = ("loss",)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    def training_step(self, batch: Any, *, progress: Progress) -> Tensor:
        """One step of the optimizer.

        Args:
            batch: inputs, or inputs with anything behind them (labels are not looked at), see
                :meth:`regularized.training.step.Batch.of`.
            progress: position in the training.

        Returns:
            The scalars of the pretext, the loss first, detached, on the device.
        """
        device = next(self.pretext.parameters()).device
        inputs = Batch.of(batch).map(lambda t: t.to(device, non_blocking=True)).inputs
        if not self.pretext.training:
            self.pretext.train()
        out = self.pretext(inputs if self.transform is None else self.transform(inputs), progress)
        scalars = {"loss": out} if isinstance(out, Tensor) else _scalars(out)
        self.optimizers.minimise(scalars["loss"], progress=progress)
        after_step = getattr(self.pretext, "after_step", None)
        if after_step is not None:
            after_step(progress)
        self._names = tuple(scalars)
        return torch.stack([value.detach() for value in scalars.values()])

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["Pretraining"], object] | None = None,
        after_step: Callable[["Pretraining"], object] | None = None,
    ) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes.
            epochs: epochs in all, also for the schedules.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step.

        Returns:
            For each epoch of this call the means of the pretext's scalars by name.

        Raises:
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``.
        """
        part = Part(as_source(data, seed=mix(self.seed, 0)), self.training_step, stream=(1,))
        return fit_epochs(
            self,
            [part],
            until=epochs,
            record=lambda means: dict(zip(self._names, means[0].tolist(), strict=True)),
            after_epoch=after_epoch,
            after_step=after_step,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: the pretext with its slow copies, the optimizer, the position.

        Plain dictionaries and lists of tensors, numbers and strings: ``torch.load(..., weights_only=True)`` reads it.

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


def _scalars(out: Any) -> dict[str, Tensor]:
    """The 0-D tensors of a named tuple, the loss first."""
    found = {name: value for name, value in out._asdict().items() if isinstance(value, Tensor) and value.ndim == 0}
    return {"loss": found.pop("loss"), **found}
