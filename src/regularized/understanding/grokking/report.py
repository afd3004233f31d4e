"""Accuracies by subset: of what was learnt rightly, what was memorised, and what was restored in spite of its label.

They need no periodicity: :func:`subset_accuracies` measures any classifier.
:mod:`regularized.understanding.grokking.scores` has the paper and its symbols.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.two_networks import evaluating
from regularized.understanding.grokking.modular_arithmetic import ModularArithmetic
from regularized.understanding.grokking.scores import Maps, neuron_ipr

__all__ = ["MemorizationProbe", "subset_accuracies"]

# Shapes: n training samples, m operands (2 for pairs).


def _shares(predicted: Tensor, labels: Tensor, corrupted: Tensor, clean: Tensor | None) -> dict[str, Tensor]:
    right = predicted == labels
    shares = {"train": _mean(right), "memorized": _mean(right, corrupted), "clean_train": _mean(right, ~corrupted)}
    if clean is not None:
        shares["restored"] = _mean(predicted == clean, corrupted)
    return shares


def _mean(right: Tensor, of: Tensor | None = None) -> Tensor:
    """Share, without waiting for the device; nan of an empty set."""
    of = torch.ones_like(right) if of is None else of
    return (right & of).sum().double() / of.sum()


@torch.no_grad()
def subset_accuracies(
    model: nn.Module,
    batches: Iterable[Any],
    corrupted: Tensor,
    *,
    clean: Tensor | None = None,
) -> dict[str, float]:
    """Accuracy on training data as a whole, on the wrong labels, and on the others: of any classifier.

    In evaluation mode, modes put back. The device is read once, at the end.

    Args:
        model: maps inputs to logits (B, C).
        batches: ``(inputs, labels, index)`` with ``index`` (B,) the position in the training set, as a loader over
            :class:`~regularized.training.data.IndexedDataset` gives them.
        corrupted: (n,) bool, which labels are wrong.
        clean: (n,) right labels, if they are known.

    Returns:
        ``train``: share of the labels as given that is reproduced; ``memorized``: of the wrong ones; ``clean_train``:
        of the others; with ``clean`` also ``restored``: share of the wrong ones where the *right* label is predicted.
        nan where a set is empty.

    Raises:
        ValueError: no data, or the mask is not a bool vector.
        IndexError: an index outside of the mask.

    Examples:
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])                      # the third label should be 2
        >>> wrong, right = torch.tensor([False, False, True]), torch.tensor([0, 1, 2])
        >>> subset_accuracies(nn.Identity(), [(x, y, torch.arange(3))], wrong, clean=right)["restored"]
        1.0
    """
    if corrupted.dtype != torch.bool or corrupted.ndim != 1:
        raise ValueError(f"corrupted must be a bool mask (n,), got {corrupted.dtype} of shape {tuple(corrupted.shape)}")
    predicted, labels, index = [], [], []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        for x, y, where in batches:
            predicted.append(model(x.to(device)).argmax(dim=-1))
            labels.append(y.to(device))
            index.append(where.to(device))
    if not predicted:
        raise ValueError("there are no batches to measure on")
    at = torch.cat(index)
    of = corrupted.to(device)[at]
    right = None if clean is None else clean.to(device)[at]
    shares = _shares(torch.cat(predicted), torch.cat(labels), of, right)
    return _read(shares)


def _read(values: Mapping[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))


class MemorizationProbe:
    """What a network on modular arithmetic has learned: the rule, the corrupted labels, or both.

    A forward pass over all pairs and, for networks whose neurons can be read, one transform of their weights. Call it
    every few steps of a loop of your own and keep the records for
    :func:`~regularized.understanding.grokking.detect_phases`, or give it to ``Trainer(evaluate=probe)``.

    Args:
        task: the task that is trained on.
        maps: gives ``(first, second)`` of :func:`neuron_ipr` for a model; None: its method ``neuron_maps()``, if it
            has one.
        inputs: makes a model's inputs of pairs (M, 2); None: the pairs themselves.

    Raises:
        ValueError: at the call: the logits are not (M, p), or weights do not fit p.

    Examples:
        >>> from regularized.understanding.grokking.modular_arithmetic import QuadraticMLP
        >>> probe = MemorizationProbe(ModularArithmetic(7, noise=0.4))
        >>> sorted(probe(QuadraticMLP(7, width=12)))
        ['clean_train', 'ipr', 'memorized', 'restored', 'test', 'train']
    """

    def __init__(
        self,
        task: ModularArithmetic,
        *,
        maps: Callable[[nn.Module], Maps] | None = None,
        inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task = task
        self.maps = maps
        pairs = task.pairs if inputs is None else inputs(task.pairs)
        self._data = (pairs, task.labels, task.clean, task.corrupted)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Shares in [0, 1], and the mean score of the neurons.

        Args:
            model: maps pairs (M, 2) to logits (M, p); put into evaluation mode for the pass.

        Returns:
            ``train``, ``memorized`` (of the replaced labels), ``restored`` (the right answer where the label was
            replaced), ``clean_train``, ``test``, and ``ipr`` where neurons can be read (pruned ones count with 0);
            nan of an empty set.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self._data[0].device != device:
            self._data = tuple(part.to(device) for part in self._data)  # type: ignore[assignment]
        pairs, labels, clean, corrupted = self._data
        with evaluating(model):
            logits = model(pairs)
        if logits.shape != (len(pairs), self.task.p):
            raise ValueError(
                f"the model must map {len(pairs)} pairs to logits ({len(pairs)}, {self.task.p}), got "
                f"{tuple(logits.shape)}"
            )
        predicted, n = logits.argmax(dim=1), self.task.num_train
        values = _shares(predicted[:n], labels[:n], corrupted, clean[:n])
        values["test"] = _mean(predicted[n:] == clean[n:])
        scores = self.scores(model)
        if scores is not None:
            values["ipr"] = scores.mean()
        return _read(values)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Tensor | None:
        """(N,) generalisation scores of the neurons; None for a model whose neurons cannot be read."""
        if self.maps is not None:
            first, second = self.maps(model)
        else:
            own: Any = getattr(model, "neuron_maps", None)
            if own is None:
                return None
            first, second = own()
        return neuron_ipr(first, second, p=self.task.p, cycle=self.task.cycle)
