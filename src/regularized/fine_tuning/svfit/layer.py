"""SVFit: adapters with one number for each singular direction of a weight, an order of magnitude smaller than LoRA's.

Each chosen weight is decomposed once. The singular vectors stay frozen, the singular values are trained: the adapter
can only rescale what the layer already does, along its own directions. Merged back it costs nothing at inference.

    Sun, Wei, Wu, Shi, He, Ma, Xie, Yang, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using
    Singular Values", 2024, arXiv 2409.05926. No official code.

==========  =====================  ======================================================================
paper       here                   meaning
==========  =====================  ======================================================================
W           ``weight``             (o, i) pretrained weight, frozen; a convolution's is (o, i * height * width)
U_r         ``left``               (o, r) its first r left singular vectors, frozen
V_r^T       ``right``              (r, i) its first r right singular vectors, frozen
Sigma_0     ``values``             (r,) its first r singular values, descending
sigma       ``values + shift``     (r,) the trained singular values
==========  =====================  ======================================================================

``W_e + U_r diag(sigma) V_r^T`` (the paper's residual plus the retained part) is ``W + U_r diag(shift) V_r^T``. We train
the shift from 0, which leaves W as it is, is exact at step 0, and is a LoRA of rank r. The one difference is weight
decay, which pulls the shift to 0 instead of sigma; ``decay="sigma"`` gives the paper's form.

Not SVFT (a sparse matrix between the vectors), SVDiff (clamped at zero), SVF (a factor on the values, by reinforcement
learning) or PiSSA (trains the vectors).
"""

from collections.abc import Iterator
from typing import Literal, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from regularized.fine_tuning.svfit.identity import relative_gap
from regularized.fine_tuning.svfit.product import shifted_forward, shifted_weight
from regularized.mechanisms.ranges import Choice, between
from regularized.mechanisms.svd import SVD, thin_svd, weight_like, weight_matrix

__all__ = [
    "Decay",
    "Rank",
    "SVFitLayer",
    "SingularValueShift",
    "SingularValues",
    "check_svfit_settings",
    "svfit_rank",
]

Rank: TypeAlias = int | Literal["full"]
Decay: TypeAlias = Literal["shift", "sigma"]


def svfit_rank(
    values: Tensor,
    rank: Rank | None = None,
    *,
    energy: float | None = None,
    nuclear: float | None = None,
    name: str = "weight",
) -> int:
    """How many singular directions to keep.

    The paper speaks of the top values that hold over 99 % of a matrix's information; what is meant by that we could not
    confirm, so both readings are offered.

    Args:
        values: (k,) all singular values, descending.
        rank: r itself, or ``"full"`` for all k.
        energy: the fewest values whose squares hold this share of the sum of squares, in (0, 1].
        nuclear: the fewest values that hold this share of the sum, in (0, 1].
        name: of the layer, for the message.

    Returns:
        r in [1, k].

    Raises:
        ValueError: not exactly one of the three is given, or it is out of its range.

    Examples:
        >>> values = torch.tensor([3.0, 2.0, 1.0])
        >>> svfit_rank(values, "full"), svfit_rank(values, energy=0.9), svfit_rank(values, nuclear=0.9)
        (3, 2, 3)
    """
    check_svfit_settings(rank, energy=energy, nuclear=nuclear)
    if rank == "full":
        return len(values)
    if rank is not None:
        if rank > len(values):
            raise ValueError(
                f"layer {name!r}: rank must be at most {len(values)}, the smaller side of the weight, got {rank}; "
                'rank="full" takes all'
            )
        return rank
    share, kept = (energy, values.double().square()) if energy is not None else (nuclear, values.double())
    held = kept.cumsum(0)
    # An entry counts as there when only rounding is lacking, so that 1.0 never asks for more than there is.
    return min(int((held < held[-1] * (cast(float, share) - 1e-12)).sum()) + 1, len(values))


_INFORMATION = between(0.0, 1.0, "(]", "a share of the weight's information").or_none()
_DECAY = Choice("shift", "sigma", meaning="what weight decay pulls to 0")


def check_svfit_settings(
    rank: Rank | None = None, *, energy: float | None = None, nuclear: float | None = None, decay: str = "shift"
) -> None:
    """Refuse settings that fit no weight at all.

    Args:
        rank: see :func:`svfit_rank`.
        energy: see :func:`svfit_rank`.
        nuclear: see :func:`svfit_rank`.
        decay: ``"shift"`` or ``"sigma"``.

    Raises:
        ValueError: one of them is out of its range, or not exactly one of the first three is given.

    Examples:
        >>> check_svfit_settings("full", decay="sigma")
    """
    given = {k: v for k, v in (("rank", rank), ("energy", energy), ("nuclear", nuclear)) if v is not None}
    if len(given) != 1:
        raise ValueError(f'give one of rank (an int or "full"), energy and nuclear; got {given or "none"}')
    if rank is not None and rank != "full" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f'rank must be an int of at least 1, or "full", got {rank!r}')
    for which, share in (("energy", energy), ("nuclear", nuclear)):
        _INFORMATION(which, share)
    _DECAY("decay", decay)


class SingularValues:
    """Marks modules that train singular values, so that an optimizer can be given settings for them."""

    def trained_values(self) -> Iterator[tuple[nn.Parameter, Decay]]:
        """The trained parameters, and what weight decay pulls to 0 in them."""
        raise NotImplementedError


class SingularValueShift(nn.Module, SingularValues):
    """The singular values of one weight, trained; its singular vectors, frozen. A parametrization of the weight.

    :class:`SVFitLayer` does the same with a forward pass that is cheaper for few directions; this form works wherever a
    parametrization does, for instance on attention that reads its weights directly. Make it with :meth:`of`.

    Args:
        svd: the retained directions: left (o, r), values (r,), right (r, i); copied.
        decay: what the parameter is: ``"shift"`` (default) starts at 0; ``"sigma"``, the paper's form, at the singular
            values. They differ under weight decay only.
        gap: relative step of the singular values at the cut, see
            :func:`~regularized.fine_tuning.svfit.identity.relative_gap`; default 0, not known.
        dtype: of the singular vectors; default theirs. The values stay as they are, float32 or wider.

    Attributes:
        left: (o, r) buffer.
        right: (r, i) buffer.
        values: (r,) buffer, the singular values at the start.
        trained: (r,) parameter.

    Raises:
        ValueError: ``decay`` is something else; by :meth:`of`, a setting is out of range, the weight is not finite, or
            has more than two dimensions without ``reshape``.
        TypeError: by :meth:`of`, the weight is quantised.

    Examples:
        >>> layer = nn.Linear(6, 4).requires_grad_(False)
        >>> shift = SingularValueShift.of(layer.weight, rank=2)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", shift)
        >>> [p.shape for p in layer.parameters() if p.requires_grad]
        [torch.Size([2])]
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def __init__(self, svd: SVD, *, decay: Decay = "shift", gap: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_svfit_settings("full", decay=decay)
        self.decay: Decay = decay
        self.gap = gap
        # Copies: slices would keep the whole decomposition alive.
        self.register_buffer("left", svd.left.to(dtype, copy=True).contiguous())
        self.register_buffer("right", svd.right.to(dtype, copy=True).contiguous())
        self.register_buffer("values", svd.values.clone())
        self.trained: nn.Parameter = nn.Parameter(
            svd.values.clone() if decay == "sigma" else torch.zeros_like(svd.values)
        )

    @classmethod
    def of(
        cls,
        weight: Tensor,
        rank: Rank | None = None,
        *,
        energy: float | None = None,
        nuclear: float | None = None,
        decay: Decay = "shift",
        reshape: bool = False,
        name: str = "weight",
    ) -> Self:
        """Decompose a weight, which stays as it is.

        Args:
            weight: (o, i) W; more dimensions with ``reshape``.
            rank: number r of directions from the top, or ``"full"``, the default: it fits the paper's count of
                parameters.
            energy: see :func:`svfit_rank`, instead of a rank.
            nuclear: see :func:`svfit_rank`, instead of a rank.
            decay: see the class.
            reshape: take a weight of more dimensions, a convolution's, as (o, everything else).
            name: of the layer, for messages.
        """
        rank = default_rank(rank, energy, nuclear)
        check_svfit_settings(rank, energy=energy, nuclear=nuclear, decay=decay)
        if weight.ndim != 2 and not (reshape and weight.ndim > 2):
            raise ValueError(
                f"{name!r} has shape {tuple(weight.shape)}; singular values are of a matrix. With reshape=True a "
                "convolution's weight is taken as (outputs, everything else)"
            )
        if not weight.is_floating_point():
            raise TypeError(
                f"{name!r} is quantised ({weight.dtype}) and cannot be decomposed; give its dequantised matrix"
            )
        svd = thin_svd(weight.flatten(1), name=name)
        r = svfit_rank(svd.values, rank, energy=energy, nuclear=nuclear, name=name)
        kept = SVD(svd.left[:, :r], svd.values[:r], svd.right[:r])
        return cls(kept, decay=decay, gap=relative_gap(svd.values, r), dtype=weight.dtype)

    @property
    def shift(self) -> Tensor:
        """(r,) what is added to the singular values."""
        return self.trained - self.values if self.decay == "sigma" else self.trained

    def trained_values(self) -> Iterator[tuple[nn.Parameter, Decay]]:
        """The one parameter."""
        yield self.trained, self.decay

    @torch.no_grad()
    def set_shift(self, shift: Tensor) -> None:
        """Take over a shift, (r,)."""
        self.trained.copy_(shift + self.values if self.decay == "sigma" else shift)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its singular values shifted, in its own shape."""
        return shifted_weight(weight.flatten(1), self.left, self.shift, self.right).view_as(weight)

    def lora(self) -> tuple[Tensor, Tensor]:
        """The same as a LoRA of scale 1: A (r, i) and B (o, r) with ``B A = U diag(shift) V^T``."""
        shift = self.shift.detach()
        return self.right.to(shift.dtype), self.left.to(shift.dtype) * shift

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"outputs={len(self.left)}, inputs={self.right.shape[1]}, rank={len(self.values)}, decay={self.decay!r}"


class SVFitLayer(nn.Module):
    """A layer whose singular values are trained, and nothing else of it. Make it with :meth:`of`.

    Of the two forms of the product the cheaper one is chosen at each call, see
    :func:`~regularized.fine_tuning.svfit.folding_pays`. ``r (o + i)`` frozen numbers are kept beside the
    weight: for all directions of a square layer twice its size.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D`` or ``nn.Conv2d`` without groups; frozen here.
        directions: of its weight.

    Raises:
        ValueError: by :meth:`of`, a setting is out of range, the layer has groups, is adapted already, or has a forward
            pass of its own; a quantised layer with ``decay="sigma"``.
        TypeError: by :meth:`of`, another kind of layer, or a quantised one without ``weight``.

    Examples:
        >>> layer = SVFitLayer.of(nn.Linear(6, 4), rank=2)
        >>> x = torch.randn(3, 6)
        >>> torch.equal(layer(x), layer.base_layer(x))
        True
    """

    def __init__(self, base_layer: nn.Module, directions: SingularValueShift) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer.requires_grad_(False)
        self.directions = directions

    @classmethod
    def of(
        cls,
        base_layer: nn.Module,
        rank: Rank | None = None,
        *,
        energy: float | None = None,
        nuclear: float | None = None,
        decay: Decay = "shift",
        weight: Tensor | None = None,
        name: str = "layer",
    ) -> Self:
        """Decompose the weight of a layer.

        Args:
            base_layer: see the class.
            rank: see :meth:`SingularValueShift.of`.
            energy: see :func:`svfit_rank`.
            nuclear: see :func:`svfit_rank`.
            decay: see :class:`SingularValueShift`.
            weight: the (o, i) matrix to decompose, where the layer's own is quantised: its dequantised weight.
            name: of the layer, for messages.
        """
        d = directions_of(base_layer, rank, energy=energy, nuclear=nuclear, decay=decay, weight=weight, name=name)
        return cls(base_layer, d)

    def forward(self, x: Tensor) -> Tensor:
        """What the base layer gives with shifted singular values."""
        d = self.directions
        return shifted_forward(self.base_layer, x, d.left, d.shift, d.right)

    @property
    def weight(self) -> Tensor:
        """The weight as it acts now, for code that reads it instead of calling the layer."""
        return weight_like(self.base_layer, self.directions(weight_matrix(self.base_layer)))

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return cast("Tensor | None", self.base_layer.bias)

    def merged(self) -> nn.Module:
        """The base layer with the shifted weight in it; a weight shared with another layer is shared no longer."""
        with torch.no_grad():
            self.base_layer.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        return self.base_layer


def directions_of(
    layer: nn.Module,
    rank: Rank | None = None,
    *,
    energy: float | None = None,
    nuclear: float | None = None,
    decay: Decay = "shift",
    weight: Tensor | None = None,
    name: str = "layer",
) -> SingularValueShift:
    """The directions of a layer, which stays as it is; arguments and errors as for :meth:`SVFitLayer.of`."""
    check_adaptable(layer, name)
    if weight is None:
        weight = weight_matrix(layer, f"layer {name!r}")
    elif decay == "sigma" and not cast(Tensor, layer.weight).is_floating_point():
        raise ValueError(
            f"layer {name!r} is quantised: the residual weight of decay='sigma' cannot be formed from it; use "
            "decay='shift', which leaves the weight as it is"
        )
    return SingularValueShift.of(weight, rank, energy=energy, nuclear=nuclear, decay=decay, name=name)


def default_rank(rank: Rank | None, energy: float | None, nuclear: float | None) -> Rank | None:
    """``"full"`` where nothing is asked for."""
    return "full" if rank is None and energy is None and nuclear is None else rank


def check_adaptable(layer: nn.Module, name: str) -> None:
    """Refuse layers that are adapted already, and those whose forward pass is not the plain product with the weight."""
    if isinstance(layer, SVFitLayer):
        raise ValueError(f"layer {name!r} is adapted already; merge_svfit(model) or unload_svfit(model) first")
    for kind in (nn.Linear, nn.Conv2d):
        # Quantised layers are subclasses, and answer for their own product.
        plain = type(layer).forward is kind.forward or not cast(Tensor, layer.weight).is_floating_point()
        if isinstance(layer, kind) and not plain:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} with a forward pass of its own, which the adapter would "
                f"bypass; replace it by a plain {kind.__name__}, or parametrize its weight with SingularValueShift"
            )
