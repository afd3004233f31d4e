"""What the contract suite checks of low-precision training.

The recipe of the checks rounds each value by itself (TF32): where a scale is shared along the batch, a batch in parts,
or in several processes, is by definition another computation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.compression.low_precision.blocks import MX
from regularized.compression.low_precision.term import LowPrecision
from regularized.evidence.contract import Classification, Subject, plain
from regularized.training.terms import CrossEntropy

TASK = Classification(features=32, hidden=(32,))


def _products() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "formats": LowPrecision("tf32")}


def _full() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "formats": LowPrecision("full")}


def _part() -> tuple[object, tuple[Tensor, ...]]:
    return MX("e4m3", scale="rceil").quantize, (torch.randn(8, 64),)


def subjects() -> list[Subject]:
    """The three products by a recipe; full precision is plain training, the limit."""
    return [Subject("products", TASK.model, _products, plain, TASK.data, off=_full, part=_part)]  # type: ignore[arg-type]
