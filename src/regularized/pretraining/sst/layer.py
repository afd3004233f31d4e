"""A linear layer kept as its singular value decomposition, of which a few directions are trained at a time.

    Zhao, Zhang, Li, Liu, Cannistraci, "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
    Networks", ICML 2025, arXiv 2405.15481. The authors' code could not be read; formulas follow the paper.

==============  =====================  ============================================================================
paper           here                   meaning
==============  =====================  ============================================================================
U (o, m)        ``left`` (m, o)        left singular vectors, one a row; m = min(o, i)
Sigma (m)       ``values`` (m,)        singular values, >= 0; all of them are trained all the time
V (i, m)        ``right`` (m, i)       right singular vectors, one a row
I               ``active`` (r,)        indices of the directions that are trained now, ascending
U_I, V_I        ``active_left``,       their vectors: the leaves that an optimizer sees; the others have neither
                ``active_right``       gradient nor optimizer state
W               ``weight()`` (o, i)    ``U diag(Sigma) V^T``, never kept
==============  =====================  ============================================================================

With ``G = dL/dW = g^T x`` (output gradient g (n, o), input x (n, i)), ``dSigma_k = u_k^T G v_k``, and for k in I the
*enhanced* gradients are ``du_k = G v_k`` and ``dv_k = G^T u_k``: those of W without the factor ``Sigma_k``, so that
small directions learn as well. The *default* gradients have it.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice, allowed
from regularized.mechanisms.svd import thin_svd

__all__ = ["Factors", "Gradient", "SpectralLinear", "factors_of", "spectral_linear"]

# Shapes: n rows of input, i inputs, o outputs, m = min(o, i) directions, r of them active.

Gradient: TypeAlias = Literal["enhanced", "default"]
"""Gradient of the active vectors: without the factor Sigma_k, or with it."""


class Factors(NamedTuple):
    """A decomposition in the layout of the layer.

    Attributes:
        left: (m, o), orthonormal rows.
        values: (m,), descending, >= 0.
        right: (m, i), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def factors_of(weight: Tensor, *, name: str = "weight") -> Factors:
    """Thin singular value decomposition of a weight, its signs chosen.

    The entry of largest absolute value of each left vector is positive: libraries differ in the signs, and a run shall
    not depend on the library. Computed in float32 at least, returned in the type of the weight.

    Args:
        weight: (o, i).
        name: what it is, for errors.

    Raises:
        ValueError: it is no matrix, or holds values that are not finite.

    Examples:
        >>> left, values, right = factors_of(torch.tensor([[3.0, 4.0], [0.0, 0.0], [4.0, -3.0]]))
        >>> values, left.abs().argmax(dim=1).shape, right.shape
        (tensor([5., 5.]), torch.Size([2]), torch.Size([2, 2]))
        >>> torch.allclose((left * values[:, None]).T @ right, torch.tensor([[3.0, 4.0], [0.0, 0.0], [4.0, -3.0]]))
        True
    """
    left, values, right = thin_svd(weight, name=name)
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return Factors(
        (left * signs).T.to(weight.dtype).contiguous(),
        values.to(weight.dtype),
        (right * signs.T).to(weight.dtype).contiguous(),
    )


def _weight(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """``U diag(Sigma) V^T``, (o, i)."""
    return (left * values[:, None]).T @ right


class _SpectralLinear(torch.autograd.Function):
    """Forward and backward pass that never keep W or its gradient; see :func:`spectral_linear`.

    The vectors of all directions come as constants. They are not saved for the check of versions: the layer writes its
    active vectors into them in each forward pass, and a layer may be called twice before a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        active_left: Tensor,
        active_right: Tensor,
        values: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        active: Tensor,
        enhanced: bool,
        through_weight: bool,
    ) -> Tensor:
        ctx.vectors = left, right
        ctx.enhanced, ctx.through_weight = enhanced, through_weight
        if through_weight:
            ctx.save_for_backward(x, active_left, active_right, values, active)
            return F.linear(x, _weight(left, values, right), bias)
        inner = x @ right.T
        ctx.save_for_backward(x, active_left, active_right, values, active, inner)
        scaled = inner * values
        return scaled @ left if bias is None else torch.addmm(bias, scaled, left)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, _active_left, active_right, values, active, *inner = ctx.saved_tensors  # all, to see who was changed since
        left, right = ctx.vectors
        if ctx.through_weight:
            # G = g^T x lives for a moment. Row k of `pulled` is u_k^T G.
            whole = grad.T @ x
            pulled = left @ whole
            grad_values = (pulled * right).sum(1)
            grad_left, grad_right = active_right @ whole.T, pulled[active]
            grad_x = grad @ _weight(left, values, right) if ctx.needs_input_grad[0] else None
        else:
            outer = grad @ left.T
            grad_values = (outer * inner[0]).sum(0)
            grad_left, grad_right = inner[0][:, active].T @ grad, outer[:, active].T @ x
            grad_x = (outer * values) @ right if ctx.needs_input_grad[0] else None
        if not ctx.enhanced:
            factor = values[active][:, None]
            grad_left, grad_right = grad_left * factor, grad_right * factor
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, grad_left, grad_right, grad_values, grad_bias, None, None, None, None, None


def _weight_is_cheaper(n: int, o: int, i: int, m: int, r: int) -> bool:
    """Whether a step needs fewer multiplications when the weight is formed, twice, than when it never is."""
    formed = 3 * n * o * i + 3 * o * i * m + r * o * i
    factored = (2 * n * m + n * r) * (o + i)
    return formed < factored


@allowed(gradient=Choice("enhanced", "default"))
def spectral_linear(
    x: Tensor,
    left: Tensor,
    values: Tensor,
    right: Tensor,
    active: Tensor,
    active_left: Tensor,
    active_right: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Gradient = "enhanced",
) -> Tensor:
    """``x V diag(Sigma) U^T + bias``, differentiable in x, Sigma, the bias and the active vectors.

    Nothing of shape (o, i) outlives the call or the backward pass. With few rows (n below about 3 m) everything goes
    through the factors; with many the weight, and in the backward pass its gradient, is formed for a moment, which
    takes fewer multiplications. Under autocast all products are in its type.

    Args:
        x: (..., i).
        left: (m, o), all left vectors; constant.
        values: (m,).
        right: (m, i), all right vectors; constant.
        active: (r,) int64, the directions whose vectors are trained.
        active_left: (r, o), equal to ``left[active]``; the gradient goes there.
        active_right: (r, i), equal to ``right[active]``; the gradient goes there.
        bias: (o,) or None.
        gradient: ``"enhanced"`` (default, paper section 4.2) without the factor Sigma_k, or ``"default"`` with it.

    Returns:
        (..., o).

    Raises:
        ValueError: an unknown ``gradient``.

    Examples:
        >>> left, values, right = factors_of(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        >>> active = torch.tensor([1])
        >>> trained = left[active].requires_grad_()
        >>> y = spectral_linear(torch.ones(1, 2), left, values, right, active, trained, right[active])
        >>> y.sum().backward()
        >>> y, trained.grad  # the default gradient would be half of it
        (tensor([[3.0000, 0.5000]], grad_fn=<ViewBackward0>), tensor([[1., 1.]]))
    """
    rows = x.reshape(-1, x.shape[-1])
    o, i = left.shape[1], right.shape[1]
    kind = x.device.type
    tensors = [rows, active_left, active_right, values, bias, left, right]
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        tensors = [None if tensor is None else tensor.to(low) for tensor in tensors]
    with torch.autocast(kind, enabled=False):
        out: Tensor = _SpectralLinear.apply(  # type: ignore[no-untyped-call]
            *tensors,
            active,
            gradient == "enhanced",
            _weight_is_cheaper(rows.shape[0], o, i, len(values), len(active)),
        )
    return out.view(*x.shape[:-1], o)


class SpectralLinear(nn.Module):
    """A linear layer with its weight as ``U diag(Sigma) V^T``, of whose vectors ``r`` pairs are trained at a time.

    It stores ``m (o + i + 1) + r (o + i)`` numbers, about twice a square weight, and trains ``r (o + i) + m`` of them.
    :class:`~regularized.pretraining.sst.SST` makes such layers, and decides which directions are active.

    In training the product goes through the factors or through a weight of the moment, whichever is cheaper. In
    ``eval()`` without gradients it always goes through the weight, so that an evaluation gives bit for bit what the
    merged layer gives. To generate token by token merge first: forming a weight for one row is a waste.

    Args:
        left: (m, o), unit rows.
        values: (m,), >= 0.
        right: (m, i), unit rows.
        active: (r,) int64, ascending: the directions that are trained first.
        bias: (o,) or None.
        gradient: of the vectors, see :func:`spectral_linear`; default ``"enhanced"``.

    Raises:
        ValueError: shapes do not fit, or an unknown ``gradient``.

    Examples:
        >>> plain = nn.Linear(5, 3)
        >>> layer = SpectralLinear.of(plain, active=torch.tensor([0, 2]))
        >>> x = torch.randn(4, 5)
        >>> torch.allclose(layer(x), plain(x), atol=1e-6)
        True
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
        {'active_left': (2, 3), 'active_right': (2, 5), 'values': (3,), 'bias': (3,)}
    """

    left: Tensor
    right: Tensor
    active: Tensor

    @allowed(gradient=Choice("enhanced", "default"))
    def __init__(
        self,
        left: Tensor,
        values: Tensor,
        right: Tensor,
        active: Tensor,
        bias: Tensor | None = None,
        *,
        gradient: Gradient = "enhanced",
    ) -> None:
        super().__init__()
        m = len(values)
        if left.ndim != 2 or right.ndim != 2 or len(left) != m or len(right) != m or active.ndim != 1:
            raise ValueError(
                "left must be (m, o), values (m,), right (m, i) and active (r,), one row a direction; got "
                f"{tuple(left.shape)}, {tuple(values.shape)}, {tuple(right.shape)} and {tuple(active.shape)}"
            )
        self.gradient: Gradient = gradient
        self.register_buffer("left", left.detach().clone())
        self.register_buffer("right", right.detach().clone())
        self.register_buffer("active", active.detach().clone())
        self.active_left: nn.Parameter = nn.Parameter(left.detach()[active])
        self.active_right: nn.Parameter = nn.Parameter(right.detach()[active])
        self.values: nn.Parameter = nn.Parameter(values.detach().clone())
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(
        cls, linear: nn.Linear, *, active: Tensor, gradient: Gradient = "enhanced", name: str = "the layer"
    ) -> "SpectralLinear":
        """The layer that computes what ``linear`` computes.

        Args:
            linear: its weight is decomposed, its bias copied.
            active: (r,) int64, the directions that are trained first.
            gradient: see the class.
            name: for errors.

        Raises:
            ValueError: the weight holds values that are not finite.
        """
        left, values, right = factors_of(linear.weight, name=f"the weight of {name}")
        layer = cls(left, values, right, active.to(left.device), linear.bias, gradient=gradient)
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        """Inputs, i."""
        return self.right.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs, o."""
        return self.left.shape[1]

    @property
    def rank(self) -> int:
        """Directions that are trained at a time, r."""
        return len(self.active)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        self.write()
        if not self.training and not torch.is_grad_enabled():
            return F.linear(x, _weight(self.left, self.values, self.right), self.bias)
        return spectral_linear(
            x,
            self.left,
            self.values,
            self.right,
            self.active,
            self.active_left,
            self.active_right,
            self.bias,
            gradient=self.gradient,
        )

    def vectors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The trained vectors."""
        return self.active_left, self.active_right

    # -- what happens to it between steps; all in place, none waits for the device -----------------

    @torch.no_grad()
    def write(self) -> None:
        """Take the active vectors, as they are now, among all of them."""
        self.left.index_copy_(0, self.active, self.active_left)
        self.right.index_copy_(0, self.active, self.active_right)

    @torch.no_grad()
    def project(self) -> None:
        """After an optimizer step: singular values back to >= 0, active vectors back to unit length.

        A vector of length zero has no direction; it becomes again what it was before the step.
        """
        self.values.clamp_(min=0.0)
        for part, whole in ((self.active_left, self.left), (self.active_right, self.right)):
            length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            part.copy_(torch.where(length == 0, whole[self.active], part / length))
        self.write()

    @torch.no_grad()
    def activate(self, active: Tensor) -> None:
        """Train other directions from now on.

        Args:
            active: (r,) int64, as many as before.
        """
        self.write()
        self.active.copy_(active)
        self.active_left.copy_(self.left[self.active])
        self.active_right.copy_(self.right[self.active])

    @torch.no_grad()
    def decompose(self, *, name: str = "the layer") -> None:
        """Decompose the weight anew: the same weight, orthogonal directions, singular values in order.

        Args:
            name: for errors.

        Raises:
            ValueError: the weight holds values that are not finite.
        """
        self.write()
        wide = torch.promote_types(self.values.dtype, torch.float32)
        weight = _weight(self.left.to(wide), self.values.to(wide), self.right.to(wide))
        left, values, right = factors_of(weight, name=f"the weight of {name}")
        self.left.copy_(left)
        self.values.copy_(values)
        self.right.copy_(right)
        self.active_left.copy_(self.left[self.active])
        self.active_right.copy_(self.right[self.active])

    # -- what it leaves behind ---------------------------------------------------------------------

    @torch.no_grad()
    def weight(self) -> Tensor:
        """``U diag(Sigma) V^T``, (o, i)."""
        self.write()
        return _weight(self.left, self.values, self.right)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same, bit for bit what this one gives in an evaluation."""
        return _linear(self.weight(), self.bias).train(self.training)

    @torch.no_grad()
    def low_rank(self, rank: int) -> nn.Sequential:
        """Two thin plain layers, for inference: the best approximation of the weight that has this rank.

        Args:
            rank: singular values to keep, from 1 to m.

        Raises:
            ValueError: the rank is outside that range.

        Examples:
            >>> layer = SpectralLinear.of(nn.Linear(5, 3), active=torch.tensor([0]))
            >>> layer.low_rank(2)
            Sequential(
              (0): Linear(in_features=5, out_features=2, bias=False)
              (1): Linear(in_features=2, out_features=3, bias=True)
            )
        """
        left, values, right = thin_svd(self.weight(), rank=rank, name="the weight")
        dtype = self.values.dtype
        return nn.Sequential(
            _linear((values[:, None] * right).to(dtype), None), _linear(left.to(dtype), self.bias)
        ).train(self.training)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank} of "
            f"{len(self.values)}, bias={self.bias is not None}, gradient={self.gradient!r}"
        )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    o, i = weight.shape
    linear = nn.Linear(i, o, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
