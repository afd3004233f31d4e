"""Interval bound propagation through any network that torch.fx can trace.

A box goes through the network's graph by the rules of :mod:`~regularized.robustness.certified_training.rules`. The
network is traced once for each mode of its modules, and stays as it is, but for hooks that note what its batch
normalisations see.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from regularized.robustness.certified_training.affine import affine_layer, affine_map
from regularized.robustness.certified_training.batch_norm import BatchStatistics, normalised, normalised_layer
from regularized.robustness.certified_training.graph import Graph
from regularized.robustness.certified_training.interval import Interval
from regularized.robustness.certified_training.rules import rule_of_node

__all__ = ["Bounds", "IntervalBounds"]


class Bounds:
    """What a box becomes in a network; made by :class:`IntervalBounds`.

    Args:
        last: the box before ``head``, or the output's.
        head: weight (K, D) and bias (K,) of the last linear layer, which is merged with the margins; None where the
            network ends otherwise.
        relu_inputs: the box before each ReLU, in the order of the forward pass.
        states: the box behind every operation, by its name in the graph, where they were asked for.

    Raises:
        ValueError: by :meth:`margins`: the logits are not (B, K), or a target is none of the classes.

    Examples:
        >>> box = Interval.around(torch.zeros(1, 2), torch.ones(1, 2))
        >>> bounds = Bounds(box, (torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0])), (), {})
        >>> bounds.output.lower, bounds.margins(torch.tensor([0]))
        (tensor([[ 1., -2.]]), tensor([[0., 1.]]))
    """

    def __init__(
        self,
        last: Interval,
        head: tuple[Tensor, Tensor | None] | None,
        relu_inputs: tuple[Interval, ...],
        states: Mapping[str, Interval],
    ) -> None:
        self._last, self._head = last, head
        self.relu_inputs: tuple[Interval, ...] = relu_inputs
        self.states: Mapping[str, Interval] = states

    @property
    def output(self) -> Interval:
        """The box of the logits, (B, K). Differences of two logits have tighter bounds, see :meth:`margins`."""
        if self._head is None:
            return self._last
        weight, bias = self._head
        with _exactly(weight):
            return Interval.around(F.linear(self._last.centre, weight, bias), F.linear(self._last.radius, weight.abs()))

    def margins(self, targets: Tensor) -> Tensor:
        """By how much the right logit exceeds each other one, at least, anywhere in the box.

        The last linear layer is merged with the differences, so that what two logits share cancels out.

        Args:
            targets: (B,) int64 classes.

        Returns:
            (B, K); 0 for the right class itself. A sample is verified if no entry is negative.

        Raises:
            ValueError: the network does not return (B, K) with K >= 2, or a target is outside 0 ... K - 1.
        """
        shape = self._last.shape if self._head is None else (*self._last.shape[:-1], len(self._head[0]))
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(f"margins need logits of shape (B, K) of at least two classes, got {tuple(shape)}")
        _check_targets(targets, samples=shape[0], classes=shape[1])
        right = targets.unsqueeze(1)
        if self._head is None:
            lower = self._last.lower.gather(1, right) - self._last.upper
            return lower.scatter(1, right, 0.0)
        weight, bias = self._head
        with _exactly(weight):
            logits = F.linear(self._last.centre, weight, bias)
            apart = (weight[targets].unsqueeze(1) - weight).abs()
            spread = torch.matmul(apart, self._last.radius.unsqueeze(2)).squeeze(2)
            return logits.gather(1, right) - logits - spread


def _exactly(like: Tensor) -> torch.autocast:
    """No autocast: bounds in half precision are no bounds."""
    return torch.autocast(like.device.type, enabled=False)


def _check_targets(targets: Tensor, *, samples: int, classes: int) -> None:
    if targets.shape != (samples,) or targets.is_floating_point():
        raise ValueError(
            f"targets must be {samples} class numbers, one for each sample of the box; got shape "
            f"{tuple(targets.shape)} of {targets.dtype}"
        )
    if targets.device.type == "cpu" and samples:  # elsewhere looking would make the host wait; torch's index check does
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"targets must be in 0 ... {classes - 1}, a class for each logit of the network; got {low} ... {high}"
            )


class IntervalBounds:
    """Bounds on everything that a network computes, for all inputs of a box.

    Args:
        model: the network: one tensor in, one out, of operations that have a rule
            (:func:`~regularized.robustness.certified_training.interval_rule`). It is kept, not copied, and its weights
            are read at each call.

    Attributes:
        model: the network.

    Raises:
        UnsupportedOperation: an operation has no rule, or the network cannot be traced.

    Warns:
        UserWarning: the last operation is no linear layer; margins are then differences of bounds, which are looser.

    Examples:
        >>> from regularized.robustness.certified_training import linf_box
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> bounds = IntervalBounds(model)
        >>> x = torch.rand(5, 4)
        >>> found = bounds(linf_box(x, 0.1, data_range=(0.0, 1.0)))
        >>> bool((found.output.lower <= model(x)).all() and (model(x) <= found.output.upper).all())
        True
        >>> found.margins(model(x).argmax(1)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self._graphs: dict[tuple[bool, ...], Graph] = {}
        if self.graph().head is None:
            warnings.warn(
                f"the last operation of {type(model).__name__} is no linear layer, so margins are differences of the "
                "bounds of two logits, which are looser; end the network with nn.Linear",
                stacklevel=2,
            )
        self._statistics = BatchStatistics(model)

    def graph(self) -> Graph:
        """The traced network, in its present mode."""
        mode = tuple(module.training for module in self.model.modules())
        if mode not in self._graphs:
            self._graphs[mode] = Graph(self.model)
        return self._graphs[mode]

    def __call__(self, box: Interval, *, states: bool = False) -> Bounds:
        """Send a box through the network.

        In training mode, with batch normalisation, ``model(x)`` comes first: the box is normalised as that batch was.
        Bounds are computed in the precision of weights and box, whatever autocast says.

        Args:
            box: of inputs, (B, ...), see :func:`~regularized.robustness.certified_training.linf_box`.
            states: keep the box behind every operation, too.

        Raises:
            RuntimeError: a batch normalisation in training mode has not seen a clean batch of this size; or one in
                evaluation keeps no running statistics.
            ValueError: a rule does not hold for how an operation is set: dropout that is active, for example.
        """
        with _exactly(box.example):
            return _Run(self.graph(), box, self._statistics, states=states).bounds()

    def clear(self) -> None:
        """Forget the last clean batch, so that its graph can be freed."""
        self._statistics.clear()

    def remove(self) -> None:
        """Take the hooks off the network."""
        self._statistics.remove()


class _Run:
    """One box on its way through a graph."""

    def __init__(self, graph: Graph, box: Interval, statistics: BatchStatistics, *, states: bool) -> None:
        self.graph, self.box, self.statistics, self.states = graph, box, statistics, states
        self.folded: Mapping[fx.Node, fx.Node] = {} if states else graph.folded
        self.waiting: set[fx.Node] = set(self.folded.values())
        self.calls: Counter[str] = Counter()
        self.known: dict[fx.Node, Any] = {}

    def bounds(self) -> Bounds:
        graph, relu_inputs = self.graph, []
        for node in graph.nodes:
            if node.op == "output" or node is graph.head or node in self.waiting:
                continue
            if graph.is_relu(node):
                relu_inputs.append(self.known[node.all_input_nodes[0]])
            self.known[node] = self._value(node)
            if node in graph.in_place:
                self.known[node.all_input_nodes[0]] = self.known[node]
        head = None
        if graph.head is not None:
            layer = cast(nn.Linear, graph.module(graph.head))
            head = (layer.weight, layer.bias)
        kept = {node.name: value for node, value in self.known.items() if isinstance(value, Interval)}
        return Bounds(self.known[graph.last], head, tuple(relu_inputs), kept if self.states else {})

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return node.args[0] if node.args else self.box
        if node.op == "get_attr":
            return self.graph.attribute(node)
        if self.graph.is_batch_norm(node):
            return self._normalised(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known.__getitem__)
        module = self.graph.module(node)
        if any(isinstance(self.known[source], Interval) for source in node.all_input_nodes):
            rule = rule_of_node(node, self.graph.modules)
            assert rule is not None, node
            return rule(*args, **kwargs) if module is None else rule(module, *args, **kwargs)
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Any, node.target)(*args, **kwargs)

    def _normalised(self, node: fx.Node) -> Interval:
        norm, name = self.graph.module(node), str(node.target)
        assert norm is not None
        statistics = self.statistics.of(norm, self.calls[name], name, len(self.box.example))
        self.calls[name] += 1
        if node not in self.folded:
            return normalised(norm, statistics, self.known[node.all_input_nodes[0]])
        source = self.folded[node]
        layer = cast(nn.Linear, self.graph.module(source))
        box = self.known[source.all_input_nodes[0]]
        apply = affine_layer(layer)
        assert apply is not None
        if isinstance(layer, nn.Linear) and len(box.shape) != 2:  # its outputs are not the channels
            return normalised(norm, statistics, affine_map(apply, layer.weight, layer.bias, box))
        return normalised_layer(apply, layer, norm, statistics, box)
