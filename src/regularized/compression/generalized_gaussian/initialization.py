"""Initial weights from a generalised Gaussian: the variance of the usual schemes, with heavier or lighter tails."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.compression.generalized_gaussian.distribution import GeneralizedGaussian
from regularized.mechanisms.ranges import Choice, allowed, positive
from regularized.mechanisms.surgery import select_modules

__all__ = ["generalized_gaussian_", "initialize_"]

Fan: TypeAlias = Literal["in", "out"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHAPE = positive(remedy="1 is Laplace's distribution, 2 the Gaussian")
_XI = positive(remedy="1 for linear and sigmoid, 2 for ReLU, 2 / (1 + k^2) for a leaky ReLU of slope k")
_FAN = Choice("in", "out")


@allowed(shape=_SHAPE, xi=_XI, fan=_FAN)
@torch.no_grad()
def generalized_gaussian_(
    tensor: Tensor,
    *,
    shape: float = 1.0,
    xi: float = 2.0,
    fan: Fan = "out",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with draws of variance ``xi / fan``, in place, as the functions of ``torch.nn.init`` do.

    With ``shape=2`` it is Kaiming's normal initialisation of gain ``sqrt(xi)``.

    Args:
        tensor: (out, in, ...), at least two dimensions.
        shape: nu, positive. Default 1: trained weights of language models are near it; the repository's default is 2.
        xi: the variance times the fan, positive: 1 for linear and sigmoid, 2 (default) for ReLU.
        fan: what the variance is divided by. Default ``"out"``, the repository's ``weight.shape[0]``, which keeps the
            variance of gradients; ``"in"`` keeps that of activations.
        generator: where the randomness comes from, on the tensor's device; default torch's own.

    Returns:
        The tensor.

    Raises:
        ValueError: an option is out of range, or the tensor has fewer than two dimensions.

    Examples:
        >>> w = generalized_gaussian_(torch.empty(200, 300), generator=torch.Generator().manual_seed(0))
        >>> round(float(w.var() * 200), 1)
        2.0
    """
    if tensor.ndim < 2:
        raise ValueError(f"a fan needs two dimensions, (out, in, ...); the tensor has shape {tuple(tensor.shape)}")
    units = tensor.shape[0 if fan == "out" else 1] * tensor[0, 0].numel()
    law = GeneralizedGaussian.with_variance(shape, xi / units)
    return tensor.copy_(law.sample(tuple(tensor.shape), generator=generator, device=tensor.device))


@allowed(shape=_SHAPE, xi=_XI, fan=_FAN)
@torch.no_grad()
def initialize_(
    model: nn.Module,
    *,
    shape: float = 1.0,
    xi: float = 2.0,
    fan: Fan = "out",
    include: tuple[type[nn.Module], ...] = _LAYERS,
    exclude: Iterable[str] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """Draw the weights of linear and convolutional layers anew, and set their biases to zero, in place.

    The repository draws *every* matrix: embeddings, too, with the vocabulary as fan (``include=(nn.Linear,
    nn.Embedding)``), which makes them small.

    Args:
        model: the model; other layers stay as they are.
        shape: see :func:`generalized_gaussian_`.
        xi: as there.
        fan: as there.
        include: layer types.
        exclude: names of submodules to leave out.
        generator: as there; layers are drawn in the order of ``named_modules``.

    Returns:
        Names of the layers; one whose weight is that of another is drawn once.

    Raises:
        ValueError: an option is out of range, or a name is no submodule.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> initialize_(model, shape=1.0, generator=torch.Generator().manual_seed(0))
        ['0', '2']
    """
    drawn, names = set(), []
    for name, layer in select_modules(model, include, exclude):
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        if id(weight) not in drawn:
            drawn.add(id(weight))
            generalized_gaussian_(weight, shape=shape, xi=xi, fan=fan, generator=generator)
            names.append(name)
        if isinstance(bias, Tensor):
            bias.zero_()
    return names
