"""A model with 2:4 weights on kernels that skip the zeros, where the machine has them.

Sparse tensor cores (NVIDIA, from Ampere on) take half of the products of a 2:4 weight. torch reaches them through
``torch.sparse.to_sparse_semi_structured``, a prototype, which asks for a GPU, a type and sizes that its kernels know. A
layer that it refuses stays as it is and computes the same, with its zeros.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from regularized.compression.cast.pattern import follows_pattern

__all__ = ["Deployed", "to_semi_structured"]


class Deployed(NamedTuple):
    """What became of the layers that have the pattern.

    Attributes:
        sparse: names of those that compute with sparse kernels now.
        dense: names of those that stay as they are, with the reason in torch's words.
    """

    sparse: tuple[str, ...]
    dense: Mapping[str, str]


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> Deployed:
    """Give each linear layer whose weight is 2:4 torch's semi-structured form, in place, for inference.

    A layer without the pattern is not looked at. Move the model to the GPU and to float16 or bfloat16 first; float32 is
    known to few kernels. The products are those of the dense layer up to the rounding of their type.

    Args:
        model: after :meth:`~regularized.compression.cast.CAST.finalize`, or with 2:4 weights from elsewhere; the
            changed weights need no gradient any more.

    Returns:
        Which layers are sparse now, and why others are not: on a machine without such kernels all are dense.

    Raises:
        ValueError: no linear layer has the pattern.

    Examples:
        >>> from regularized.compression.cast import semi_structured_mask
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model[0].weight.data.mul_(semi_structured_mask(model[0].weight)).shape
        torch.Size([32, 64])
        >>> done = to_semi_structured(model)  # on a CPU
        >>> done.sparse, list(done.dense)
        ((), ['0'])
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and follows_pattern(module.weight)
    }
    if not layers:
        raise ValueError(
            f"no linear layer of {type(model).__name__} has 2:4 weights; call cast.finalize() first, or cut the "
            "weights by semi_structured_mask"
        )
    sparse, dense = [], {}
    for name, module in layers.items():
        try:
            weight = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
        except (RuntimeError, NotImplementedError) as error:
            dense[name] = str(error).splitlines()[0]
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
            sparse.append(name)
    return Deployed(tuple(sparse), dense)
