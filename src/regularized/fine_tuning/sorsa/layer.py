"""SORSA: an adapter of a weight's own singular triplets, kept orthonormal, for those whose LoRA learns slowly.

The largest r singular triplets of a pretrained weight become the adapter, the rest is frozen, so training starts at the
pretrained function and moves along its strongest directions. A small penalty keeps both sets of singular vectors
orthonormal, so that the values alone carry the scale. Merged at the end, it costs nothing at inference.

    Yang Cao, Zhao Song, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
    Language Models", 2024, arXiv 2409.00055. Official code: github.com/Gunale0926/SORSA at 809cca0 (Apache-2.0).

=========  =======================  ==========================================================================
paper      here                     meaning
=========  =======================  ==========================================================================
U_p        ``left``                 (o, r) left singular vectors B, trained
Sigma_p    ``values``               (r,) singular values S, trained; the diagonal matrix is never built
V_p^T      ``right``                (r, i) right singular vectors A, trained
W_r        ``weight``               (o, i) the frozen residual, W - c (left * values) right
L_reg      ``orthonormal_penalty``  mean of \\|F F^T - I\\|_F over all factors, the norm not squared
gamma      ``gamma``                step size of the penalty, >= 0; its gradient enters as gamma / lr
=========  =======================  ==========================================================================

Here are the layers, for models of any kind; on PEFT they are in :mod:`regularized.fine_tuning.sorsa.peft`. Without the
penalty this is PiSSA in other coordinates: the same functions and the same start, another path.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, between, positive
from regularized.mechanisms.surgery import check_called, match_modules, tied_parameters
from regularized.mechanisms.svd import thin_svd, weight_matrix

__all__ = ["SingularFactors", "SorsaLinear", "inject_sorsa", "merge_sorsa"]

# Shapes: o outputs, i inputs, r rank.


class SingularFactors:
    """What a layer with factors is known by, whatever else it is (a plain layer, a layer of PEFT)."""

    def singular_factors(self) -> Iterable[Tensor]:
        """The trained factors that are to stay orthonormal."""
        raise NotImplementedError

    @property
    def is_merged(self) -> bool:
        """Whether the factors are in the weight at present, so that training would not reach them."""
        raise NotImplementedError


class SorsaLinear(nn.Linear, SingularFactors):
    """A linear layer ``x (weight + c (left * values) right)^T + bias`` of which the three factors are trained.

    Made by :meth:`of` or :func:`inject_sorsa` from a pretrained layer, whose function it has at first. ``weight`` holds
    the frozen residual, so a ``state_dict`` is complete. Training never builds the (o, i) product; without gradient it
    is built where that is cheaper (more than ``o i / (o + i)`` rows), which gives bit for bit what the merged layer
    gives.

    Args:
        in_features: i.
        out_features: o.
        bias: whether there is one. The factors are set by :meth:`of`; the constructor alone makes none.

    Attributes:
        left: (o, r) parameter, float32 at least.
        values: (r,) parameter.
        right: (r, i) parameter.
        weight: (o, i) frozen residual, in the dtype of the original.
        scale: c.

    Raises:
        RuntimeError: called for training while merged.

    Examples:
        >>> layer = SorsaLinear.of(nn.Linear(6, 4), r=2)
        >>> layer(torch.randn(3, 6)).shape, layer.left.shape, layer.values.shape, layer.right.shape
        (torch.Size([3, 4]), torch.Size([4, 2]), torch.Size([2]), torch.Size([2, 6]))
        >>> type(layer.plain()).__name__
        'Linear'
    """

    left: nn.Parameter
    values: nn.Parameter
    right: nn.Parameter

    @classmethod
    @allowed(alpha=positive().or_none("a scale of 1"), dropout=between(0.0, 1.0, "[)"))
    def of(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        niter: int | None = None,
        name: str = "the layer",
    ) -> Self:
        """Split a pretrained layer; it is left as it was, the bias is shared.

        Args:
            linear: the layer.
            r: rank, in [1, min(o, i)].
            alpha: scale c = alpha / r of the factors; default None is c = 1 (official default, "not in the paper").
            dropout: on the input of the factors; default 0 (official default).
            niter: power iterations of a randomised decomposition; default None decomposes exactly.
            name: for errors.

        Raises:
            ValueError: the rank or another setting is out of range, or the weight is not finite.
            TypeError: the weight is quantized.

        Examples:
            >>> layer, x = nn.Linear(6, 4), torch.randn(3, 6)
            >>> torch.allclose(SorsaLinear.of(layer, r=2)(x), layer(x), atol=1e-6)
            True
        """
        original = weight_matrix(linear, name)
        svd = thin_svd(original, rank=r, niter=niter, name=f"the weight of {name}")
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        layer.scale = 1.0 if alpha is None else alpha / r
        layer.dropout = dropout
        layer.bias = linear.bias
        layer.left, layer.values, layer.right = (nn.Parameter(part) for part in svd)
        principal = (svd.left * (layer.scale * svd.values)) @ svd.right
        residual = (original.detach() - principal).to(original.dtype)
        layer.weight = nn.Parameter(residual, requires_grad=False)
        layer.train(linear.training)
        return layer

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.scale: float = 1.0
        self.dropout: float = 0.0
        # While merged: the whole weight. The residual stays, so that unmerging is exact and a state_dict complete.
        self.register_buffer("_whole", None, persistent=False)
        self._whole: Tensor | None

    @property
    def is_merged(self) -> bool:
        """Whether :meth:`merge` was called."""
        return self._whole is not None

    def singular_factors(self) -> tuple[Tensor, Tensor]:
        """``left`` and ``right``."""
        return self.left, self.right

    def whole_weight(self) -> Tensor:
        """(o, i) residual plus factors, in the dtype of the residual."""
        return (self.weight + (self.left * (self.scale * self.values)) @ self.right).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with the one whole weight from now on."""
        self._whole = self.whole_weight()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit."""
        self._whole = None

    def plain(self) -> nn.Linear:
        """An ordinary layer with the whole weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.whole_weight().detach())
        linear.bias = self.bias
        linear.train(self.training)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o).

        Raises:
            RuntimeError: training while merged.
        """
        if self._whole is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("the layer is merged, so training would not reach its factors; call unmerge()")
            return F.linear(x, self._whole, self.bias)
        o, i = self.weight.shape
        if not (torch.is_grad_enabled() or self.training) and x.numel() // i * (o + i) > o * i:
            return F.linear(x, self.whole_weight(), self.bias)
        rest = F.linear(x, self.weight, self.bias)
        inputs = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden = F.linear(inputs.to(self.right.dtype), self.right) * (self.scale * self.values)
        return (rest + F.linear(hidden, self.left)).to(rest.dtype)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, r={len(self.values)}, scale={self.scale}, dropout={self.dropout}"


def inject_sorsa(
    model: nn.Module,
    *,
    r: int,
    target_modules: Iterable[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    niter: int | None = None,
) -> list[str]:
    """Replace linear layers of any model by :class:`SorsaLinear`, in place, and freeze everything else.

    For models of transformers, for GPT-2's Conv1D and for convolutions, and to save the adapter alone, use the same on
    PEFT: :mod:`regularized.fine_tuning.sorsa.peft`. Build the optimizer afterwards.

    Args:
        model: changed in place.
        r: rank; 128 in the authors' runs with 7 B models.
        target_modules: names of layers, or ends of names such as ``"q_proj"``; default every ``nn.Linear``.
        alpha: as in :meth:`SorsaLinear.of`.
        dropout: as there.
        niter: as there.

    Returns:
        Names of the layers.

    Raises:
        ValueError: nothing matches, with close names; a layer was injected before; a layer shares its weight, or its
            weight is read without calling it; or as :meth:`SorsaLinear.of`. The model is left as it was.
        TypeError: a matching layer is not linear, or is quantized.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inject_sorsa(model, r=2, target_modules=["0"])
        ['0']
        >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
        ['0.left', '0.right', '0.values']
    """
    if any(isinstance(module, SingularFactors) for module in model.modules()):
        raise ValueError("the model already has SORSA layers; merge_sorsa(model) first, or start from the plain model")
    chosen = match_modules(model, target_modules)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no layer to split: target_modules is {target_modules!r}")
    check_called(model, chosen)
    tied = {owner for owners in tied_parameters(model).values() for owner in owners}
    layers = {}
    for name, module in chosen.items():  # all of them first, so that an error leaves the model as it was
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is a {type(module).__name__}, not nn.Linear; on PEFT, Conv1D and Conv2d go too")
        if f"{name}.weight" in tied:
            raise ValueError(f"{name} shares its weight with another layer, which would change too; leave it out")
        layers[name] = SorsaLinear.of(module, r=r, alpha=alpha, dropout=dropout, niter=niter, name=name)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def merge_sorsa(model: nn.Module) -> list[str]:
    """Replace each :class:`SorsaLinear` by an ordinary layer with the whole weight, in place.

    Args:
        model: after :func:`inject_sorsa`; one without such layers is left as it is.

    Returns:
        Names of the layers.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_sorsa(model, r=2)
        >>> merge_sorsa(model), type(model[0]).__name__
        (['0'], 'Linear')
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SorsaLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.plain())
    return list(layers)
