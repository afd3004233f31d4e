"""ELR+: early-learning regularisation with two networks that supervise each other, averaged weights, and mixup.

For classifiers whose training labels are partly wrong, where the best accuracy is worth about three times the cost of
plain training. :mod:`regularized.noisy_labels.early_learning.loss` has the paper, its symbols, and the one-network
method.

=========  ==================  =========================================================================
paper      here                meaning
=========  ==================  =========================================================================
f1, f2     ``networks``        the two networks that are trained
g1, g2     ``averages``        exponential moving averages of their weights
t1, t2     ``losses.history``  (N, C) running averages; that of f1 is fed by g2 and the other way round
l          ``mix.share``       share of mixup, at least 1/2, one for each batch
q          (in the loss)       (B, C) rows of the history, mixed like the inputs
=========  ==================  =========================================================================

Paper and code (934af53) differ: labels are refined by q in the code only when there are exactly 100 classes; here that
is ``refine_labels``. The code's averages start from initialisations of their own; ours from their network's, which the
rising decay forgets within a few steps either way. Prediction is the mean of f1 and f2, as in the code on one GPU.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.ema import EMA, Decay, ramped_decay
from regularized.mechanisms.mixup import draw_mix
from regularized.mechanisms.ranges import allowed, at_least
from regularized.mechanisms.sample_history import check_index
from regularized.mechanisms.two_networks import check_distinct, mean_logits
from regularized.noisy_labels.early_learning.penalty import STRENGTH, PredictionHistory
from regularized.noisy_labels.early_learning.plus_loss import EarlyLearningPlusLoss
from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule
from regularized.training.randomness import mix as mix_seeds
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["EarlyLearningPlus"]

# Shapes: B samples of a batch, N samples of the training set, C classes.

Parameters: TypeAlias = Iterable[nn.Parameter]

_STATE = ("networks", "averages", "losses", "optimizers", "mixing", "epochs")


class EarlyLearningPlus:
    """Two networks trained against label noise, each on what the other one's average believes.

    In every epoch the first network is trained on all the data, then the second one. In a step of network k the inputs
    and labels are mixed up, the *average* of the other network looks at the inputs before mixing, and its predictions
    go into the history that regularises network k. The averages run in training mode, so that their batch
    normalisation keeps its own statistics.

    A step costs a plain step and a forward pass of the other average; with two networks an epoch costs at least 2.67
    plain epochs. Memory: four models and two histories of N x C x 4 bytes. It runs in one process.

    Not where one network is all that can be afforded: use
    :class:`~regularized.noisy_labels.early_learning.EarlyLearningLoss`. Not for inputs that cannot be blended (tokens).

    Args:
        make_model: builds a network; called twice, and must give different initial weights.
        num_samples: N, length of the training set that the index of a batch counts in.
        num_classes: C.
        optimizer: factory called with the parameters of a network, such as ``partial(torch.optim.SGD, lr=0.02,
            momentum=0.9, weight_decay=5e-4)`` (the authors' for CIFAR).
        schedule: factor on the learning rates, a number or a function of
            :class:`~regularized.training.progress.Progress`; the authors divide by 10 once at 3/4 (CIFAR-10):
            ``piecewise({0.75: 0.1})``.
        strength: coefficient of the regulariser, a number or a schedule; default 3 (CIFAR-10). The authors ramp it for
            CIFAR-100: ``gaussian_ramp(7.0, steps=40000)``.
        momentum: share of the old history that stays, in [0, 1]; default 0.7 (CIFAR-10).
        mixup: parameter of the Beta distribution of mixup, >= 0; default 1 (CIFAR, Clothing1M); 0 switches it off.
        decay: decay of the averaged weights; default ``ramped_decay(0.997, steps=40000)`` (CIFAR). ``steps`` is about
            half of that training: shorten it with yours.
        eps: probabilities are clamped to [eps, 1 - eps]; default 1e-4.
        refine_labels: multiply the labels by the history; default False (the code does it for CIFAR-100 alone).
        device: where the networks are trained; default: where ``make_model`` puts them.
        seed: decides mixup, and in :meth:`fit` the order of the data and what the networks draw at random; default 0.

    Attributes:
        networks: the two networks.
        averages: their averaged copies, see :class:`~regularized.mechanisms.ema.EMA`.
        losses: their losses, with the histories.
        optimizers: their optimizers, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: a setting is outside its range, or ``make_model`` returned the same network twice, or two that share
            parameters.

    Examples:
        >>> from functools import partial
        >>> x, y = torch.randn(32, 4), torch.randint(3, (32,))
        >>> batches = [(x[i], y[i], i) for i in torch.arange(32).split(8)]
        >>> plus = EarlyLearningPlus(
        ...     lambda: nn.Linear(4, 3), num_samples=32, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1)
        ... )
        >>> losses = plus.fit(batches, epochs=2)
        >>> plus.predict(x).shape, plus.suspected_label_errors(y).shape
        (torch.Size([32, 3]), torch.Size([32]))
    """

    @allowed(strength=STRENGTH.or_schedule(), mixup=at_least(0.0, remedy="0 switches it off"))
    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        *,
        num_samples: int,
        num_classes: int,
        optimizer: Callable[[Parameters], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        strength: Coefficient = 3.0,
        momentum: float = 0.7,
        mixup: float = 1.0,
        decay: Decay | None = None,
        eps: float = 1e-4,
        refine_labels: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        self.networks: tuple[nn.Module, nn.Module] = (make_model(), make_model())
        check_distinct(self.networks, remedy="make_model must build a new one at each call")
        if device is not None:
            for network in self.networks:
                network.to(device)
        self.device: torch.device = next(self.networks[0].parameters()).device
        decay = ramped_decay() if decay is None else decay
        self.averages: tuple[EMA, ...] = tuple(EMA(network, decay=decay, buffers="own") for network in self.networks)
        self.losses: tuple[EarlyLearningPlusLoss, ...] = tuple(
            EarlyLearningPlusLoss(num_samples, num_classes, momentum=momentum, eps=eps, refine_labels=refine_labels).to(
                self.device
            )
            for _ in self.networks
        )
        self.optimizers: Optimizers = Optimizers(
            [optimizer(list(network.parameters())) for network in self.networks], schedule=schedule
        )
        self.strength: Schedule = as_schedule(strength, name="strength")
        self.mixup = mixup
        self.seed = seed
        self.mixing: tuple[torch.Generator, ...] = tuple(
            torch.Generator().manual_seed(mix_seeds(seed, net)) for net in range(2)
        )
        self.epochs: Epochs = Epochs(seed)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def steps(self) -> list[int]:
        """Optimizer steps done by each network."""
        return self.optimizers.steps

    def training_step(self, net: int, batch: Any, *, progress: Progress | None = None) -> Tensor:
        """One optimizer step of one network, and of its average.

        Args:
            net: 0 or 1, which network.
            batch: (x, y, index), see :meth:`regularized.training.step.Batch.of`; x a floating-point tensor.
            progress: position in the training, for the schedules; default: the steps done, of unknown total.

        Returns:
            The loss, detached, on the device.

        Raises:
            ValueError: ``net`` is not 0 or 1, or the batch lacks labels or index.
            TypeError: the input is not a floating-point tensor.
        """
        if net not in (0, 1):
            raise ValueError(f"net must be 0 or 1, got {net!r}")
        sorted_batch = Batch.of(batch)
        index = sorted_batch.index
        check_index(index, self.losses[net].num_samples, owner="EarlyLearningPlus", batch_size=sorted_batch.size)
        sorted_batch = sorted_batch.map(lambda t: t.to(self.device, non_blocking=True))
        inputs, labels, index = sorted_batch.inputs, sorted_batch.targets, sorted_batch.index
        if labels is None or index is None:
            raise ValueError("EarlyLearningPlus needs labels and index in each batch: yield (x, y, index)")
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TypeError(
                "EarlyLearningPlus blends inputs by mixup and needs them as one floating-point tensor, got "
                f"{inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__}"
            )
        progress = Progress(self.steps[net], 0) if progress is None else progress
        network, teacher = self.networks[net], self.averages[1 - net]
        for module in (network, teacher):
            if not module.training:
                module.train()
        mix = draw_mix(len(inputs), self.mixup, generator=self.mixing[net], device=self.device, keep_larger=True)
        logits = network(mix(inputs))
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        loss: Tensor = self.losses[net](
            logits, labels, index, teacher_logits=teacher_logits, mix=mix, strength=self.strength(progress)
        )
        self.optimizers.minimise(loss, net, progress=progress)
        self.averages[net].update(network)
        return loss.detach()

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["EarlyLearningPlus"], object] | None = None,
        after_step: Callable[["EarlyLearningPlus"], object] | None = None,
    ) -> list[tuple[float, float]]:
        """Train both networks until ``epochs`` epochs are done in all.

        A procedure restored by :meth:`load_state_dict` goes on where it stopped, and ends bit for bit (CPU) as one that
        was never interrupted, also in the middle of an epoch. The two networks see different orders.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes: ``TensorData``, a ``DataLoader``, a list of
                batches (x, y, index); or a pair of them, one for each network.
            epochs: epochs in all.
            after_epoch: called with this object after each epoch, for evaluation or saving.
            after_step: called with this object after each step of either network, for saving within long epochs.

        Returns:
            Mean loss of each network in each epoch of this call.

        Raises:
            TypeError: the data cannot be iterated.
            ValueError: they are empty, or of unknown length.
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``; the weights are those before it.
        """
        pair = data if isinstance(data, tuple) else (data, data)
        if len(pair) != 2:
            raise ValueError(f"data must be one source of batches, or a pair, one for each network; got {len(pair)}")
        parts = [
            Part(as_source(one, seed=mix_seeds(self.seed, net)), partial(self.training_step, net), stream=(net,))
            for net, one in enumerate(pair)
        ]
        return fit_epochs(
            self,
            parts,
            until=epochs,
            record=lambda means: (float(means[0]), float(means[1])),
            after_epoch=after_epoch,
            after_step=after_step,
        )

    def predict(self, inputs: Tensor) -> Tensor:
        """Mean of the two networks' logits in evaluation mode, (B, C); the modes are put back afterwards."""
        return mean_logits(self.networks, inputs.to(self.device))

    def suspected_label_errors(self, labels: Tensor) -> Tensor:
        """Which training labels both histories together contradict; (N,) labels to (N,) bool."""
        both = PredictionHistory(self.losses[0].num_samples, self.losses[0].num_classes, momentum=0.0)
        both.history = self.losses[0].history + self.losses[1].history
        return both.suspected_label_errors(labels)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: networks, averages, histories, optimizers, counters, random states.

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
