"""A bilevel problem's derivatives on flat vectors, counted: what solvers, hypergradient and line search stand on.

    min over theta of  g(x*(theta), theta),   x*(theta) = argmin over x of h(x, theta)

=======================  =============================  =====================================================
paper                    here                           meaning
=======================  =============================  =====================================================
h, g                     ``lower``, ``upper``           scalar functions of pytrees of tensors
grad_x h                 ``inner_gradient``             (n,) flat
A = grad_xx h            ``Linearised.hessian``         product with an (n,) vector
B = d grad_x h / dtheta  ``Linearised.cross_transpose``  B^T q, (d,) from (n,);  ``cross``: B v, (n,) from (d,)
grad g                   ``upper_gradient``             (n,) and the direct part (d,)
=======================  =============================  =====================================================

One gradient graph serves all products with A and B at a point.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["BilevelProblem", "FlatTree", "Linearised", "Tree", "norm"]

Tree: TypeAlias = Any  # a tensor, or tuples, lists and dictionaries of tensors
Lower: TypeAlias = Callable[[Any, Any], Tensor]
Upper: TypeAlias = Callable[..., Tensor]


def norm(v: Tensor) -> float:
    """Euclidean norm of a flat vector, read from the device."""
    return float(torch.linalg.vector_norm(v))


class FlatTree:
    """The shape of a pytree of tensors: to one flat vector and back.

    Args:
        tree: a tensor, or tuples, lists and dictionaries of tensors of one floating dtype on one device.
        name: for errors.

    Raises:
        ValueError: no tensor, one that is not floating point, or different dtypes or devices.

    Examples:
        >>> shape = FlatTree({"a": torch.zeros(2), "b": torch.ones(1, 2)}, "x")
        >>> shape.flatten({"a": torch.zeros(2), "b": torch.ones(1, 2)})
        tensor([0., 0., 1., 1.])
        >>> shape.unflatten(torch.arange(4.0))["b"]
        tensor([[2., 3.]])
    """

    def __init__(self, tree: Tree, name: str) -> None:
        leaves, self._spec = pytree.tree_flatten(tree)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            kinds = sorted({type(leaf).__name__ for leaf in leaves})
            raise ValueError(f"{name} must be a tensor or a tuple, list or dictionary of tensors, got {kinds}")
        if bad := [str(leaf.dtype) for leaf in leaves if not leaf.is_floating_point()]:
            raise ValueError(f"{name} must be floating point to be differentiated, got {bad[0]}; use float64")
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1:
            kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
            raise ValueError(f"all tensors of {name} must have one dtype and device, got {', '.join(kinds)}")
        self._shapes = [leaf.shape for leaf in leaves]
        self._sizes = [leaf.numel() for leaf in leaves]
        self.size: int = sum(self._sizes)

    def flatten(self, tree: Tree) -> Tensor:
        """(n,) a copy without graph."""
        leaves = [leaf.detach().reshape(-1) for leaf in pytree.tree_leaves(tree)]
        return torch.cat(leaves)

    def unflatten(self, flat: Tensor) -> Tree:
        """Views of a flat vector in the form of the tree."""
        if len(self._shapes) == 1:
            return pytree.tree_unflatten([flat.view(self._shapes[0])], self._spec)
        pieces = [piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]
        return pytree.tree_unflatten(pieces, self._spec)


class Linearised:
    """The lower gradient at one point with its graph: each product below is one or two backward passes through it.

    Attributes:
        gradient: (n,) grad_x h, without graph.
    """

    def __init__(self, problem: "BilevelProblem", x: Tensor, theta: Tensor) -> None:
        self._problem = problem
        self._x = x.detach().requires_grad_()
        self._theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            value = problem.lower_value(self._x, self._theta)
            self._graph = problem.differentiate(value, self._x, create_graph=True)
        problem.inner_gradients += 1
        self.gradient: Tensor = self._graph.detach()

    def hessian(self, v: Tensor) -> Tensor:
        """A v, (n,)."""
        self._problem.products += 1
        if not self._graph.requires_grad:  # h is linear in x: no curvature at all
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(self._graph, self._x, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product

    def cross_transpose(self, q: Tensor) -> Tensor:
        """B^T q, (d,).

        Raises:
            ValueError: the lower gradient does not depend on theta.
        """
        self._problem.products += 1
        product = None
        if self._graph.requires_grad:
            (product,) = torch.autograd.grad(self._graph, self._theta, q, retain_graph=True, allow_unused=True)
        if product is None:
            raise ValueError(_DISCONNECTED)
        return product

    def both(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """A q and B^T q in one backward pass.

        Raises:
            ValueError: the lower gradient does not depend on theta.
        """
        if not self._graph.requires_grad:
            raise ValueError(_DISCONNECTED)
        self._problem.products += 1
        product, transposed = torch.autograd.grad(
            self._graph, (self._x, self._theta), q, retain_graph=True, allow_unused=True
        )
        if transposed is None:
            raise ValueError(_DISCONNECTED)
        return torch.zeros_like(q) if product is None else product, transposed

    def cross(self, v: Tensor) -> Tensor:
        """B v, (n,): the derivative of B^T w by w, taken at a vector v."""
        self._problem.products += 2
        dummy = torch.zeros_like(self._graph).requires_grad_()
        with torch.enable_grad():
            (product,) = torch.autograd.grad(self._graph, self._theta, dummy, create_graph=True, allow_unused=True)
            if product is None or not product.requires_grad:
                raise ValueError(_DISCONNECTED)
            (forward,) = torch.autograd.grad(product, dummy, v)
        return forward

    def check_connected(self) -> None:
        """Look whether B is 0.

        Raises:
            ValueError: it is.
        """
        if not self.cross(torch.ones_like(self._theta)).any():
            raise ValueError(_DISCONNECTED)


_DISCONNECTED = (
    "the upper loss does not depend on theta through the lower problem: the gradient of lower(x, theta) by x does not "
    "contain theta. Use the theta that lower receives as its argument, and multiply it with something that has x"
)


class BilevelProblem:
    """Lower and upper objective on flat vectors, with counters.

    Args:
        lower: ``lower(x, theta)``, a scalar; twice differentiable, strongly convex in x.
        upper: ``upper(x)``, a scalar, or ``upper(x, theta)`` where theta enters it directly too: which, is read off
            its signature.
        x: pytree like the inner variable.
        theta: pytree like the outer variable.

    Attributes:
        inner_gradients: gradients of ``lower`` by x that were taken.
        products: backward passes through their graphs, for products with A, B and B^T.

    Raises:
        ValueError: x or theta is no pytree of floating tensors, or ``upper`` takes other arguments.

    Examples:
        >>> x, theta = torch.zeros(3), torch.zeros(3)
        >>> problem = BilevelProblem(lambda x, t: 0.5 * (x - t).square().sum(), lambda x: x.sum(), x, theta)
        >>> problem.linearise(torch.ones(3), theta).hessian(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, lower: Lower, upper: Upper, x: Tree, theta: Tree) -> None:
        self.x_shape: FlatTree = FlatTree(x, "x")
        self.theta_shape: FlatTree = FlatTree(theta, "theta")
        self._lower = lower
        self._upper = upper
        self.upper_takes_theta: bool = _takes_theta(upper)
        self._given_theta = [leaf for leaf in pytree.tree_leaves(theta) if leaf.requires_grad]
        self.inner_gradients: int = 0
        self.products = 0

    def lower_value(self, x: Tensor, theta: Tensor) -> Tensor:
        """h, a scalar."""
        return _scalar(self._lower(self.x_shape.unflatten(x), self.theta_shape.unflatten(theta)), "lower")

    def upper_value(self, x: Tensor, theta: Tensor) -> Tensor:
        """g, a scalar."""
        arguments = (self.theta_shape.unflatten(theta),) if self.upper_takes_theta else ()
        return _scalar(self._upper(self.x_shape.unflatten(x), *arguments), "upper")

    def inner_gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        """grad_x h, (n,)."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.lower_value(x, theta)
        self.inner_gradients += 1
        return self.differentiate(value, x)

    def linearise(self, x: Tensor, theta: Tensor) -> Linearised:
        """grad_x h with its graph, for products with A and B."""
        return Linearised(self, x, theta)

    def upper_gradient(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """g, its gradient (n,) by x, and by theta directly (d,), None where theta does not enter.

        Raises:
            ValueError: ``upper`` does not depend on x, or depends on theta past its arguments.
        """
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_(self.upper_takes_theta)
        with torch.enable_grad():
            value = self.upper_value(x, theta)
        if self._given_theta and value.requires_grad:
            closed_over = torch.autograd.grad(value, self._given_theta, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in closed_over):
                raise ValueError(
                    "the upper loss uses theta from outside its arguments, so that part of the gradient would be lost: "
                    "write it as upper(x, theta)"
                )
            self._given_theta = []  # looked at once
        wanted = (x, theta) if self.upper_takes_theta else (x,)
        found = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else (None,)
        if found[0] is None:
            raise ValueError("upper(x) does not depend on x, so there is nothing to learn through the lower problem")
        return value.detach(), found[0], found[1] if len(found) > 1 else None

    def upper_hessian(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        """Product of the Hessian of g by x with a vector (n,)."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.upper_value(x, theta.detach())
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(gradient, x, v, allow_unused=True)
        return torch.zeros_like(v) if product is None else product

    def differentiate(self, value: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
        """Gradient of the lower objective's value by x.

        Raises:
            ValueError: it does not depend on x.
        """
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "lower(x, theta) does not depend on x: use the x that it receives as its argument, without detach()"
            )
        return gradient


def _scalar(value: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number as a tensor, got {got}; sum or average it")
    return value.reshape(())


def _takes_theta(upper: Upper) -> bool:
    """Whether a loss is ``upper(x, theta)``: it has two positional parameters without default."""
    forward = upper.forward if isinstance(upper, torch.nn.Module) else upper
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # something built in, of one argument
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if len(required) > 2 or (not required and not any(p.kind in positional for p in parameters)):
        raise ValueError(
            "upper must be upper(x), or upper(x, theta) where theta enters it directly too; it takes "
            f"({', '.join(str(p) for p in parameters)})"
        )
    return len(required) == 2
