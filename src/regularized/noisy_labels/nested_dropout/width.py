"""Nested dropout after the training: which width to keep, chosen on validation data.

:mod:`regularized.noisy_labels.nested_dropout.layer` has the paper, its symbols, and the layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least
from regularized.mechanisms.two_networks import evaluating
from regularized.noisy_labels.nested_dropout.layer import NestedLinear, find_nested
from regularized.training.data import as_source
from regularized.training.step import Batch, call_model

__all__ = ["best_width", "select_width", "width_accuracies"]

# Shapes: B samples of a batch, D channels of the features, C classes.

_BLOCK = 2**22  # numbers that the outputs of several widths may take at once, 16 MB in float32


@torch.no_grad()
def width_accuracies(models: nn.Module | Sequence[nn.Module], data: Any, *, layer: str | None = None) -> Tensor:
    """Accuracy of every width 1 ... D on validation data; for several models that of their mean output.

    Where the nested layer feeds a linear classifier whose output is the model's, the outputs of all widths are a
    running sum over channels: one pass over the data, plus B x D x C additions a batch. Anywhere else every width takes
    passes of its own.

    Args:
        models: one model, or several with nested layers of the same D.
        data: batches (x, y), see :func:`~regularized.training.data.as_source`; y class labels (B,). With several
            processes give every process all of it.
        layer: name of the nested layer (or of the ``NestedLinear``) where a model has several; the others evaluate at
            their ``keep``.

    Returns:
        (D,) float64 shares in [0, 1], on the CPU; entry j belongs to width j + 1.

    Raises:
        ValueError: no nested layer, several and none was named, models of different D, or batches without labels.

    Examples:
        >>> model = NestedLinear(2, 2, sigma=1.0)
        >>> model.weight.data = torch.tensor([[1.0, -5.0], [-1.0, 5.0]])
        >>> x = torch.tensor([[1.0, 0.1], [-1.0, -1.0]])  # the second channel spoils the second sample
        >>> width_accuracies(model, [(x, torch.tensor([0, 1]))])
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    networks = _as_tuple(models)
    probes = [_Probe(network, layer) for network in networks]
    sizes = {probe.nested.features for probe in probes}
    if len(sizes) != 1:
        raise ValueError(f"the models have nested layers of different sizes, {sorted(sizes)}: no width is common")
    (features,) = sizes
    device = next(networks[0].parameters()).device
    correct = torch.zeros(features, dtype=torch.int64, device=device)
    count = 0
    with evaluating(*networks):
        for raw in as_source(data, seed=0).batches(0):
            batch = Batch.of(raw).map(lambda t: t.to(device, non_blocking=True))
            labels = batch.targets
            if labels is None or labels.is_floating_point() or labels.ndim != 1:
                raise ValueError("choosing a width needs class labels: batches (x, y) with integer y of shape (B,)")
            at = 0
            for outputs in _outputs_of_all_widths(probes, batch.inputs, features):
                hits = (outputs.argmax(dim=-1) == labels[:, None]).sum(dim=0)
                correct[at : at + len(hits)] += hits
                at += len(hits)
            count += len(labels)
    return correct.double().cpu() / count


@allowed(penalty=at_least(0.0))
def best_width(accuracies: Tensor, *, penalty: float = 1e-5) -> tuple[int, float]:
    """The width k with the largest ``accuracy(k) - penalty (k - 1)``; of equals the smallest.

    Args:
        accuracies: (D,) shares in [0, 1], see :func:`width_accuracies`.
        penalty: what another channel must gain, >= 0; default 1e-5 (official code), which decides near-ties only.

    Returns:
        The width, 1 ... D, and its penalised accuracy.

    Raises:
        ValueError: ``accuracies`` has another form, or ``penalty`` is negative.

    Examples:
        >>> best_width(torch.tensor([0.5, 0.75, 0.75]), penalty=0.0)
        (2, 0.75)
    """
    if accuracies.ndim != 1 or len(accuracies) == 0:
        raise ValueError(f"accuracies must have shape (D,), one for each width; got {tuple(accuracies.shape)}")
    values: list[float] = [accuracy - penalty * j for j, accuracy in enumerate(accuracies.tolist())]
    best = max(range(len(values)), key=values.__getitem__)  # the first of equals
    return best + 1, values[best]


def select_width(
    models: nn.Module | Sequence[nn.Module], data: Any, *, layer: str | None = None, penalty: float = 1e-5
) -> tuple[int, float]:
    """Choose the width on validation data and set it as ``keep`` of the nested layer of every model.

    It is a choice *on these data*, and its accuracy is optimistic: report that on others. A few labels that were
    checked by hand are enough for it.

    Args:
        models: one model, or several that predict together (their mean output decides).
        data: batches (x, y) of validation data, see :func:`width_accuracies`.
        layer: name of the nested layer where there are several.
        penalty: see :func:`best_width`.

    Returns:
        The width, and the accuracy in [0, 1] at it.

    Raises:
        ValueError: see :func:`width_accuracies` and :func:`best_width`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), NestedLinear(8, 3, sigma=2.0))
        >>> width, accuracy = select_width(model, [(torch.randn(20, 4), torch.randint(3, (20,)))])
        >>> model[2].nested.keep == width
        True
    """
    accuracies = width_accuracies(models, data, layer=layer)
    width, _ = best_width(accuracies, penalty=penalty)
    for network in _as_tuple(models):
        find_nested(network, layer)[1].keep = width
    return width, float(accuracies[width - 1])


def _as_tuple(models: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    return (models,) if isinstance(models, nn.Module) else tuple(models)


class _Probe:
    """Runs a model once and catches the features in front of the nested layer and the classifier behind it."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self.model = model
        self.name, self.nested = find_nested(model, layer)
        self.owner = model.get_submodule(self.name)

    def run(self, inputs: Any) -> tuple[Tensor, nn.Linear | None]:
        """Features (B, D), and the linear classifier that makes the model's output of them, where there is one."""
        features: Tensor | None = None
        passed: Tensor | None = None
        classifier: nn.Linear | None = None
        output: Tensor | None = None

        def catch(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            nonlocal features, passed, classifier, output
            features = args[0]
            if isinstance(module, NestedLinear):
                classifier, output = module, out
                return None
            passed = args[0].view_as(args[0])  # an object of its own: whoever gets it reads the nested layer
            return passed

        def follow(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            nonlocal classifier, output
            if isinstance(module, nn.Linear) and passed is not None and args and args[0] is passed:
                classifier, output = module, out

        handles = [self.owner.register_forward_hook(catch)]
        if not isinstance(self.owner, NestedLinear):
            readers = [module for module in self.model.modules() if type(module) is nn.Linear]
            handles += [reader.register_forward_hook(follow) for reader in readers]
        try:
            result = self.at_width(inputs, self.nested.features)
        finally:
            for handle in handles:
                handle.remove()
        if features is None:
            raise ValueError(f"the nested layer {self.name!r} was not reached by the forward pass")
        return features, classifier if result is output and features.ndim == 2 else None

    def at_width(self, inputs: Any, width: int) -> Tensor:
        """The model's output at one width."""
        before, self.nested.keep = self.nested.keep, width
        try:
            result = call_model(self.model, inputs)
        finally:
            self.nested.keep = before
        output: Tensor = getattr(result, "logits", result)
        return output


def _outputs_of_all_widths(probes: Sequence[_Probe], inputs: Any, features: int) -> Iterator[Tensor]:
    """Outputs (B, widths, C), summed over the models, for successive ranges of widths that fit into memory."""
    caught = [probe.run(inputs) for probe in probes]
    heads = [(h, classifier) for h, classifier in caught if classifier is not None]
    if len(heads) < len(probes):
        for width in range(1, features + 1):
            yield torch.stack([probe.at_width(inputs, width) for probe in probes]).sum(dim=0)[:, None]
        return
    h, classifier = heads[0]
    block = max(1, _BLOCK // max(1, len(h) * classifier.out_features))
    sums = [h.new_zeros(len(h), 1, c.out_features) if c.bias is None else c.bias[None, None] for h, c in heads]
    for start in range(0, features, block):
        part = slice(start, start + block)
        # The outputs at width k are the bias and the sum over j <= k of h_j W_j.
        running = [
            (h[:, part, None] * c.weight.T[None, part]).cumsum(dim=1).add_(before)
            for before, (h, c) in zip(sums, heads, strict=True)
        ]
        sums = [each[:, -1:].clone() for each in running]
        for other in running[1:]:
            running[0] += other
        yield running[0]
