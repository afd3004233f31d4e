"""What experiments on small images share: the plain loop, the quality of predictions, and what is remembered of a run.

The loop is the one that a user would write. It knows nothing of the technique, which comes in as a loss, a layer of
the network, or an optimizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets.samples import display_name, resplit
from regularized.evidence.experiment import About
from regularized.mechanisms.calibration import expected_calibration_error
from regularized.mechanisms.two_networks import mean_logits
from regularized.training.data import Source
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.step import Batch

__all__ = [
    "Augmented",
    "Trace",
    "about_images",
    "checkpoints",
    "crop_and_flip",
    "fit",
    "outputs",
    "percent",
    "quality",
]


def fit(
    net: nn.Module,
    data: Source,
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    schedule: Coefficient = 1.0,
    first_epoch: int = 0,
    before_epoch: Callable[[int], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train a network for a number of epochs.

    Args:
        net: trained in place; in training mode during each epoch.
        data: batches, on the network's device.
        loss: of a network and a batch, a scalar.
        optimizer: its learning rates are those that the schedule multiplies.
        epochs: how many.
        schedule: factor of the learning rates, over all steps; default constant.
        first_epoch: where to begin in the orders of the data; default 0. Networks that shall see other orders begin
            elsewhere.
        before_epoch: called with the number of the epoch to come, from 0.
        after_epoch: called with the number of epochs that are done.

    Examples:
        >>> from regularized.training.data import TensorData
        >>> net = nn.Linear(2, 2)
        >>> data = TensorData(torch.randn(8, 2), torch.randint(2, (8,)), batch_size=4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> fit(net, data, lambda n, b: F.cross_entropy(n(b.inputs), b.targets), optimizer=optimizer, epochs=2)
    """
    factor, rates = as_schedule(schedule), [group["lr"] for group in optimizer.param_groups]
    total = epochs * len(data)
    for epoch in range(epochs):
        net.train()
        if before_epoch is not None:
            before_epoch(epoch)
        for number, batch in enumerate(data.batches(first_epoch + epoch)):
            now = factor(Progress(epoch * len(data) + number, total))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * now
            loss(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        if after_epoch is not None:
            after_epoch(epoch + 1)


def outputs(networks: nn.Module | Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Logits in evaluation mode, the mean over networks where there are several: (N, C) on the processor.

    Args:
        networks: one or several; their modes are put back.
        inputs: (N, ...); fed in pieces.
    """
    members = [networks] if isinstance(networks, nn.Module) else networks
    return torch.cat([mean_logits(members, part).cpu() for part in inputs.split(2000)])


def percent(hits: Tensor) -> float:
    """Share of true entries, in per cent.

    Examples:
        >>> percent(torch.tensor([True, False, True, True]))
        75.0
    """
    return 100.0 * hits.double().mean().item()


def quality(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How good predictions are: ``accuracy`` in per cent, and whether probabilities can be trusted: ``nll``, ``ece``.

    The negative log-likelihood is in nats; the expected calibration error, over ten equal bins, in per cent.

    Args:
        logits: (N, C).
        labels: (N,) int64.

    Examples:
        >>> {name: round(value, 3) for name, value in quality(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])).items()}
        {'accuracy': 75.0, 'nll': 0.693, 'ece': 25.0}
    """
    exact = logits.double()
    return {
        "accuracy": percent(exact.argmax(dim=1) == labels),
        "nll": float(F.cross_entropy(exact, labels)),
        "ece": 100.0 * float(expected_calibration_error(exact.softmax(dim=1), labels)),
    }


def checkpoints(epochs: int, count: int = 10) -> frozenset[int]:
    """Epochs at which a run is measured: about ``count``, evenly spread, the last among them.

    Examples:
        >>> sorted(checkpoints(20, 5)), sorted(checkpoints(3))
        ([4, 8, 12, 16, 20], [1, 2, 3])
    """
    return frozenset(round(epochs * k / count) for k in range(1, count + 1)) - {0}


@dataclass
class Trace:
    """The metrics of a run at each epoch at which it was measured.

    Examples:
        >>> trace = Trace()
        >>> for epoch, (noisy, test) in enumerate([(40.0, 60.0), (50.0, 80.0), (45.0, 70.0)], 1):
        ...     trace.add(epoch, {"validation_accuracy": noisy, "test_accuracy": test})
        >>> trace.last["test_accuracy"], trace.best("validation_accuracy", "higher")["test_accuracy"]
        (70.0, 80.0)
        >>> trace.curves("test_accuracy")
        {'test_accuracy': [(1, 60.0), (2, 80.0), (3, 70.0)]}
    """

    epochs: list[int] = field(default_factory=list)
    metrics: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Remember the metrics of an epoch."""
        self.epochs.append(epoch)
        self.metrics.append(dict(metrics))

    @property
    def last(self) -> dict[str, float]:
        """Metrics at the end."""
        return dict(self.metrics[-1])

    def best(self, name: str, direction: Literal["higher", "lower"]) -> dict[str, float]:
        """All metrics of the epoch where one was best, of equals the first: early stopping, where it is a validation's.

        ``stopped_at`` is that epoch.
        """
        sign = 1.0 if direction == "higher" else -1.0
        at = max(range(len(self.metrics)), key=lambda i: sign * self.metrics[i][name])
        return {**self.metrics[at], "stopped_at": float(self.epochs[at])}

    def curves(self, *names: str) -> dict[str, list[tuple[float, float]]]:
        """Metrics over epochs, by name."""
        return {name: [(epoch, m[name]) for epoch, m in zip(self.epochs, self.metrics)] for name in names}


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual augmentation of CIFAR: a crop of each image from a margin of 4 pixels, and a flip of every other one.

    Args:
        images: (B, C, H, W).
        generator: on the processor.

    Examples:
        >>> crop_and_flip(torch.randn(5, 3, 32, 32), torch.Generator()).shape
        torch.Size([5, 3, 32, 32])
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.where(flip, width - 1 - columns, columns)).to(images.device)
    of_image = torch.arange(count, device=images.device)[:, None, None, None]
    of_channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[of_image, of_channel, rows[:, None, :, None], columns[:, None, None, :]]


class Augmented:
    """Batches whose inputs are changed at each visit.

    Args:
        data: batches.
        change: from inputs to inputs.
    """

    def __init__(self, data: Source, change: Callable[[Tensor], Tensor]) -> None:
        self._data = data
        self._change = change

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As those of the data."""
        for batch in self._data.batches(epoch, start=start, rank=rank, world=world):
            assert isinstance(batch.inputs, Tensor)
            yield Batch(self._change(batch.inputs), batch.targets, batch.index)


def about_images(data: str, *, train: int, test: int, model: str, build: Callable[[], nn.Module]) -> About:
    """What an arm on images is measured on.

    Args:
        data: name of the set, as in :func:`~regularized.evidence.datasets.samples.draw`.
        train: training images.
        test: test images.
        model: in a few words, without its size.
        build: makes the network; called without memory for its weights.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in build().parameters())
    words = f"{train:,} {display_name(data)}", f"{model}, {_short(weights)} weights"
    return About(words[0], train, words[1], weights, resplit(data, train=train, test=test))


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
