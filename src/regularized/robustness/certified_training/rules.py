"""The registry: what each operation does to a box, and how to say it of an operation of one's own.

A *rule* is a function with the signature of the operation, whose tensors are :class:`Interval` s, and which returns
one. It must be sound: whatever lies in the box that goes in, its image lies in the box that comes out. The rules of
torch's own operations are in :mod:`~regularized.robustness.certified_training.monotone` and
:mod:`~regularized.robustness.certified_training.affine`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import fx, nn

__all__ = ["Rule", "UnsupportedOperation", "interval_rule", "rule_of_module", "rule_of_node"]

Rule: TypeAlias = Callable[..., Any]
R = TypeVar("R", bound=Rule)

_RULES: dict[Any, Rule] = {}


class UnsupportedOperation(NotImplementedError):
    """A network holds an operation that has no interval rule; the message names it, and how to give it one."""


def interval_rule(*operations: Any) -> Callable[[R], R]:
    """Say what an operation does to a box, as a decorator. A later rule replaces an earlier one.

    Args:
        operations: types of modules (``nn.GELU``, or a layer of your own, which is then not looked into), functions
            (``torch.sin``), or names of tensor methods (``"sin"``). The rule of a module is called with the module
            before its arguments, the others with the arguments alone.

    Returns:
        The decorator; it returns the rule itself.

    Raises:
        TypeError: something that is none of these.

    Examples:
        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return 2.0 * x
        >>> @interval_rule(Double)
        ... def _double(module, box):
        ...     return box.map(lambda end: 2.0 * end)
    """
    for operation in operations:
        is_type = isinstance(operation, type)
        if not (issubclass(operation, nn.Module) if is_type else isinstance(operation, str) or callable(operation)):
            raise TypeError(
                f"an interval rule is for a type of modules, a function or the name of a method, got {operation!r}"
            )

    def register(rule: R) -> R:
        _RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def rule_of_module(module: nn.Module) -> Rule | None:
    """The rule of a module's type, or of the type whose ``forward`` it inherits; None where there is none."""
    for kind in type(module).__mro__:
        if kind in _RULES and type(module).forward is getattr(kind, "forward", None):
            return _RULES[kind]
    return None


def rule_of_node(node: fx.Node, modules: Mapping[str, nn.Module]) -> Rule | None:
    """The rule of a call in a graph; None where there is none."""
    if node.op == "call_module":
        return rule_of_module(modules[str(node.target)])
    return _RULES.get(node.target)
