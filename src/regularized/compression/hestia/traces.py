"""Traces of the loss' Hessian for each weight tensor, by Hutch++: how sensitive a tensor is to rounding.

Hutch++ (Meyer, Musco, Musco and Woodruff, 2021) splits the trace of a symmetric n x n operator H. A sketch ``H S`` of k
random signs spans most of its large eigenvalues; with Q an orthonormal basis of it::

    Tr(H) = Tr(Q^T H Q) + Tr((I - Q Q^T) H (I - Q Q^T))

the first part is exact, the second is estimated from q random signs. It is exact where k reaches the rank of H.

The official code does that tensor by tensor: ``layers x batches x (2 k + q)`` double backward passes, one vector at a
time. ``joint`` probes give every tensor its own columns and multiply the Hessian of *all* weights by them at once,
which takes ``batches x (2 k + q)`` passes whatever the number of tensors. What other tensors add to a tensor's product
has the mean zero, since each column of each tensor has a random sign of its own: estimates stay unbiased, with more
variance.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.mechanisms.surgery import select_modules
from regularized.mechanisms.two_networks import evaluating

__all__ = ["TraceEstimate", "hessian_traces", "hutchpp"]

Probes: TypeAlias = Literal["joint", "exact"]

# Shapes: n entries of a weight tensor, k columns of the sketch, q probes of the rest.


class TraceEstimate(NamedTuple):
    """Both parts of a trace.

    Attributes:
        low: that of the sketched subspace, ``Tr(Q^T H Q)``; a 0-d tensor.
        rest: the estimate of what is outside.
    """

    low: Tensor
    rest: Tensor

    @property
    def total(self) -> Tensor:
        """The trace."""
        total: Tensor = self.low + self.rest
        return total


def hutchpp(product: Callable[[Tensor], Tensor], sketch: Tensor, probes: Tensor) -> TraceEstimate:
    """Hutch++ for one symmetric operator that is known by its products.

    Args:
        product: (n, c) to (n, c), ``H V``.
        sketch: (n, k) random signs; where k reaches n the trace is exact and no probe is used.
        probes: (n, q) random signs.

    Raises:
        ValueError: the two have another number of rows.

    Examples:
        >>> entries = torch.tensor([4.0, 2.0, 0.0, 0.0])
        >>> signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
        >>> estimate = hutchpp(lambda v: entries[:, None] * v, signs, signs)
        >>> round(float(estimate.total), 4)
        6.0
    """
    if len(sketch) != len(probes):
        raise ValueError(f"sketch and probes must have as many rows as the operator, got {len(sketch)}, {len(probes)}")
    basis = _basis(product(sketch))
    low = torch.sum(basis * product(basis))
    if sketch.shape[1] >= len(sketch):
        return TraceEstimate(low, torch.zeros_like(low))
    return TraceEstimate(low, _rest(basis, probes, product(_outside(basis, probes))))


def _basis(sketched: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(sketched, mode="reduced").Q
    return basis


def _outside(basis: Tensor, columns: Tensor) -> Tensor:
    return columns - basis @ (basis.T @ columns)


def _rest(basis: Tensor, probes: Tensor, products: Tensor) -> Tensor:
    return (probes * _outside(basis, products)).sum() / probes.shape[1]


# -- of a model ---------------------------------------------------------------------------------------


@allowed(sketch=count(1), queries=count(1), batches=count(1), together=count(1), probes=Choice("joint", "exact"))
def hessian_traces(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    data: Iterable[Any],
    *,
    sketch: int = 10,
    queries: int = 20,
    batches: int = 5,
    probes: Probes = "joint",
    together: int = 1,
    include: tuple[type[nn.Module], ...] = (nn.Linear,),
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """Hessian trace of the weight of each layer, for a model in full precision; take it before annealing.

    The model is in evaluation mode meanwhile and is left as it was. Attention is computed by torch's mathematical
    kernel, since the fused ones have no second derivative. Needs ``sketch`` and ``queries`` times the memory of all
    weights together, beside the graph of a double backward pass.

    Args:
        model: in full precision.
        loss: ``loss(model, batch)``, a scalar mean over the batch.
        data: batches; the first ``batches`` are kept and passed over three times.
        sketch: columns k of the sketch; default 10, the code's.
        queries: probes q of the rest; default 20, the code's.
        batches: of data; default 5, the code's.
        probes: ``"joint"`` (default) multiplies by the Hessian of all weights at once; ``"exact"`` tensor by tensor, as
            the official code: less variance, and as many times the work as there are layers.
        together: vectors of one double backward pass (``torch.func.vmap``); default 1. More is faster on small models
            and takes so many times the memory.
        include: types of layers; default linear.
        exclude: names of layers to leave out, as for
            :func:`~regularized.compression.hestia.anneal_weights`.
        seed: of the random signs.

    Returns:
        Traces by the name of the layer.

    Raises:
        ValueError: no layer, no data; a layer is annealed already, or its weight needs no gradient; the loss is no
            scalar, does not reach a layer, or is not finite.
        RuntimeError: an operation has no second derivative; the message says what to do.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> square = lambda model, x: model(x).square().sum() / 2
        >>> traces = hessian_traces(model, square, [torch.eye(3)], sketch=6)  # the Hessian is the identity of 6
        >>> round(traces["0"], 4)
        6.0
    """
    weights = _weights(model, include, exclude)
    kept = _first(data, batches)
    signs = torch.Generator().manual_seed(seed)

    def draw(columns: int) -> list[Tensor]:
        return [_signs((p.numel(), columns), signs).to(p.device, torch.float32) for p in weights.values()]

    def products(vectors: list[Tensor]) -> list[Tensor]:
        return _products(model, loss, kept, list(weights.values()), vectors, exact=probes == "exact", together=together)

    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        columns = min(sketch, max(p.numel() for p in weights.values()))
        bases = [_basis(y) for y in products(draw(columns))]
        if probes == "joint":  # a random sign a column of each tensor: no other tensor's product has a mean
            bases = [b * _signs((1, b.shape[1]), signs).to(b.device, b.dtype) for b in bases]
        width = max(basis.shape[1] for basis in bases)  # a tensor of fewer entries than columns has a smaller basis
        padded = [nn.functional.pad(basis, (0, width - basis.shape[1])) for basis in bases]
        low = [(b * y).sum() for b, y in zip(padded, products(padded), strict=True)]
        omega = draw(queries)
        outside = [_outside(b, o) for b, o in zip(bases, omega, strict=True)]
        rest = [_rest(b, o, y) for b, o, y in zip(bases, omega, products(outside), strict=True)]
    totals = torch.stack([TraceEstimate(a, b).total.cpu() for a, b in zip(low, rest, strict=True)]).tolist()
    return dict(zip(weights, totals, strict=True))


def _weights(model: nn.Module, include: tuple[type[nn.Module], ...], exclude: Iterable[str]) -> dict[str, nn.Parameter]:
    layers = dict(select_modules(model, include, exclude))
    if not layers:
        raise ValueError(f"no layer of {type(model).__name__} is one of {[kind.__name__ for kind in include]}")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"layer {name!r} is annealed already; take the traces of the model in full precision")
        if not cast(Tensor, layer.weight).requires_grad:
            raise ValueError(f"the weight of layer {name!r} needs no gradient; exclude it, or requires_grad_(True)")
    return {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}


def _first(data: Iterable[Any], batches: int) -> list[Any]:
    kept = [batch for _, batch in zip(range(batches), data)]
    if not kept:
        raise ValueError("the calibration data hold no batch")
    return kept


def _signs(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def _products(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    weights: Sequence[nn.Parameter],
    vectors: Sequence[Tensor],
    *,
    exact: bool,
    together: int,
) -> list[Tensor]:
    """(n, c) products of the Hessian, mean over the batches, with (n, c) vectors of each weight."""
    sums = [torch.zeros_like(v) for v in vectors]
    for batch in batches:
        with torch.enable_grad():
            value = loss(model, batch)
            if value.ndim != 0 or not bool(value.isfinite()):
                raise ValueError(f"the calibration loss must be a finite scalar, got {value.detach()}")
            try:
                gradients = torch.autograd.grad(value, weights, create_graph=True)
                groups = [[number] for number in range(len(weights))] if exact else [list(range(len(weights)))]
                for group in groups:
                    _add_products(
                        [sums[i] for i in group],
                        [gradients[i] for i in group],
                        [weights[i] for i in group],
                        [vectors[i] for i in group],
                        together,
                    )
            except RuntimeError as error:
                raise _explained(error) from error
    return [total / len(batches) for total in sums]


def _add_products(
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[nn.Parameter],
    vectors: Sequence[Tensor],
    together: int,
) -> None:
    for first in range(0, vectors[0].shape[1], together):
        chosen = slice(first, first + together)
        columns = [v[:, chosen].T.reshape(-1, *p.shape).to(p.dtype) for v, p in zip(vectors, weights, strict=True)]
        batched = together > 1
        found = torch.autograd.grad(
            gradients,
            weights,
            columns if batched else [c[0] for c in columns],
            retain_graph=True,
            is_grads_batched=batched,
        )
        for total, product in zip(sums, found, strict=True):
            width = min(together, total.shape[1] - first)
            total[:, chosen] += product.reshape(width, -1).T


def _explained(error: RuntimeError) -> RuntimeError | ValueError:
    text = str(error)
    if "not have been used in the graph" in text or "does not require grad" in text:
        return ValueError(
            "a weight has no second derivative: the calibration loss does not reach it, is linear in it, or passes "
            f"through an operation whose backward pass cannot be differentiated ({text}); exclude such layers"
        )
    return RuntimeError(
        f"the second derivative failed: {text}. Fused kernels often have none: build the model with "
        "attn_implementation='eager' (transformers), or without flash attention and other custom kernels, for the "
        "calibration"
    )
