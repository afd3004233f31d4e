"""A network's graph in one mode: traced by torch.fx, and looked at before any box goes through it."""

import inspect
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from regularized.robustness.certified_training.affine import affine_layer
from regularized.robustness.certified_training.batch_norm import is_batch_norm
from regularized.robustness.certified_training.rules import UnsupportedOperation, rule_of_module, rule_of_node

__all__ = ["Graph"]

_RELUS: tuple[Any, ...] = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE: tuple[Any, ...] = (operator.iadd, operator.isub, operator.imul, torch.relu_)
_VIEWS: tuple[Any, ...] = (
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "t", "narrow", "select"),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, operator.getitem),
)
_SHAPES: tuple[Any, ...] = ("size", "dim", "numel")


class Graph:
    """What a network computes, with every operation known to have a rule.

    Args:
        model: the network, in the mode in which it is traced.

    Attributes:
        nodes: its operations, in order.
        modules: by name.
        in_place: operations that change their first argument.
        last: the operation whose box is kept.
        head: the linear layer behind ``last``, merged with the margins; None where the network ends otherwise.
        folded: batch normalisations that only a linear or convolutional layer feeds, with that layer.

    Raises:
        UnsupportedOperation: it cannot be traced, has several inputs or outputs, or an operation without a rule.
    """

    def __init__(self, model: nn.Module) -> None:
        single = rule_of_module(model) is not None or is_batch_norm(model)  # which a tracer would look into
        self.root: nn.Module = nn.Sequential(model) if single else model
        before = set(self.root.__dict__)
        try:
            graph = _Tracer().trace(self.root)
        except Exception as error:
            raise UnsupportedOperation(
                f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error}); give the "
                "module that looks at the values of its input a rule of its own: @interval_rule(ItsType)"
            ) from error
        # The tracer leaves tensors that are made in `forward` in the module; they belong here.
        made = set(self.root.__dict__) - before
        self.constants: Mapping[str, Any] = {name: self.root.__dict__.pop(name) for name in made}
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.modules: dict[str, nn.Module] = dict(self.root.named_modules())
        self.in_place: frozenset[fx.Node] = frozenset(filter(self._changes_its_input, self.nodes))
        self._check(self._depending_on_the_input())
        self.last: fx.Node
        self.head: fx.Node | None
        self.last, self.head = self._merged_head()
        self.folded: Mapping[fx.Node, fx.Node] = self._folded_layers()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls; None for other nodes."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def attribute(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant that a node reads."""
        name = str(node.target)
        return self.constants[name] if name in self.constants else operator.attrgetter(name)(self.root)

    def is_relu(self, node: fx.Node) -> bool:
        """Whether a node is a ReLU."""
        module = self.module(node)
        return isinstance(module, nn.ReLU) if module is not None else node.target in _RELUS

    def is_batch_norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch normalisation."""
        module = self.module(node)
        return module is not None and is_batch_norm(module)

    def _changes_its_input(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return bool(getattr(module, "inplace", False))
        by_name = isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
        if node.op not in ("call_method", "call_function"):
            return False
        return by_name or node.target in _IN_PLACE or self._asked_in_place(node)

    @staticmethod
    def _asked_in_place(node: fx.Node) -> bool:
        try:
            asked = inspect.signature(cast(Any, node.target)).bind_partial(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):  # a built-in function, or the name of a method
            return bool(node.kwargs.get("inplace"))
        return bool(asked.get("inplace"))

    def layers_behind_additions(self) -> list[nn.Module]:
        """Linear and convolutional layers whose input is a ReLU of a sum: of a residual connection."""
        found = []
        for node in self.nodes:
            module = self.module(node)
            if module is None or affine_layer(module) is None:
                continue
            (source,) = node.all_input_nodes
            if self.is_relu(source):
                total = source.all_input_nodes[0]
                branches = [branch for branch in total.all_input_nodes if branch.op != "get_attr"]
                if total.target in _ADDITIONS and len(branches) == 2:
                    found.append(module)
        return found

    # -- looked at once -----------------------------------------------------------------------------

    def _depending_on_the_input(self) -> set[fx.Node]:
        inputs = [node for node in self.nodes if node.op == "placeholder" and not node.args]
        if len(inputs) != 1:
            raise UnsupportedOperation(
                f"bounds are for networks of one input, {type(self.root).__name__} takes {len(inputs)}; wrap it in a "
                "module whose forward takes the tensor that is perturbed"
            )
        depending: set[fx.Node] = set(inputs)
        for node in self.nodes:
            shape = node.target in _SHAPES or (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype"))
            if not shape and depending.intersection(node.all_input_nodes):
                depending.add(node)
        return depending

    def _check(self, depending: set[fx.Node]) -> None:
        for node in self.nodes:
            if node not in depending or node.op in ("placeholder", "output"):
                continue
            if not self.is_batch_norm(node) and rule_of_node(node, self.modules) is None:
                raise UnsupportedOperation(self._without_rule(node))
            if node in self.in_place:
                changed = node.all_input_nodes[0]
                if changed.target in _VIEWS or any(user.target in _VIEWS for user in changed.users):
                    raise UnsupportedOperation(
                        f"{self._words(node)} changes {changed.name!r} in place, of which there is a view that would "
                        "change, too; write it without inplace"
                    )

    def _words(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return f"module {node.target!r} ({type(module).__name__})"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
        inside = next((str(path) for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
        where = f"in module {inside!r}" if inside else "in its forward"
        return f"the {'method' if node.op == 'call_method' else 'function'} {name!r} {where}"

    def _without_rule(self, node: fx.Node) -> str:
        module = self.module(node)
        operation = (
            type(module).__name__
            if module is not None
            else repr(node.target)
            if isinstance(node.target, str)
            else f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
        )
        arguments, call = ("module, box", "module.forward") if module is not None else ("box", "lambda end: ...")
        return (
            f"{self._words(node)} of {type(self.root).__name__} has no interval rule. Give it a sound one, here for a "
            f"function that never falls:\n@interval_rule({operation})\ndef rule({arguments}):\n"
            f"    return box.map({call})\nor use another operation"
        )

    def _merged_head(self) -> tuple[fx.Node, fx.Node | None]:
        last = next(node for node in self.nodes if node.op == "output").args[0]
        if not isinstance(last, fx.Node):
            raise UnsupportedOperation(f"bounds are for networks that return one tensor, this one returns {last!r}")
        module = self.module(last)
        linear = module is not None and type(module).forward is nn.Linear.forward and len(last.users) == 1
        return (last.all_input_nodes[0], last) if linear else (last, None)

    def _folded_layers(self) -> dict[fx.Node, fx.Node]:
        folded = {}
        for node in filter(self.is_batch_norm, self.nodes):
            (source,) = node.all_input_nodes
            layer = self.module(source)
            plain = layer is not None and type(layer).forward in (
                *(nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward),
            )
            if plain and len(source.users) == 1:
                folded[node] = source
        return folded


class _Tracer(fx.Tracer):
    """Does not look into modules that have a rule of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = rule_of_module(m) is not None or is_batch_norm(m)
        return known or super().is_leaf_module(m, module_qualified_name)
