"""SORSA: an adapter of a weight's own singular triplets, kept orthonormal, for those whose LoRA learns slowly.

The largest r singular triplets of a pretrained weight become the adapter, the rest is frozen, so training starts at the
pretrained function and moves along its strongest directions. A small penalty keeps both sets of singular vectors
orthonormal, so that the values alone carry the scale. Merged at the end, it costs nothing at inference.

    Yang Cao, Zhao Song, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
    Language Models", 2024, arXiv 2409.00055. Official code: github.com/Gunale0926/SORSA at 809cca0 (Apache-2.0).

=========  ===============  ==========================================================================
paper      here             meaning
=========  ===============  ==========================================================================
U_p        ``left``         (o, r) left singular vectors B, trained
Sigma_p    ``values``       (r,) singular values S, trained; the diagonal matrix is never built
V_p^T      ``right``        (r, i) right singular vectors A, trained
W_r        ``weight``       (o, i) the frozen residual, W - c (left * values) right
L_reg      :func:`orthonormal_penalty`   mean of \\|F F^T - I\\|_F over all factors, the norm not squared
gamma      ``gamma``        step size of the penalty, >= 0; its gradient enters as gamma / lr
=========  ===============  ==========================================================================

Paper and code differ: the paper sums the penalty over the factors and steps by gamma on its own; the code averages and
adds gamma / (peak lr) times the gradient after clipping, inside AdamW, which renormalises it. We follow the code. Its
trainer divides once more by the number of accumulation steps (64 in the reported runs): ``gamma=4e-4 / 64`` repeats
those. With gamma = 0 it is PiSSA in other coordinates: the same functions and the same start, another path.
"""

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.surgery import check_optimizer_is_current, tied_parameters
from regularized.mechanisms.svd import thin_svd, weight_matrix
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = [
    "OrthonormalPenalty",
    "Sorsa",
    "SorsaLinear",
    "SpectralDrift",
    "inject_sorsa",
    "merge_sorsa",
    "orthonormal_gradient",
    "orthonormal_penalty",
    "spectral_drift",
]

# Shapes: o outputs, i inputs, r rank; a factor is (o, r) or (r, i), and r is its shorter side.

Reduction: TypeAlias = Literal["mean", "sum"]


# -- the penalty --------------------------------------------------------------------------------


def orthonormal_penalty(factors: Sequence[Tensor], *, reduction: Reduction = "mean") -> Tensor:
    """How far the factors are from orthonormal: ``\\|F F^T - I\\|_F``, over all factors; differentiable.

    The product is taken over the shorter side (``B^T B`` of a tall B, ``A A^T`` of a wide A), so the factors of any
    low-rank adapter can be given. For training, :func:`orthonormal_gradient` is the cheaper way.

    Args:
        factors: matrices of any shapes.
        reduction: ``"mean"`` (default, official code) or ``"sum"`` (the paper's, over one layer).

    Returns:
        Scalar >= 0; its gradient is 0 where a factor is exactly orthonormal.

    Examples:
        >>> eye = torch.eye(2, 5)
        >>> orthonormal_penalty([eye, 2 * eye.T])  # 0 and \\|3 I\\|_F = 3 sqrt(2)
        tensor(2.1213)
    """
    _check_reduction(reduction)
    norms = torch.cat([torch.linalg.matrix_norm(defect) for _, _, defect in _defects(factors)])
    return norms.mean() if reduction == "mean" else norms.sum()


@torch.no_grad()
def orthonormal_gradient(
    factors: Sequence[Tensor], *, eps: float = 1e-6, reduction: Reduction = "mean"
) -> list[Tensor]:
    """Gradient of :func:`orthonormal_penalty` in closed form, ``2 (F F^T - I) F / \\|F F^T - I\\|_F`` each.

    Two small products a factor, batched over equal shapes; no graph, no look at values by the host.

    Args:
        factors: matrices of any shapes.
        eps: the gradient is 0 where the defect is at most ``eps sqrt(r)``. The norm has a kink at 0, where training
            starts: there rounding alone decides on the direction of a gradient of unit size. Default 1e-6, the
            rounding of float32; 0 is the official code.
        reduction: as in :func:`orthonormal_penalty`.

    Returns:
        A tensor of the shape of each factor.

    Examples:
        >>> (gradient,) = orthonormal_gradient([2 * torch.eye(2, 3)])  # 2 * 3 I * 2 I / (3 sqrt(2))
        >>> gradient
        tensor([[2.8284, 0.0000, 0.0000],
                [0.0000, 2.8284, 0.0000]])
    """
    _check_reduction(reduction)
    share = 1.0 if reduction == "sum" else 1.0 / max(len(factors), 1)
    gradients: list[Tensor] = [torch.empty(0)] * len(factors)
    for members, stacked, defect in _defects(factors):
        norms = torch.linalg.matrix_norm(defect)
        slope = torch.where(norms > eps * math.sqrt(stacked.shape[-2]), 2.0 * share / norms, 0.0)
        for k, gradient in zip(members, torch.bmm(defect * slope[:, None, None], stacked), strict=True):
            gradients[k] = gradient.mT if _is_tall(factors[k]) else gradient
    return gradients


def _defects(factors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Factors of equal shape together: their places, stacked as (n, r, long side), and ``F F^T - I`` (n, r, r)."""
    if not factors:
        raise ValueError("there are no factors to penalise; give at least one matrix")
    groups: dict[Any, list[int]] = {}
    for k, factor in enumerate(factors):
        if factor.ndim != 2:
            raise ValueError(f"a factor must be a matrix, got shape {tuple(factor.shape)}")
        short, long = sorted(factor.shape)
        groups.setdefault((short, long, factor.dtype, factor.device), []).append(k)
    for (short, _, dtype, device), members in groups.items():
        stacked = torch.stack([factors[k].mT if _is_tall(factors[k]) else factors[k] for k in members])
        with torch.autocast(device.type, enabled=False):  # 1 + 1e-3 is 1 in bfloat16
            defect = torch.bmm(stacked, stacked.mT) - torch.eye(short, dtype=dtype, device=device)
        yield members, stacked, defect


def _is_tall(factor: Tensor) -> bool:
    return factor.shape[0] > factor.shape[1]


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


class SingularFactors:
    """What a layer with factors is known by, whatever else it is (a plain layer, a layer of PEFT)."""

    def singular_factors(self) -> Iterable[Tensor]:
        """The trained factors that are to stay orthonormal."""
        raise NotImplementedError

    @property
    def is_merged(self) -> bool:
        """Whether the factors are in the weight at present, so that training would not reach them."""
        raise NotImplementedError


class OrthonormalPenalty:
    """Adds the penalty's gradient to ``.grad``, once an optimizer step, after clipping and before the step.

    Cost: two Gram matrices and two products of the factors, ``2 r^2 (o + i)`` multiply-adds a layer and step, whatever
    the batch; no second backward pass.

    Args:
        model: a model with SORSA layers (:func:`inject_sorsa`, or PEFT's), or the factors of any other adapter.
        gamma: strength, >= 0; default 4e-4 (the authors' runs). 0 leaves the gradients as they are, bit for bit. Two
            orders more stopped learning in our trial.
        lr: peak learning rate of the optimizer, > 0: the gradient enters as gamma / lr.
        eps: dead zone of :func:`orthonormal_gradient`; default 1e-6.
        reduction: as in :func:`orthonormal_penalty`.
        optimizer: if given, it is checked: it must hold the factors, and should not decay them.

    Raises:
        ValueError: gamma < 0, or lr <= 0 with gamma > 0; no SORSA layer in the model; the optimizer was built before
            the injection.

    Warns:
        UserWarning: the optimizer has weight decay on the factors, which pulls them away from orthonormal.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject_sorsa(model, r=2)
        >>> trained = [p for p in model.parameters() if p.requires_grad]
        >>> optimizer = torch.optim.AdamW(trained, lr=3e-5, weight_decay=0.0)
        >>> penalty = OrthonormalPenalty(model, gamma=4e-4, lr=3e-5, optimizer=optimizer)
        >>> for _ in range(2):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     _ = nn.utils.clip_grad_norm_(trained, 1.0)
        ...     penalty.add_gradient()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        *,
        gamma: float = 4e-4,
        lr: float,
        eps: float = 1e-6,
        reduction: Reduction = "mean",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        _check_gamma(gamma, lr)
        _check_reduction(reduction)
        self.gamma, self.lr, self.eps, self.reduction = gamma, lr, eps, reduction
        self._layers: list[SingularFactors] = []
        self._given: list[Tensor] = []
        if isinstance(model, nn.Module):
            self._layers = [module for module in model.modules() if isinstance(module, SingularFactors)]
            if not self._layers:
                raise ValueError(f"{type(model).__name__} has no SORSA layers; inject them first")
            if optimizer is not None:
                check_optimizer_is_current(model, optimizer)
        else:
            self._given = list(model)
        if optimizer is not None:
            _warn_of_decay(self.factors(), optimizer)

    def factors(self) -> list[Tensor]:
        """The factors at present."""
        return [*self._given, *(factor for layer in self._layers for factor in layer.singular_factors())]

    def value(self) -> Tensor:
        """The penalty at present, without gamma; scalar, differentiable."""
        return orthonormal_penalty(self.factors(), reduction=self.reduction)

    def add_gradient(self, *, gamma: float | None = None, scaler: torch.amp.GradScaler | None = None) -> None:
        """Add ``gamma / lr`` times the gradient of the penalty to the factors' ``.grad``.

        Args:
            gamma: another strength for this step; default that of the constructor.
            scaler: the gradient scaler of fp16 training, if one is in use: checked that it has unscaled.

        Raises:
            RuntimeError: no factor has a gradient (no backward pass yet, or the adapter is frozen); gradients are still
                scaled; the adapter is merged.
        """
        gamma = self.gamma if gamma is None else gamma
        if gamma == 0.0:
            return
        _check_gamma(gamma, self.lr)
        if any(layer.is_merged for layer in self._layers):
            raise RuntimeError("the adapter is merged, so training does not reach its factors; unmerge it first")
        if scaler is not None and scaler.is_enabled() and not _has_unscaled(scaler):
            raise RuntimeError(
                "the gradients are still multiplied by the loss scale, the penalty would vanish beside them; unscale "
                "first: scaler.unscale_(optimizer), then clip, then add_gradient()"
            )
        factors = self.factors()
        held = [k for k, factor in enumerate(factors) if factor.grad is not None]
        if not held:
            raise RuntimeError(
                "no factor has a gradient: call add_gradient() after loss.backward() and before optimizer.step(). If "
                "that is so, the adapter is frozen, or the factors are not part of the loss"
            )
        gradients = orthonormal_gradient(factors, eps=self.eps, reduction=self.reduction)
        grads = [g for k in held if (g := factors[k].grad) is not None]
        torch._foreach_add_(grads, [gradients[k] for k in held], alpha=gamma / self.lr)


def _check_gamma(gamma: float, lr: float) -> None:
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if gamma > 0.0 and not lr > 0.0:
        raise ValueError(f"lr must be the peak learning rate, > 0, since the penalty enters as gamma / lr; got {lr}")


def _has_unscaled(scaler: torch.amp.GradScaler) -> bool:
    stages = [state["stage"].name for state in scaler._per_optimizer_states.values()]
    return "UNSCALED" in stages


def _warn_of_decay(factors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    own = {id(factor) for factor in factors}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0.0) > 0.0 and any(id(p) in own for p in group["params"]):
            warnings.warn(
                f"weight_decay={group['weight_decay']} on singular vectors shrinks them, against the penalty; put the "
                "adapter into a parameter group with weight_decay=0 (the authors use 0)",
                stacklevel=3,
            )
            return


# -- a plain layer ------------------------------------------------------------------------------


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
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be positive, or None for a scale of 1; got {alpha}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
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
        self.scale = 1.0
        self.dropout = 0.0
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
        ValueError: nothing matches, with close names; a layer was injected before; a layer shares its weight; or as
            :meth:`SorsaLinear.of`. The model is left as it was.
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
    ends = None if target_modules is None else tuple(target_modules)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) if ends is None else _ends_with(name, ends))
    }
    if not chosen:
        raise ValueError(_no_match(model, ends))
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


def _ends_with(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _no_match(model: nn.Module, ends: tuple[str, ...] | None) -> str:
    known = sorted({n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)})
    close = sorted({near for end in ends or () for near in difflib.get_close_matches(end, known, n=3, cutoff=0.4)})
    return (
        f"no layer of {type(model).__name__} matches target_modules={list(ends or ())}; "
        f"{'close names' if close else 'its linear layers'}: {close or known[:20]}"
    )


class Sorsa(Term):
    """SORSA in the loop: injected before the optimizer is built, penalised after each clipping, merged at the end.

    Args:
        r: rank.
        lr: peak learning rate of the optimizer.
        gamma: strength of the penalty, a number >= 0 or a schedule; default 4e-4, see :class:`OrthonormalPenalty`.
        target_modules: as in :func:`inject_sorsa`. A model that has SORSA layers already, plain ones or PEFT's, is left
            as it is.
        alpha: as in :func:`inject_sorsa`.
        dropout: as there.

    Raises:
        ValueError: a setting is out of range, here or when the model is attached.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> term = Sorsa(r=2, lr=1e-3)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    contributes = False

    def __init__(
        self,
        *,
        r: int,
        lr: float,
        gamma: Coefficient = 4e-4,
        target_modules: Iterable[str] | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        as_schedule(gamma, name="gamma")
        if not callable(gamma):
            _check_gamma(gamma, lr)
        self.r, self.lr, self.gamma = r, lr, gamma
        self.target_modules = None if target_modules is None else tuple(target_modules)
        self.alpha, self.dropout = alpha, dropout
        self._penalty: OrthonormalPenalty | None = None
        self._injected = False

    def attach(self, model: nn.Module) -> None:
        """Inject, unless the model has its SORSA layers already."""
        if not any(isinstance(module, SingularFactors) for module in model.modules()):
            inject_sorsa(model, r=self.r, target_modules=self.target_modules, alpha=self.alpha, dropout=self.dropout)
            self._injected = True
        self._penalty = OrthonormalPenalty(model, gamma=0.0, lr=self.lr)

    def before_step(self, step: Step) -> None:
        """Add the penalty's gradient."""
        if self._penalty is None:
            raise RuntimeError("Sorsa was not attached; call attach(model) before the optimizer is built")
        self._penalty.add_gradient(gamma=as_schedule(self.gamma, name="gamma")(step.progress))

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model; layers that were there before :meth:`attach` stay."""
        if self._injected:
            merge_sorsa(model)

    def forward(self, step: Step) -> Tensor:
        """Nothing is added to the loss."""
        return step.logits.new_zeros(())


# -- what training did to the spectrum ----------------------------------------------------------


class SpectralDrift(NamedTuple):
    """How far a weight has moved from the pretrained one.

    Attributes:
        values: mean absolute change of the singular values.
        vectors: ``1 - (|<u_t, u_0>| + |<v_t, v_0>|) / 2``, mean over the triplets; 0 unturned, 1 orthogonal.
    """

    values: Tensor
    vectors: Tensor


def spectral_drift(before: Tensor, after: Tensor, *, rank: int | None = None) -> SpectralDrift:
    """Change of singular values and singular vectors, triplet by triplet in descending order.

    Says little where singular values cross or repeat: then triplets are paired that do not belong together.

    Args:
        before: (o, i) pretrained weight.
        after: (o, i) fine-tuned weight.
        rank: look at the leading triplets alone; default all.

    Returns:
        Two scalars, float32 at least.

    Raises:
        ValueError: the shapes differ, or a weight is not finite.

    Examples:
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> spectral_drift(weight, 2 * weight)
        SpectralDrift(values=tensor(2.), vectors=tensor(0.))
    """
    if before.shape != after.shape:
        raise ValueError(f"the two weights must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    old, new = thin_svd(before, rank=rank, name="before"), thin_svd(after, rank=rank, name="after")
    values = (new.values - old.values).abs().mean()
    left = (new.left * old.left).sum(dim=0).abs()
    right = (new.right * old.right).sum(dim=1).abs()
    return SpectralDrift(values, 1.0 - 0.5 * (left + right).mean())
