"""The homomorphism error: how badly small operators predict a phrase's hidden state from those of its parts.

Measured after training, with fresh probes, from the states of one layer (An and Du 2026). A warning number for models
that must recombine what they know. It has the scale of the states: read it divided by the variance of what is
predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice, allowed
from regularized.understanding.homomorphism_error.penalty import find_pairs

__all__ = [
    "CompositionProbe",
    "HomomorphismError",
    "homomorphism_error",
    "modifier_triples",
    "probe_errors",
    "segment_triples",
    "split",
]

Family: TypeAlias = Literal["linear", "bilinear", "mlp"]
_FAMILIES: tuple[Family, ...] = ("linear", "bilinear", "mlp")


class CompositionProbe(nn.Module):
    """An operator from two states to one: ``linear`` on [a; b], ``bilinear`` on [a; b; a*b], or an ``mlp``.

    Args:
        dim: d, width of the states.
        family: which; the mlp has max(4d, 128) hidden units with GELU (official).

    Raises:
        ValueError: the family is unknown.

    Examples:
        >>> CompositionProbe(4, "bilinear")(torch.randn(3, 4), torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    @allowed(family=Choice(*_FAMILIES))
    def __init__(self, dim: int, family: Family) -> None:
        super().__init__()
        self.family = family
        if family == "mlp":
            self.fc1: nn.Linear = nn.Linear(2 * dim, max(4 * dim, 128))
            self.fc2: nn.Linear = nn.Linear(max(4 * dim, 128), dim)
        else:
            self.lin: nn.Linear = nn.Linear((2 if family == "linear" else 3) * dim, dim)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, d) states of the parts to (n, d) of the whole."""
        if self.family == "mlp":
            return torch.as_tensor(self.fc2(F.gelu(self.fc1(torch.cat([a, b], dim=-1)))))
        parts = [a, b] if self.family == "linear" else [a, b, a * b]
        return torch.as_tensor(self.lin(torch.cat(parts, dim=-1)))


def modifier_triples(tokens: Tensor, hidden: Tensor, words: Sequence[int], modifiers: Sequence[int]) -> Tensor:
    """States of each word that is directly followed by a modifier, of the modifier, and their mean.

    Args:
        tokens: (B, T).
        hidden: (B, T, d).
        words: tokens that can be modified.
        modifiers: tokens of the modifiers.

    Returns:
        (n, 3, d), in the order of the text.

    Examples:
        >>> modifier_triples(torch.tensor([[5, 9, 3]]), torch.randn(1, 3, 4), [5], [9]).shape
        torch.Size([1, 3, 4])
    """
    found, _ = find_pairs(tokens, words, modifiers)
    rows, first = found.nonzero(as_tuple=True)
    return _with_mean(hidden[rows, first], hidden[rows, first + 1])


def segment_triples(tokens: Tensor, hidden: Tensor, words: Sequence[int], *, pad: int = 0) -> Tensor:
    """Mean states of neighbouring segments, and the mean of both.

    A segment begins at each word; what stands before the first word is a segment of its own.

    Args:
        tokens: (B, T), padded behind.
        hidden: (B, T, d).
        words: tokens that begin a segment.
        pad: the padding token; default 0.

    Returns:
        (n, 3, d), in the order of the text.

    Examples:
        >>> segment_triples(torch.tensor([[5, 9, 3, 5, 0]]), torch.randn(1, 5, 4), [5]).shape
        torch.Size([1, 3, 4])
    """
    inside = tokens != pad
    starts = torch.isin(tokens, torch.tensor(list(words), device=tokens.device)) & inside
    starts[:, 0] = inside[:, 0]
    number = starts.cumsum(dim=1) - 1
    most = int(number.max()) + 1
    member = F.one_hot(number.clamp(min=0), most).to(hidden.dtype) * inside[..., None]
    size = member.sum(dim=1)
    means = torch.einsum("bts,btd->bsd", member, hidden) / size.clamp(min=1)[..., None]
    pairs = (size[:, 1:] > 0) & (size[:, :-1] > 0)
    return _with_mean(means[:, :-1][pairs], means[:, 1:][pairs])


def _with_mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b, (a + b) / 2], dim=1)


@dataclass(frozen=True, slots=True)
class HomomorphismError:
    """How badly fresh probes predict the whole from its parts, on triples that they were not trained on.

    Args:
        mse: mean squared error by family of probes.
        cosine: 1 - cosine similarity by family.
        variance: variance of what is predicted, the scale of ``mse``.
    """

    mse: dict[str, float]
    cosine: dict[str, float]
    variance: float

    @property
    def mean(self) -> float:
        """Mean squared error over the families: the reported number."""
        return sum(self.mse.values()) / len(self.mse)

    @property
    def relative(self) -> float:
        """:attr:`mean` over :attr:`variance`: does not fall when the states merely shrink."""
        return self.mean / self.variance


def split(triples: Tensor) -> tuple[Tensor, Tensor]:
    """The first four fifths, and the rest (official: in order, without shuffling)."""
    cut = int(0.8 * len(triples))
    return triples[:cut], triples[cut:]


def homomorphism_error(
    triples: Tensor,
    *,
    families: Sequence[Family] = _FAMILIES,
    epochs: int = 50,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> HomomorphismError:
    """Train a probe of each family on four fifths of the triples and measure it on the rest.

    Args:
        triples: (n, 3, d): parts and whole, from :func:`modifier_triples` or :func:`segment_triples`, or your own, such
            as the state that the model has at the end of a phrase.
        families: of probes; default all three (official).
        epochs: default 50 (the paper's runs; the official function has 200).
        lr: of Adam with weight decay 1e-6; default 1e-3 (official).
        batch_size: default 128 (official), in fixed order.
        seed: of the probes' initial weights. The global random state is left alone.

    Raises:
        ValueError: triples have another shape, or there are fewer than 2 to measure on.

    Examples:
        >>> parts = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(0))
        >>> additive = torch.cat([parts, parts.sum(dim=1, keepdim=True)], dim=1)
        >>> report = homomorphism_error(additive, families=["linear"], epochs=60, lr=0.05)
        >>> report.relative < 0.01
        True
    """
    if triples.ndim != 3 or triples.shape[1] != 3:
        raise ValueError(f"triples must be (n, 3, d): two parts and the whole, got {tuple(triples.shape)}")
    triples = triples.detach()
    train, held = split(triples)
    if len(held) < 2:
        raise ValueError(
            f"{len(triples)} triples leave {len(held)} to measure on, at least 2 are needed: give 10 or more"
        )
    mse, cosine = {}, {}
    for number, family in enumerate(families):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            probe = CompositionProbe(triples.shape[-1], family).to(triples)
        _fit(probe, train, epochs, lr, batch_size)
        with torch.no_grad():
            predicted = probe(held[:, 0], held[:, 1])
            mse[family], cosine[family] = (float(value) for value in probe_errors(predicted, held[:, 2]))
    return HomomorphismError(mse, cosine, float(held[:, 2].var(dim=0, unbiased=False).mean()))  # type: ignore[arg-type]


def _fit(probe: nn.Module, train: Tensor, epochs: int, lr: float, batch_size: int) -> None:
    optimizer = torch.optim.Adam(probe.parameters(), lr=lr, weight_decay=1e-6)
    with torch.enable_grad():
        for _ in range(epochs):
            for part in train.split(batch_size):
                optimizer.zero_grad()
                F.mse_loss(probe(part[:, 0], part[:, 1]), part[:, 2]).backward()
                optimizer.step()


def probe_errors(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error, and 1 - cosine (1e-8 added to the product of the lengths, as in the official code)."""
    lengths = predicted.norm(dim=-1) * target.norm(dim=-1) + 1e-8
    return F.mse_loss(predicted, target), (1.0 - (predicted * target).sum(dim=-1) / lengths).mean()
