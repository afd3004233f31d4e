"""Weights in shards over the processes: FSDP2, torch's ``fully_shard``, and what terms must say for it.

Each process holds a part of every parameter, of its gradient and of the optimizer's state; a block of the model is
gathered for its forward and backward pass. Whoever looks at a weight in between sees a shard, and many operations on it
are silently something else. So each term declares what it needs, as its attribute ``sharding``:

- ``"forward"``: it looks at the model only through forward passes (``step.output``, ``step.forward``, taps);
- ``"weights"``: its loss reads weights: they stay whole from the shared forward pass to the end of the backward pass;
- ``"gradients"``: its moments read or change weights or their gradients: around each of them both are gathered, and
  what was changed goes back.

One that declares nothing is refused. ``unsharded``, a sentence, says why a term cannot work with shards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.mechanisms.distributed import whole

__all__ = [
    "Sharded",
    "check_declared",
    "check_whole",
    "clip_sharded",
    "gathered",
    "is_sharded",
    "placed",
    "whole_weights",
]

NEEDS = ("forward", "weights", "gradients")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a part of it.

    Examples:
        >>> is_sharded(torch.ones(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def check_whole(parameters: Iterable[Tensor], owner: str) -> None:
    """Refuse weights that are in shards already: who looks at gradients or saves weights would see a part of them.

    Args:
        parameters: the weights.
        owner: whose they are, for the message.

    Raises:
        ValueError: one is in shards.

    Examples:
        >>> check_whole([torch.ones(2)], "the network")
    """
    if any(map(is_sharded, parameters)):
        raise ValueError(
            f"weights of {owner} are in shards: give it whole, without fully_shard. Terms train in shards, where "
            'Trainer makes them by Compute(sharding="fsdp2")'
        )


def check_declared(terms: Mapping[str, nn.Module]) -> None:
    """Make sure that every term says what it needs of weights in shards.

    Raises:
        ValueError: one says nothing, something unknown, or why it cannot.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> check_declared({"task": CrossEntropy()})
    """
    for name, term in terms.items():
        need, kind = getattr(term, "sharding", None), type(term).__name__
        if (why := getattr(term, "unsharded", None)) is not None:
            raise ValueError(f'term {name!r} ({kind}) cannot train with sharding="fsdp2": {why}. Give sharding="no"')
        if need is None:
            raise ValueError(
                f"term {name!r} ({kind}) does not say what it needs of weights in shards. Give it the attribute "
                'sharding = "forward" where it looks at the model through forward passes alone, "weights" where its '
                'loss reads weights, "gradients" where its moments read or change weights or gradients; or train with '
                'sharding="no"'
            )
        if need not in NEEDS:
            raise ValueError(f"sharding of term {name!r} ({kind}) must be one of {NEEDS}, got {need!r}")


class Sharded:
    """A model in shards, for a training with terms.

    Blocks are the entries of the outermost ``nn.ModuleList`` and ``nn.Sequential``; what is in none of them is one
    more. A parameter without dimensions stays whole.

    Args:
        model: the model, after all surgery; it is sharded in place, and its parameters are other objects afterwards.
        terms: by name.
        device: of the processes.

    Attributes:
        unsharded: parameters that stay whole, whose gradients are to be averaged.

    Raises:
        ValueError: a term declares nothing, see :func:`check_declared`.
    """

    def __init__(self, model: nn.Module, terms: Mapping[str, nn.Module], device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        check_declared(terms)
        needs = {str(term.sharding) for term in terms.values()}
        self.model = model
        self.reads_weights = bool(needs & {"weights", "gradients"})
        self.unsharded: list[nn.Parameter] = [p for p in model.parameters() if p.ndim == 0]
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*_blocks(model), model):
            fully_shard(module, mesh=mesh, ignored_params=set(self.unsharded))
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if self.reads_weights:
            root = self._parts[0]
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(False)

    def synchronise_gradients(self, last: bool) -> None:
        """Whether the next backward pass exchanges gradients: with the last micro-batch only."""
        self._parts[0].set_requires_gradient_sync(last)

    def reshard(self) -> None:
        """Let go of what a forward or backward pass has gathered."""
        for part in self._parts:
            part.reshard()

    def around(self, moments: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
        """The moments of terms, with whole weights and gradients where the term needs them."""
        return [
            self._gathering(moment) if getattr(cast(Any, moment).__self__, "sharding", None) == "gradients" else moment
            for moment in moments
        ]

    def _gathering(self, moment: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            with whole_weights(self.model):
                return moment(*arguments)

        return called


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Parts that are gathered one at a time; none of them shares a parameter with another part."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, nn.ModuleList):
                found.append(child)
            else:
                walk(child)

    walk(model)
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1

    def is_alone(block: nn.Module) -> bool:
        own: dict[int, int] = {}
        for _, p in block.named_parameters(remove_duplicate=False):
            own[id(p)] = own.get(id(p), 0) + 1
        return bool(own) and all(uses[key] == number for key, number in own.items())

    return [block for block in dict.fromkeys(found) if is_alone(block)]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, parameters in shards are whole, with whole gradients; what is changed in place goes back to the shards.

    All processes must enter, and do the same inside.

    Examples:
        >>> with whole_weights(nn.Linear(2, 2)):  # nothing to do in one process
        ...     pass
    """
    together: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and is_sharded(p):
                if id(p) not in together:
                    full = nn.Parameter(whole(p.detach()).clone(), requires_grad=p.requires_grad)
                    full.grad = None if p.grad is None else whole(p.grad).detach().clone()
                    together[id(p)] = (p, full)
                places.append((module, name, p))
                module._parameters[name] = together[id(p)][1]
    try:
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
        with torch.no_grad():
            for p, full in together.values():
                p.copy_(placed(full.detach(), p))
                p.grad = None if full.grad is None else placed(full.grad, p)


def gathered(tree: Any) -> Any:
    """A state whose tensors in shards are whole; all processes must ask.

    Examples:
        >>> gathered({"state": [torch.ones(1), 2]})
        {'state': [tensor([1.]), 2]}
    """
    if isinstance(tree, Tensor):
        return whole(tree.detach())
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(gathered(value) for value in tree)
    return tree


def placed(value: Any, like: Any) -> Any:
    """A whole tensor in shards as another one's, where that one is in shards and of the same shape.

    Every process has the whole; nothing is sent.

    Examples:
        >>> placed(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not (isinstance(value, Tensor) and isinstance(like, Tensor) and is_sharded(like) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    target = cast(Any, like)
    return distribute_tensor(value.detach().to(like.device), target.device_mesh, target.placements, src_data_rank=None)


def clip_sharded(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """As ``nn.utils.clip_grad_norm_``, for parameters of which some are in shards: one norm over all of them.

    Examples:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_sharded([weight], 1.0), [round(g, 4) for g in weight.grad.tolist()]
        (tensor(5.), [0.6, 0.8])
    """
    kinds = [[p for p in parameters if is_sharded(p) is kind and p.grad is not None] for kind in (True, False)]
    kinds = [held for held in kinds if held]
    norms = [whole(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in held])) for held in kinds]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for held in kinds:
        nn.utils.clip_grads_with_norm_(held, largest, norm)
    return norm
