"""Weight Compander: one more cheap regularizer for those whose net overfits in spite of weight decay and dropout.

Rinor Cakaj, Jens Mehnert, Bin Yang: *Weight Compander: A Simple Weight Reparameterization for Regularization*, 2023,
arXiv 2306.16993. No official code. Only abstract and introduction were at hand: the function and the starting values
below are unconfirmed, and the function is written so that it can be replaced.

==========  ===================  =====================================================
paper       here                 meaning
==========  ===================  =====================================================
v           ``original``         latent weight, what the optimizer sees
Psi(v)      :func:`compand`      ``a atan(v / b)``, what the layer computes with
a           ``a``                bound: \\|w\\| < a pi / 2
b           ``b``                width: slope a / b at zero; smaller b, stronger effect
==========  ===================  =====================================================

The gradient of a latent weight is that of the weight times ``(a / b) / (1 + (v / b)^2)``: large weights are damped,
small ones leave zero quickly. Learned a and b are ``exp`` of a parameter, since unconstrained ones cross zero and
diverge.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularized.mechanisms.ranges import Choice, allowed, positive
from regularized.mechanisms.surgery import NoEffectWarning, select_modules, tied_parameters
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = [
    "Compander",
    "WeightCompander",
    "compand",
    "compand_inverse",
    "compand_weights",
    "compander_param_groups",
    "load_plain_state_dict",
    "merge_companders",
    "plain_state_dict",
]

Init: TypeAlias = Literal["shrink", "preserve", "clamp"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MARGIN = 1e-3  # distance from the pole of tan at which the inverse is cut off


class _Compand(torch.autograd.Function):
    """``a atan(v / b)`` that keeps v alone: autograd would keep v / b and atan(v / b) too."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        w = v.mul(b.reciprocal()).atan_().mul_(a)
        ctx.save_for_backward(v, a, b, w)  # w is alive anyway: the layer keeps it for its own backward
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_w,) = grads
        v, a, b, w = ctx.saved_tensors
        # dPsi/dv = (a / b) / (1 + (v / b)^2) = 1 / (b / a + v^2 / (a b)): three passes over the weights instead of five
        grad_v = grad_w / torch.addcmul(b / a, v, v * (a * b).reciprocal())
        grad_a = (grad_w * w).sum() / a if ctx.needs_input_grad[1] else None  # dPsi/da = atan(v / b)
        grad_b = -(grad_v * v).sum() / b if ctx.needs_input_grad[2] else None  # dPsi/db = -(v / b) dPsi/dv
        return grad_v if ctx.needs_input_grad[0] else None, grad_a, grad_b


def compand(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """``Psi(v) = a atan(v / b)``, elementwise.

    Args:
        v: latent weights, any shape.
        a: bound divided by pi / 2; positive, a number or a 0-d tensor.
        b: width; positive, a number or a 0-d tensor.

    Returns:
        Weights of the shape of ``v``, between ``-a pi / 2`` and ``a pi / 2``; differentiable in all three.

    Examples:
        >>> compand(torch.tensor([-1e6, 0.0, 1.0]), 1.0, 1.0)
        tensor([-1.5708,  0.0000,  0.7854])
    """
    like = {"dtype": v.dtype, "device": v.device}
    out: Tensor = _Compand.apply(v, torch.as_tensor(a, **like), torch.as_tensor(b, **like))  # type: ignore[no-untyped-call, arg-type]
    return out


def compand_inverse(w: Tensor, a: Tensor | float, b: Tensor | float, *, margin: float = _MARGIN) -> Tensor:
    """``Psi^-1(w) = b tan(w / a)``, computed in float32 at least; ``\\|w / a\\|`` is cut off at ``pi / 2 - margin``.

    Args:
        w: weights, any shape.
        a: bound divided by pi / 2; positive.
        b: width; positive.
        margin: distance from the pole of the tangent; default 1e-3.

    Returns:
        Latent weights of the shape and type of ``w``.

    Examples:
        >>> w = torch.tensor([-0.5, 0.1, 1.2])
        >>> torch.allclose(compand(compand_inverse(w, 1.0, 0.5), 1.0, 0.5), w)
        True
    """
    dtype = torch.promote_types(w.dtype, torch.float32)
    limit = math.pi / 2 - margin
    return (b * torch.tan((w.to(dtype) / a).clamp(-limit, limit))).to(w.dtype)


class Compander(nn.Module):
    """The parametrization ``w = a atan(v / b)``, for ``torch.nn.utils.parametrize``.

    Args:
        a: bound divided by pi / 2, in the unit of the weights; positive.
        b: width, in the unit of the weights; positive.
        learnable: train log a and log b, one pair a tensor; default False, since learned ones undo the restriction
            in our own measurements.

    Raises:
        ValueError: a or b is not a positive finite number.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", Compander(1.0, 1.0))
        >>> bool(layer.weight.abs().max() < math.pi / 2)
        True
    """

    @allowed(a=positive(), b=positive())
    def __init__(self, a: float, b: float, *, learnable: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.learnable = learnable
        if learnable:
            self.log_a: nn.Parameter = nn.Parameter(torch.tensor(math.log(a), dtype=dtype))
            self.log_b: nn.Parameter = nn.Parameter(torch.tensor(math.log(b), dtype=dtype))
        else:
            self.register_buffer("a", torch.tensor(float(a), dtype=dtype))
            self.register_buffer("b", torch.tensor(float(b), dtype=dtype))

    def shape_parameters(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The present a and b as 0-d tensors of the type of ``like``."""
        if self.learnable:
            return self.log_a.exp().to(like.dtype), self.log_b.exp().to(like.dtype)
        a, b = cast("tuple[Tensor, Tensor]", (self.a, self.b))
        return a.to(like.dtype), b.to(like.dtype)

    def forward(self, v: Tensor) -> Tensor:
        """Latent weights to weights, same shape."""
        return compand(v, *self.shape_parameters(v))

    def right_inverse(self, w: Tensor) -> Tensor:
        """Weights to latent weights, same shape; what does not fit under the bound is cut off just below it."""
        a, b = self.shape_parameters(w)
        return compand_inverse(w, a, b).detach()


@allowed(a=positive(), b=positive(), init=Choice("preserve", "clamp", "shrink"))
def compand_weights(
    model: nn.Module,
    *,
    a: float = 2.0,
    b: float = 2.0,
    relative: bool = True,
    learnable: bool = False,
    init: Init = "preserve",
    include: tuple[type[nn.Module], ...] = _LAYERS,
    exclude: Sequence[str] = (),
) -> list[str]:
    """Compand the weight of every linear and convolutional layer of a model, in place.

    Build the optimizer afterwards, with :func:`compander_param_groups`. End with :func:`merge_companders`.

    Args:
        model: the model; biases and normalisation layers stay as they are.
        a: bound of the weights divided by pi / 2. Default 2, ours (the paper's is unconfirmed): no loss on clean labels
            and a gain on noisy ones in our measurements; 1 is stronger, 4 hardly does anything.
        b: width of the linear part; ``a = b`` keeps the slope at zero 1. Default 2, ours.
        relative: a and b are in units of the standard deviation of each weight now (default), or absolute.
        learnable: train a and b of each layer; default False.
        init: ``"preserve"`` (default, for pre-trained weights) solves for latent weights that leave the model's
            function unchanged and refuses weights out of range; ``"clamp"`` does the same but cuts off what is out of
            range; ``"shrink"`` (for fresh weights) takes the weights as latent ones: they start slightly smaller.
        include: layer types.
        exclude: names of submodules to leave out, for example the classifier.

    Returns:
        Names of the companded layers.

    Raises:
        ValueError: a, b or init is not allowed; a layer is already companded, a normalisation layer, not yet
            initialised (lazy), shares its weight with another layer, or has weights out of range under
            ``init="preserve"``.

    Warns:
        NoEffectWarning: no layer matches.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> compand_weights(model, a=4.0, b=4.0, exclude=["2"])
        ['0']
        >>> optimizer = torch.optim.SGD(compander_param_groups(model, weight_decay=5e-4), lr=0.1)
        >>> merge_companders(model)
        ['0']
    """
    if norms := [kind.__name__ for kind in include if issubclass(kind, _NORMS)]:
        raise ValueError(f"include names normalisation layers {norms}: their weight is a gain, leave it as it is")
    layers = list(select_modules(model, include, exclude))
    if not layers:
        warnings.warn(
            f"no layer of {type(model).__name__} is one of {[kind.__name__ for kind in include]}: nothing is companded",
            NoEffectWarning,
            stacklevel=3,
        )
    tied = tied_parameters(model)
    plans = []
    for name, layer in layers:  # look at everything first, so that an error leaves the model as it was
        if _is_companded(layer):
            raise ValueError(f"layer {name!r} is already companded; merge_companders(model) first")
        weight = layer.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; run one batch through the model first")
        if id(weight) in tied:
            raise ValueError(
                f"layer {name!r} shares its weight ({', '.join(tied[id(weight)])}); exclude it, since only one of the "
                "owners would be companded"
            )
        unit = float(cast(Tensor, weight).detach().float().std(correction=0)) if relative else 1.0
        if unit == 0.0:
            raise ValueError(f"layer {name!r} has constant weights, so relative a and b are 0; use relative=False")
        if init == "preserve":
            _check_range(name, cast(Tensor, weight), a * unit)
        plans.append((layer, a * unit, b * unit))
    for layer, bound, width in plans:
        weight = cast(nn.Parameter, layer.weight)
        start = weight.detach().clone()
        compander = Compander(bound, width, learnable=learnable, dtype=torch.promote_types(start.dtype, torch.float32))
        parametrize.register_parametrization(layer, "weight", compander.to(start.device))
        if init == "shrink":
            with torch.no_grad():
                _latent(layer).copy_(start)
    return [name for name, _ in layers]


def compander_param_groups(model: nn.Module, *, weight_decay: float = 0.0, shape_lr: float | None = None) -> list[Any]:
    """Parameter groups for an optimizer: no weight decay on a and b.

    Args:
        model: a model after :func:`compand_weights`.
        weight_decay: decay of everything else; it acts on the latent weights.
        shape_lr: learning rate of a and b, whose gradients are sums over whole tensors; default that of the optimizer.

    Returns:
        One group, or two where a and b are learned.

    Examples:
        >>> model = nn.Linear(8, 2)
        >>> _ = compand_weights(model, learnable=True)
        >>> [len(group["params"]) for group in compander_param_groups(model)]
        [2, 2]
    """
    shapes = _shape_parameters(model)
    chosen = {id(p) for p in shapes}
    groups: list[Any] = [
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": weight_decay}
    ]
    if shapes:
        own: dict[str, Any] = {"params": shapes, "weight_decay": 0.0}
        groups.append(own if shape_lr is None else {**own, "lr": shape_lr})
    return groups


def merge_companders(model: nn.Module) -> list[str]:
    """Replace each companded weight by its value: a plain model with bit for bit the same outputs, in place.

    Args:
        model: a model after :func:`compand_weights`; one without companded layers is left as it is.

    Returns:
        Names of the layers that were merged.

    Examples:
        >>> model = nn.Linear(8, 2)
        >>> _ = compand_weights(model)
        >>> _ = merge_companders(model)
        >>> sorted(model.state_dict())
        ['bias', 'weight']
    """
    merged = []
    for name, layer in model.named_modules():
        if _is_companded(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            merged.append(name)
    return merged


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State of the plain model that :func:`merge_companders` would leave, without changing the model.

    Args:
        model: a model after :func:`compand_weights`.

    Returns:
        A state dictionary that loads into the model without companders.

    Examples:
        >>> model = nn.Linear(8, 2)
        >>> _ = compand_weights(model)
        >>> sorted(plain_state_dict(model))
        ['bias', 'weight']
    """
    layers = {name: layer for name, layer in model.named_modules() if _is_companded(layer)}
    prefixes = tuple(f"{name}.parametrizations.weight." if name else "parametrizations.weight." for name in layers)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes or "\0")}
    for name, layer in layers.items():
        state[f"{name}.weight" if name else "weight"] = cast(Tensor, layer.weight).detach()
    return state


def load_plain_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state of a plain model into a companded one: the latent weights are solved for.

    Args:
        model: a model after :func:`compand_weights`.
        state: state dictionary of the plain model.

    Raises:
        ValueError: a weight is out of the range of its compander.
        RuntimeError: keys or shapes do not fit the plain model.

    Examples:
        >>> plain, companded = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> _ = compand_weights(companded, a=10.0, b=10.0)
        >>> load_plain_state_dict(companded, plain.state_dict())
        >>> torch.allclose(companded.weight, plain.weight)
        True
    """
    layers = {
        f"{name}.weight" if name else "weight": layer for name, layer in model.named_modules() if _is_companded(layer)
    }
    expected = plain_state_dict(model)
    if expected.keys() != state.keys():
        raise RuntimeError(
            f"the state does not fit the plain model: missing {sorted(expected.keys() - state.keys())}, unexpected "
            f"{sorted(state.keys() - expected.keys())}"
        )
    for key, layer in layers.items():
        if state[key].shape != expected[key].shape:
            raise RuntimeError(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}")
        bound, _ = _compander(layer).shape_parameters(state[key])
        _check_range(key, state[key], float(bound))
    own = model.state_dict()
    for key, value in state.items():
        if key in layers:
            with torch.no_grad():
                _latent(layers[key]).copy_(_compander(layers[key]).right_inverse(value.to(_latent(layers[key]).device)))
        else:
            own[key].copy_(value)


class WeightCompander(Term):
    """Weight Compander in the loop: companded before the optimizer is built, merged at the end, no loss of its own.

    Args:
        a: bound of the weights divided by pi / 2; default 2, as in :func:`compand_weights`.
        b: width; default 2.
        relative: a and b in units of the standard deviation of each weight; default True.
        learnable: train a and b; default False.
        init: default ``"preserve"``.
        include: layer types.
        exclude: names of submodules to leave out.
        shape_lr: learning rate of a and b where they are learned; default that of the optimizer.

    Raises:
        ValueError: as :func:`compand_weights`, when the model is attached.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> term = WeightCompander(a=4.0, b=4.0)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    sharding = "forward"

    contributes = False

    def __init__(
        self,
        *,
        a: float = 2.0,
        b: float = 2.0,
        relative: bool = True,
        learnable: bool = False,
        init: Init = "preserve",
        include: tuple[type[nn.Module], ...] = _LAYERS,
        exclude: Iterable[str] = (),
        shape_lr: float | None = None,
    ) -> None:
        super().__init__()
        Compander(a, b)
        self.a = a
        self.b = b
        self.relative = relative
        self.learnable = learnable
        self.init = init
        self.include = include
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.shape_lr = shape_lr

    def attach(self, model: nn.Module) -> None:
        """Compand the layers; a model that already is companded is left as it is."""
        if any(_is_companded(layer) for layer in model.modules()):
            return
        compand_weights(
            model,
            a=self.a,
            b=self.b,
            relative=self.relative,
            learnable=self.learnable,
            init=self.init,
            include=self.include,
            exclude=self.exclude,
        )

    def param_groups(self, model: nn.Module) -> list[Any]:
        """a and b where they are learned: without weight decay, and with their own learning rate."""
        return compander_param_groups(model, shape_lr=self.shape_lr)[1:]

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model."""
        merge_companders(model)

    def forward(self, step: Step) -> Tensor:
        """Nothing is added to the loss."""
        return step.logits.new_zeros(())


def _is_companded(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(p, Compander) for p in cast(Any, layer).parametrizations.weight
    )


def _compander(layer: nn.Module) -> Compander:
    return next(p for p in cast(Any, layer).parametrizations.weight if isinstance(p, Compander))


def _latent(layer: nn.Module) -> Tensor:
    return cast(Tensor, cast(Any, layer).parametrizations.weight.original)


def _shape_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, Compander) for p in module.parameters()]


def _check_range(name: str, weight: Tensor, a: float) -> None:
    largest = float(weight.detach().abs().max())
    if largest >= a * math.pi / 2:
        share = float((weight.detach().abs() >= a * math.pi / 2).double().mean())
        smallest = largest * 2 / math.pi
        raise ValueError(
            f"{share:.2%} of the weights of {name!r} are out of range: |w| must be below a pi / 2 = "
            f"{a * math.pi / 2:.4g}, the largest is {largest:.4g}. The smallest valid a is {smallest:.4g} "
            f"({smallest / a:.4g} times the present one); or use init='clamp', or init='shrink' for fresh weights"
        )
