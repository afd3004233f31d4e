"""Where Learning from the Undesirable steps to: the adapter itself, an adapter beside it, or offsets of hidden states.

Each kind owns the tensors that go uphill, its *variables*. In the clean pass they are where they do nothing, so that
one backward pass gives both the gradient of the loss and the direction uphill; in the other pass they are displaced.

======================  =====================================================================
paper, code             here
======================  =====================================================================
theta itself (code)     :class:`OwnStep`, ``aux="self"``: the parameters that are trained
phi (paper)             :class:`AuxiliaryLoRA`, ``aux="lora"``: ``y + scale * (x A^T) B^T``, B = 0
d_l (RepS)              :class:`Steering`, ``aux="steering"``: ``h_l + d_l`` at each layer, d = 0
======================  =====================================================================
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice, allowed, count

__all__ = ["AuxiliaryLoRA", "OwnStep", "Steering", "steer"]

Kind: TypeAlias = Literal["plain", "normalised"]


def steer(hidden: Tensor, direction: Tensor, *, mix: float | None = None) -> Tensor:
    """Hidden states pushed along a direction.

    Args:
        hidden: h, (..., d).
        direction: d, broadcast against ``hidden``.
        mix: None, the sum ``h + d`` (paper); a number alpha, ``h / |h| + alpha d / |d|``, scaled back to the length of
            h (official code).

    Returns:
        (..., d).

    Examples:
        >>> h, d = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 2.0])
        >>> steer(h, d)
        tensor([[3., 6.]])
        >>> steer(h, d, mix=0.5).norm()
        tensor(5.)
    """
    if mix is None:
        return hidden + direction
    mixed = F.normalize(hidden, dim=-1) + mix * F.normalize(direction, dim=-1)
    steered: Tensor = F.normalize(mixed, dim=-1) * hidden.norm(dim=-1, keepdim=True)
    return steered


class OwnStep(nn.Module):
    """The trained parameters themselves take the step: what the published numbers were made with.

    Raises:
        ValueError: nothing in the model is trainable.

    Examples:
        >>> step = OwnStep()
        >>> step.bind(nn.Linear(2, 1, bias=False), ())
        >>> weight = nn.Parameter(torch.ones(1, 2))
        >>> step.displace({"weight": weight}, [torch.tensor([[0.0, 0.5]])])["weight"]
        tensor([[1.0000, 1.5000]], requires_grad=True)
    """

    starts_at_zero = True

    def bind(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Look at the model once; ``layers`` are the names whose hidden states are compared."""

    def start(self, model: nn.Module) -> None:
        """Put hooks on the model for the clean pass."""

    def stop(self) -> None:
        """Take them off."""

    def variables(self, trained: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """The tensors that go uphill; after the clean backward pass ``.grad`` of each is the direction."""
        return list(trained.values())

    def names(self, trained: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of the variables, in their order."""
        return list(trained)

    def displace(self, trained: Mapping[str, nn.Parameter], offsets: Sequence[Tensor]) -> dict[str, Tensor]:
        """New leaves of the trained parameters for the perturbed pass; here displaced by the offsets."""
        with torch.no_grad():
            moved = torch._foreach_add(list(trained.values()), list(offsets))
        return {name: tensor.requires_grad_() for name, tensor in zip(trained, moved, strict=True)}

    def settle(self) -> None:
        """Back to where the variables do nothing."""

    def open(self) -> None:
        """For a pass that finds the direction alone: variables that a gradient can reach, from where they start."""


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Widths of input and output of a linear layer; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # transformers' own linear layer, its weight transposed
        weight = module.weight
        return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) else None
    return None


def _linear_layers(model: nn.Module) -> Iterator[str]:
    """Linear layers by name, without the parts of PEFT's adapters and without the head on top of a language model."""
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    for name, module in model.named_modules():
        owner = next((prefix for prefix in wrapped if name.startswith(prefix)), None)
        of_adapter = owner is not None and not name.removeprefix(owner).startswith("base_layer")
        if _features(module) is not None and module is not head and not of_adapter:
            yield name


def _leaves(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The same storage as leaves of their own: gradients arrive there, past the hooks of the parameters (DDP)."""
    return {name: parameter.detach().requires_grad_() for name, parameter in trained.items()}


class AuxiliaryLoRA(nn.Module):
    """A low-rank adapter beside each linear layer takes the step, and is never saved with the model.

    ``A`` is drawn once, as LoRA does; ``B`` starts at 0 in each step, so that the whole step lands in it. With targets
    that are quantised or carry an adapter of PEFT already, it is added to the output of the inner linear layer.

    Args:
        rank: width r; default 8, the authors' for the adapter that they train.
        scale: factor on the product; default 2, their alpha / r = 16 / 8.
        targets: names of the linear layers; default all of the model but the output head of a transformers model.
        seed: of the draw of A; default 0.

    Raises:
        ValueError: rank below 1; at ``bind``, no linear layer, or a name that is none.

    Examples:
        >>> aux = AuxiliaryLoRA(rank=2)
        >>> aux.bind(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), ())
        >>> {name: tuple(tensor.shape) for name, tensor in aux.state_dict().items()}
        {'A.0': (2, 3), 'A.1': (2, 4)}
    """

    @allowed(rank=count(1))
    def __init__(
        self, *, rank: int = 8, scale: float = 2.0, targets: Iterable[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.seed = seed
        self.targets: tuple[str, ...] | None = None if targets is None else tuple(targets)
        self.A: nn.ParameterList = nn.ParameterList()
        self._widths: list[int] = []
        self._start: list[Tensor] | None = None
        self._now: tuple[list[Tensor], list[Tensor]] | None = None
        self._handles: list[Any] = []

    @property
    def starts_at_zero(self) -> bool:
        """Whether the adapter does nothing in the clean pass."""
        return self._start is None

    def bind(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Find the targets and draw A for each; once."""
        if self._widths:
            return
        if self.targets is None:
            self.targets = tuple(_linear_layers(model))
        modules = dict(model.named_modules())
        wrong = [name for name in self.targets if name not in modules or _features(modules[name]) is None]
        if wrong or not self.targets:
            raise ValueError(
                f"AuxiliaryLoRA needs linear layers as targets; {wrong or 'the model has none'}. Linear layers here: "
                f"{list(_linear_layers(model))[:12]}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        for name in self.targets:
            width_in, width_out = _features(modules[name]) or (0, 0)
            like = next((p for p in modules[name].parameters() if p.is_floating_point()), torch.empty(0))
            bound = 1 / math.sqrt(width_in)  # kaiming_uniform_(a=sqrt(5)), as LoRA initialises A
            a = (2 * torch.rand(self.rank, width_in, generator=generator) - 1) * bound
            self.A.append(nn.Parameter(a.to(like.device, torch.promote_types(like.dtype, torch.float32)), False))
            self._widths.append(width_out)

    def load(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
        """Start each step from a given adapter instead of B = 0; the direction then needs a pass of its own.

        Args:
            A: (r, in) by target.
            B: (out, r) by target.
        """
        assert self.targets is not None
        for own, name in zip(self.A, self.targets, strict=True):
            own.data = A[name].detach().clone()
        self._start = [B[name].detach().clone() for name in self.targets]

    def start(self, model: nn.Module) -> None:
        """See :meth:`OwnStep.start`."""
        if self._handles:
            return
        self.settle()
        modules = dict(model.named_modules())
        assert self.targets is not None
        for i, name in enumerate(self.targets):
            self._handles.append(modules[name].register_forward_hook(self._hook(i)))

    def stop(self) -> None:
        """See :meth:`OwnStep.stop`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now = None

    def settle(self) -> None:
        """Back to B = 0; an adapter that was loaded, which would do something, is left out."""
        if self.starts_at_zero:
            self.open()
        else:
            self._now = None

    def open(self) -> None:
        """See :meth:`OwnStep.open`."""
        if self._start is None:
            zeros = [a.new_zeros(width, self.rank) for a, width in zip(self.A, self._widths)]
            self._now = ([a.detach() for a in self.A], [b.requires_grad_() for b in zeros])
        else:
            both = (list(self.A), self._start)
            a, b = ([t.detach().clone().requires_grad_() for t in tensors] for tensors in both)
            self._now = (a, b)

    def variables(self, trained: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """B of each target, after A where both move."""
        assert self._now is not None
        a, b = self._now
        return b if self.starts_at_zero else [*a, *b]

    def names(self, trained: Mapping[str, nn.Parameter]) -> list[str]:
        """``A.target`` and ``B.target``."""
        assert self.targets is not None
        return [f"{matrix}.{name}" for matrix in ("B" if self.starts_at_zero else "AB") for name in self.targets]

    def displace(self, trained: Mapping[str, nn.Parameter], offsets: Sequence[Tensor]) -> dict[str, Tensor]:
        """The adapter moves, the trained parameters stay."""
        self.open()
        assert self._now is not None
        a = self._now[0]
        with torch.no_grad():
            moved = list(torch._foreach_add(self.variables(trained), list(offsets)))
        self._now = (a, moved) if self.starts_at_zero else (moved[: len(a)], moved[len(a) :])
        return _leaves(trained)

    def _hook(self, i: int) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._now is None:
                return None
            a, b = self._now[0][i], self._now[1][i]
            x = args[0].to(a.dtype)
            if self.starts_at_zero and b.requires_grad:
                x = x.detach()  # nothing flows back to the input through B = 0: only the gradient of B is wanted
            return output + F.linear(F.linear(x, a), self.scale * b).to(output.dtype)

        return hook


class Steering(nn.Module):
    """One offset for each layer whose hidden states are compared takes the step (the paper's RepS).

    Cheap, since no second set of weights is needed.

    Args:
        kind: ``"plain"``, the paper's ``h + d``, default; ``"normalised"`` keeps the length of each hidden state, as
            the official code does, with the same direction uphill.

    Raises:
        ValueError: ``kind`` is neither; at ``bind``, the layers are no submodules.

    Examples:
        >>> Steering(kind="normalised").kind
        'normalised'
    """

    starts_at_zero = True

    @allowed(kind=Choice("plain", "normalised"))
    def __init__(self, *, kind: Kind = "plain") -> None:
        super().__init__()
        self.kind: Kind = kind
        self.alpha: float = 1.0
        self._layers: tuple[str, ...] = ()
        self._zeros: dict[str, Tensor] = {}
        self._offsets: dict[str, Tensor] | None = None
        self._handles: list[Any] = []

    def bind(self, model: nn.Module, layers: Sequence[str]) -> None:
        """See :meth:`OwnStep.bind`."""
        if not layers:
            raise ValueError('steering needs layers that are submodules, not layers="hidden_states"; name them')
        self._layers = tuple(layers)

    def start(self, model: nn.Module) -> None:
        """See :meth:`OwnStep.start`."""
        if self._handles:
            return
        self.settle()
        modules = dict(model.named_modules())
        for name in self._layers:
            self._handles.append(modules[name].register_forward_hook(self._hook(name)))

    def stop(self) -> None:
        """See :meth:`OwnStep.stop`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.settle()

    def settle(self) -> None:
        """Back to offsets of 0."""
        self._zeros, self._offsets = {}, None

    def open(self) -> None:
        """See :meth:`OwnStep.open`."""
        self.settle()

    def variables(self, trained: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """The offsets, in the order of the layers."""
        return [self._zeros[name] for name in self._layers]

    def names(self, trained: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of the layers."""
        return list(self._layers)

    def displace(self, trained: Mapping[str, nn.Parameter], offsets: Sequence[Tensor]) -> dict[str, Tensor]:
        """The hidden states move, the trained parameters stay."""
        self._offsets = dict(zip(self._layers, offsets, strict=True))
        return _leaves(trained)

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            if self._offsets is None:
                if name not in self._zeros:
                    dtype = torch.promote_types(hidden.dtype, torch.float32)
                    self._zeros[name] = hidden.new_zeros(hidden.shape[-1], dtype=dtype).requires_grad_()
                steered = hidden + self._zeros[name].to(hidden.dtype)
            else:
                mix = self.alpha if self.kind == "normalised" else None
                steered = steer(hidden, self._offsets[name].to(hidden.dtype), mix=mix)
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        return hook


# -- by name ---------------------------------------------------------------------------------------

Aux: TypeAlias = Literal["self", "lora", "steering"] | OwnStep | AuxiliaryLoRA | Steering

_PUBLISHED = {OwnStep: 5.0, AuxiliaryLoRA: 5.0, Steering: 0.1}  # beta in the official scripts


def auxiliary(aux: Aux) -> OwnStep | AuxiliaryLoRA | Steering:
    """What takes the step, by its name; an object of one of the classes is taken as it is."""
    if isinstance(aux, OwnStep | AuxiliaryLoRA | Steering):
        return aux
    kinds: dict[str, Callable[[], OwnStep | AuxiliaryLoRA | Steering]] = {
        "self": OwnStep,
        "lora": AuxiliaryLoRA,
        "steering": Steering,
    }
    if aux not in kinds:
        raise ValueError(f"aux must be one of {sorted(kinds)}, or an object of their classes, got {aux!r}")
    return kinds[aux]()


def published_strength(aux: nn.Module) -> float:
    """The weight of the penalty that the authors use with this kind of step."""
    return next(value for kind, value in _PUBLISHED.items() if isinstance(aux, kind))
