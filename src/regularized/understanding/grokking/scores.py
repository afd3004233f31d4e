"""Which neurons hold the rule and which hold the noise: periodicity scores, accuracies by subset, pruning by score.

For whoever trains on partly wrong labels, and wants to see memorisation and generalisation apart.

    Doshi, Das, He, Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
    algorithmic datasets", 2023, arXiv 2310.13061. Official code: github.com/d-doshi/Grokking at 0b4335f (no licence
    file).

==========  ============================  ============================================================================
paper       here                          meaning
==========  ============================  ============================================================================
u           a row of weights              (p,) what a neuron makes of each number
IPR_r       ``inverse_participation...``  sum over frequencies of ``(a_k / ||a||)^(2 r)`` with ``a = |rfft(u)|``
rho         ``fraction``                  share of the neurons that is pruned
==========  ============================  ============================================================================

A neuron that serves the rule is a cosine of the number, with a single frequency: its IPR is 1. One that remembers
samples has all frequencies: about 3 / p. Text and code differ: in the text each frequency counts twice (a cosine has
1/2), the code takes ``rfft``; we follow the code. *The scores mean something only where the numbers form a cycle on
which the rule is a shift*; with the inputs in another order they are other numbers.

The accuracies by subset need no such structure: :func:`subset_accuracies` measures any classifier. The task and the
networks are in :mod:`regularized.understanding.grokking.modular_arithmetic`, phases of a whole training in
:mod:`regularized.understanding.grokking.phases`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.pruning import pruned
from regularized.mechanisms.two_networks import evaluating
from regularized.understanding.grokking.modular_arithmetic import ModularArithmetic

__all__ = [
    "MemorizationProbe",
    "gini",
    "inverse_participation_ratio",
    "neuron_ipr",
    "neuron_masks",
    "prune_by_score_",
    "pruning_sweep",
    "score_correlation",
    "spectrum",
    "subset_accuracies",
]

# Shapes: N neurons, p numbers in a cycle, n training samples, m operands (2 for pairs).

Maps: TypeAlias = tuple[Tensor, Tensor]

_TENTHS = tuple(k / 10 for k in range(10))


def spectrum(rows: Tensor, *, dim: int = -1) -> Tensor:
    """Amplitudes ``|rfft|`` along an axis of length p: ``p // 2 + 1`` of them, the mean's among them.

    Args:
        rows: any shape; half precision is widened.
        dim: the group axis.

    Returns:
        The same shape with the axis last, and shortened.

    Examples:
        >>> spectrum(torch.ones(4))
        tensor([4., 0., 0.])
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))  # no transform in half precision
    amplitudes: Tensor = torch.fft.rfft(wide.movedim(dim, -1)).abs()
    return amplitudes


def inverse_participation_ratio(rows: Tensor, *, dim: int = -1, r: float = 2) -> Tensor:
    """How concentrated the Fourier spectrum is: 1 for a cosine or a constant, 1/m for m equal frequencies.

    The mean counts as a frequency, as in the official code. Cost: one transform. For the embedding of a transformer
    take ``dim=0``, the axis of the numbers.

    Args:
        rows: weights; the axis ``dim`` runs over the numbers 0 ... p - 1 in their cyclic order.
        dim: the group axis; default the last.
        r: order, > 1; default 2 (official), the sum of squared shares of power.

    Returns:
        The shape without that axis, values in ``[(p // 2 + 1)^(1 - r), 1]``; 0 where all is zero.

    Raises:
        ValueError: ``r`` is not above 1.

    Examples:
        >>> n = torch.arange(7) * (2 * torch.pi / 7)
        >>> inverse_participation_ratio(torch.stack([torch.cos(2 * n + 1), torch.cos(n) + torch.cos(3 * n)]))
        tensor([1.0000, 0.5000])
    """
    if not r > 1:
        raise ValueError(f"r must be above 1 (at 1 every spectrum has the ratio 1), got {r}; the official code has 2")
    amplitudes = spectrum(rows, dim=dim)
    # Scaled by the largest first, so that tiny weights do not underflow when squared.
    largest = amplitudes.amax(dim=-1, keepdim=True)
    power = (amplitudes / torch.where(largest > 0, largest, 1.0)).square()
    total = power.sum(dim=-1, keepdim=True)
    return (power / torch.where(total > 0, total, 1.0)).pow(r).sum(dim=-1)


def gini(values: Tensor, *, dim: int = -1) -> Tensor:
    """Gini coefficient of nonnegative values, for example of a :func:`spectrum`: 0 if all are equal.

    ``mean |a_i - a_j| / (2 mean a)``, computed from the sorted values.

    Args:
        values: any shape, nonnegative.
        dim: axis.

    Returns:
        The shape without that axis, in ``[0, 1 - 1/length]``; 0 where all is zero.

    Examples:
        >>> gini(torch.tensor([[0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([0.7500, 0.0000])
    """
    ordered = values.movedim(dim, -1).sort(dim=-1).values
    length = ordered.shape[-1]
    # The i-th of the sorted values is the larger one in i - 1 pairs and the smaller one in n - i.
    factor = 2 * torch.arange(1, length + 1, device=values.device, dtype=ordered.dtype) - length - 1
    total = ordered.sum(dim=-1)
    return (ordered * factor).sum(dim=-1) / (length * torch.where(total > 0, total, 1.0))


def neuron_ipr(first: Tensor, second: Tensor, *, p: int, cycle: Tensor | None = None, r: float = 2) -> Tensor:
    """Generalisation score of each neuron: mean IPR of what it reads from each operand, and of what it says.

    Args:
        first: (N, m p) weights from the operands' one-hot vectors to the neurons, one block of p for each operand:
            ``fc1.weight``.
        second: (p, N) weights from the neurons to the results: ``fc2.weight``.
        p: length of the cycle.
        cycle: (L,) order of the numbers in which the rule is a shift, see :attr:`ModularArithmetic.cycle`; None: as
            they are.
        r: see :func:`inverse_participation_ratio`.

    Returns:
        (N,).

    Raises:
        ValueError: shapes do not fit p.

    Examples:
        >>> from regularized.understanding.grokking.modular_arithmetic import analytic_weights
        >>> neuron_ipr(*analytic_weights(11, width=3), p=11)
        tensor([1., 1., 1.])
    """
    if first.ndim != 2 or first.shape[1] % p or not first.shape[1]:
        raise ValueError(
            f"the columns of first are the group axis: (N, m p) with p = {p}, one block for each operand; got "
            f"{tuple(first.shape)}"
        )
    if second.ndim != 2 or second.shape[0] != p:
        raise ValueError(f"the rows of second are the group axis: (p, N) with p = {p}, got {tuple(second.shape)}")
    if first.shape[0] != second.shape[1]:
        raise ValueError(f"first has {first.shape[0]} neurons (rows), second {second.shape[1]} (columns)")
    curves = torch.cat([first.unflatten(1, (-1, p)), second.t()[:, None]], dim=1)
    if cycle is not None:
        curves = curves[..., cycle.to(curves.device)]
    return inverse_participation_ratio(curves, r=r).mean(dim=1)


def score_correlation(scores: Tensor, gains: Tensor) -> Tensor:
    """Correlation of the neurons' scores with the size of their gains, ``|gamma|`` of a batch normalisation.

    Positive where the normalisation turns periodic neurons up and others down.

    Args:
        scores: (N,).
        gains: (N,), of any sign.

    Returns:
        Scalar in [-1, 1]; 0 where one of them is constant.

    Examples:
        >>> score_correlation(torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.1, -0.4, 0.7]))
        tensor(1.)
    """
    a, b = scores - scores.mean(), gains.abs() - gains.abs().mean()
    size = a.norm() * b.norm()
    return (a * b).sum() / torch.where(size > 0, size, 1.0)


# -- pruning ------------------------------------------------------------------------------------


def neuron_masks(
    model: nn.Module,
    scores: Tensor,
    *,
    fraction: float,
    first: str = "fc1",
    second: str = "fc2",
    norm: str | None = None,
) -> dict[str, Tensor]:
    """Which weights stay when the neurons of lowest score go: rows of one layer, columns of the next.

    For :func:`regularized.mechanisms.pruning.pruned`, inside which the pruned network can be trained on. Other orders
    are other scores: ``-scores`` takes the highest away, ``torch.rand(N)`` any, ``weight.norm(dim=1)`` the smallest.

    Args:
        model: holds both layers.
        scores: (N,) one for each neuron; equal ones go in their order.
        fraction: share of the neurons that goes, in [0, 1]; ``round(fraction * N)`` of them.
        first: name of the linear layer into the neurons; its bias is pruned too, if it has one.
        second: name of the linear layer out of them; its bias stays.
        norm: name of a normalisation of the neurons between the layers: its shift would keep a pruned neuron alive.

    Returns:
        Bool masks by name of parameter; True stays.

    Raises:
        ValueError: ``fraction`` out of range, layers of other shapes, or the model normalises N features and ``norm``
            does not say where.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> neuron_masks(model, torch.tensor([0.9, 0.1, 0.5]), fraction=1 / 3, first="0", second="2")["0.bias"]
        tensor([ True, False,  True])
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], the share of neurons that goes; got {fraction}")
    into, out = model.get_submodule(first), model.get_submodule(second)
    weights = [getattr(layer, "weight", None) for layer in (into, out)]
    shapes = [tuple(w.shape) if isinstance(w, Tensor) else None for w in weights]
    if not (isinstance(into, nn.Linear) and isinstance(out, nn.Linear)) or scores.shape != (into.out_features,):
        raise ValueError(
            f"{first!r} must be a linear layer with as many rows as there are scores, and {second!r} one with as many "
            f"columns; got scores {tuple(scores.shape)}, weights {shapes[0]} and {shapes[1]}"
        )
    if out.in_features != into.out_features:
        raise ValueError(f"{second!r} must have {into.out_features} columns, one for each neuron; it has {shapes[1]}")
    _check_normalised(model, into.out_features, norm)
    stays = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    stays[scores.argsort(stable=True)[: round(fraction * len(scores))]] = False
    stays = stays.to(into.weight.device)
    masks = {f"{first}.weight": stays[:, None].expand_as(into.weight)}
    masks[f"{second}.weight"] = stays.expand_as(out.weight)
    if into.bias is not None:
        masks[f"{first}.bias"] = stays
    if norm is not None:
        masks |= {f"{norm}.{name}": stays for name, p in model.get_submodule(norm).named_parameters()}
    return masks


def _check_normalised(model: nn.Module, width: int, norm: str | None) -> None:
    """Refuse a normalisation of the neurons that nobody named: its shift speaks for a neuron that is pruned."""
    found = []
    for name, module in model.named_modules():
        sizes = getattr(module, "num_features", None), getattr(module, "normalized_shape", None)
        if width in sizes or (width,) in sizes:
            found.append(name)
    if norm is None and found:
        raise ValueError(
            f"the model normalises its {width} neurons in {found}, whose shift would keep pruned ones alive; say "
            f"norm={found[0]!r}"
        )
    if norm is not None and norm not in found:
        raise ValueError(f"norm={norm!r} is no normalisation of {width} neurons; the model has {found}")


def prune_by_score_(
    model: nn.Module,
    scores: Tensor,
    *,
    fraction: float,
    first: str = "fc1",
    second: str = "fc2",
    norm: str | None = None,
) -> int:
    """Set the neurons of lowest score to zero, in place; arguments and errors as in :func:`neuron_masks`.

    Args:
        model: changed in place; shapes stay.
        scores: (N,).
        fraction: share of the neurons that goes.
        first: layer into the neurons.
        second: layer out of them.
        norm: normalisation of the neurons, if there is one.

    Returns:
        How many neurons were pruned.

    Examples:
        >>> from regularized.understanding.grokking.modular_arithmetic import QuadraticMLP
        >>> net = QuadraticMLP(7, width=10)
        >>> prune_by_score_(net, neuron_ipr(*net.neuron_maps(), p=7), fraction=0.4)
        4
    """
    masks = neuron_masks(model, scores, fraction=fraction, first=first, second=second, norm=norm)
    with pruned(model, masks):
        pass
    return int((~masks[f"{first}.weight"][:, 0]).sum())


def pruning_sweep(
    model: nn.Module,
    measure: Callable[[nn.Module], Mapping[str, float]],
    scores: Tensor,
    *,
    fractions: Sequence[float] = _TENTHS,
    **layers: Any,
) -> list[dict[str, float]]:
    """What a network can do with more and more of its neurons pruned; the network itself is left alone.

    Args:
        model: trained network.
        measure: for example a :class:`MemorizationProbe`.
        scores: (N,) neurons of low score go first.
        fractions: shares of the neurons that go; default 0, 0.1, ... 0.9.
        **layers: ``first``, ``second`` and ``norm`` of :func:`neuron_masks`.

    Returns:
        A record for each fraction: ``"fraction"`` and the measurements.

    Examples:
        >>> from regularized.understanding.grokking.modular_arithmetic import QuadraticMLP
        >>> net, task = QuadraticMLP(7, width=10), ModularArithmetic(7)
        >>> records = pruning_sweep(net, MemorizationProbe(task), torch.rand(10), fractions=[0.0, 1.0])
        >>> [record["fraction"] for record in records]
        [0.0, 1.0]
    """
    records = []
    for fraction in fractions:
        smaller = copy.deepcopy(model)
        prune_by_score_(smaller, scores, fraction=fraction, **layers)
        records.append({"fraction": float(fraction), **measure(smaller)})
    return records


# -- accuracies ---------------------------------------------------------------------------------


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
