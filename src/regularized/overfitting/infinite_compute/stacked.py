"""Members of an ensemble in one tensor program: weights stacked along a first dimension, products of matrices batched.

Small members leave most of a machine idle when they train one after the other. Stacked, a layer of all members is one
batched product, and one optimizer step moves all of them; what each learns is what it would have learnt alone.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from regularized.mechanisms.ranges import allowed, positive
from regularized.overfitting.infinite_compute.ensemble import equal_members
from regularized.training.step import call_model

__all__ = ["StackedModels", "clip_members_"]


class StackedModels(nn.Module):
    """K models of one architecture as one module, whose parameters and buffers have K as first dimension.

    Names are those of one model behind ``stacked.``. Parameters are copies; those given stay as they are. Dropout and
    whatever else a model draws differ between members.

    Args:
        models: the members, on one device, in one mode, frozen alike.

    Raises:
        ValueError: no model, models of different classes, names or shapes, or two with equal weights.

    Examples:
        >>> models = StackedModels([nn.Linear(2, 3), nn.Linear(2, 3)])
        >>> models.stacked.weight.shape
        torch.Size([2, 3, 2])
        >>> x = torch.ones(2, 5, 2)  # a batch of five for each member
        >>> torch.allclose(models(x)[1], models.member(1)(x[1]), atol=1e-6)
        True
        >>> models.shared(x[0]).shape  # one batch for all
        torch.Size([2, 5, 3])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        _check(models)
        self.size: int = len(models)
        tensors = [_tensors(model) for model in models]
        whole = {name: torch.stack([own[name].detach() for own in tensors]) for name in tensors[0]}
        self.stacked: nn.Module = _with(models[0], whole)
        # What computes: no weights of its own, and no submodule, since its names would come twice.
        self._computes = (_with(models[0], {name: t.detach().to("meta") for name, t in tensors[0].items()}),)
        self.train(models[0].training)

    def train(self, mode: bool = True) -> "StackedModels":
        """Training or evaluation mode of all members."""
        super().train(mode)
        self._computes[0].train(mode)
        return self

    def forward(self, inputs: Any) -> Any:
        """Each member on inputs of its own: (K, B, ...) to (K, B, ...)."""
        return self._run(inputs, 0)

    def shared(self, inputs: Any) -> Any:
        """Every member on the same inputs: (B, ...) to (K, B, ...)."""
        return self._run(inputs, None)

    def member(self, number: int) -> nn.Module:
        """One member as a model of its own: a copy, on the same device."""
        if not 0 <= number < self.size:
            raise ValueError(f"there are members 0 to {self.size - 1}, got {number}")
        own = {name: tensor.detach()[number].clone() for name, tensor in _tensors(self.stacked).items()}
        return _with(self._computes[0], own)

    def members(self) -> list[nn.Module]:
        """All members as models of their own."""
        return [self.member(number) for number in range(self.size)]

    def _run(self, inputs: Any, along: int | None) -> Any:
        tensors = _tensors(self.stacked)

        def one(own: Mapping[str, Tensor], given: Any) -> Any:
            return call_model(
                lambda *args, **kwargs: functional_call(self._computes[0], dict(own), args, kwargs), given
            )

        with _attention(next(iter(tensors.values())).device):
            return vmap(one, in_dims=(0, along), randomness="different")(tensors, inputs)


def _attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a processor torch's fused attention cannot be stacked: it would run member by member, and warn."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
@allowed(max_norm=positive())
def clip_members_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each member's whole gradient to a norm of at most ``max_norm``, as if it were alone.

    Args:
        parameters: (K, ...) each; those without a gradient are passed over.
        max_norm: > 0.

    Returns:
        (K,) norms before.

    Raises:
        ValueError: no parameter has a gradient.

    Examples:
        >>> weights = torch.zeros(2, 2)
        >>> weights.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_members_([weights], 1.0)
        tensor([5.0000, 0.5000])
        >>> weights.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("no parameter has a gradient; call this between backward() and the optimizer's step")
    norms = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]), dim=0
    )
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
    for grad in grads:
        grad.mul_(factors.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)))
    return norms  # type: ignore[no-any-return]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that two modules share comes once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _with(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other tensors, of any shape and device. What modules share, they share again.

    ``Module.to("meta")`` would not do: it makes two of a tied weight.
    """
    old = _tensors(model)
    new = {
        id(tensor): nn.Parameter(tensors[name], requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensors[name]
        for name, tensor in old.items()
    }
    return copy.deepcopy(model, new)


def _check(models: Sequence[nn.Module]) -> None:
    if not models:
        raise ValueError("stacking needs at least one model, got none")
    first = {name: tuple(tensor.shape) for name, tensor in models[0].state_dict().items()}
    for number, model in enumerate(models[1:], start=1):
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if type(model) is not type(models[0]) or own.keys() != first.keys():
            raise ValueError(
                f"members must have one architecture: member 0 is a {type(models[0]).__name__} with {len(first)} "
                f"tensors, member {number} a {type(model).__name__} with {len(own)}; put others into a LogitEnsemble"
            )
        for name, shape in own.items():
            if shape != first[name]:
                raise ValueError(
                    f"members must have one shape: {name!r} is {first[name]} in member 0, {shape} in member {number}; "
                    "do they have one vocabulary and one width?"
                )
    if pair := equal_members(models):
        raise ValueError(
            f"members {pair[0]} and {pair[1]} have the same weights and would learn the same from the same data; "
            "build each with a seed of its own"
        )
