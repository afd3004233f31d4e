"""Batch normalisation of a box: by the statistics of the *clean* batch, through which the gradient flows.

In training a box is normalised as the inputs themselves are, by mean and variance of the clean batch at that layer.
They are noted down while the clean batch passes; running statistics are touched by that pass alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from regularized.robustness.certified_training.affine import Apply, affine_map
from regularized.robustness.certified_training.interval import Interval

__all__ = ["BatchStatistics", "Statistics", "is_batch_norm", "normalised", "normalised_layer"]

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Statistics(NamedTuple):
    """What one layer normalises with.

    Attributes:
        mean: (C,).
        variance: (C,), biased.
    """

    mean: Tensor
    variance: Tensor


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is torch's batch normalisation, or inherits its ``forward``.

    Examples:
        >>> is_batch_norm(nn.BatchNorm1d(3)), is_batch_norm(nn.LayerNorm(3)), is_batch_norm(nn.SyncBatchNorm(3))
        (True, False, False)
    """
    return isinstance(module, _KINDS) and type(module).forward is _BatchNorm.forward


class _MeanAndVariance(torch.autograd.Function):
    """Of each channel; on a CPU ``torch.var_mean`` takes up to twenty times as long."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(dims, keepdim=True)
        ctx.save_for_backward(x)
        return mean.flatten(), (x - mean).square_().mean(dims)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        mean = x.mean([d for d in range(x.ndim) if d != 1], keepdim=True)
        of_mean, of_variance = (gradient.reshape(mean.shape) * (mean.numel() / x.numel()) for gradient in gradients)
        slope = 2.0 * of_variance
        return torch.addcmul(of_mean - slope * mean, x, slope)


class BatchStatistics:
    """Notes, while a batch passes through a network in training, what its batch normalisations normalise with.

    Args:
        model: the network; hooks are set on it and on its batch normalisations.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[int, list[Statistics]] = {}
        self.samples: int | None = None
        layers = [module for module in model.modules() if is_batch_norm(module)]
        self._handles: list[Any] = []
        if layers:
            self._handles.append(model.register_forward_pre_hook(self._begin))
            self._handles += [layer.register_forward_pre_hook(self._note) for layer in layers]

    def _begin(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.clear()
        self.samples = len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not module.training:
            return
        x = inputs[0]
        if x.numel() // x.shape[1] < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}; bounds need the "
                "statistics of a batch: give more samples, or put the network into evaluation mode"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = _MeanAndVariance.apply(x)  # type: ignore[no-untyped-call]
        self._calls.setdefault(id(module), []).append(Statistics(mean, variance))

    def of(self, module: nn.Module, call: int, name: str, samples: int) -> Statistics:
        """Statistics for a call of a layer: of the clean batch in training, else the running ones.

        Args:
            module: the layer.
            call: which of its calls in a forward pass, from 0.
            name: of the layer, for messages.
            samples: in the box.

        Raises:
            RuntimeError: it is in training, and no clean batch of this size has passed; or it keeps no running
                statistics and is in evaluation.
        """
        assert isinstance(module, _BatchNorm)
        if not module.training:
            if module.running_mean is None or module.running_var is None:
                raise RuntimeError(
                    f"batch normalisation {name!r} keeps no running statistics, so its outputs hang on the rest of "
                    "the batch and no bound holds; build it with track_running_stats=True"
                )
            return Statistics(module.running_mean, module.running_var)
        noted = self._calls.get(id(module), [])
        if len(noted) <= call or samples != self.samples:
            seen = "none has passed" if self.samples is None else f"the last one had {self.samples} samples"
            raise RuntimeError(
                f"batch normalisation {name!r} is in training mode and needs the statistics of the clean batch: call "
                f"model(x) with the same {samples} samples before the bounds ({seen}), or put the network into "
                "evaluation mode"
            )
        return noted[call]

    def clear(self) -> None:
        """Forget the batch, so that no graph outlives its step."""
        self._calls.clear()
        self.samples = None

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchStatistics":
        """A copied network gets one that notes nothing: what was noted belongs to the graph of the original."""
        return _Silent()

    def __reduce__(self) -> tuple[Callable[[], "BatchStatistics"], tuple[()]]:
        """Pickled as one that notes nothing."""
        return _Silent, ()


class _Silent(BatchStatistics):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def _begin(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None: ...

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None: ...


def _scale_and_shift(module: _BatchNorm, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """(C,) each: what a normalisation multiplies by and adds."""
    scale = torch.rsqrt(statistics.variance + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = -statistics.mean * scale
    return scale, shift if module.bias is None else shift + module.bias


def normalised(module: nn.Module, statistics: Statistics, box: Interval) -> Interval:
    """The image under a batch normalisation."""
    assert isinstance(module, _BatchNorm)
    scale, shift = _scale_and_shift(module, statistics)
    shape = (-1, *[1] * (len(box.shape) - 2))
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    return Interval.around(torch.addcmul(shift, box.centre, scale), box.radius * scale.abs())


def normalised_layer(
    apply: Apply, layer: nn.Linear | nn.Conv2d, module: nn.Module, statistics: Statistics, box: Interval
) -> Interval:
    """The image under a layer and the batch normalisation behind it, which is folded into the layer's weights.

    A box then pays nothing for the normalisation: it costs as much as the weights, not as the activations.
    """
    assert isinstance(module, _BatchNorm)
    scale, shift = _scale_and_shift(module, statistics)
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return affine_map(apply, weight, shift if layer.bias is None else torch.addcmul(shift, layer.bias, scale), box)
