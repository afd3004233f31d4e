"""Co-teaching: two networks that pick the training samples for each other, for labels that are partly wrong.

Samples with a wrong label have a large loss until the network memorises them. Each network chooses the samples of a
batch with the smallest loss, and the *other* one learns from them, so that neither confirms its own mistakes.

    Han, Yao, Yu, Niu, Xu, Hu, Tsang, Sugiyama, "Co-teaching: Robust Training of Deep Neural Networks with Extremely
    Noisy Labels", NeurIPS 2018, arXiv 1804.06872. Here in the form that Chen et al. (:mod:`nested_dropout
    <regularized.noisy_labels.nested_dropout.layer>`, official code at 9a2fc40) use to fine-tune two trained networks.

=========  ====================  ======================================================================
paper      here                  meaning
=========  ====================  ======================================================================
f1, f2     ``networks``          the two networks
r_e        ``forget_rate``       share of a batch that is left out in epoch e, in [0, 1)
R          ``num_kept``          samples that are kept, int((1 - r_e) b)
b          (in the step)         half of the batch with ``split``, else all of it
=========  ====================  ======================================================================

Papers and codes differ: Han et al. let both networks choose from the same batch, with the forward pass that they train
on (``split=False`` comes near to that); the code of Chen et al. gives each a half of the batch and chooses in
evaluation mode. We follow the latter, where the networks see more different samples. Both truncate (1 - r) b, which may
be one less than expected, int((1 - 0.9) 10) = 0; we keep at least one sample.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, between, count
from regularized.mechanisms.two_networks import check_distinct, evaluating, mean_logits
from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule
from regularized.training.state import restore, state_of
from regularized.training.step import Batch, call_model

__all__ = ["CoTeaching", "CoTeachingLosses", "forget_schedule", "num_kept", "small_loss_selection"]

# Shapes: B samples of a batch, C classes, R samples kept.

Parameters: TypeAlias = Iterable[nn.Parameter]

_RATE = between(0.0, 1.0, "[)", "a share of the samples")

_STATE = ("networks", "optimizers", "epochs")


@dataclass(frozen=True, slots=True)
class _ForgetSchedule:
    rate: float
    gradual: int

    def __call__(self, progress: Progress) -> float:
        if progress.epoch >= self.gradual:
            return self.rate
        return self.rate * (progress.epoch / (self.gradual - 1)) if self.gradual > 1 else 0.0


@allowed(rate=_RATE, gradual=count(0, "a number of epochs"))
def forget_schedule(rate: float, *, gradual: int) -> Schedule:
    """The share of samples to leave out: from 0 in the first epoch in equal steps to ``rate``, then constant.

    Args:
        rate: final share, in [0, 1): about the share of wrong labels.
        gradual: number of epochs of the rise, the first (0) and the last (``rate``) included; 0 is constant, 1 leaves
            nothing out in the first epoch only. Han et al. use 10; the fine-tuning of Chen et al. 0.

    Returns:
        A function of :class:`~regularized.training.progress.Progress`.

    Raises:
        ValueError: ``rate`` outside [0, 1), or ``gradual`` negative.

    Examples:
        >>> rate = forget_schedule(0.2, gradual=5)
        >>> [round(rate(Progress(0, 1, epoch=e, total_epochs=7)), 3) for e in range(7)]
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2]
    """
    return _ForgetSchedule(rate, gradual)


def num_kept(size: int, forget_rate: float) -> int:
    """How many of ``size`` samples are kept: ``int((1 - forget_rate) * size)``, at least 1.

    Raises:
        ValueError: there is no sample, or ``forget_rate`` is outside [0, 1).

    Examples:
        >>> num_kept(6, 0.3), num_kept(10, 0.9)
        (4, 1)
    """
    _RATE("the forget rate", forget_rate)
    if size < 1:
        raise ValueError(
            "co-teaching would keep 0 samples: there are none to choose from. With split=True each network chooses "
            "from a half of the batch, which needs at least 2 samples; use drop_last, or a larger batch"
        )
    return max(1, int((1 - forget_rate) * size))


def small_loss_selection(losses: Tensor, forget_rate: float) -> Tensor:
    """Positions of the samples with the smallest losses, smallest first; of equal losses the earlier sample.

    Args:
        losses: (B,) one a sample; NaN counts as the largest.
        forget_rate: share that is left out, in [0, 1).

    Returns:
        (R,) int64 on the device of ``losses``.

    Raises:
        ValueError: ``losses`` has another shape or is empty, or ``forget_rate`` is outside [0, 1).

    Examples:
        >>> small_loss_selection(torch.tensor([0.7, 0.1, 2.0, 0.1]), 0.4)
        tensor([1, 3])
    """
    if losses.ndim != 1:
        raise ValueError(f"losses must have shape (B,), one for each sample; got {tuple(losses.shape)}")
    return losses.detach().argsort(stable=True)[: num_kept(len(losses), forget_rate)]


class CoTeachingLosses(NamedTuple):
    """Losses of a step, and what was chosen.

    Attributes:
        first: scalar, mean loss of the first network on what the second one chose.
        second: scalar, mean loss of the second network on what the first one chose.
        chosen_by_first: (R,) positions in the batch, smallest loss first.
        chosen_by_second: (R,) the same of the second network.
        logits: (b, C) of each network for the samples that it chose from, in evaluation mode.
    """

    first: Tensor
    second: Tensor
    chosen_by_first: Tensor
    chosen_by_second: Tensor
    logits: tuple[Tensor, Tensor]


class CoTeaching:
    """Two networks trained together, each on the small-loss samples that the other one picked.

    A step: the batch is halved; in evaluation mode the first network picks from the first half, the second from the
    second; each then takes a training step on the pick of the *other*. For fresh networks let the forget rate rise
    slowly (:func:`forget_schedule`), for trained ones it may be constant.

    It costs ``(1 + 3 (1 - r)) / 3`` plain steps of one network on the same batch, 1.13 at r = 0.2, with ``split``, and
    twice that without; and the memory of two networks. It runs in one process.

    Not for networks that have memorised the wrong labels: their losses no longer tell right from wrong. Not where the
    share of wrong labels cannot even be guessed; nor where large losses are rare classes.

    Args:
        first: a network, fresh or trained.
        second: another one of different weights.
        optimizer: factory called with the trainable parameters of a network, such as ``partial(torch.optim.SGD,
            lr=0.001, momentum=0.9, weight_decay=5e-4)`` (fine-tuning on CIFAR).
        schedule: factor on the learning rates, a number or a function of
            :class:`~regularized.training.progress.Progress`; the authors divide by 10 once.
        forget_rate: share of samples left out, in [0, 1), a number or a schedule; default 0.2 (CIFAR and ANIMAL-10N;
            0.3 for Clothing1M).
        split: each network chooses from its own half of the batch (official code); False: both from the whole batch, as
            Han et al. do.
        freeze_norm: batch normalisation keeps its statistics and its parameters, as the authors do in fine-tuning;
            default False, right for fresh networks.
        loss: ``loss(logits, labels) -> (B,)``; default cross-entropy.
        seed: decides in :meth:`fit` the order of the data and what the networks draw at random; default 0.

    Attributes:
        networks: the two networks.
        optimizers: their optimizers, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: the networks are one and the same or share parameters, or a setting is outside its range.

    Examples:
        >>> from functools import partial
        >>> x, y = torch.randn(40, 4), torch.randint(3, (40,))
        >>> co = CoTeaching(
        ...     nn.Linear(4, 3),
        ...     nn.Linear(4, 3),
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     forget_rate=forget_schedule(0.4, gradual=2),
        ... )
        >>> losses = co.fit([(x[:20], y[:20]), (x[20:], y[20:])], epochs=3)
        >>> co.predict(x).shape
        torch.Size([40, 3])
    """

    @allowed(forget_rate=_RATE.or_schedule())
    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        *,
        optimizer: Callable[[Parameters], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        forget_rate: Coefficient = 0.2,
        split: bool = True,
        freeze_norm: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.networks: tuple[nn.Module, nn.Module] = (first, second)
        check_distinct(self.networks, remedy="train two networks, from different initial weights")
        self.forget_rate: Schedule = as_schedule(forget_rate, name="forget_rate")
        self.split = split
        self.loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy if loss is None else loss
        self.seed = seed
        self._frozen = [
            module
            for network in self.networks
            for module in network.modules()
            if freeze_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for module in self._frozen:
            module.requires_grad_(False)
        self.optimizers: Optimizers = Optimizers(
            [optimizer([p for p in net.parameters() if p.requires_grad]) for net in self.networks], schedule=schedule
        )
        self.epochs: Epochs = Epochs(seed)
        self.device: torch.device = next(first.parameters()).device
        self._warned_of_odd_batch = False

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def steps(self) -> int:
        """Optimizer steps done by each network."""
        return self.optimizers.steps[0]

    def losses(self, batch: Any, forget_rate: float) -> CoTeachingLosses:
        """Choose, exchange, and compute both losses with their graphs; no optimizer moves.

        Args:
            batch: (x, y), see :meth:`regularized.training.step.Batch.of`; an odd last sample is left out with
                ``split``.
            forget_rate: share that is left out, in [0, 1).

        Returns:
            Losses and choices; the choices carry no gradient.

        Raises:
            ValueError: the batch has no class labels, or too few samples.
        """
        sorted_batch = Batch.of(batch).map(lambda t: t.to(self.device, non_blocking=True))
        labels = sorted_batch.targets
        if labels is None or labels.is_floating_point():
            raise ValueError("co-teaching needs class labels in each batch: yield (x, y) with integer y of shape (B,)")
        size = len(labels) // 2 if self.split else len(labels)
        num_kept(size, forget_rate)  # refuses what cannot work before anything is computed
        if self.split and len(labels) % 2 and not self._warned_of_odd_batch:
            self._warned_of_odd_batch = True
            warnings.warn(
                f"co-teaching halves the batch, and this one has {len(labels)} samples: the last is left out, here and "
                "in other odd batches. Use an even batch size, and drop_last for the remainder",
                stacklevel=2,
            )
        starts = (0, size) if self.split else (0, 0)
        chosen, logits = [], []
        with evaluating(*self.networks), torch.no_grad():
            for network, start in zip(self.networks, starts, strict=True):
                part = _rows(sorted_batch, slice(start, start + size))
                assert part.targets is not None
                outputs = call_model(network, part.inputs)
                chosen.append(small_loss_selection(self._each(outputs, part.targets), forget_rate) + start)
                logits.append(outputs)
        self._train_mode()
        means = []
        for network, picked in zip(self.networks, reversed(chosen), strict=True):
            part = _rows(sorted_batch, picked)
            assert part.targets is not None
            means.append(self._each(call_model(network, part.inputs), part.targets).mean())
        return CoTeachingLosses(means[0], means[1], chosen[0], chosen[1], (logits[0], logits[1]))

    def training_step(self, batch: Any, *, progress: Progress | None = None) -> CoTeachingLosses:
        """One optimizer step of both networks.

        Args:
            batch: (x, y), see :meth:`losses`.
            progress: position in the training, for the schedules; default: the steps and epochs done.

        Returns:
            Detached losses and the choices, on the device.

        Raises:
            ValueError: see :meth:`losses`; or the schedule gave a forget rate outside [0, 1).
        """
        progress = Progress(self.steps, 0, self.epoch) if progress is None else progress
        result = self.losses(batch, self.forget_rate(progress))
        for net, loss in enumerate((result.first, result.second)):
            self.optimizers.minimise(loss, net, progress=progress)
        return result._replace(first=result.first.detach(), second=result.second.detach())

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["CoTeaching"], object] | None = None,
        after_step: Callable[["CoTeaching"], object] | None = None,
    ) -> list[tuple[float, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes: ``TensorData``, a ``DataLoader``, a list of
                batches (x, y).
            epochs: epochs in all.
            after_epoch: called with this object after each epoch: for evaluation, saving, or a new choice of width
                (``lambda co: select_width(co.networks, validation)``).
            after_step: called with this object after each step, for saving within long epochs.

        Returns:
            Mean loss of each network in each epoch of this call.

        Raises:
            TypeError: the data cannot be iterated.
            ValueError: they are empty, or of unknown length; see also :meth:`losses`.
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``.
        """
        part = Part(as_source(data, seed=self.seed), self._averaged_step)

        def record(means: list[Tensor]) -> tuple[float, float]:
            first, second = means[0].tolist()
            return first, second

        return fit_epochs(self, [part], until=epochs, record=record, after_epoch=after_epoch, after_step=after_step)

    def _averaged_step(self, batch: Batch, *, progress: Progress) -> Tensor:
        result = self.training_step(batch, progress=progress)
        return torch.stack((result.first, result.second))

    def predict(self, inputs: Tensor) -> Tensor:
        """Mean of the two networks' logits in evaluation mode, (B, C); the modes are put back afterwards."""
        return mean_logits(self.networks, inputs.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: networks, optimizers, counters, generators of the networks' layers.

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

    def _each(self, outputs: Any, labels: Tensor) -> Tensor:
        losses = self.loss(outputs, labels)
        if losses.shape != labels.shape[:1]:
            raise ValueError(
                f"the loss must return one value for each sample, shape ({len(labels)},), got {tuple(losses.shape)}; "
                "give a torch loss reduction='none'"
            )
        return losses

    def _train_mode(self) -> None:
        for network in self.networks:
            if not network.training:
                network.train()
        for module in self._frozen:
            module.training = False


def _rows(batch: Batch, rows: slice | Tensor) -> Batch:
    return batch.map(lambda t: t[rows])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")
