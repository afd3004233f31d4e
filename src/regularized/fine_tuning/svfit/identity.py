"""Whether shifts of singular values meet the weight, and the basis, that they were learned in.

A tiny file holds the shifts alone and takes the singular vectors from the base weight again. That is safe only if the
weight is the same (:func:`weight_fingerprint`), if the cut does not fall between equal singular values
(:func:`relative_gap`), and if the decomposition, perhaps on another machine, has led to the same vectors
(:func:`basis_witness`): vectors of nearly equal values turn freely among themselves. Signs do not matter, since the
two vectors of a direction flip together.
"""

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["SMALLEST_GAP", "basis_witness", "check_basis", "check_weight", "relative_gap", "weight_fingerprint"]

SMALLEST_GAP = 1e-6
"""Share of the largest singular value: a smaller step at the cut leaves the choice of directions to rounding."""
_PROBES = 4
# Probes give about the error of the adapter's weight relative to its size; float32 vectors are good to about 1e-5.
_TOLERANCE = 1e-3


def weight_fingerprint(weight: Tensor) -> str:
    """SHA-256 of a weight's values and shape, in hexadecimal.

    Half-precision weights are hashed as float32, so a model loaded in another of those types without rounding keeps its
    fingerprint.

    Args:
        weight: of any shape, floating point.

    Examples:
        >>> weight_fingerprint(torch.ones(2, dtype=torch.bfloat16)) == weight_fingerprint(torch.ones(2))
        True
    """
    values = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def relative_gap(values: Tensor, rank: int) -> float:
    """Step from the last retained singular value to the first that is left out, as a share of the largest.

    Args:
        values: (k,) all singular values, descending.
        rank: r <= k.

    Returns:
        ``(s_r - s_{r+1}) / s_1``; infinite where nothing is left out, 0 for a weight of zeros.

    Examples:
        >>> relative_gap(torch.tensor([4.0, 3.0, 1.0]), 2), relative_gap(torch.tensor([4.0, 3.0, 1.0]), 3)
        (0.5, inf)
    """
    if rank == len(values):
        return math.inf
    largest = float(values[0])
    return float(values[rank - 1] - values[rank]) / largest if largest > 0 else 0.0


def basis_witness(left: Tensor, right: Tensor) -> Tensor:
    """A few numbers that tell whether two bases act alike: entries of adapters with made-up shifts.

    ``a^T U diag(c_j) V^T b`` for fixed vectors a and b and fixed shifts c_j. Flipped signs of a direction change
    nothing; directions that turned into each other do.

    Args:
        left: (o, r).
        right: (r, i).

    Returns:
        (4 + 1,) float64 on the CPU: the entries, and the size below which differences are judged.

    Examples:
        >>> u, s, v = torch.linalg.svd(torch.randn(5, 4), full_matrices=False)
        >>> torch.equal(basis_witness(u, v), basis_witness(-u, -v))
        True
    """
    seen = (_probe(len(left)) @ left.detach().double().cpu()) * (right.detach().double().cpu() @ _probe(right.shape[1]))
    j = torch.arange(1, _PROBES + 1, dtype=torch.float64)
    k = torch.arange(1, len(seen) + 1, dtype=torch.float64)
    shifts = torch.cos(math.sqrt(2.0) * j[:, None] * k)
    return torch.cat([shifts @ seen, seen.norm()[None]])


def check_weight(fingerprint: str, weight: Tensor, *, name: str) -> None:
    """Refuse a weight that shifts were not learned on.

    Args:
        fingerprint: of the weight that they were learned on.
        weight: the present one.
        name: of the layer, for the message.

    Raises:
        ValueError: they differ.

    Examples:
        >>> check_weight(weight_fingerprint(torch.ones(2)), torch.ones(2), name="layer")
    """
    if weight_fingerprint(weight) != fingerprint:
        raise ValueError(
            f"layer {name!r}: the base weight is not the one that this adapter was trained on (its fingerprint "
            "differs), so its shifts would rescale other directions. Load the same base model, not merged, not "
            "fine-tuned and not rounded to another type"
        )


def check_basis(witness: Tensor, left: Tensor, right: Tensor, *, gap: float, name: str) -> None:
    """Refuse singular vectors other than those that shifts were learned in.

    Args:
        witness: :func:`basis_witness` of the basis that they were learned in.
        left: (o, r) the present basis.
        right: (r, i).
        gap: :func:`relative_gap` of the weight at the cut.
        name: of the layer, for the message.

    Raises:
        ValueError: the gap is below :data:`SMALLEST_GAP`, or the basis differs.

    Examples:
        >>> u, s, v = torch.linalg.svd(torch.randn(5, 4), full_matrices=False)
        >>> check_basis(basis_witness(u, v), u, v, gap=1.0, name="layer")
    """
    remedy = "Save the adapter with its basis (larger files), or train it with another rank"
    if gap < SMALLEST_GAP:
        raise ValueError(
            f"layer {name!r}: the singular values on both sides of the cut are nearly equal (gap {gap:.2g} of the "
            f"largest, below {SMALLEST_GAP:g}), so the decomposition does not determine the directions. {remedy}"
        )
    present = basis_witness(left, right)
    if bool((present - witness).abs().max() > _TOLERANCE * witness[-1]):
        raise ValueError(
            f"layer {name!r}: the decomposition gives other singular vectors here than where this adapter was trained: "
            f"some of its singular values are too close to each other. {remedy}"
        )


def _probe(size: int) -> Tensor:
    """A fixed vector of length 1 without structure; the same on every machine."""
    k = torch.arange(1, size + 1, dtype=torch.float64)
    return torch.cos(k * k).div(math.sqrt(size / 2))
