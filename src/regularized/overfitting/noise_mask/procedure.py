"""Pre-training of classifier and mask policy together, two optimizers on one backward pass.

:mod:`regularized.overfitting.noise_mask.layer` has the paper and its symbols.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed
from regularized.overfitting.noise_mask.layer import NoiseMask
from regularized.overfitting.noise_mask.loss import CREDIT, Credit, noise_mask_objective
from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.randomness import mix as mix_seeds
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["NoiseMaskPretraining"]

_STATE = ("classifier", "noise_mask", "optimizers", "epochs")


class NoiseMaskPretraining:
    """Phase 1: classifier and policy trained together, two optimizers on one backward pass.

    Phase 2 is ordinary training of ``pretraining.classifier``, which holds nothing of the policy.

    Args:
        classifier: the network that is wanted.
        noise_mask: the policy with its mask; shares no parameter with the classifier.
        optimizer: factory for the classifier's optimizer; the authors: ``partial(torch.optim.SGD, lr=0.1,
            momentum=0.9, weight_decay=1e-4)``.
        policy_optimizer: factory for the policy's; the authors: the same with a tenth of the learning rate.
        schedule: factor on the classifier's learning rate, a number or a function of
            :class:`~regularized.training.progress.Progress`; the authors: ``piecewise({1/3: 0.1, 2/3: 0.01})``.
        policy_schedule: factor on the policy's; the authors: ``cosine()``.
        loss: ``loss(logits, targets) -> (B,)``; default cross-entropy.
        credit: see :func:`noise_mask_objective`; default ``"batch"`` (official code).
        coupled: see :func:`noise_mask_objective`; default True (official code).
        seed: of data order and draws; default 0.

    Attributes:
        classifier: the network.
        noise_mask: the policy.
        optimizers: those of classifier and policy, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: policy and classifier share parameters.

    Warns:
        UserWarning: q was negative on average over an epoch, so that the classifier climbed its loss.

    Examples:
        >>> from functools import partial
        >>> from regularized.overfitting.noise_mask import BetaMaskPolicy, NoiseMask
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> pretraining = NoiseMaskPretraining(
        ...     nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        ...     NoiseMask(policy, kernel=3, sigma=1.0),
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     policy_optimizer=partial(torch.optim.SGD, lr=0.01),
        ... )
        >>> batches = [(torch.rand(6, 1, 8, 8), torch.randint(3, (6,))) for _ in range(2)]
        >>> records = pretraining.fit(batches, epochs=1)
        >>> sorted(records[0])
        ['log_density', 'loss']
    """

    @allowed(credit=CREDIT)
    def __init__(
        self,
        classifier: nn.Module,
        noise_mask: NoiseMask,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        policy_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        policy_schedule: Coefficient = 1.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        credit: Credit = "batch",
        coupled: bool = True,
        seed: int = 0,
    ) -> None:
        shared = {id(p) for p in classifier.parameters()} & {id(p) for p in noise_mask.parameters()}
        if shared:
            raise ValueError(
                f"policy and classifier share {len(shared)} parameter(s), so both optimizers would move them; give the "
                "policy a backbone of its own"
            )
        self.classifier = classifier
        self.noise_mask = noise_mask
        self.optimizers: Optimizers = Optimizers(
            [optimizer(list(classifier.parameters())), policy_optimizer(list(noise_mask.parameters()))],
            schedule=(as_schedule(schedule, name="schedule"), as_schedule(policy_schedule, name="policy_schedule")),
            names=("the classifier", "the policy"),
            remedy="lower the learning rates, or use coupled=False",
        )
        self.loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy if loss is None else loss
        self.credit: Credit = credit
        self.coupled = coupled
        self.seed = seed
        self.epochs: Epochs = Epochs(seed)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.optimizers.steps[0]

    def training_step(self, batch: Any, *, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """One step of both optimizers.

        Args:
            batch: (x, y), see :meth:`regularized.training.step.Batch.of`.
            progress: position in the training, for the schedules; default: the steps done, of unknown total.

        Returns:
            Mean loss of the classifier and mean q, detached, on the device.
        """
        device = next(self.classifier.parameters()).device
        sorted_batch = Batch.of(batch).map(lambda t: t.to(device, non_blocking=True))
        if sorted_batch.targets is None:
            raise ValueError("NoiseMaskPretraining needs labels in each batch: yield (x, y)")
        progress = Progress(self.steps, 0) if progress is None else progress
        for module in (self.classifier, self.noise_mask):
            if not module.training:
                module.train()
        masked = self.noise_mask(sorted_batch.inputs)
        losses = self.loss(self.classifier(masked.images), sorted_batch.targets)
        objective = noise_mask_objective(losses, masked.log_density, credit=self.credit, coupled=self.coupled)
        self.optimizers.minimise(objective, progress=progress)
        return losses.detach().mean(), masked.log_density.detach().mean()

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["NoiseMaskPretraining"], object] | None = None,
        after_step: Callable[["NoiseMaskPretraining"], object] | None = None,
    ) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes; a batch has at least two images.
            epochs: epochs in all.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step, for saving within long epochs.

        Returns:
            For each epoch of this call the mean ``loss`` and the mean ``log_density``.

        Raises:
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``; the weights are those before it.
        """
        part = Part(as_source(data, seed=mix_seeds(self.seed, 0)), self._averaged_step, stream=(1,))

        def record(means: list[Tensor]) -> dict[str, float]:
            loss, log_density = means[0].tolist()
            if log_density < 0 and self.coupled:
                warnings.warn(
                    f"the mean log density was {log_density:.3g} in epoch {self.epoch - 1}: with coupled=True a "
                    "negative one turns the classifier's gradient round. Use coupled=False, or a larger grid",
                    stacklevel=4,
                )
            return {"loss": loss, "log_density": log_density}

        return fit_epochs(self, [part], until=epochs, record=record, after_epoch=after_epoch, after_step=after_step)

    def _averaged_step(self, batch: Batch, *, progress: Progress) -> Tensor:
        return torch.stack(self.training_step(batch, progress=progress))

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: both networks, the running state in the policy, both optimizers, the counters.

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


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")
