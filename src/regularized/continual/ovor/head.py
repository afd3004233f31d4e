"""The second phase: the head alone learns a little longer, on features of the task and outliers around them."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.continual.ovor.loss import energy, outlier_loss
from regularized.continual.ovor.outliers import OutlierSampler
from regularized.continual.ovor.thresholds import EnergyQuantile, Thresholds, warn_of_scale
from regularized.mechanisms.ranges import allowed, at_least, count
from regularized.training.data import epoch_order
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Coefficient, Progress
from regularized.training.randomness import mix

__all__ = ["ADAM", "VirtualOutlierRegularizer"]

ADAM = partial(torch.optim.Adam, lr=1e-3)
"""The optimizer of both phases: "Adam, lr 1e-3", whatever the data."""


class VirtualOutlierRegularizer(nn.Module):
    """Trains a head on frozen features beside outliers, so that its classes claim less of the empty space.

    Whatever made the features: a prompted transformer, any frozen encoder. With ``weight=0`` no outlier is drawn, and
    the phase is plain training of the head.

    Args:
        weight: lambda >= 0; default 0.1 (the released code).
        thresholds: ``(tau_id, tau_ood)``, such as the released (-15, -3), or how they come from the energies of the
            first task; default :class:`~regularized.continual.ovor.thresholds.EnergyQuantile`, since they must match
            the scale of the logits.
        sampler: draws the outliers; default :class:`~regularized.continual.ovor.outliers.OutlierSampler`.
        huber: Huber loss, or the square; default True (the paper).

    Attributes:
        thresholds: what is used at present, None until there are energies.

    Raises:
        ValueError: an option is outside its range, or ``tau_id`` is not below ``tau_ood``.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(2).repeat(50)
        >>> features = torch.randn(100, 8) + 3.0 * torch.eye(8)[labels]
        >>> vor = VirtualOutlierRegularizer(sampler=OutlierSampler(k=5, select=10, noises=20))
        >>> losses = vor.fit_head(nn.Linear(8, 4), features, labels, classes=(0, 1), epochs=5)
        >>> losses.shape, vor.thresholds is None
        (torch.Size([5, 2]), False)
    """

    @allowed(weight=at_least(0.0))
    def __init__(
        self,
        *,
        weight: float = 0.1,
        thresholds: tuple[float, float] | EnergyQuantile | None = None,
        sampler: OutlierSampler | None = None,
        huber: bool = True,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.sampler: OutlierSampler = OutlierSampler() if sampler is None else sampler
        self.huber = huber
        self.thresholds: Thresholds | None = None
        self.quantile: EnergyQuantile | None = None
        if thresholds is None or isinstance(thresholds, EnergyQuantile):
            self.quantile = EnergyQuantile() if thresholds is None else thresholds
        else:
            self.thresholds = Thresholds(*thresholds)
            self.thresholds.check()

    def loss(self, id_logits: Tensor, ood_logits: Tensor) -> Tensor:
        """The weighted regulariser, see :func:`~regularized.continual.ovor.loss.outlier_loss`.

        Raises:
            RuntimeError: the thresholds are to come from energies, and there were none yet.
        """
        if self.thresholds is None:
            raise RuntimeError("there are no thresholds yet: call set_thresholds(energies), as fit_head does")
        tau_id, tau_ood = self.thresholds
        return self.weight * outlier_loss(id_logits, ood_logits, tau_id=tau_id, tau_ood=tau_ood, huber=self.huber)

    def set_thresholds(self, energies: Tensor) -> None:
        """Take thresholds from a task's energies, where that is to be done now; warn of fixed ones that are far off.

        Args:
            energies: (n,) of the task's training features over its classes.

        Warns:
            UserWarning: fixed thresholds lie more than 10 below all energies.
        """
        if self.quantile is None:
            assert self.thresholds is not None
            warn_of_scale(energies, self.thresholds)
        elif self.thresholds is None or self.quantile.each_task:
            self.thresholds = self.quantile.of(energies)

    @allowed(epochs=count(0), batch_size=count(1))
    def fit_head(
        self,
        head: nn.Module,
        features: Tensor,
        labels: Tensor,
        *,
        classes: Sequence[int],
        epochs: int,
        optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
        schedule: Coefficient = 1.0,
        batch_size: int = 128,
        seed: int = 0,
        refresh: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The phase of one task. Rows of the head for other classes get no gradient.

        Args:
            head: from features (B, d) to logits (B, all classes); changed in place.
            features: (n, d) of the task's training samples, without a graph.
            labels: (n,) of them, as the head counts.
            classes: of the task.
            epochs: E2; the paper has a fifth of all epochs. 0 does nothing.
            optimizer: builds the optimizer of the head's parameters; default Adam with 1e-3. The released code goes on
                with that of the first phase.
            schedule: factor on its rates; default 1. See :func:`~regularized.continual.ovor.schedule.epoch_cosine`.
            batch_size: default 128.
            seed: of the order and of the outliers.
            refresh: ``refresh(epoch)`` gives features and labels anew for an epoch, where images are augmented; default
                None: those that are given serve all epochs.

        Returns:
            (epochs, 2): mean cross-entropy and mean weighted regulariser of each epoch.

        Raises:
            ValueError: labels are of other classes, a class is named twice, features carry a graph, or there are not
                more of them than ``k``.
            NonFiniteLoss: the training diverged.

        Warns:
            UserWarning: there are fewer outliers than batches, or thresholds do not match the logits.
        """
        _check(features, labels, classes)
        columns = torch.tensor(list(classes), device=features.device)
        if not epochs:
            return features.new_zeros(0, 2)
        if self.weight:
            with torch.no_grad():
                self.set_thresholds(energy(head(features)[:, columns]))
        optimizers = Optimizers([optimizer(head.parameters())], schedule=schedule, names=["the head"])
        means = []
        for epoch in range(epochs):
            if refresh is not None:
                features, labels = refresh(epoch)
                _check(features, labels, classes)
            means.append(self._epoch(head, features, labels, columns, optimizers, epoch, epochs, batch_size, seed))
        optimizers.settle()
        return torch.stack(means)

    def _epoch(
        self,
        head: nn.Module,
        features: Tensor,
        labels: Tensor,
        columns: Tensor,
        optimizers: Optimizers,
        epoch: int,
        epochs: int,
        batch_size: int,
        seed: int,
    ) -> Tensor:
        """One pass over the features, and over outliers that are drawn for it."""
        order = epoch_order(len(features), seed=seed, epoch=epoch).to(features.device).split(batch_size)
        targets = (labels[:, None] == columns).int().argmax(dim=1)
        outliers = self._outliers(features, len(columns), len(order), mix(seed, epoch)) if self.weight else None
        sums = features.new_zeros(2)
        for number, rows in enumerate(order):
            real = features[rows]
            if outliers is None:
                logits, penalty = head(real)[:, columns], features.new_zeros(())
            else:  # one pass of the head for both
                both = head(torch.cat([real, outliers[number]]))[:, columns]
                logits, penalty = both[: len(rows)], self.loss(both[: len(rows)], both[len(rows) :])
            cross_entropy = F.cross_entropy(logits, targets[rows])
            loss = cross_entropy if outliers is None else cross_entropy + penalty
            step = epoch * len(order) + number
            optimizers.minimise(loss, progress=Progress(step, epochs * len(order), epoch, epochs))
            sums = sums + torch.stack([cross_entropy.detach(), penalty.detach()])
        return sums / len(order)

    def _outliers(self, features: Tensor, num_classes: int, batches: int, seed: int) -> Sequence[Tensor]:
        """The epoch's outliers, as many for each batch; what does not divide is left out."""
        generator = torch.Generator().manual_seed(seed)
        drawn = self.sampler.draw(features, num_classes=num_classes, generator=generator)
        if len(drawn) < batches:
            warnings.warn(
                f"there are {len(drawn)} outliers for {batches} batches of an epoch, so they are used more than once; "
                "raise per_class or batch_size",
                stacklevel=4,
            )
            drawn = drawn.repeat(-(-batches // len(drawn)), 1)
        each = len(drawn) // batches
        return [drawn[number * each : (number + 1) * each] for number in range(batches)]

    def get_extra_state(self) -> Tensor:
        """The thresholds; NaN where there are none yet."""
        return torch.tensor(self.thresholds or (torch.nan, torch.nan), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over saved thresholds."""
        tau_id, tau_ood = state.tolist()
        self.thresholds = None if tau_id != tau_id else Thresholds(tau_id, tau_ood)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"weight={self.weight}, thresholds={self.thresholds or self.quantile}, {self.sampler}, huber={self.huber}"
        )


def _check(features: Tensor, labels: Tensor, classes: Sequence[int]) -> None:
    if features.requires_grad:
        raise ValueError(
            "features carry a graph, so the backbone is not frozen in the second phase; compute them without gradient, "
            "as extract_features does"
        )
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (n, d) and labels (n,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if len(set(classes)) < len(classes):
        raise ValueError(f"a class is named twice in {tuple(classes)}")
    known = torch.isin(labels, torch.tensor(list(classes), device=labels.device))
    if not bool(known.all()):
        raise ValueError(
            f"label {int(labels[~known][0])} is none of the task's classes {sorted(classes)}; name it in its task's "
            "`classes`, or leave the sample out"
        )
