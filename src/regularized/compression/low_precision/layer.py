"""A linear layer whose three products have formats of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regularized.compression.low_precision.blocks import Scaled
from regularized.compression.low_precision.delayed import AmaxHistory, Delayed
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.hadamard import hadamard, random_signs
from regularized.compression.low_precision.products import hardware_product, why_not_hardware
from regularized.compression.low_precision.recipe import Operand, Product, Recipe
from regularized.compression.low_precision.rounding import RandomStream, Rounder

__all__ = ["LowPrecisionLinear", "Observation", "Observer"]

ProductName: TypeAlias = Literal["forward", "input_gradient", "weight_gradient"]
Side: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What an observer is shown: an operand on its way into a product.

    Args:
        product: ``"forward"``, ``"input_gradient"`` or ``"weight_gradient"``.
        side: ``"left"`` or ``"right"``.
        before: float32, after its rotation where there is one.
        after: what the product gets.
        limit: the largest magnitude that each value's block could hold.
        form: the format.
    """

    product: str
    side: str
    before: Tensor
    after: Tensor
    limit: Tensor | float
    form: Format


Observer: TypeAlias = Callable[["LowPrecisionLinear", Observation], None]


class LowPrecisionLinear(nn.Linear):
    """``nn.Linear`` with the same parameters under the same names, and products by a recipe.

    Its state holds, beside the parameters, ``draws`` where the recipe draws numbers (how many it has drawn: a run that
    goes on from there draws what it would have drawn), and the histories of delayed scaling. In evaluation mode the
    formats are those of training; what is stochastic is rounded to nearest and histories stay as they are.

    The arithmetic is float32 (float64 for float64), and the output has the type of the input; autocast changes neither.

    Args:
        in_features: as in ``nn.Linear``.
        out_features: as there.
        bias: as there; added in full precision.
        recipe: the formats.
        seed: of its draws.
        key: tells its draws from those of other layers of the same seed.
        device: as there.
        dtype: as there.

    Raises:
        ValueError: (in a pass) the recipe asks for the kernels of hardware that this device does not have.

    Examples:
        >>> from regularized.compression.low_precision.recipe import RECIPES
        >>> layer = LowPrecisionLinear(32, 8, recipe=RECIPES["mxfp8"])
        >>> layer(torch.randn(4, 32)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([8, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe,
        seed: int = 0,
        key: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = recipe
        self.stream: RandomStream = RandomStream(seed, key=key)
        self.observer: Observer | None = None
        self.histories: nn.ModuleDict = nn.ModuleDict(
            {
                f"{name}_{side}": AmaxHistory(operand.form)
                for name, product in recipe.products.items()
                for side, operand in (("left", product.left), ("right", product.right))
                if isinstance(operand.form, Delayed) and self._first_with(name, side, operand) == (name, side)
            }
        )

    def _first_with(self, name: str, side: str, operand: Operand) -> tuple[str, str]:
        """The first product in which the same tensor has the same format: they share a rounding, and a history."""
        twin = {
            ("input_gradient", "right"): ("forward", "right"),
            ("weight_gradient", "right"): ("forward", "left"),
            ("weight_gradient", "left"): ("input_gradient", "left"),
        }.get((name, side))
        if twin is None:
            return name, side
        return twin if getattr(self.recipe.products[twin[0]], twin[1]) == operand else (name, side)

    @classmethod
    def of(cls, linear: nn.Linear, recipe: Recipe, *, seed: int = 0, key: int = 0) -> "LowPrecisionLinear":
        """The layer with the parameters of another one: the same objects, not copies.

        Args:
            linear: any ``nn.Linear``.
            recipe: the formats.
            seed: of its draws.
            key: as in the class.
        """
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, recipe=recipe, seed=seed, key=key, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.histories.to_empty(device=linear.weight.device)
        for amax in layer.histories.buffers():
            amax.zero_()
        layer.train(linear.training)
        return layer

    def plain(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.bias = self.bias
        linear.train(self.training)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type of ``x``."""
        if self.recipe.is_full:
            return F.linear(x, self.weight, self.bias)
        return cast(Tensor, _ThreeProducts.apply(x, self.weight, self.bias, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The sizes and the recipe."""
        return f"{super().extra_repr()}, recipe={self.recipe.name!r}"

    # -- one operand -------------------------------------------------------------------------------

    def rounded(self, name: ProductName, side: Side, x: Tensor, axis: int) -> Tensor:
        """What an operand becomes before its product: its values in the recipe's format, float32.

        Args:
            name: of the product.
            side: of the operand.
            x: (n, m).
            axis: the one that the product sums over.
        """
        operand: Operand = getattr(self.recipe.products[name], side)
        x = _working(x)
        if operand.form is None:
            return x
        if isinstance(operand.form, Delayed):
            history = cast(AmaxHistory, self.histories["_".join(self._first_with(name, side, operand))])
            limit = history.limit
            after: Tensor = history(x, self._rounder(operand, x.device))
            self._show(name, side, x, after, limit, operand.form)
            return after
        values = operand.form.rounded(x, self._rounder(operand, x.device), axis=axis)
        if self.observer is not None:
            self._show(name, side, x, values, operand.form.limit(x, axis=axis), operand.form)
        return values

    def _show(self, name: str, side: str, x: Tensor, after: Tensor, limit: Tensor | float, form: Format) -> None:
        if self.observer is not None:
            self.observer(self, Observation(name, side, x, after, limit, form))

    def _rounder(self, operand: Operand, device: torch.device) -> Rounder:
        if operand.rounding != "stochastic":
            return Rounder(operand.rounding, operand.overflow)
        if not self.training:
            return Rounder("nearest_even", operand.overflow)
        return Rounder("stochastic", operand.overflow, self.stream.next(device))

    def rotated(self, product: Product, left: Tensor, right: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Both operands rotated along the axis that is summed over, where the product asks for it."""
        if product.rotation is None:
            return left, right
        signs = None
        if product.rotation == "random" and self.training:
            signs = random_signs(product.rotation_block, self.stream.next(left.device))
        one, other = (
            hadamard(_working(x), block=product.rotation_block, axis=axis, signs=signs)
            for x, axis in zip((left, right), axes)
        )
        return one, other

    def product(self, name: ProductName, left: Tensor, right: Tensor) -> Tensor:
        """left right of two operands that are rounded."""
        accumulator = self.recipe.products[name].accumulator
        return left @ right if accumulator is None else accumulator.product(left, right)

    def hardware(self, name: ProductName, left: Tensor, right: Tensor) -> Tensor:
        """left right^T by the device's kernel, the operands not rounded yet."""
        product = self.recipe.products[name]
        reason = why_not_hardware(product.left.form, product.right.form, left.device)
        if product.rotation is not None or product.accumulator is not None:
            reason = "it is rotated or has an accumulator of its own"
        elif any((o.rounding, o.overflow) != ("nearest_even", "saturate") for o in (product.left, product.right)):
            reason = "an operand is not rounded to the nearest and saturated"
        if reason:
            raise ValueError(
                f"the {name} product of recipe {self.recipe.name!r} cannot run on this device's own kernels: {reason}. "
                "Use hardware=False to emulate it"
            )
        forms = cast(Scaled, product.left.form), cast(Scaled, product.right.form)
        return hardware_product(left.float().contiguous(), forms[0], right.float().contiguous(), forms[1])

    # -- state -------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.recipe.is_random:
            destination[prefix + "draws"] = torch.tensor(self.stream.position)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.recipe.is_random:
            draws = state_dict.get(prefix + "draws")
            if draws is None:
                args[2].append(prefix + "draws")  # the missing keys
            else:
                self.stream.seek(int(draws))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.recipe.is_random and prefix + "draws" in args[3]:
            args[3].remove(prefix + "draws")  # the unexpected keys


class _ThreeProducts(torch.autograd.Function):
    """The layer's forward and backward pass; nothing is kept for the backward pass that it does not read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: LowPrecisionLinear) -> Tensor:
        """(..., in) to (..., out)."""
        recipe = layer.recipe
        rows = x.reshape(-1, x.shape[-1])
        kept_x, kept_w = rows, weight
        with torch.autocast(x.device.type, enabled=False):
            if recipe.hardware:
                y = layer.hardware("forward", rows, weight)
            else:
                one, other = layer.rotated(recipe.forward, rows, weight, (-1, -1))
                left = layer.rounded("forward", "left", one, -1)
                right = layer.rounded("forward", "right", other, -1)
                y = layer.product("forward", left, right.T)
                if _serves(recipe.forward, recipe.weight_gradient, "left"):
                    kept_x = left
                if _serves(recipe.forward, recipe.input_gradient, "right"):
                    kept_w = right
            if bias is not None:
                y += bias
        ctx.save_for_backward(kept_x, kept_w)
        ctx.layer, ctx.shape, ctx.types = layer, x.shape, (x.dtype, weight.dtype, bias is not None)
        ctx.serves = kept_x is not rows, kept_w is not weight
        return y.to(x.dtype).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of input, weight and bias."""
        layer: LowPrecisionLinear = ctx.layer
        recipe = layer.recipe
        x, w = ctx.saved_tensors
        x_is_rounded, w_is_rounded = ctx.serves
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = dw = db = None
        left: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if recipe.hardware:
                dx = layer.hardware("input_gradient", g, w.T)
            else:
                one, other = layer.rotated(recipe.input_gradient, g, w, (-1, 0))
                left = layer.rounded("input_gradient", "left", one, -1)
                right = other if w_is_rounded else layer.rounded("input_gradient", "right", other, 0)
                dx = layer.product("input_gradient", left, right)
            dx = dx.to(ctx.types[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if recipe.hardware:
                dw = layer.hardware("weight_gradient", g.T, x.T)
            else:
                one, other = layer.rotated(recipe.weight_gradient, g, x, (0, 0))
                shared = left is not None and _same_rounding(recipe.input_gradient, recipe.weight_gradient)
                first = left if shared else layer.rounded("weight_gradient", "left", one, 0)
                second = other if x_is_rounded else layer.rounded("weight_gradient", "right", other, 0)
                assert first is not None
                dw = layer.product("weight_gradient", first.T, second)
            dw = dw.to(ctx.types[1])
        if ctx.types[2] and ctx.needs_input_grad[2]:
            db = g.sum(0).to(ctx.types[1])
        return dx, dw, db, None


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def _serves(forward: Product, other: Product, side: Side) -> bool:
    """Whether the values of a forward operand serve a later product, too: its right operand, along another axis."""
    mine: Operand = getattr(forward, side)
    if other.right.reuse:
        return mine.form is not None
    shared = mine.form is not None and mine == other.right and not mine.form.needs_axis
    return shared and forward.rotation is None and other.rotation is None


def _same_rounding(one: Product, other: Product) -> bool:
    """Whether the output's gradient, rounded for one product, serves the other."""
    form = one.left.form
    return (
        one.left == other.left
        and one.rotation is None
        and other.rotation is None
        and (form is None or not form.needs_axis)
    )
