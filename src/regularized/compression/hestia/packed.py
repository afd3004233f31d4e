"""Hard weights as codes of one, two, four or eight bits: exact packing, and layers that compute from what is packed.

A byte holds ``8 / bits`` codes of one row, the first in its lowest bits; a row is filled up with zeros to whole bytes.
Ternary weights have two bits, and with a float32 scale for 128 weights 2.25 bits a weight in all.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.hestia.layer import annealed_weights, latent_weights
from regularized.compression.hestia.quantizer import Codebook, levels_of, to_codes
from regularized.mechanisms.ranges import allowed, count

__all__ = ["PackedLinear", "bits_for", "pack_codes", "pack_weights", "size_in_bytes", "unpack_codes", "unpack_weights"]


def bits_for(levels: int) -> int:
    """Bits of a code, such that whole codes fill a byte: 1, 2, 4 or 8.

    Args:
        levels: length of the codebook, 2 to 256.

    Examples:
        >>> bits_for(2), bits_for(3), bits_for(4), bits_for(5)
        (1, 2, 2, 4)
    """
    return next(bits for bits in (1, 2, 4, 8) if levels <= 2**bits)


def _check_bits(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"codes have 1, 2, 4 or 8 bits, got {bits}; see bits_for(levels)")


def pack_codes(codes: Tensor, bits: int = 2) -> Tensor:
    """Several codes into each byte.

    Args:
        codes: (..., n) uint8, each below ``2 ** bits``.
        bits: 1, 2, 4 or 8; default 2.

    Returns:
        (..., ceil(n bits / 8)) uint8.

    Raises:
        ValueError: another number of bits, another type, or a code that does not fit.

    Examples:
        >>> pack_codes(torch.tensor([1, 2, 0, 3, 1], dtype=torch.uint8))
        tensor([201,   1], dtype=torch.uint8)
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {bits} bits is below {2**bits}, the largest here is {int(codes.max())}")
    each = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = torch.zeros_like(padded[..., 0])
    for place in range(each):
        packed |= padded[..., place] << (bits * place)
    return packed


def unpack_codes(packed: Tensor, width: int, bits: int = 2) -> Tensor:
    """The codes that :func:`pack_codes` packed.

    Args:
        packed: (..., ceil(width bits / 8)) uint8.
        width: codes of a row.
        bits: 1, 2, 4 or 8; default 2.

    Returns:
        (..., width) uint8.

    Raises:
        ValueError: another number of bits, or rows of another length.

    Examples:
        >>> unpack_codes(torch.tensor([201, 1], dtype=torch.uint8), 5)
        tensor([1, 2, 0, 3, 1], dtype=torch.uint8)
    """
    _check_bits(bits)
    if packed.shape[-1] != -(-width * bits // 8):
        raise ValueError(
            f"{width} codes of {bits} bits take {-(-width * bits // 8)} bytes, the rows have {packed.shape[-1]}"
        )
    places = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, dim=-1).flatten(-2)[..., :width].contiguous()


@functools.lru_cache
def _table(levels: tuple[float, ...]) -> Tensor:
    """(256, codes of a byte): the levels that each byte stands for."""
    bits = bits_for(len(levels))
    known = torch.zeros(2**bits, dtype=torch.float64)
    known[: len(levels)] = torch.tensor(levels, dtype=torch.float64)
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None], 8 // bits, bits)
    return known[codes.long()]


class PackedLinear(nn.Module):
    """A linear layer that holds codes and scales, and computes bit for bit what the annealed layer did in evaluation.

    The weight is unpacked for each forward pass and not kept: memory is that of the codes, time that of unpacking more.
    Gradients reach inputs and bias.

    Args:
        in_features: as ``nn.Linear``.
        out_features: as ``nn.Linear``.
        bias: whether there is one; default True.
        codebook: levels; default ternary.
        group_size: weights that share a scale; default 128, as in :func:`~regularized.compression.hestia.anneal`.
        dtype: of the weight that is unpacked; default float32.
        device: where; default as torch.

    Attributes:
        packed: (out, ceil(in bits / 8)) uint8.
        scales: (groups, 1).

    Raises:
        ValueError: the codebook is none.

    Examples:
        >>> layer = PackedLinear.of(torch.tensor([[0.1, -0.9, 2.0, 1.0]]), None, group_size=-1)
        >>> layer.packed.shape, layer(torch.ones(1, 4))
        (torch.Size([1, 1]), tensor([[1.]]))
    """

    packed: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    @allowed(in_features=count(1), out_features=count(1))
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        codebook: Codebook = "ternary",
        group_size: int = 128,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.levels: tuple[float, ...] = levels_of(codebook)
        self.group_size = group_size
        self.dtype = dtype
        self.bits: int = bits_for(len(self.levels))
        weights = in_features * out_features
        groups = {0: 1, -1: out_features}.get(group_size, weights // max(group_size, 1))
        wide = torch.promote_types(dtype, torch.float32)
        width = -(-in_features * self.bits // 8)
        self.register_buffer("packed", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.ones(groups, 1, dtype=wide, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    @torch.no_grad()
    def of(
        cls, weight: Tensor, bias: Tensor | None, *, codebook: Codebook = "ternary", group_size: int = 128
    ) -> "PackedLinear":
        """The packed layer of a latent weight.

        Args:
            weight: (out, in) latent weights, which are quantized here; not hard ones.
            bias: (out,) or None.
            codebook: levels; default ternary.
            group_size: default 128.

        Raises:
            ValueError: the weight holds NaN or infinite entries, or ``group_size`` does not fit.
        """
        out_features, in_features = weight.shape
        codes, scales = to_codes(weight, codebook=codebook, group_size=group_size)
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            codebook=codebook,
            group_size=group_size,
            dtype=weight.dtype,
            device=weight.device,
        )
        layer.packed.copy_(pack_codes(codes, layer.bits))
        layer.scales.copy_(scales)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Scales keep their precision under ``half()`` and the like: with others the weights would be other ones."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.packed.device)
        return self

    @property
    def weight(self) -> Tensor:
        """(out, in), unpacked."""
        table = _table(self.levels).to(self.packed.device, self.scales.dtype)
        values = table[self.packed.int()].flatten(1)[:, : self.in_features]
        return (values.reshape(len(self.scales), -1) * self.scales).reshape(values.shape).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )


# -- of a model ---------------------------------------------------------------------------------------


def pack_weights(model: nn.Module) -> list[str]:
    """Replace every annealed linear layer by a :class:`PackedLinear`, in place: the other way to end, beside freezing.

    Args:
        model: after :func:`~regularized.compression.hestia.anneal_weights`.

    Returns:
        Names of the layers.

    Raises:
        ValueError: there is no annealed layer (frozen ones hold hard weights, whose codes are gone); one is not linear,
            or is the model itself.

    Examples:
        >>> from regularized.compression.hestia import anneal_weights
        >>> model = nn.Sequential(nn.Linear(8, 4)).eval()
        >>> _ = anneal_weights(model, group_size=-1)
        >>> x = torch.randn(2, 8)
        >>> hard = model(x)
        >>> pack_weights(model), torch.equal(model(x), hard)
        (['0'], True)
    """
    annealed = annealed_weights(model)
    if not annealed:
        raise ValueError(
            "the model has no annealed layer to pack: anneal_weights(model) first, and pack_weights instead of "
            "freeze_weights at the end"
        )
    for name in annealed:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer is model:
            raise ValueError(
                f"only linear layers inside a model can be packed, {name!r} is {type(layer).__name__}; freeze_weights "
                "keeps it as a plain layer, or wrap the model in nn.Sequential"
            )
    for (name, weight), latent in zip(annealed.items(), latent_weights(model).values(), strict=True):
        layer = cast(nn.Linear, model.get_submodule(name))
        packed = PackedLinear.of(latent, layer.bias, codebook=weight.levels, group_size=weight.group_size)
        replace_layer(model, name, packed.train(layer.training))
    return list(annealed)


def unpack_weights(model: nn.Module) -> list[str]:
    """Replace every packed layer by a plain one with the same outputs, in place.

    Args:
        model: after :func:`pack_weights`; without packed layers it is left as it is.

    Returns:
        Names of the layers.

    Examples:
        >>> model = nn.Sequential(PackedLinear(8, 4, group_size=-1))
        >>> unpack_weights(model), type(model[0]).__name__
        (['0'], 'Linear')
    """
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.weight)
        plain.register_parameter("bias", layer.bias)
        replace_layer(model, name, plain.train(layer.training))
    return list(packed)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the submodule of a name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once: what a file of the model holds.

    Args:
        model: any.

    Examples:
        >>> size_in_bytes(nn.Linear(128, 8, bias=False)), size_in_bytes(PackedLinear(128, 8, bias=False))
        (4096, 288)
    """
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
