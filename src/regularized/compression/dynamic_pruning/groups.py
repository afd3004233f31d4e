"""Which filters of a network can be switched off: convolutions with what follows them, found by tracing.

A filter that is off must be silent for the rest of the network. So a convolution can be pruned where its result goes,
through batch normalisation or directly, into functions that map zero to zero. Where another normalisation follows, the
filters are switched off before it.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning.masks import Activation

__all__ = ["FilterGroup", "Survey", "find_groups"]

# Elementwise functions; whether they map zero to zero is tried.
_ACTIVATION_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Tanh,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softplus,
)
_ACTIVATION_FUNCTIONS = {
    F.relu,
    torch.relu,
    F.relu6,
    F.leaky_relu,
    F.silu,
    F.gelu,
    F.hardswish,
    F.elu,
    F.celu,
    F.selu,
    F.mish,
    torch.tanh,
    F.tanh,
    F.hardtanh,
    torch.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    F.softplus,
}
_ACTIVATION_METHODS = {"relu": torch.relu, "relu_": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}

# What leaves an empty channel empty, besides activations.
_CHANNELWISE_MODULES = (
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Upsample,
    nn.ZeroPad2d,
)
_CHANNELWISE_FUNCTIONS = {
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
    F.interpolate,
}


@dataclass(frozen=True, slots=True)
class FilterGroup:
    """A convolution whose filters are switched on and off for each image, and what follows it.

    Args:
        conv: dotted name of the ``nn.Conv2d``.
        norm: name of the ``nn.BatchNorm2d`` that alone takes its result; None where there is none.
        activation: elementwise function that follows, with ``f(0) = 0``; None for none. The network goes on applying
            it itself; here it is part of how strongly a filter answers.
        source: name of the pruned convolution whose silent filters are the empty channels of this one's input; None
            where all channels may be filled, as behind a residual sum.
        output: name of the module whose result is judged and masked in place of the convolution's, channel by channel:
            a residual block, of which this is the last convolution. Default None; an option of the official code.

    Examples:
        >>> FilterGroup("features.0", norm="features.1", activation=F.relu).conv
        'features.0'
    """

    conv: str
    norm: str | None = None
    activation: Activation | None = None
    source: str | None = None
    output: str | None = None


class Survey(NamedTuple):
    """What tracing a network gave.

    Attributes:
        groups: convolutions that can be pruned, by name, in the order of the forward pass.
        left_out: why the others cannot, by name.
        summed: those of the groups whose result, without an activation, enters a sum: a residual branch.
    """

    groups: Mapping[str, FilterGroup]
    left_out: Mapping[str, str]
    summed: frozenset[str]


def find_groups(model: nn.Module) -> Survey:
    """Find all convolutions that can be pruned dynamically.

    Args:
        model: a convolutional network that ``torch.fx`` can trace: no branches that depend on data.

    Raises:
        ValueError: it cannot be traced; the message says how to name the layers instead.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.Flatten())
        >>> groups, left_out, _ = find_groups(net)
        >>> groups["0"].norm, left_out
        ('1', {'3': 'it is the last layer: its filters are the outputs of the network'})
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the user's forward does with a proxy instead of a tensor
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {str(error)[:200]}); say which layers "
            'to prune and what follows them: layers=[FilterGroup("conv1", norm="bn1", activation=F.relu), ...]'
        ) from error
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    groups: dict[str, FilterGroup] = {}
    left_out: dict[str, str] = {}
    ends: dict[fx.Node, str] = {}  # the node whose value is masked, and the convolution
    summed = set()
    for name, nodes in calls.items():
        if not isinstance(modules[name], nn.Conv2d):
            continue
        reason = _obstacle(nodes, modules, calls)
        if reason is not None:
            left_out[name] = reason
            continue
        conv = nodes[0]
        norm = _norm_of(conv, modules)
        end = conv if norm is None else norm
        groups[name] = FilterGroup(
            name,
            norm=None if norm is None else str(norm.target),
            activation=_activation_of(end, modules),
            source=_source_of(conv, modules, ends),
        )
        ends[end] = name
        if any(_is_sum(user) for user in end.users):
            summed.add(name)
    return Survey(groups, left_out, frozenset(summed))


def _obstacle(nodes: list[fx.Node], modules: Mapping[str, nn.Module], calls: Mapping[str, list[fx.Node]]) -> str | None:
    """Why filters of this convolution cannot be switched off; None where they can."""
    if len(nodes) > 1:
        return f"it is called {len(nodes)} times in a forward pass, with one set of filters"
    (conv,) = nodes
    norm = _norm_of(conv, modules)
    if norm is not None and len(calls[str(norm.target)]) > 1:
        return f"its normalisation {norm.target!r} serves other layers, too"
    end = conv if norm is None else norm
    users = list(end.users)
    for user in users:
        activation = _as_activation(user, modules)
        if activation is not None and not _silent_at_zero(activation):
            return f"{_name_of(user, modules)} follows, which does not map 0 to 0: a silent filter would still speak"
    if not any(_reaches_a_layer(user, modules) for user in users):
        return "it is the last layer: its filters are the outputs of the network"
    return None


def _norm_of(conv: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    users = list(conv.users)
    if len(users) == 1 and isinstance(_module(users[0], modules), nn.BatchNorm2d):
        return users[0]
    return None


def _activation_of(end: fx.Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    users = list(end.users)
    return _as_activation(users[0], modules) if len(users) == 1 else None


def _as_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The elementwise function that a node applies; None where it does something else."""
    module = _module(node, modules)
    if isinstance(module, _ACTIVATION_MODULES):
        return module
    extra = node.args[1:]
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "inplace")}
    if node.op == "call_method" and node.target in _ACTIVATION_METHODS:
        return _ACTIVATION_METHODS[str(node.target)]
    if node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS:
        function: Any = node.target
        plain = not options and (not extra or function in (F.relu, F.relu6))  # their second argument is `inplace`
        return function if plain else _bound(function, extra, options)
    return None


def _bound(function: Any, extra: tuple[Any, ...], options: dict[str, Any]) -> Activation:
    return partial(_apply, function, extra, options)


def _apply(function: Any, extra: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> Tensor:
    result: Tensor = function(x, *extra, **options)
    return result


@torch.no_grad()
def _silent_at_zero(activation: Activation) -> bool:
    device = next(iter(activation.parameters())).device if isinstance(activation, nn.PReLU) else None
    return not bool(activation(torch.zeros(1, 1, 1, 1, device=device)).any())


def _source_of(conv: fx.Node, modules: Mapping[str, nn.Module], ends: Mapping[fx.Node, str]) -> str | None:
    """The pruned convolution of which this one sees the filters, channel by channel."""
    node = conv.args[0] if conv.args else conv.kwargs.get("input")
    while isinstance(node, fx.Node):
        if node in ends:
            return ends[node]
        if not _is_channelwise(node, modules):
            return None
        node = node.args[0] if node.args else node.kwargs.get("input")
    return None


def _is_channelwise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if isinstance(_module(node, modules), _CHANNELWISE_MODULES):
        return True
    if node.op == "call_function" and node.target in _CHANNELWISE_FUNCTIONS:
        return True
    activation = _as_activation(node, modules)
    return activation is not None and _silent_at_zero(activation)


def _reaches_a_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether something with weights comes later: a convolution, or a linear layer."""
    return any(isinstance(_module(later, modules), nn.Conv2d | nn.Linear) for later in _downstream(node))


def _downstream(node: fx.Node) -> Iterator[fx.Node]:
    seen, open_nodes = {node}, [node]
    while open_nodes:
        current = open_nodes.pop()
        yield current
        new = [user for user in current.users if user not in seen]
        seen.update(new)
        open_nodes.extend(new)


def _is_sum(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add, "add", "add_")


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _name_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    module = _module(node, modules)
    return type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))
