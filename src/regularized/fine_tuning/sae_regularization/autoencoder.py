"""A top-k sparse autoencoder: splits embeddings into features that can be named, without labels.

Wu, Yu, Zhai, Liu, "Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification", KDD 2025,
arXiv 2502.14133, sections on pre-training and task fine-tuning. Official code: JacksonWuxs/SelfReg-... at 60f3c07
(Apache-2.0).

=============  =========================  ====================================================================
paper          here                       meaning
=============  =========================  ====================================================================
W              ``encoder`` (C, d)         rows are feature directions; with tied weights the decoder too
b_e, b_d       ``encoder_bias``, ...      (C,) and (d,); b_d is subtracted from the input and added to the output
pre(x)         ``preactivations``         (x - b_d) W + b_e, shape (B, C)
a              ``codes``                  relu of the k largest pre-activations of a row; the others are 0
x_hat          ``reconstruction``         a W^T + b_d
nmse           ``normalized_error``       mean (x_hat - x)^2 / mean x^2 of each row; 0 perfect, 1 for x_hat = 0
=============  =========================  ====================================================================

Only k of C features take part in a row, so decoder and gradients touch k rows of the weights: a training step costs the
encoder's dense product and little else.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, between, count

__all__ = ["SparseCodes", "TopKSAE", "normalized_error", "usable_rows"]

# Shapes: B rows of a batch, d width of an embedding, C features, k features of a row.

_TINY = 1e-12  # below this a mean square counts as zero: the sheet's clamp, far under any embedding's


class SparseCodes(NamedTuple):
    """The k features that take part in each row.

    Attributes:
        values: (B, k) their values.
        features: (B, k) int64, which features they are.
    """

    values: Tensor
    features: Tensor


def normalized_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each row, as a share of the row's own mean square.

    Args:
        reconstruction: (B, d).
        target: (B, d).

    Returns:
        (B,) values >= 0: 0 for a perfect reconstruction, 1 for a reconstruction of zeros.

    Examples:
        >>> x = torch.randn(3, 8)
        >>> normalized_error(torch.zeros_like(x), x)
        tensor([1., 1., 1.])
    """
    error = (reconstruction - target).float() if target.dtype is torch.float16 else reconstruction - target
    return error.square().mean(dim=-1) / target.square().mean(dim=-1).clamp(min=_TINY)


def usable_rows(activations: Tensor) -> Tensor:
    """The rows that are finite; looks at all of them once, so call it before training and not in it.

    Args:
        activations: (N, d) embeddings.

    Returns:
        (M, d) the finite rows, the same tensor where all are.

    Raises:
        ValueError: the shape is not (N, d), or no row is finite.

    Warns:
        UserWarning: rows were left out, or rows are zero (their reconstruction error is bounded, not meaningful).

    Examples:
        >>> rows = torch.ones(3, 2)
        >>> usable_rows(rows) is rows
        True
    """
    if activations.ndim != 2 or not activations.is_floating_point():
        raise ValueError(f"activations must be floats (N, d), got {activations.dtype} {tuple(activations.shape)}")
    finite = torch.isfinite(activations).all(dim=1)
    lost = len(activations) - int(finite.sum())
    if lost == len(activations):
        raise ValueError(f"none of the {lost} rows is finite; look at how the embeddings were made")
    if lost:
        warnings.warn(f"{lost} of {len(activations)} rows are not finite and are left out", stacklevel=3)
        activations = activations[finite]
    zero = int((activations.square().mean(dim=1) <= _TINY).sum())
    if zero:
        warnings.warn(
            f"{zero} of {len(activations)} rows have zero norm; their normalised error is divided by {_TINY:g}, not by "
            "0. Leave them out unless they mean something",
            stacklevel=3,
        )
    return activations


class _ChosenProducts(torch.autograd.Function):
    """``<x_b, W_j>`` for the k chosen j of each row, of known value; the gradient touches the chosen rows alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, index = ctx.saved_tensors
        # m_b = sum_j g_bj W_j is the gradient by x_b; and <m_b, x_b> has the gradient sum_b g_bj x_b by W_j.
        with torch.enable_grad():
            rows = weight.detach().requires_grad_()
            mixed = F.embedding_bag(index, rows, per_sample_weights=grads[0].to(rows.dtype), mode="sum")
        by_weight = torch.autograd.grad(mixed, rows, x.to(rows.dtype))[0] if ctx.needs_input_grad[1] else None
        return mixed.detach().to(x.dtype), by_weight, None, None


class _TiedReconstruction(torch.autograd.Function):
    """``sum_j a_bj W_j`` of ``a_bj = <x_b, W_j> + c_bj`` for the chosen j of each row, the products being known.

    Encoder and decoder are one weight here, so that its gradient is one buffer, in which the chosen rows are added up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, products: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values = products + bias
        codes = values if gate is None else torch.where(gate, values, 0.0)
        ctx.save_for_backward(x, weight, index, codes, gate)
        ctx.mark_non_differentiable(codes)
        return F.embedding_bag(index, weight, per_sample_weights=codes.to(weight.dtype), mode="sum"), codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, codes, gate = ctx.saved_tensors
        grad, codes = grads[0], codes.to(weight.dtype)
        with torch.enable_grad():
            leaf = codes.detach().requires_grad_()
            decoded = F.embedding_bag(index, weight.detach(), per_sample_weights=leaf, mode="sum")
        (by_codes,) = torch.autograd.grad(decoded, leaf, grad)
        if gate is not None:
            by_codes = torch.where(gate, by_codes, 0.0)
        # g is the gradient by the codes. By W_j: sum_b a_bj grad_b (decoder) + g_bj x_b (encoder). By x: sum_j g_bj W_j
        with torch.enable_grad():
            rows = weight.detach().requires_grad_()
            both = F.embedding_bag(
                torch.cat([index, index]), rows, per_sample_weights=torch.cat([codes, by_codes]), mode="sum"
            )
        by_weight = None
        if ctx.needs_input_grad[1]:
            (by_weight,) = torch.autograd.grad(both, rows, torch.cat([grad, x.to(rows.dtype)]))
        return both.detach()[len(x) :].to(x.dtype), by_weight, by_codes, None, None, None


class TopKSAE(nn.Module):
    """Sparse autoencoder whose codes are the k largest features of each row.

    Takes pretrained autoencoders of others too, see :meth:`from_tensors` and
    :func:`~regularized.fine_tuning.sae_regularization.load_sae_lens`: with a decoder of its own (untied), with
    thresholds (JumpReLU), or without any top-k (``k=None``).

    A forward pass costs B x C x d multiplications for the encoder and B x k x d for the decoder. Memory: C x d weights,
    B x C pre-activations.

    Not for embeddings of another layer, model or normalisation than those that it was trained on: look at
    :meth:`check`.

    Args:
        num_inputs: d, width of the embeddings.
        num_features: C; the authors use 16 d (65,536 for 4,096), 3 to 8 d is usual for small d.
        k: features of a row, in [1, C]; default 20 (official). None: all that are positive, for autoencoders of others
            that are no top-k ones; such a one can be used but not trained here.
        tied: one weight for encoder and decoder; default True (official).

    Attributes:
        fired: (C,) int64 buffer, how often each feature was active in training; counted on the device.

    Raises:
        ValueError: a size below 1, k outside [1, C], or embeddings of another width.

    Examples:
        >>> sae = TopKSAE(16, 64, k=4)
        >>> x = torch.randn(5, 16)
        >>> sae(x).shape
        torch.Size([5, 16])
        >>> int((sae.encode(x) > 0).sum(dim=1).max()) <= 4
        True
    """

    decoder: nn.Parameter | None
    fired: Tensor
    threshold: Tensor | None

    @allowed(num_inputs=count(1), num_features=count(1))
    def __init__(self, num_inputs: int, num_features: int, *, k: int | None = 20, tied: bool = True) -> None:
        super().__init__()
        check_k(k, num_features)
        self.k = k
        # Kaiming-normal for relu over the d inputs of a feature: the official fan_out of a (d, C) matrix.
        self.encoder: nn.Parameter = nn.Parameter(torch.randn(num_features, num_inputs) * (2.0 / num_inputs) ** 0.5)
        self.encoder_bias: nn.Parameter = nn.Parameter(torch.zeros(num_features))
        self.decoder_bias: nn.Parameter = nn.Parameter(torch.zeros(num_inputs))
        self.register_parameter("decoder", None if tied else nn.Parameter(self.encoder.detach().clone()))
        self.register_buffer("threshold", None)
        self.register_buffer("fired", torch.zeros(num_features, dtype=torch.int64))

    @property
    def num_features(self) -> int:
        """C."""
        return self.encoder.shape[0]

    @property
    def num_inputs(self) -> int:
        """d."""
        return self.encoder.shape[1]

    @property
    def directions(self) -> Tensor:
        """(C, d) what each feature adds to the reconstruction: the decoder's rows."""
        return self.encoder if self.decoder is None else self.decoder

    def preactivations(self, x: Tensor) -> Tensor:
        """(..., d) embeddings to (..., C) pre-activations of all features."""
        self._check_width(x)
        return F.linear(x - self.decoder_bias, self.encoder, self.encoder_bias)

    def top_preactivations(
        self, x: Tensor, *, k: int | None = None, among: Tensor | None = None, compat: bool = False
    ) -> SparseCodes:
        """The k largest pre-activations of each row, negative ones too.

        Args:
            x: (B, d) embeddings.
            k: how many; default the autoencoder's own.
            among: (C,) bool, the features that may be chosen; default all. Where fewer than k may be, the rest are 0.
            compat: fill up with features that may not be chosen, as the official code does; default False.

        Returns:
            (B, k) values and features.
        """
        centred, dense = self._encoded(x)
        return self._top(centred, dense, self._checked(k), among, compat)

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x - b_d``, and all pre-activations, which serve to choose and have no gradient."""
        self._check_width(x)
        centred = x - self.decoder_bias
        with torch.no_grad():
            return centred, F.linear(centred, self.encoder, self.encoder_bias)

    def _top(self, centred: Tensor, dense: Tensor, k: int, among: Tensor | None, compat: bool) -> SparseCodes:
        index, bias, known, allowed = self._choose(dense, k, among, compat)
        products: Tensor = _ChosenProducts.apply(centred, self.encoder, index, known)  # type: ignore[no-untyped-call]
        values = products + bias
        return SparseCodes(values if allowed is None else values.masked_fill(~allowed, 0.0), index)

    def _choose(
        self, dense: Tensor, k: int, among: Tensor | None, compat: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The chosen features, their bias, their products with the input, and which of them count (None: all)."""
        if among is None:
            ranked = dense
        else:
            # The official code subtracts 1e9 and so keeps an order among the features that may not be chosen.
            ranked = dense - 1e9 * (~among).to(dense.dtype) if compat else dense.masked_fill(~among, -torch.inf)
        _, index = ranked.topk(k, dim=-1)
        bias = self.encoder_bias[index]
        # The dense values hold the bias, which is taken off in float32 or wider and put on again inside the graph.
        products = dense.gather(-1, index).to(bias.dtype) - bias.detach()
        return index, bias, products, None if among is None or compat else among[index]

    def _reconstruct(
        self,
        centred: Tensor,
        dense: Tensor,
        k: int,
        *,
        relu: bool,
        among: Tensor | None = None,
        compat: bool = False,
    ) -> tuple[Tensor, SparseCodes]:
        """What the k largest features decode to, and their codes, which for a tied weight have no gradient."""
        if self.decoder is not None:
            values, index = self._top(centred, dense, k, among, compat)
            codes = SparseCodes(values.relu() if relu else values, index)
            return self.decode(codes), codes
        index, bias, products, gate = self._choose(dense, k, among, compat)
        if relu:
            positive = ~(products + bias.detach() <= 0)  # NaN passes, as through a relu
            gate = positive if gate is None else gate & positive
        mixed, values = _TiedReconstruction.apply(  # type: ignore[no-untyped-call]
            centred, self.encoder, bias, index, products, gate
        )
        return mixed + self.decoder_bias, SparseCodes(values, index)

    def top_codes(self, x: Tensor, *, k: int | None = None) -> SparseCodes:
        """(B, d) embeddings to the k features of each row, relu applied."""
        values, index = self.top_preactivations(x, k=k)
        return SparseCodes(values.relu(), index)

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) embeddings to dense codes (..., C), at most k of them non-zero in a row."""
        if self.k is None:
            return self.positive(self.preactivations(x))
        flat = x.reshape(-1, x.shape[-1])
        values, index = self.top_codes(flat)
        codes = values.new_zeros(len(flat), self.num_features).scatter(1, index, values)
        return codes.reshape(*x.shape[:-1], self.num_features)

    def positive(self, preactivations: Tensor) -> Tensor:
        """All active codes of (..., C) pre-activations: relu, and above the threshold where there is one."""
        codes = preactivations.relu()
        return codes if self.threshold is None else codes * (preactivations > self.threshold)

    def decode(self, codes: Tensor | SparseCodes) -> Tensor:
        """Dense codes (..., C) or sparse ones to reconstructions (..., d)."""
        if isinstance(codes, SparseCodes):
            rows = self.directions
            mixed = F.embedding_bag(codes.features, rows, per_sample_weights=codes.values.to(rows.dtype), mode="sum")
            return mixed + self.decoder_bias
        return F.linear(codes, self.directions.T, self.decoder_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) embeddings to reconstructions of the same shape."""
        if self.k is None:
            return self.decode(self.encode(x))
        flat = x.reshape(-1, x.shape[-1])
        return self.decode(self.top_codes(flat)).reshape(x.shape)

    def loss(self, x: Tensor, *, k: int | None = None, count: bool = False) -> Tensor:
        """Mean normalised error of a batch: the loss of pre-training.

        Args:
            x: (B, d) embeddings.
            k: features of a row; default the autoencoder's own. The training schedule gives larger ones.
            count: add what was active to ``fired``; default False.

        Returns:
            Scalar.
        """
        centred, dense = self._encoded(x)
        reconstruction, codes = self._reconstruct(centred, dense, self._checked(k), relu=True)
        if count:
            self._count(codes)
        return normalized_error(reconstruction, x).mean()

    def fine_tuning_loss(
        self, x: Tensor, dead: Tensor, *, dead_weight: float = 0.1, compat: bool = False, count: bool = False
    ) -> Tensor:
        """The loss of task fine-tuning: live features reconstruct, dead ones reconstruct what is left over.

        ``nmse(x1, x) + dead_weight * nmse(x2, x - sg[x1])``, where x1 decodes the k largest live features and x2 the k
        largest dead ones, both without relu (a dead feature has no gradient behind a relu).

        Args:
            x: (B, d) embeddings.
            dead: (C,) bool, features that are never active on the task's data, see :meth:`never_active`.
            dead_weight: share of the second part; default 0.1 (official). 0 leaves it out, as where nobody is dead.
            compat: see :meth:`top_preactivations`.
            count: add what was active to ``fired``; default False.

        Returns:
            Scalar.
        """
        k = self._checked(None)
        centred, dense = self._encoded(x)
        first, live = self._reconstruct(centred, dense, k, relu=False, among=~dead, compat=compat)
        if count:
            self._count(live)
        if dead_weight == 0.0:
            return normalized_error(first, x).mean()
        second, _ = self._reconstruct(centred, dense, k, relu=False, among=dead, compat=compat)
        rest = x - first.detach()
        return (normalized_error(first, x) + dead_weight * normalized_error(second, rest)).mean()

    @torch.no_grad()
    def _count(self, codes: SparseCodes) -> None:
        active = (codes.values > 0).to(torch.int64)
        self.fired.scatter_add_(0, codes.features.flatten(), active.flatten())

    @torch.no_grad()
    def never_active(self, activations: Tensor, *, batch_size: int = 4096) -> Tensor:
        """Which features have no positive pre-activation on any row; one read of the device at most, by the caller.

        Args:
            activations: (N, d) embeddings of the task.
            batch_size: rows at a time; memory is batch_size x C.

        Returns:
            (C,) bool.
        """
        alive = torch.zeros_like(self.fired, dtype=torch.bool)
        for rows in torch.split(activations, batch_size):
            alive |= (self.preactivations(rows.to(alive.device)) > 0).any(dim=0)
        return ~alive

    @torch.no_grad()
    def check(self, activations: Tensor, *, batch_size: int = 4096) -> float:
        """Mean normalised error on embeddings: do they belong to this autoencoder?

        Args:
            activations: (N, d) embeddings; some thousand are enough.
            batch_size: rows at a time.

        Returns:
            The error: 0 perfect, about 0.1 to 0.3 usual, 1 as bad as a reconstruction of zeros.

        Warns:
            UserWarning: it is above 0.5.
        """
        errors = [normalized_error(self(rows), rows) for rows in torch.split(activations, batch_size)]
        error = float(torch.cat(errors).mean())
        if error > 0.5:
            warnings.warn(
                f"the autoencoder reconstructs these embeddings with a normalised error of {error:.2f} (above 0.5): "
                "are they from the same model, layer and normalisation, and was it trained long enough?",
                stacklevel=2,
            )
        return error

    def _checked(self, k: int | None) -> int:
        k = self.k if k is None else k
        if k is None:
            raise ValueError("this autoencoder has k=None: it can encode, clean and be judged, but not be trained here")
        check_k(k, self.num_features)
        return k

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.num_inputs:
            raise ValueError(
                f"the autoencoder was made for embeddings of width {self.num_inputs}, got {tuple(x.shape)}; are they "
                "from the same model and layer?"
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        tied = "" if self.decoder is None else ", tied=False"
        return f"num_inputs={self.num_inputs}, num_features={self.num_features}, k={self.k}{tied}"

    @classmethod
    def from_tensors(
        cls,
        encoder: Tensor,
        *,
        encoder_bias: Tensor | None = None,
        decoder: Tensor | None = None,
        decoder_bias: Tensor | None = None,
        threshold: Tensor | None = None,
        k: int | None = None,
    ) -> "TopKSAE":
        """An autoencoder of given weights, frozen.

        Args:
            encoder: (C, d), a feature a row; transpose a ``W_enc`` of shape (d, C).
            encoder_bias: (C,); default zeros.
            decoder: (C, d), a feature a row; default tied to the encoder.
            decoder_bias: (d,), subtracted from the input and added to the output; default zeros.
            threshold: (C,) of a JumpReLU autoencoder; default none.
            k: of a top-k autoencoder; default None, all positive features.

        Raises:
            ValueError: shapes that do not fit together.

        Examples:
            >>> sae = TopKSAE.from_tensors(torch.eye(3), decoder=2 * torch.eye(3))
            >>> sae(torch.tensor([[1.0, -1.0, 0.5]]))
            tensor([[2., 0., 1.]])
        """
        if encoder.ndim != 2:
            raise ValueError(f"encoder must be (C, d), got {tuple(encoder.shape)}")
        features, width = encoder.shape
        given = {
            "encoder": encoder,
            "encoder_bias": encoder.new_zeros(features) if encoder_bias is None else encoder_bias,
            "decoder_bias": encoder.new_zeros(width) if decoder_bias is None else decoder_bias,
        }
        optional = {"decoder": decoder, "threshold": threshold}
        given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        shapes = {
            "encoder": (features, width),
            "encoder_bias": (features,),
            "decoder": (features, width),
            "decoder_bias": (width,),
            "threshold": (features,),
        }
        for name, tensor in given.items():
            if tuple(tensor.shape) != shapes[name]:
                hint = "; transpose it" if tuple(tensor.shape[::-1]) == shapes[name] else ""
                raise ValueError(
                    f"{name} must have shape {shapes[name]} beside an encoder of {features} features (rows) and width "
                    f"{width}, got {tuple(tensor.shape)}{hint}"
                )
        with torch.device("meta"):
            sae = cls(width, features, k=k, tied=decoder is None)
        sae.fired = torch.zeros(features, dtype=torch.int64, device=encoder.device)
        for name, tensor in given.items():
            copy = tensor.detach().clone().contiguous()
            if name == "threshold":
                sae.threshold = copy
            else:
                setattr(sae, name, nn.Parameter(copy, requires_grad=False))
        return sae.eval()


def check_k(k: int | None, features: int) -> None:
    """Refuse a k outside [1, C]."""
    if k is not None:
        between(1, features, "[]", "the number of features", whole=True)("k", k)
