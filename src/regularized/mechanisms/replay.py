"""Keep what a forward pass was given and what its layers said, and run it again with other tensors for the weights.

Methods that compare a network with a changed copy of itself need the same pass twice: the same inputs, the same dropout
masks, the same precision, other weights. A :class:`ForwardRecorder` watches a model in anybody's loop, and
:meth:`~ForwardRecorder.replay` runs a recorded pass once more with substituted tensors. No weight is written to.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from regularized.mechanisms.ascent import frozen_statistics
from regularized.mechanisms.taps import Taps

__all__ = ["ForwardRecorder", "RecordedForward", "find_layers"]

T = TypeVar("T")

HIDDEN_STATES = "hidden_states"


@dataclass(slots=True)
class RecordedForward:
    """One forward pass of a model, as it was called.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        hidden: hidden states by layer, without graph.
        mask: what the recorder was told about the valid positions, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    _random: tuple[Tensor, ...] = ()
    _autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    def is_of(self, inputs: Any) -> bool:
        """Whether this pass was given these very inputs (a tensor, a tuple, or a mapping)."""
        given = [*_tensors(self.args), *_tensors(self.kwargs)]
        return any(a is b or a.data_ptr() == b.data_ptr() for a in given for b in _tensors(inputs))


def find_layers(model: nn.Module, layers: Sequence[int | str] | str = "all") -> tuple[str, ...]:
    """Names of the layers whose outputs count as hidden states.

    Args:
        model: searched through.
        layers: ``"all"``, the blocks of the longest ``nn.ModuleList`` of equal parts (a transformer's layers); or a
            sequence of positions in it (negative from the end) and of dotted names.

    Raises:
        ValueError: no blocks are found, or a position is out of range, or there is no submodule of a name.

    Examples:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
        >>> find_layers(model), find_layers(model, [0, -1])
        (('layers.0', 'layers.1', 'layers.2'), ('layers.0', 'layers.2'))
    """
    if isinstance(layers, str) and layers != "all":
        raise ValueError(
            f'layers must be "all", "{HIDDEN_STATES}", or a sequence of names or positions, got {layers!r}'
        )
    if not isinstance(layers, str) and not layers:
        raise ValueError('layers is empty: name at least one submodule, or use layers="all"')
    blocks: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(part) for part in module}) != 1:
            continue
        if name.startswith(seen):  # experts inside a block, say; outer lists come first
            continue
        seen = (*seen, f"{name}.".lstrip("."))
        if len(module) > len(blocks):
            blocks = tuple(f"{name}.{i}".lstrip(".") for i in range(len(module)))
    if not blocks and (isinstance(layers, str) or any(isinstance(layer, int) for layer in layers)):
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"{type(model).__name__} has no list of equal blocks, so its hidden states are not known; name the layers, "
            f"for example layers={names[:1]} (submodules: {names[:12]})"
        )
    if isinstance(layers, str):
        return blocks
    for layer in layers:
        if isinstance(layer, int) and not -len(blocks) <= layer < len(blocks):
            raise ValueError(
                f"layer {layer} is out of range: the model has {len(blocks)} blocks ({blocks[0]} ... {blocks[-1]})"
            )
    return tuple(blocks[layer] if isinstance(layer, int) else layer for layer in layers)


class ForwardRecorder:
    """Record forward passes of a model in training, and run them again.

    Between :meth:`start` and :meth:`stop` the model has hooks; apart from that it is as it was. Only passes in training
    mode with gradients are recorded; ``strict`` makes any other one an error.

    Args:
        model: the model itself, not a wrapper such as DDP.
        layers: names of submodules whose outputs are hidden states; ``"hidden_states"`` takes those that a
            transformers model returns with ``output_hidden_states=True``.

    Raises:
        ValueError: a name is not a submodule.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
        >>> recorder = ForwardRecorder(model, ["1"])
        >>> recorder.start()
        >>> out = model(torch.ones(5, 3))
        >>> passed = recorder.take()[0]
        >>> same = recorder.replay(passed, {}, lambda hidden: hidden["1"])
        >>> torch.equal(same, passed.hidden["1"])  # the same dropout mask
        True
        >>> recorder.stop()
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | str) -> None:
        self.model = model
        self.layers: str | tuple[str, ...] = layers if isinstance(layers, str) else tuple(layers)
        self.mask: Tensor | None = None
        self.strict = False
        self.listening: bool = True
        self._runner = _Runner(model)
        self._passes: list[RecordedForward] = []
        self._open: RecordedForward | None = None
        self._taps: Taps | None = None
        self._handles: list[Any] = []
        if not isinstance(self.layers, str):
            Taps(model, self.layers).remove()  # complains now of a name that is not there

    @property
    def started(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def start(self) -> None:
        """Put the hooks on the model, if they are not there yet."""
        if self.started:
            return
        model = self.model
        names = () if isinstance(self.layers, str) else self.layers
        self._taps = Taps(model, names)
        self._handles = [
            model.register_forward_pre_hook(self._before(), with_kwargs=True),
            model.register_forward_hook(self._after()),
        ]

    def stop(self) -> None:
        """Take the hooks off the model, and forget what was not taken."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        self._passes, self._open = [], None

    def take(self) -> list[RecordedForward]:
        """The passes recorded since the last time."""
        passes, self._passes = self._passes, []
        return passes

    def replay(
        self,
        recorded: RecordedForward,
        tensors: Mapping[str, Tensor],
        then: Callable[[Mapping[str, Tensor]], T],
    ) -> T:
        """Run a recorded pass again with other tensors in the place of parameters.

        Inputs, dropout masks and autocast are those of the recorded pass; running statistics stay as they are, and so
        does the global random state. A transformers model computes no loss, and logits of one position only.

        Args:
            recorded: the pass.
            tensors: by name of the parameter; what is not named is the model's own.
            then: called with the hidden states, while the tensors are still in place: activation checkpointing computes
                parts of the pass again in the backward pass, which belongs here therefore.

        Returns:
            What ``then`` returned.
        """
        listening, self.listening = self.listening, False
        try:
            result: T = functional_call(
                self._runner,
                {f"model.{name}": tensor for name, tensor in tensors.items()},
                (self, recorded, then),
            )
        finally:
            self.listening = listening
        return result

    def call(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The model's output with other tensors in the place of parameters; not recorded."""
        listening, self.listening = self.listening, False
        try:
            with frozen_statistics(self.model):
                return functional_call(self.model, dict(tensors), args, kwargs)
        finally:
            self.listening = listening

    # -- hooks ---------------------------------------------------------------------------------------

    def _before(self) -> Callable[..., None]:
        # Closures, not methods: a deep copy of the model (an average, say) would copy a method's object along.
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not self.model or not self.listening:
                return
            if not (module.training and torch.is_grad_enabled()):
                if self.strict:
                    raise RuntimeError(
                        "a forward pass to be recorded must be one of training: the model is in "
                        + ("evaluation mode; call model.train()" if not module.training else "no_grad; leave it out")
                    )
                return
            device = next((t.device for t in (*_tensors(args), *_tensors(kwargs))), torch.device("cpu"))
            assert self._taps is not None
            self._taps.clear()
            self._open = RecordedForward(
                args, dict(kwargs), mask=self.mask, _random=_random_state(device), _autocast=_autocast_state(device)
            )

        return hook

    def _after(self) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            recorded, self._open = self._open, None
            if module is not self.model or recorded is None:
                return
            recorded.hidden = {name: state.detach() for name, state in self._states(output).items()}
            self._passes.append(recorded)
            assert self._taps is not None
            self._taps.clear()

        return hook

    def _states(self, output: Any) -> Mapping[str, Tensor]:
        if self.layers == HIDDEN_STATES:
            states = output.get(HIDDEN_STATES) if isinstance(output, Mapping) else getattr(output, HIDDEN_STATES, None)
            if not states:
                raise ValueError(
                    "the model returned no hidden states; call it with output_hidden_states=True (or set it in its "
                    "config), or name layers=[...] whose outputs are read"
                )
            return {str(i): state for i, state in enumerate(states)}
        assert self._taps is not None
        states = dict(self._taps.states)
        missing = [name for name in self.layers if name not in states]
        if missing:
            raise ValueError(
                f"the forward pass did not go through {missing[:3]}: name layers that it uses. A model that "
                "torch.compile has replaced does not call them; give the model itself, and compile its layers"
            )
        return states


class _Runner(nn.Module):
    """Holds the model one storey below, so that its tensors stay substituted until the backward pass is done."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._signatures: dict[type[nn.Module], bool] = {}

    def forward(
        self,
        recorder: ForwardRecorder,
        recorded: RecordedForward,
        then: Callable[[Mapping[str, Tensor]], Any],
    ) -> Any:
        """Replay inside the substitution."""
        assert recorder._taps is not None
        kind, dtype, enabled = recorded._autocast
        kwargs = recorded.kwargs
        if self._keeps_logits():  # hidden states are wanted, not a vocabulary's worth of logits for each token
            kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
            kwargs["logits_to_keep"] = 1
        recorder._taps.clear()
        with _random(recorded._random), frozen_statistics(self.model):
            # Without the cache: it would keep casts of tensors that live for this pass only.
            with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False) if enabled else nullcontext():
                output = self.model(*recorded.args, **kwargs)
            states = recorder._states(output)
            recorder._taps.clear()
            del output
            return then(states)

    def _keeps_logits(self) -> bool:
        unwrap = getattr(self.model, "get_base_model", None)
        base = unwrap() if callable(unwrap) else self.model  # PEFT
        kind = type(base)
        if kind not in self._signatures:
            # The class's own: Accelerate wraps the method of the instance.
            self._signatures[kind] = "logits_to_keep" in inspect.signature(kind.forward).parameters
        return self._signatures[kind]


# -- what a pass depends on besides weights and inputs ------------------------------------------------


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    state = torch.get_rng_state()
    if device.type == "cpu":
        return (state,)
    # The host keeps it: nothing waits for the device.
    return (state, torch.get_device_module(device).get_rng_state(device))


@contextmanager
def _random(state: tuple[Tensor, ...]) -> Iterator[None]:
    """The random state of a recorded pass inside; what it was outside afterwards."""
    accelerator = torch.accelerator.current_accelerator() if len(state) > 1 else None
    before = _random_state(torch.device("cpu") if accelerator is None else torch.device(accelerator.type))
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    accelerator = torch.accelerator.current_accelerator() if len(state) > 1 else None
    if accelerator is not None:
        torch.get_device_module(accelerator).set_rng_state(state[1])


def _autocast_state(device: torch.device) -> tuple[str, torch.dtype, bool]:
    kind = device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
