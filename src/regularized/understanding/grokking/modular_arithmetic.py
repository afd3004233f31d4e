"""A task whose rule, noise and neurons can be told apart: modular arithmetic with part of the labels corrupted.

For whoever asks of a regulariser: does the network that it trains learn the rule, the wrong labels, or both?

    Doshi, Das, He, Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
    algorithmic datasets", 2023, arXiv 2310.13061. Official code: github.com/d-doshi/Grokking at 0b4335f (no licence
    file). The exact solution: Gromov, "Grokking modular arithmetic", 2023, arXiv 2301.02679.

=========  ======================  ==================================================================================
paper      here                    meaning
=========  ======================  ==================================================================================
p          ``p``                   the modulus, a prime; also the number of classes
alpha      ``frac``                share of all pairs that is trained on, in (0, 1]
xi         ``noise``               share of the training labels that is replaced by random ones, in [0, 1]
N          ``width``               neurons of the hidden layer
U, V       ``fc1.weight``          (N, 2 p): ``[U | V]``, what a neuron makes of the first and of the second number
W          ``fc2.weight``          (p, N): what it says about each result
=========  ======================  ==================================================================================

A replaced label is drawn from *all* classes, so a share 1/p of them stays right: a network that has dropped them all
has the training accuracy ``1 - noise (1 - 1/p)``. Paper and code differ: in the code dropout comes before the square
and batch normalisation after it; we follow the code. Its variant for transformers never draws the last class; ours
does.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from regularized.mechanisms.ranges import Choice, allowed, at_least, between, count, positive, share

__all__ = [
    "ModularArithmetic",
    "ModularTransformer",
    "QuadraticMLP",
    "analytic_weights",
    "modular_optimizer",
    "one_hot_mse",
]

# Shapes: B pairs of a batch, M pairs in all, p classes, N neurons.

Operation: TypeAlias = Literal["add", "subtract", "multiply", "divide"]


class ModularArithmetic:
    """All pairs of numbers below p with the result of an operation, split, and part of the training labels corrupted.

    The order of draws is that of the official code: Python's generator shuffles the pairs, the first ``int(frac M)``
    are for training, and the labels of the first ``int(noise * n)`` of those are replaced from torch's CPU generator.
    Test labels are right. Inputs are pairs of integers, (B, 2) int64.

    Args:
        p: the modulus; the paper has 97.
        op: ``"add"`` (default), ``"subtract"``, ``"multiply"``, or ``"divide"``, which leaves out divisors without an
            inverse. For the latter two p should be prime.
        frac: share of the pairs that is trained on, in (0, 1]; default 0.5.
        noise: share of the training labels that is replaced, in [0, 1]; default 0.
        pair_seed: of the split; default 420 (official notebook).
        label_seed: of the random labels; default 0 (official notebook).

    Attributes:
        pairs: (M, 2) all pairs, those for training first.
        labels: (M,) as given to training: corrupted ones first, then right ones.
        clean: (M,) the right labels.
        corrupted: (n,) bool, which training labels were replaced; a share 1/p of them is right by chance.
        order: (M,) position of each pair in the table of all pairs, ``i p + j`` where none is left out.
        num_train: n.

    Raises:
        ValueError: p < 2, ``op`` unknown, ``frac`` or ``noise`` out of range, or no pair is left for training.

    Warns:
        UserWarning: p is not a prime and the operation multiplies: then the map is not one to one.

    Examples:
        >>> task = ModularArithmetic(7, frac=0.5, noise=0.35)
        >>> len(task.train), len(task.test), int(task.corrupted.sum())
        (24, 25, 8)
        >>> (task.clean == task.pairs.sum(dim=1) % 7).all()
        tensor(True)
    """

    @allowed(p=count(2, remedy="the paper has 97"), op=Choice(*get_args(Operation)), frac=share(), noise=share())
    def __init__(
        self,
        p: int = 97,
        op: Operation = "add",
        *,
        frac: float = 0.5,
        noise: float = 0.0,
        pair_seed: int = 420,
        label_seed: int = 0,
    ) -> None:
        if op in ("multiply", "divide") and not _is_prime(p):
            warnings.warn(
                f"p = {p} is not a prime: to {op} is not one to one then, and the scores of neurons mean nothing; take "
                "a prime, or add",
                stacklevel=3,
            )
        table, results = _table(p, op)
        order = list(range(len(table)))
        random.Random(pair_seed).shuffle(order)
        self.num_train: int = int(frac * len(table))
        if self.num_train < 1:
            raise ValueError(f"frac = {frac} of {len(table)} pairs leaves none for training; at least 1/{len(table)}")
        self.p = p
        self.op = op
        self.frac = frac
        self.noise = noise
        self.order: Tensor = torch.tensor(order)
        self.pairs: Tensor = table[self.order]
        self.clean: Tensor = results[self.order]
        replaced = int(noise * self.num_train)
        draws = torch.Generator().manual_seed(label_seed)
        self.labels: Tensor = torch.cat([torch.randint(0, p, (replaced,), generator=draws), self.clean[replaced:]])
        self.corrupted: Tensor = torch.arange(self.num_train) < replaced

    @property
    def train(self) -> TensorDataset:
        """Pairs and labels for training, corrupted ones first."""
        return TensorDataset(self.pairs[: self.num_train], self.labels[: self.num_train])

    @property
    def test(self) -> TensorDataset:
        """The other pairs, with right labels."""
        return TensorDataset(self.pairs[self.num_train :], self.labels[self.num_train :])

    @property
    def wrong(self) -> Tensor:
        """(n,) bool: training labels that are really wrong, without those that are right by chance."""
        return self.labels[: self.num_train] != self.clean[: self.num_train]

    @property
    def cycle(self) -> Tensor | None:
        """Order in which the operation is addition, for spectra: powers of a primitive root; None if it is already.

        (p - 1,) int64 without the zero, which is no power; also None for a modulus that is not prime.
        """
        return _powers(self.p) if self.op in ("multiply", "divide") and _is_prime(self.p) else None

    def __repr__(self) -> str:
        return f"ModularArithmetic(p={self.p}, op={self.op!r}, frac={self.frac}, noise={self.noise})"


def _table(p: int, op: str) -> tuple[Tensor, Tensor]:
    """(M, 2) pairs in the order of the table, and (M,) results."""
    second = torch.arange(p)
    if op == "divide":
        second = torch.tensor([j for j in range(p) if math.gcd(j, p) == 1])
    table = torch.cartesian_prod(torch.arange(p), second)
    i, j = table.unbind(dim=1)
    if op == "divide":
        j = torch.tensor([pow(k, -1, p) if math.gcd(k, p) == 1 else 0 for k in range(p)])[j]
    results = {"add": i + j, "subtract": i - j, "multiply": i * j, "divide": i * j}[op] % p
    return table, results


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))


def _powers(p: int) -> Tensor:
    """Powers 1, g, g², ... of the smallest primitive root of a prime."""
    for g in range(1, p):
        powers = [1]
        while (following := powers[-1] * g % p) != 1:
            powers.append(following)
        if len(powers) == p - 1:
            return torch.tensor(powers)
    raise ValueError(f"{p} has no primitive root; it is not a prime")


def one_hot_mse(logits: Tensor, labels: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """Mean squared error to the one-hot labels, over all B p entries: the paper's loss.

    Args:
        logits: (B, p).
        labels: (B,) int64.
        reduction: ``"mean"`` (default); ``"none"``: the mean over the classes for each sample, for
            :class:`~regularized.training.terms.Loss`.

    Returns:
        Scalar, or (B,).

    Raises:
        ValueError: ``reduction`` is neither.

    Examples:
        >>> one_hot_mse(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
        tensor(0.2500)
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    errors = F.mse_loss(logits, F.one_hot(labels, logits.shape[-1]).to(logits.dtype), reduction=reduction)
    return errors if reduction == "mean" else errors.mean(dim=-1)


_DROPOUT = between(0.0, 1.0, "[)")


class QuadraticMLP(nn.Module):
    """Two layers with a square between them: ``W (U x_1 + V x_2)²``.

    On pairs of integers the first layer looks two rows of its weight up and adds them, which takes a fraction of the
    time of a matrix product with one-hot vectors; it takes those, too. Names and shapes of the weights are those of
    the official code.

    Args:
        p: modulus.
        width: neurons N; default 500 (the paper's).
        dropout: on the sum *before* the square (official code); default 0.
        norm: ``"batch"`` or ``"layer"`` normalisation *after* the square (official code); default None.

    Attributes:
        fc1: linear layer with weight (N, 2 p).
        fc2: linear layer with weight (p, N).
        norm1: the normalisation, or an identity.

    Raises:
        ValueError: an argument out of range; at the call: inputs that are neither pairs nor one-hot vectors, or
            numbers outside [0, p) (checked while they are on the CPU).

    Examples:
        >>> net = QuadraticMLP(7, width=12)
        >>> pairs = torch.tensor([[0, 3], [6, 6]])
        >>> one_hot = nn.functional.one_hot(pairs, 7).flatten(1).float()
        >>> torch.allclose(net(pairs), net(one_hot), atol=1e-6)
        True
    """

    @allowed(p=count(2), width=count(1), dropout=_DROPOUT)
    def __init__(
        self,
        p: int = 97,
        *,
        width: int = 500,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
    ) -> None:
        super().__init__()
        if norm not in (None, "batch", "layer"):
            raise ValueError(f"norm must be 'batch', 'layer' or None, got {norm!r}")
        self.p = p
        self.fc1: nn.Linear = nn.Linear(2 * p, width, bias=False)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        kinds: dict[str | None, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norm1: nn.Module = kinds[norm](width) if norm else nn.Identity()
        self.fc2: nn.Linear = nn.Linear(width, p, bias=False)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.5 / (2 * width) ** (1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, p) of pairs (B, 2), or of one-hot vectors (B, 2 p) or (B, 2, p)."""
        return self.read_out(self.dropout(self.sums(x)))

    def sums(self, x: Tensor) -> Tensor:
        """(B, N) what the neurons square."""
        if x.is_floating_point():
            if x.flatten(1).shape[1] != 2 * self.p:
                raise ValueError(f"one-hot inputs must be (B, {2 * self.p}) or (B, 2, {self.p}), got {tuple(x.shape)}")
            sums: Tensor = self.fc1(x.flatten(1))
            return sums
        check_pairs(x, self.p)
        rows = x + torch.arange(0, 2 * self.p, self.p, device=x.device)  # of U, then of V
        # One kernel gathers and adds; its backward pass adds up per row, and never builds (B, 2 p).
        return F.embedding_bag(rows, self.fc1.weight.t().contiguous(), mode="sum")

    def read_out(self, sums: Tensor) -> Tensor:
        """(B, p) logits from what the neurons square."""
        logits: Tensor = self.fc2(self.norm1(sums.square()))
        return logits

    def neuron_maps(self) -> tuple[Tensor, Tensor]:
        """(N, 2 p) from the numbers to the neurons, and (p, N) from the neurons to the results."""
        return self.fc1.weight, self.fc2.weight


class ModularTransformer(nn.Module):
    """One block of attention and a ReLU layer on pairs of numbers, read at the second one; no normalisation, no bias.

    Scaled as the official notebook has it (s = 1): attention by 1 / head width, logits by 1 / width.

    Args:
        p: modulus.
        width: of the embedding; default 128 (official).
        heads: default 4 (official).
        neurons: of the ReLU layer; None: four times the width (official).
        dropout: on the attention, its output, the embedding and the ReLU layer's output; default 0 (official).

    Attributes:
        tokens: embedding (p, width) of the numbers; ``inverse_participation_ratio(tokens.weight, dim=0)`` tells how
            periodic its dimensions are.
        fc: linear layer to the neurons.
        proj: linear layer from the neurons.
        head: linear layer to the logits.

    Raises:
        ValueError: an argument out of range, ``heads`` does not divide ``width``, or the inputs are not pairs.

    Examples:
        >>> ModularTransformer(7, width=16)(torch.tensor([[0, 3], [6, 6]])).shape
        torch.Size([2, 7])
    """

    @allowed(p=count(2), dropout=_DROPOUT)
    def __init__(
        self, p: int = 97, *, width: int = 128, heads: int = 4, neurons: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        neurons = 4 * width if neurons is None else neurons
        self.p = p
        self.width = width
        self.heads = heads
        self.tokens: nn.Embedding = nn.Embedding(p, width)
        self.places: nn.Embedding = nn.Embedding(2, width)
        self.query: nn.Linear = nn.Linear(width, width, bias=False)
        self.key: nn.Linear = nn.Linear(width, width, bias=False)
        self.value: nn.Linear = nn.Linear(width, width, bias=False)
        self.out: nn.Linear = nn.Linear(width, width, bias=False)
        self.fc: nn.Linear = nn.Linear(width, neurons, bias=False)
        self.proj: nn.Linear = nn.Linear(neurons, width, bias=False)
        self.head: nn.Linear = nn.Linear(width, p, bias=False)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (B, p) of pairs (B, 2)."""
        check_pairs(pairs, self.p)
        x = self.dropout(self.tokens(pairs) + self.places.weight)
        # Only the last place is read, so only it asks.
        last = x[:, -1]
        query = self.query(last).unflatten(1, (self.heads, -1))
        key, value = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.key, self.value))
        shares = torch.einsum("bhd,bthd->bth", query, key).div(query.shape[-1]).softmax(dim=1)
        seen = torch.einsum("bth,bthd->bhd", self.dropout(shares), value).flatten(1)
        last = last + self.dropout(self.out(seen))
        last = last + self.dropout(self.proj(self.fc(last).relu()))
        logits: Tensor = self.head(last)
        return logits / self.width

    def neuron_maps(self) -> tuple[Tensor, Tensor]:
        """(N, p) from a number's embedding to the neurons, and (p, N) from the neurons to the results."""
        return self.fc.weight @ self.tokens.weight.t(), self.head.weight @ self.proj.weight


def check_pairs(x: Tensor, p: int) -> None:
    """Refuse what are not pairs of numbers below p; looks at values only while they are on the CPU."""
    if x.is_floating_point() or x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"the inputs must be pairs of integers, (B, 2), got {x.dtype} of shape {tuple(x.shape)}")
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(x)
        if low < 0 or high >= p:
            raise ValueError(f"the numbers must be in [0, {p}), got {int(low)} to {int(high)}: another modulus?")


@torch.no_grad()
@allowed(p=count(3, "so that there is a frequency"))
def analytic_weights(p: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights of a :class:`QuadraticMLP` that adds without training: a random frequency and two phases for a neuron.

    ``U = cos(2 pi n s/p + a)``, ``V = cos(2 pi n s/p + b)``, ``W = (2/N) cos(2 pi n s/p + a + b)`` (Gromov 2023). The
    square makes ``2 cos(.. i + a) cos(.. j + b)``, which holds ``cos(2 pi (i + j) s/p + a + b)``; the sum over many
    neurons peaks where n = i + j, and is about one-hot there.

    Args:
        p: modulus.
        width: N; accuracy is 100 % where it is large against p, N = 2048 for p = 23.
        seed: of frequencies and phases.
        dtype: of the weights.

    Returns:
        fc1.weight (N, 2 p) and fc2.weight (p, N).

    Raises:
        ValueError: p < 3.

    Examples:
        >>> net = QuadraticMLP(11, width=1024)
        >>> _ = net.load_state_dict(dict(zip(("fc1.weight", "fc2.weight"), analytic_weights(11, 1024))))
        >>> task = ModularArithmetic(11)
        >>> (net(task.pairs).argmax(dim=1) == task.clean).all()
        tensor(True)
    """
    draws = torch.Generator().manual_seed(seed)
    frequency = torch.randint(1, (p - 1) // 2 + 1, (width, 1), generator=draws)
    one, two = 2 * math.pi * torch.rand(2, width, 1, generator=draws, dtype=torch.float64)
    # The product is reduced before it is scaled: whole turns would cost digits.
    angle = (frequency * torch.arange(p) % p) * (2 * math.pi / p)
    first = torch.cat([torch.cos(angle + one), torch.cos(angle + two)], dim=1)
    second = torch.cos(angle + one + two).t() * (2 / width)
    return first.to(dtype), second.to(dtype)


@allowed(weight_decay=at_least(0.0), lr=positive(), batch_size=count(1).or_none("the whole training set"))
def modular_optimizer(
    parameters: Iterable[Any],
    *,
    weight_decay: float = 0.0,
    lr: float = 1e-2,
    batch_size: int | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW with ``betas = (0.9, 0.98)``, its decay *decoupled* from the gradient.

    A step shrinks the weights by ``1 - lr * weight_decay``, so the decays of the paper (5, 15, 20) are large numbers.
    With them added to the gradient instead, as ``torch.optim.Adam`` does, they mean something else.

    Args:
        parameters: parameters or groups.
        weight_decay: lambda, >= 0; default 0. The paper has 0, 5, 15 and 20.
        lr: default 0.01 (official).
        batch_size: of mini-batches: below 256 the rate is scaled by ``sqrt(batch_size / 256)``, and steps should be
            ``256 / batch_size`` times as many (official); None: the whole training set.
        optimizer: another class that takes ``lr``, ``betas`` and ``weight_decay``.

    Raises:
        ValueError: a number out of range.

    Warns:
        UserWarning: the optimizer adds the decay to the gradient.

    Examples:
        >>> modular_optimizer(nn.Linear(2, 2).parameters(), batch_size=64).param_groups[0]["lr"]
        0.005
    """
    rate = lr * math.sqrt(min(1.0, (batch_size or 256) / 256))
    built = optimizer(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    group = built.param_groups[0]
    coupled = isinstance(built, torch.optim.Adam) and not group.get("decoupled_weight_decay", False)
    if weight_decay and coupled:
        warnings.warn(
            f"{type(built).__name__} adds weight_decay={weight_decay} to the gradient, where Adam divides it by the "
            "gradient's size; the decays of the paper are decoupled. Take torch.optim.AdamW",
            stacklevel=3,
        )
    return built
