"""Training an ensemble's members in one step: each from its own start, in its own order of the same samples."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least, count, positive
from regularized.overfitting.infinite_compute.ensemble import LogitEnsemble
from regularized.overfitting.infinite_compute.optimizer import check_decay, decay_groups, warmup_then_cosine
from regularized.overfitting.infinite_compute.stacked import StackedModels, clip_members_
from regularized.training.data import Source, TensorData
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["EnsembleTraining", "MemberBatches", "next_token_loss"]

_STATE = ("models", "optimizers", "epochs")
# They mix the entries of a weight, and would mix those of members.
_WHOLE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "Muon", "LBFGS") if hasattr(torch.optim, name))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all positions of one member: logits (B, ..., V), targets (B, ...)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class EnsembleTraining:
    """K members, or one, by the paper's recipe.

    Decoupled decay on weight matrices alone; 1 % of the steps warm-up, then a cosine to zero; each member's gradient
    clipped to its own norm; each sample seen once an epoch by every member. With one model it is the recipe of a single
    one.

    Args:
        models: the members, see :class:`~regularized.overfitting.infinite_compute.stacked.StackedModels`; they are
            copied.
        optimizer: factory of an optimizer that treats each weight by itself, called with parameter groups;
            ``functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95))`` is the paper's.
        weight_decay: of weight matrices; see
            :func:`~regularized.overfitting.infinite_compute.optimizer.decay_groups`.
        seeds: of each member's data order; default 0 ... K - 1.
        loss: of one member, from its logits (B, ...) and targets (B, ...) to a scalar; default
            :func:`next_token_loss`.
        schedule: factor on the rate; default
            :func:`~regularized.overfitting.infinite_compute.optimizer.warmup_then_cosine`.
        clip: largest norm of a member's gradient; default 1, the framework's of the paper; None clips nothing.

    Attributes:
        models: the members, stacked.
        optimizers: the optimizer, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: members or seeds do not fit, see there; a coupled or too strong decay; or an optimizer that looks at
            a whole tensor.

    Examples:
        >>> from functools import partial
        >>> members = [nn.Linear(3, 2) for _ in range(4)]
        >>> adamw = partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.95))
        >>> training = EnsembleTraining(members, optimizer=adamw, weight_decay=0.8)
        >>> data = TensorData(torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 1] * 4), batch_size=6)
        >>> losses = training.fit(data, epochs=20)
        >>> len(losses), len(losses[0]), max(losses[-1]) < max(losses[0])
        (20, 4, True)
        >>> training.ensemble()(torch.eye(3)).argmax(dim=1)
        tensor([0, 1, 1])
    """

    @allowed(weight_decay=at_least(0.0), clip=positive().or_none("no clipping"))
    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        weight_decay: float,
        seeds: Sequence[int] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss,
        schedule: Coefficient | None = None,
        clip: float | None = 1.0,
    ) -> None:
        self.models: StackedModels = StackedModels(models)
        self.seeds: list[int] = list(range(len(models))) if seeds is None else list(seeds)
        if len(set(self.seeds)) != len(models) or len(self.seeds) != len(models):
            raise ValueError(f"each of the {len(models)} members needs a seed of its own, got {self.seeds}")
        self.loss = loss
        self.clip = clip
        built = optimizer(decay_groups(self.models, weight_decay))
        check_decay(built)
        if isinstance(built, _WHOLE):
            raise ValueError(
                f"{type(built).__name__} looks at a whole weight, and would mix those of stacked members; use an "
                "optimizer that treats each entry by itself, such as torch.optim.AdamW"
            )
        schedule = warmup_then_cosine() if schedule is None else schedule
        self.optimizers: Optimizers = Optimizers([built], schedule=schedule, names=("the members",))
        self.epochs: Epochs = Epochs(self.seeds[0])

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    def training_step(self, batch: Any, *, progress: Progress) -> Tensor:
        """One step of every member.

        Args:
            batch: inputs (K, B, ...) and targets (K, B, ...), see :class:`MemberBatches`.
            progress: position in the training.

        Returns:
            (K,) losses, detached.
        """
        device = next(self.models.parameters()).device
        own = Batch.of(batch).map(lambda tensor: tensor.to(device, non_blocking=True))
        if own.targets is None:
            raise ValueError(
                "a member learns from targets: give data with inputs and targets, for text the next tokens"
            )
        if not self.models.training:
            self.models.train()
        losses: Tensor = vmap(self.loss)(self.models(own.inputs), own.targets)
        self.optimizers[0].zero_grad()
        losses.sum().backward()  # members share nothing: the gradient of the sum is that of each
        if self.clip is not None:
            clip_members_(self.models.parameters(), self.clip)
        self.optimizers.step(progress=progress, loss=losses.detach().sum())
        return losses.detach()

    @allowed(epochs=count(1, remedy="for parts of an epoch see mixture_steps"))
    def fit(
        self,
        data: TensorData | Sequence[Source],
        *,
        epochs: int,
        after_step: Callable[["EnsembleTraining"], object] | None = None,
    ) -> list[list[float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, also in the middle of an epoch, and ends bit
        for bit (CPU) as if it had never been interrupted.

        Args:
            data: the fixed set of samples, with targets; its seed does not count, those of the members do. Or a source
                for each member.
            epochs: in all, also for the schedule.
            after_step: called with this object after each step.

        Returns:
            For each epoch of this call the mean loss of each member.

        Raises:
            ValueError: not one source for each member, or sources of different lengths.
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``.

        Warns:
            UserWarning: ``drop_last`` leaves samples out of an epoch.
        """
        source = MemberBatches(data, self.seeds)
        part = Part(source, self.training_step, stream=(1,))

        def record(means: list[Tensor]) -> list[float]:
            losses: list[float] = means[0].tolist()
            return losses

        return fit_epochs(self, [part], until=epochs, record=record, after_step=after_step)

    def ensemble(self) -> LogitEnsemble:
        """The members as models of their own, in evaluation mode."""
        return LogitEnsemble(self.models.members()).eval()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and position; ``torch.load(..., weights_only=True)`` reads it."""
        return state_of(self, *_STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, of a procedure built with the same settings.

        Raises:
            ValueError: parts of the state are missing, unknown, or of another procedure; nothing is changed then.
        """
        restore(self, state, *_STATE)


class MemberBatches:
    """The same samples for every member, in an order of each one's own; batches are stacked, (K, B, ...).

    Args:
        data: one set for all, or a source for each member.
        seeds: of the members' orders.

    Raises:
        ValueError: not one source for each seed, or sources of different lengths.

    Warns:
        UserWarning: the data leave out a last batch, so that samples are seen less than once an epoch.

    Examples:
        >>> data = TensorData(torch.arange(4.0), torch.arange(4), batch_size=2)
        >>> batch = next(MemberBatches(data, seeds=[0, 1]).batches(epoch=0))
        >>> batch.index
        tensor([[1, 0],
                [3, 0]])
    """

    def __init__(self, data: TensorData | Sequence[Source], seeds: Sequence[int]) -> None:
        if isinstance(data, TensorData):
            if data.drop_last and data.size % data.batch_size:
                seen = len(data) * data.batch_size
                warnings.warn(
                    f"drop_last leaves {data.size - seen} of {data.size} samples out of each epoch: a sample is seen "
                    f"{seen / data.size:.3g} times an epoch; choose a batch size that divides the set",
                    stacklevel=3,
                )
            self.sources: list[Source] = [_with_seed(data, seed) for seed in seeds]
        else:
            self.sources = list(data)
        lengths = {len(source) for source in self.sources}
        if len(self.sources) != len(seeds) or len(lengths) != 1:
            raise ValueError(
                f"{len(seeds)} members need as many sources, of one length; got {len(self.sources)} with "
                f"{sorted(lengths)} batches"
            )

    def __len__(self) -> int:
        """Number of batches an epoch."""
        return len(self.sources[0])

    def identity(self) -> dict[str, Any]:
        """What tells these data and orders from others."""
        own: list[dict[str, Any]] = [getattr(source, "identity", dict)() for source in self.sources]
        return {"kind": "MemberBatches", "members": own}

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, of each the part of process ``rank`` of ``world``."""
        each = [source.batches(epoch, start=start, rank=rank, world=world) for source in self.sources]
        for batches in zip(*each, strict=True):
            yield _stacked(batches)


def _with_seed(data: TensorData, seed: int) -> TensorData:
    return TensorData(
        data.inputs,
        data.targets,
        batch_size=data.batch_size,
        extras=data.extras,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        seed=seed,
    )


def _stacked(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    inputs = (
        {name: torch.stack([batch.inputs[name] for batch in batches]) for name in first.inputs}
        if isinstance(first.inputs, dict)
        else torch.stack([batch.inputs for batch in batches])
    )
    targets, index = (
        None if getattr(first, name) is None else torch.stack([getattr(batch, name) for batch in batches])
        for name in ("targets", "index")
    )
    return Batch(inputs, targets, index, whole=first.whole)
