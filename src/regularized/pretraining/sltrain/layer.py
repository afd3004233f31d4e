"""SLTrain: a linear layer whose weight is a thin product and a few free entries, for pretraining from scratch.

Each layer stores two thin factors and a small share of entries at positions that are drawn once and never move.
Parameters, gradients and the optimizer's moments shrink with them; the thin product alone trains to a far worse loss.

    Han, Li, Huang, Hong, Takeda, Jawanpuria, Mishra, "SLTrain: a sparse plus low-rank approach for parameter and memory
    efficient pretraining", NeurIPS 2024, arXiv 2406.02214. Official code: github.com/andyjm3/SLTrain (Apache-2.0).

=========  ===============  ==========================================================================
paper      here             meaning
=========  ===============  ==========================================================================
W          ``weight``       (o, i) ``scale * left @ right``, with ``values`` added at ``positions``
B          ``left``         (o, r) zero at the start, where there are entries
A          ``right``        (r, i) uniform to 1 / sqrt(i) at the start
v          ``values``       (k,) uniform to 1 / sqrt(i) at the start, k = floor(delta o i)
idx        ``positions``    (k,) flat positions row * i + column, ascending; a buffer, in the state dict
delta      ``density``      share of the entries that are free
alpha / r  ``scale``        a number; or tanh of a trained number that starts at 1
=========  ===============  ==========================================================================

At the start the weight is its entries alone, since ``left`` is zero. Training and evaluation do the same.

Without entries (a density of 0, which the authors' code refuses) a zero ``left`` would be a start from which a
transformer never moves: all its layers give zero, and so are all gradients. There ``left`` is drawn, too, so that the
entries of the product vary as those of ``nn.Linear`` do.

Weight decay on ``values`` decays these entries of W; on ``left`` and ``right`` it is not the same as decaying their
product. The authors use none.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, count, positive, share
from regularized.mechanisms.svd import thin_svd
from regularized.pretraining.sltrain.product import dense_weight, sparse_low_rank_linear

__all__ = ["SparseLowRankLinear", "num_entries"]

_INT32 = 2**31
_RANK = count(0, remedy="0 leaves the entries alone")
_DENSITY = share("the part of the entries that is free", remedy="0 leaves the factors alone, the authors use 0.03")


def num_entries(outputs: int, inputs: int, *, rank: int, density: float, name: str = "layer") -> int:
    """Free entries of a weight, floor(density * outputs * inputs), after a look at the settings.

    Args:
        outputs: o.
        inputs: i.
        rank: r, see :class:`SparseLowRankLinear`.
        density: delta, see :class:`SparseLowRankLinear`.
        name: of the layer, for messages.

    Raises:
        ValueError: ``rank`` or ``density`` is out of its range, both are 0, or the density gives no entry.

    Examples:
        >>> num_entries(512, 512, rank=128, density=0.03)
        7864
    """
    _RANK(f"rank of layer {name!r}", rank)
    _DENSITY(f"density of layer {name!r}", density)
    if rank == 0 and density == 0:
        raise ValueError(f"layer {name!r}: rank and density are both 0, which leaves no weight; set one of them")
    entries = math.floor(density * outputs * inputs)
    if density and not entries:
        raise ValueError(
            f"layer {name!r}: a density of {density:g} gives no entry of a weight of {outputs} x {inputs}; it needs "
            f"{1 / (outputs * inputs):.3g} or more, or density=0 for the factors alone, or leave this layer out"
        )
    return entries


class SparseLowRankLinear(nn.Module):
    """A drop-in ``nn.Linear`` with a sparse plus low-rank weight.

    Args:
        in_features: i.
        out_features: o.
        bias: whether there is one; default True.
        rank: r. 0 leaves the entries alone: a sparse layer with a fixed random mask. The authors take a quarter of the
            width: 128 for LLaMA 60M, 256 for 130M and 350M, 512 for 1B.
        density: delta, share of the weight's entries that are free. 0 leaves the factors alone. Default 0.03, as in the
            authors' scripts; 0.05 for 7B.
        alpha: the product is multiplied by ``alpha / rank``. Default 16, the authors' for 130M and 350M; 32 for 60M, 8
            for 1B and 7B.
        trained_scale: multiply it by tanh of a trained number instead, which starts at 1; default False.
        generator: decides positions and start, on the processor; default the global one. The same generator gives the
            same positions on every process and every device.
        device: of the parameters.
        dtype: of the parameters.
        name: of the layer, for messages.

    Attributes:
        left: (o, r) parameter, or None.
        right: (r, i) parameter, or None.
        values: (k,) parameter, or None.
        positions: (k,) buffer, or None: int32 where o * i < 2^31, which halves what positions cost, else int64.
        bias: (o,) parameter, or None.

    Raises:
        ValueError: a setting is out of its range, see :func:`num_entries`.

    Warns:
        UserWarning: the layer has as many trained numbers as a dense one, or more.

    Examples:
        >>> layer = SparseLowRankLinear(64, 48, rank=8, density=0.03, alpha=16)
        >>> layer(torch.zeros(5, 64)).shape, layer.weight.shape
        (torch.Size([5, 48]), torch.Size([48, 64]))
        >>> sum(p.numel() for p in layer.parameters())  # 8 (64 + 48) + 92 + 48
        1036
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    values: nn.Parameter | None
    positions: Tensor | None
    bias: nn.Parameter | None
    trained_scale: nn.Parameter | None

    @allowed(alpha=positive())
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 16.0,
        trained_scale: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "layer",
    ) -> None:
        super().__init__()
        entries = num_entries(out_features, in_features, rank=rank, density=density, name=name)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.density = density
        self.alpha = alpha

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.register_parameter("left", empty(out_features, rank) if rank else None)
        self.register_parameter("right", empty(rank, in_features) if rank else None)
        self.register_parameter("values", empty(entries) if entries else None)
        self.register_parameter("bias", empty(out_features) if bias else None)
        self.register_parameter("trained_scale", empty(1) if trained_scale and rank else None)
        index = torch.int32 if out_features * in_features < _INT32 else torch.int64
        self.register_buffer("positions", torch.empty(entries, device=device, dtype=index) if entries else None)
        self.reset_parameters(generator)
        numbers, dense = rank * (in_features + out_features) + entries, in_features * out_features
        if numbers >= dense:
            warnings.warn(
                f"layer {name!r} of {out_features} x {in_features} has {numbers:,} trained numbers with rank={rank} "
                f"and density={density:g}, a dense one {dense:,}: nothing is saved; lower them, or leave it dense",
                stacklevel=3,
            )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw positions and start anew, also after ``to_empty`` has given a layer of the meta device its memory.

        Args:
            generator: on the processor; default the global one.
        """
        if self.positions is not None and not self.positions.is_meta:
            drawn = torch.randperm(
                self.out_features * self.in_features, generator=generator, dtype=self.positions.dtype
            )
            self.positions.copy_(drawn[: len(self.positions)].sort().values)
        for parameter in (self.right, self.values):
            if parameter is not None:
                _uniform_(parameter, 1 / math.sqrt(self.in_features), generator)
        if self.trained_scale is not None:
            self.trained_scale.fill_(1.0)
        if self.left is not None:
            if self.values is not None:
                self.left.zero_()
            elif not self.left.is_meta:
                _uniform_(self.left, math.sqrt(3 / self.rank) / float(self.scale), generator)
        if self.bias is not None:
            # Outputs, as in the authors' code; nn.Linear takes the inputs.
            _uniform_(self.bias, 1 / math.sqrt(self.out_features), generator)

    @property
    def scale(self) -> Tensor | float:
        """What the product of the factors is multiplied by."""
        if self.trained_scale is not None:
            return self.trained_scale.tanh()
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def weight(self) -> Tensor:
        """(o, i) the weight as it acts now, built at each call, for code that reads it instead of calling the layer."""
        return dense_weight(self.shape, self.left, self.right, self.values, self.positions, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return sparse_low_rank_linear(
            x, self.shape, self.left, self.right, self.values, self.positions, self.bias, self.scale
        )

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> float:
        """Come near a dense weight: its best approximation of rank r, and at the positions what that lacks.

        The layer is made for training from scratch; this is for a dense weight that is there already.

        Args:
            weight: (o, i).

        Returns:
            What is missing, relative to the weight (Frobenius norms).

        Raises:
            ValueError: another shape, or a scale of 0.

        Examples:
            >>> layer = SparseLowRankLinear(64, 48, rank=8)
            >>> layer.set_weight(torch.ones(48, 64)) < 1e-3
            True
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight must be {self.shape[0]} x {self.shape[1]}, got {tuple(weight.shape)}")
        rest = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.left is not None and self.right is not None:
            scale = float(self.scale)
            if scale == 0.0:
                raise ValueError(
                    "the trained scale is 0, so that factors cannot give a weight; reset_parameters() first"
                )
            svd = thin_svd(rest, rank=min(self.rank, *self.shape))
            root = (svd.values / abs(scale)).sqrt()
            self.left.zero_()[:, : len(root)] = svd.left * root
            self.right.zero_()[: len(root)] = math.copysign(1.0, scale) * root[:, None] * svd.right
            rest = rest - scale * self.left.to(rest.dtype) @ self.right.to(rest.dtype)
        if self.values is not None and self.positions is not None:
            rest = rest.reshape(-1).clone()
            self.values.copy_(rest.index_select(0, self.positions))
            rest.index_fill_(0, self.positions.long(), 0.0)
        return float(rest.norm() / weight.norm())

    def to_linear(self) -> nn.Linear:
        """A plain layer that does the same, of the dense size.

        Examples:
            >>> layer, x = SparseLowRankLinear(64, 48, rank=8), torch.randn(100, 64)
            >>> torch.equal(layer.to_linear()(x), layer(x))
            True
        """
        weight = self.weight.detach()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.detach().clone()))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, density={self.density:g}, "
            + ("trained scale" if self.trained_scale is not None else f"alpha={self.alpha:g}")
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse the state of a dense layer, and positions that cannot be."""
        errors: list[str] = rest[-1]
        if f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix}weight is the weight of a dense layer, and this one is sparse plus low-rank, for training "
                "from scratch; init_from_dense(model, state_dict) comes as near to dense weights as it can"
            )
            return
        positions = state_dict.get(f"{prefix}positions")
        if positions is not None and self.positions is not None and positions.shape == self.positions.shape:
            problem = _impossible(positions, self.out_features * self.in_features)
            if problem:
                errors.append(f"{prefix}positions {problem}: the file is damaged, or of another layer")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Drawn on the processor, so that every device starts alike."""
    if not tensor.is_meta:
        tensor.copy_(torch.empty_like(tensor, device="cpu").uniform_(-bound, bound, generator=generator))


def _impossible(positions: Tensor, entries: int) -> str:
    """Why these are no ascending positions in a weight; empty where they are."""
    if positions.is_meta or not len(positions):
        return ""
    if positions.is_floating_point():
        return f"are {positions.dtype}, not whole numbers"
    if not bool((positions[1:] > positions[:-1]).all()):
        return "are not ascending"
    first, last = int(positions[0]), int(positions[-1])
    return "" if first >= 0 and last < entries else f"go from {first} to {last}, the weight has {entries:,} entries"
