"""Phase diagrams: hundreds of small networks, over shares of data and of corrupted labels, trained at once.

    Doshi, Das, He, Gromov, "To grok or not to grok", 2023, arXiv 2310.13061, whose diagrams have 17 x 17 cells for
    each strength of a regulariser.

All runs of a chunk are one batched model: weights carry a leading axis R, and since the optimizer works entry by entry,
each run trains as it would alone. With the whole training set as the batch, the first layer on *all* pairs is an outer
sum of U and V, without a gather; each run's training set is a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, count
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    Operation,
    QuadraticMLP,
    modular_optimizer,
)
from regularized.understanding.grokking.phases import Phase, phase_of
from regularized.understanding.grokking.scores import neuron_ipr

__all__ = ["PhaseDiagram", "phase_diagram"]

_SHARES = tuple(k / 20 for k in range(2, 19))  # "np.linspace(0.1, 0.9, 17)" in the official scripts

# Shapes: R runs at once, A shares of data, X shares of noise, N neurons, p classes, M = p p pairs.


@dataclass(frozen=True, slots=True)
class PhaseDiagram:
    """What the networks of a diagram had learned at the end; rows are shares of data, columns shares of noise.

    Args:
        fracs: the A shares of data.
        noises: the X shares of corrupted labels.
        p: modulus.
        accuracies: ``train``, ``memorized``, ``restored``, ``test`` and ``ipr``, (A, X) float64 each; ``size``: the
            weights' norm as a share of what it was at the start.

    Raises:
        KeyError: a measurement that there is not is asked for.

    Examples:
        >>> diagram = phase_diagram(5, fracs=[0.8], noises=[0.0, 0.5], width=8, steps=2)
        >>> diagram["test"].shape, len(diagram.phases()[0])
        (torch.Size([1, 2]), 2)
    """

    fracs: tuple[float, ...]
    noises: tuple[float, ...]
    p: int
    accuracies: Mapping[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """One measurement, (A, X)."""
        return self.accuracies[name]

    def phases(self, **limits: float) -> list[list[Phase]]:
        """The phase of each cell; ``limits`` are ``high`` and ``low`` of :func:`phase_of`.

        There is no log here: a network whose weights have shrunk below a hundredth counts as one that forgot.
        """
        names = ("train", "test", "memorized", "size")
        return [
            [
                phase_of(train, test, memorized, chance=1 / self.p, generalized_before=size < 0.01, **limits)
                for train, test, memorized, size in zip(*rows, strict=True)
            ]
            for rows in zip(*(self.accuracies[name].tolist() for name in names), strict=True)
        ]

    def share(self, phase: Phase) -> float:
        """Share of the cells that are in a phase."""
        cells = [found for row in self.phases() for found in row]
        return cells.count(phase) / len(cells)


class _Runs(nn.Module):
    """R networks of one shape: what :class:`QuadraticMLP` is, with a leading axis."""

    mean: Tensor
    variance: Tensor

    def __init__(self, net: QuadraticMLP, runs: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.rate = net.dropout.p
        # Transposed, so that a number's row lies together.
        self.first = nn.Parameter(net.fc1.weight.detach().t().repeat(runs, 1, 1))  # (R, 2 p, N)
        self.second = nn.Parameter(net.fc2.weight.detach().t().repeat(runs, 1, 1))  # (R, N, p)
        self.gain = self.shift = None
        if batch_norm:
            width = self.first.shape[2]
            self.gain = nn.Parameter(torch.ones(runs, 1, width))
            self.shift = nn.Parameter(torch.zeros(runs, 1, width))
            self.register_buffer("mean", torch.zeros(runs, 1, width))
            self.register_buffer("variance", torch.ones(runs, 1, width))

    def size(self) -> Tensor:
        """(R,) norm of all weights."""
        return (self.first.square().sum(dim=(1, 2)) + self.second.square().sum(dim=(1, 2))).sqrt()

    def table(self) -> Tensor:
        """(R, M, p) logits of all pairs."""
        p = self.first.shape[1] // 2
        return self.read_out((self.first[:, :p, None] + self.first[:, None, p:]).flatten(1, 2))

    def gathered(self, pairs: Tensor) -> Tensor:
        """(R, B, p) logits of other pairs for each run, (R, B, 2)."""
        runs, batch, _ = pairs.shape
        rows = pairs + torch.arange(0, self.first.shape[1], self.first.shape[1] // 2, device=pairs.device)
        rows = rows + (torch.arange(runs, device=pairs.device) * self.first.shape[1])[:, None, None]
        sums = F.embedding_bag(rows.flatten(0, 1), self.first.flatten(0, 1), mode="sum")
        return self.read_out(sums.unflatten(0, (runs, batch)))

    def read_out(self, sums: Tensor) -> Tensor:
        hidden = F.dropout(sums, self.rate, self.training).square()
        if self.gain is not None and self.shift is not None:
            mean, variance = self.mean, self.variance
            if self.training:
                mean, size = hidden.mean(dim=1, keepdim=True), hidden.shape[1]
                variance = hidden.var(dim=1, keepdim=True, unbiased=False)
                with torch.no_grad():  # momentum and correction of torch.nn.BatchNorm1d
                    self.mean.lerp_(mean, 0.1)
                    self.variance.lerp_(variance * (size / (size - 1)), 0.1)
            hidden = (hidden - mean) * (variance + 1e-5).rsqrt() * self.gain + self.shift
        return hidden @ self.second


@allowed(steps=count(0), batch_size=count(2).or_none("the whole training set"), runs_at_once=count(1))
def phase_diagram(
    p: int = 97,
    *,
    fracs: Sequence[float] = _SHARES,
    noises: Sequence[float] = _SHARES,
    width: int = 500,
    steps: int = 2000,
    weight_decay: float = 0.0,
    dropout: float = 0.0,
    norm: Literal["batch"] | None = None,
    batch_size: int | None = None,
    op: Operation = "add",
    seed: int = 1,
    device: torch.device | str = "cpu",
    runs_at_once: int = 100,
) -> PhaseDiagram:
    """Train a network for each share of data and of noise, many at once.

    All start from the same weights, as in the official scripts. At the paper's size a run needs about 0.1 GB with the
    whole training set as the batch, and a diagram takes minutes on a GPU, hours on two cores.

    Args:
        p: modulus; default 97 (the paper's).
        fracs: shares of data; default 0.1, 0.15, ... 0.9 (the paper's).
        noises: shares of corrupted labels; default the same.
        width: neurons; default 500 (the paper's).
        steps: with the whole training set; default 2,000 (official scripts). With mini-batches ``256 / batch_size``
            times as many are made (official).
        weight_decay: decoupled; the paper has 0, 5, 15, 20.
        dropout: the paper has 0, 0.3, 0.6, 0.9.
        norm: ``"batch"``, as the paper has it with batches of 8, 32, 64 and 256; None.
        batch_size: None: the whole training set. Every run must have a batch of training pairs.
        op: see :class:`ModularArithmetic`.
        seed: of the starting weights, of dropout and of the batches; default 1 (official scripts).
        device: where to train.
        runs_at_once: R, runs of a chunk.

    Raises:
        ValueError: no cell, normalisation without mini-batches, a batch larger than a training set, or an argument
            that the task or the network refuses.

    Examples:
        >>> round(float(phase_diagram(5, fracs=[1.0], noises=[0.0], width=64, steps=60)["train"]), 1)
        1.0
    """
    if not fracs or not noises:
        raise ValueError(f"a diagram needs shares of data and of noise, got fracs={fracs!r} and noises={noises!r}")
    if norm is not None and batch_size is None:
        raise ValueError("batch normalisation is for mini-batches here: give batch_size, the paper has 8 to 256")
    tasks = [ModularArithmetic(p, op, frac=frac, noise=noise) for frac in fracs for noise in noises]
    if batch_size is not None and (smallest := min(task.num_train for task in tasks)) < batch_size:
        raise ValueError(f"batch_size={batch_size} is larger than the smallest training set, {smallest} pairs")
    settings: dict[str, Any] = {"weight_decay": weight_decay, "batch_size": batch_size, "seed": seed}
    found: dict[str, list[Tensor]] = {}
    for k in range(0, len(tasks), runs_at_once):
        chunk = tasks[k : k + runs_at_once]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = QuadraticMLP(p, width=width, dropout=dropout, norm=norm)
        runs = _Runs(net, len(chunk), batch_norm=norm is not None).to(device)
        data = _Tables.of(chunk, device)
        before = runs.size().detach()
        (_train_whole if batch_size is None else _train_batches)(runs, data, chunk, steps, **settings)
        measured = {**_measure(runs, data, chunk[0]), "size": (runs.size() / before).detach().double()}
        for name, values in measured.items():
            found.setdefault(name, []).append(values.cpu())
    shape = (len(fracs), len(noises))
    return PhaseDiagram(
        tuple(fracs), tuple(noises), p, {name: torch.cat(parts).view(shape) for name, parts in found.items()}
    )


@dataclass(frozen=True, slots=True)
class _Tables:
    """Labels and masks of R tasks in the order of the table of pairs, (R, M)."""

    labels: Tensor
    clean: Tensor
    train: Tensor
    corrupted: Tensor
    test: Tensor

    @classmethod
    def of(cls, tasks: Sequence[ModularArithmetic], device: torch.device | str) -> "_Tables":
        labels = torch.zeros(len(tasks), tasks[0].p ** 2, dtype=torch.int64)
        clean, masks = torch.zeros_like(labels), torch.zeros(3, *labels.shape, dtype=torch.bool)
        for r, task in enumerate(tasks):
            at = task.pairs[:, 0] * task.p + task.pairs[:, 1]
            labels[r, at], clean[r, at] = task.labels, task.clean
            n = task.num_train
            masks[0, r, at[:n]], masks[1, r, at[:n]], masks[2, r, at[n:]] = True, task.corrupted, True
        return cls(labels.to(device), clean.to(device), *masks.to(device))


def _squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, B) squared error to the one-hot label, without building that."""
    said = logits.gather(2, labels[..., None]).squeeze(2)
    return logits.square().sum(dim=2) - 2 * said + 1


def _train_whole(
    runs: _Runs,
    data: _Tables,
    tasks: Sequence[ModularArithmetic],
    steps: int,
    *,
    weight_decay: float,
    batch_size: None,
    seed: int,
) -> None:
    optimizer = modular_optimizer(runs.parameters(), weight_decay=weight_decay)
    sizes = torch.tensor([task.num_train * task.p for task in tasks], device=data.labels.device)
    weights = data.train / sizes[:, None]
    with torch.random.fork_rng(devices=[] if weights.device.type == "cpu" else [weights.device]):
        torch.manual_seed(seed)  # dropout
        for _ in range(steps):
            optimizer.zero_grad()
            (_squared_errors(runs.table(), data.labels) * weights).sum().backward()
            optimizer.step()


def _train_batches(
    runs: _Runs,
    data: _Tables,
    tasks: Sequence[ModularArithmetic],
    steps: int,
    *,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> None:
    optimizer = modular_optimizer(runs.parameters(), weight_decay=weight_decay, batch_size=batch_size)
    p, device = tasks[0].p, data.labels.device
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([task.num_train // batch_size for task in tasks])  # batches of an epoch, for each run
    order = torch.zeros(len(tasks), int(lengths.max()) * batch_size, dtype=torch.int64)
    places = [task.pairs[: task.num_train, 0] * p + task.pairs[: task.num_train, 1] for task in tasks]
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        for step in range(steps * 256 // min(batch_size, 256)):
            batch = step % lengths
            for r in (batch == 0).nonzero().flatten().tolist():
                used = int(lengths[r]) * batch_size
                order[r, :used] = places[r][torch.randperm(len(places[r]), generator=draws)[:used]]
            at = order.gather(1, batch[:, None] * batch_size + torch.arange(batch_size)).to(device)
            pairs = torch.stack([at // p, at % p], dim=2)
            optimizer.zero_grad()
            loss = _squared_errors(runs.gathered(pairs), data.labels.gather(1, at)).sum() / (batch_size * p)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _measure(runs: _Runs, data: _Tables, task: ModularArithmetic) -> dict[str, Tensor]:
    runs.eval()
    predicted = runs.table().argmax(dim=2)

    def share(right: Tensor, of: Tensor) -> Tensor:
        return (right & of).sum(dim=1).double() / of.sum(dim=1)

    first, second = runs.first.transpose(1, 2), runs.second.transpose(1, 2)
    scores = [neuron_ipr(u, w, p=task.p, cycle=task.cycle).mean() for u, w in zip(first, second, strict=True)]
    return {
        "train": share(predicted == data.labels, data.train),
        "memorized": share(predicted == data.labels, data.corrupted),
        "restored": share(predicted == data.clean, data.corrupted),
        "test": share(predicted == data.clean, data.test),
        "ipr": torch.stack(scores).double(),
    }
