"""How good are features? Freeze the encoder, embed two labelled sets once, and let a simple classifier answer.

Three probes: a linear layer trained for a few epochs, as papers report it; multinomial logistic regression solved to
its optimum, which has no seed and suits small data; and nearest neighbours, which learn nothing.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from regularized.mechanisms.ranges import allowed, between, count, positive
from regularized.mechanisms.two_networks import evaluating

__all__ = ["Labelled", "embed", "knn_probe", "linear_probe", "logistic_probe"]

Labelled: TypeAlias = tuple[Tensor, Tensor] | Dataset[tuple[Tensor, Tensor]] | Iterable[tuple[Tensor, Tensor]]
"""Labelled data: tensors ``(x, y)`` of the whole set, a map-style data set, or an iterable of batches ``(x, y)``."""

Encoder: TypeAlias = Callable[[Tensor], Tensor]

# Shapes: N training samples, M test samples, E features, C classes.


def embed(encoder: Encoder | None, data: Labelled, *, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Features of a whole data set, in evaluation mode and without gradient; the modes are put back afterwards.

    Args:
        encoder: gives (B, ...) features, flattened to (B, E); None where the inputs are the features already.
        data: inputs with their labels, in one of the forms of ``Labelled``.
        batch_size: samples that the encoder sees at once, where ``data`` is not cut into batches already.

    Returns:
        Features (N, E) and labels (N,), on the device of the encoder.

    Raises:
        ValueError: there is no sample, or the inputs of ``encoder=None`` carry a gradient.

    Examples:
        >>> x, y = torch.ones(5, 1, 2, 2), torch.arange(5)
        >>> features, labels = embed(nn.AvgPool2d(2), (x, y))
        >>> features.shape, labels.tolist()
        (torch.Size([5, 1]), [0, 1, 2, 3, 4])
    """
    parameter = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    features, labels = [], []
    with torch.no_grad(), evaluating(encoder) if isinstance(encoder, nn.Module) else nullcontext():
        for x, y in _batches(data, batch_size):
            if parameter is not None:
                x, y = x.to(parameter.device), y.to(parameter.device)
            if encoder is None and x.requires_grad:
                raise ValueError(
                    "the features carry a gradient, so the encoder is not frozen; detach them, or give the encoder"
                )
            features.append((x if encoder is None else encoder(x)).flatten(1))
            labels.append(y)
    if not features:
        raise ValueError("there is no sample to embed; is the data set empty, or an iterator that was used up?")
    return torch.cat(features), torch.cat(labels)


@allowed(epochs=count(1), lr=positive(), batch_size=count(1))
def linear_probe(
    encoder: Encoder | None,
    train: Labelled,
    test: Labelled,
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 256,
    standardise: bool = True,
    generator: torch.Generator | None = None,
) -> float:
    """Test accuracy of one linear layer that was trained on the frozen features.

    AdamW with torch's defaults on cross-entropy, as in github.com/safelix/dinopl. With few samples that is too few
    steps to fit anything: take more epochs, or :func:`logistic_probe`.

    Args:
        encoder: see :func:`embed`.
        train: labelled training set.
        test: labelled test set.
        epochs: default 10 (dinopl).
        lr: default 1e-3 (dinopl, and torch's default).
        batch_size: default 256 (dinopl's configurations).
        standardise: give each feature mean 0 and deviation 1 over the training set; a constant one is left. Default
            True (dinopl).
        generator: draws the initial layer and the order, on the CPU; None takes a new one of seed 0.

    Returns:
        Share of the test samples that are classified correctly, in [0, 1].

    Raises:
        ValueError: fewer training samples than classes, a setting that is not positive, or see :func:`embed`.

    Examples:
        >>> y = torch.arange(100) % 2
        >>> x = torch.stack([y * 2.0 - 1.0, torch.randn(100)], dim=1)
        >>> linear_probe(None, (x, y), (x, y), epochs=100, lr=0.1)
        1.0
    """
    x, y, test_x, test_y, classes = _prepared(encoder, train, test, standardise)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    bound = x.shape[1] ** -0.5
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ((classes, x.shape[1]), (classes,))
    )
    layer = [t.to(x).requires_grad_() for t in (weight, bias)]
    optimizer = torch.optim.AdamW(layer, lr=lr)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                F.cross_entropy(F.linear(x[rows], *layer), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return _accuracy(F.linear(test_x, *layer).argmax(dim=1), test_y)


@allowed(penalty=positive())
def logistic_probe(
    encoder: Encoder | None, train: Labelled, test: Labelled, *, penalty: float = 1e-2, standardise: bool = True
) -> float:
    """Test accuracy of multinomial logistic regression on the frozen features, solved to its optimum in float64.

    The minimum of ``mean CE + penalty / 2 * |W|^2``, bias free, is unique: no seed, no learning rate. scikit-learn's
    ``LogisticRegression(C=c)`` is ``penalty = 1 / (c N)``.

    Args:
        encoder: see :func:`embed`.
        train: labelled training set.
        test: labelled test set.
        penalty: > 0; default 1e-2 (ours: C = 0.1 at a thousand samples).
        standardise: see :func:`linear_probe`.

    Returns:
        Share of the test samples that are classified correctly, in [0, 1].

    Raises:
        ValueError: fewer training samples than classes, ``penalty`` not positive, or see :func:`embed`.

    Examples:
        >>> y = torch.arange(100) % 2
        >>> x = torch.stack([y * 2.0 - 1.0, torch.randn(100)], dim=1)
        >>> logistic_probe(None, (x, y), (x, y))
        1.0
    """
    x, y, test_x, test_y, classes = _prepared(encoder, train, test, standardise)
    x, test_x = x.double(), test_x.double()
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + 0.5 * penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return _accuracy(F.linear(test_x, weight, bias).argmax(dim=1), test_y)


def knn_probe(
    encoder: Encoder | None,
    train: Labelled,
    test: Labelled,
    *,
    k: int = 20,
    standardise: bool = True,
    chunk: int = 1024,
) -> float:
    """Test accuracy of the majority among the ``k`` nearest training features, by Euclidean distance.

    Args:
        encoder: see :func:`embed`.
        train: labelled training set.
        test: labelled test set.
        k: neighbours, in [1, N]; default 20 (dinopl). Of classes with equally many, the smallest label counts.
        standardise: see :func:`linear_probe`.
        chunk: test samples whose distances are in memory at once.

    Returns:
        Share of the test samples that are classified correctly, in [0, 1].

    Raises:
        ValueError: ``k`` outside [1, N], fewer training samples than classes, or see :func:`embed`.

    Examples:
        >>> x, y = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 1])
        >>> knn_probe(None, (x, y), (x, y), k=2)
        1.0
    """
    x, y, test_x, test_y, classes = _prepared(encoder, train, test, standardise)
    between(1, len(x), "[]", "the number of training samples", whole=True)("k", k)
    predicted = []
    for rows in test_x.split(chunk):
        nearest = torch.cdist(rows, x).topk(k, dim=1, largest=False).indices
        votes = rows.new_zeros(len(rows), classes).scatter_add_(1, y[nearest], rows.new_ones(nearest.shape))
        predicted.append(votes.argmax(dim=1))
    return _accuracy(torch.cat(predicted), test_y)


def _batches(data: Labelled, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple):
        return zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=batch_size)
    return data


def _prepared(
    encoder: Encoder | None, train: Labelled, test: Labelled, standardise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Features and labels of both sets, float32 or wider, and the number of classes."""
    (x, y), (test_x, test_y) = embed(encoder, train), embed(encoder, test)
    classes = int(torch.cat([y, test_y]).max()) + 1
    if len(x) < classes:
        raise ValueError(
            f"a probe needs at least as many training samples as classes, got {len(x)} samples of {classes} classes"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, test_x = x.to(dtype), test_x.to(dtype)
    if standardise:
        mean, deviation = x.mean(dim=0), x.std(dim=0)
        deviation[~(deviation >= 10 * torch.finfo(dtype).eps)] = 1.0  # constant, or one sample
        x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    return x, y, test_x, test_y, classes


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())
