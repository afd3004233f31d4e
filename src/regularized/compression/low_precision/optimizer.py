"""Any torch optimizer with weights and states in few bits, and steps in float32.

``LowPrecisionOptimizer(torch.optim.AdamW(...), states="8bit")`` is 8-bit AdamW: before a step the states of some
parameters are decoded, the optimizer makes its step with them, and they are encoded again, a few parameters at a time.
So it is the same optimizer, whichever it is, up to what rounding loses.

Second moments are never negative, and have a codebook without a sign. In 4 bits theirs has no zero either: the step
divides by their root.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regularized.compression.low_precision.blocking import padded
from regularized.compression.low_precision.blocks import Scaled
from regularized.compression.low_precision.codebook import Codebook, dynamic_tree, evenly_above_zero
from regularized.compression.low_precision.elements import Element, element
from regularized.compression.low_precision.formats import Encoded, Format, pack_nibbles, unpack_nibbles
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.rounding import ROUNDINGS, RandomStream, Rounder, Rounding
from regularized.mechanisms.ranges import Choice, at_least, count

__all__ = ["STATE_FORMATS", "LowPrecisionOptimizer", "StateFormat", "join_float32", "split_float32"]

States: TypeAlias = Literal["8bit", "4bit", "fp8"]

_NOT_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta"})
_AT_ONCE = 1 << 22  # values whose states are in float32 at the same time; more parameters wait for their turn


@dataclass(frozen=True, slots=True)
class StateFormat:
    """How an optimizer's states are kept.

    Args:
        signed: elements of first moments and all else that may be negative, in [-1, 1].
        unsigned: elements of second moments, in [0, 1].
        block: values that share a float32 scale.

    Examples:
        >>> form = STATE_FORMATS["8bit"]
        >>> m = torch.linspace(-1, 1, 1000)
        >>> bool((form.decode(form.encode(m, "exp_avg"), "exp_avg", m.shape) - m).abs().max() < 0.02)
        True
    """

    signed: Element
    unsigned: Element
    block: int

    def _form(self, name: str) -> Scaled:
        return Scaled(self.unsigned if name in _NOT_NEGATIVE else self.signed, self.block)

    def encode(self, state: Tensor, name: str) -> Encoded:
        """Codes, two a byte in 4 bits, and scales of a float32 state, flattened."""
        form = self._form(name)
        rows = padded(state.flatten(), self.block, 0).view(-1, self.block)
        scales = form.scales(rows.abs().amax(1))  # of what is not finite it is NaN, and says so when it is decoded
        codes = _codes(form.elements, rows / scales[:, None]).flatten()
        return Encoded(pack_nibbles(codes) if self.signed.bits == 4 else codes, (scales,))

    def decode(self, encoded: Encoded, name: str, shape: torch.Size) -> Tensor:
        """The state, float32."""
        codes, (scales,) = encoded
        if self.signed.bits == 4:
            codes = unpack_nibbles(codes, scales.numel() * self.block)
        flat = self._form(name).decode(Encoded(codes, (scales.unsqueeze(-1),)))
        return flat[: shape.numel()].view(shape)


def _codes(form: Element, x: Tensor) -> Tensor:
    """Codes without a look for NaN, which would make every step wait for the device."""
    return form.nearest(x) if isinstance(form, Codebook) else form.codes(form.cast(x, Rounder()))


STATE_FORMATS: Mapping[str, StateFormat] = MappingProxyType(
    {
        # Blocks of 256 and 128 as in bitsandbytes and torchao today; the papers have 2,048 and 128.
        "8bit": StateFormat(dynamic_tree(8), dynamic_tree(8, signed=False), 256),
        "4bit": StateFormat(dynamic_tree(4, 3), evenly_above_zero(4), 128),
        "fp8": StateFormat(element("e4m3"), element("e4m3"), 256),
    }
)
"""By name."""


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16, rounded to nearest, and the 16 bits that are missing.

    Args:
        x: float32, finite.

    Returns:
        bfloat16 and int16 of the same shape.

    Examples:
        >>> x = torch.randn(5)
        >>> bool((join_float32(*split_float32(x)) == x).all())
        True
    """
    pattern = x.contiguous().view(torch.int32)
    high = (pattern + 0x8000) >> 16
    rest = pattern - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def join_float32(high: Tensor, rest: Tensor) -> Tensor:
    """What :func:`split_float32` has split, bit for bit.

    Args:
        high: bfloat16.
        rest: int16.
    """
    return ((high.contiguous().view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


class LowPrecisionOptimizer(Optimizer):
    """An optimizer whose weights or states are kept in few bits.

    It shares groups and state with the one that it is given, and takes its place: in schedulers, gradient scalers,
    :class:`~regularized.training.trainer.Trainer`. Codes and scales lie in the state under names such as
    ``exp_avg.codes``, and ``draws`` is how often a parameter was rounded at random: a run that goes on from a
    checkpoint goes on bit for bit.

    Args:
        optimizer: any that works parameter by parameter (not LBFGS).
        weights: the format that weights are rounded to after each step, or the name of one; a group may have its own
            under ``"weights"``. ``"bf16_residual"`` keeps what bfloat16 parameters lack of float32 in 16 bits beside
            them. Default None: as they are.
        rounding: of the weights; default ``"stochastic"``: to nearest, an update below half a step is lost.
        states: ``"8bit"``, ``"4bit"``, ``"fp8"`` or a :class:`StateFormat`; default None: as they are.
        smallest: tensors with fewer values keep their states whole; default 4,096, bitsandbytes'.
        seed: of the draws. Processes that hold copies of the same weights need the same.

    Raises:
        TypeError: LBFGS; or ``optimizer`` is none.
        ValueError: no such format; fp16 parameters, which are no place to keep weights; vectors (biases, norms) that
            would be rounded to fewer than 8 bits and whose group does not say so.

    Examples:
        >>> layer = nn.Linear(64, 64)
        >>> inner = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        >>> optimizer = LowPrecisionOptimizer(inner, weights="bf16", states="8bit")
        >>> layer(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[layer.weight])
        ['draws', 'exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq.codes', 'exp_avg_sq.scale', 'step']
        >>> bool((layer.weight.bfloat16() == layer.weight).all())
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        weights: Format | str | None = None,
        rounding: Rounding = "stochastic",
        states: States | StateFormat | None = None,
        smallest: int = 4096,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS looks at all parameters at once; LowPrecisionOptimizer takes them one by one")
        ROUNDINGS("rounding", rounding)
        at_least(0)("smallest", smallest)
        count(0)("seed", seed)
        if isinstance(states, str):
            Choice(*STATE_FORMATS)("states", states)
            states = STATE_FORMATS[states]
        self.inner: Optimizer = optimizer
        self.residual: bool = weights == "bf16_residual"
        self.weights: Format | None = None if weights is None or self.residual else as_format(weights)
        self.rounding: Rounding = rounding
        self.states: StateFormat | None = states
        self.smallest = smallest
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()
        self.seed = seed
        for group in self.param_groups:
            for p in group["params"]:
                self._check(p, group)

    def _share(self) -> None:
        """One list of groups and one state for both."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _check(self, p: Tensor, group: Mapping[str, Any]) -> None:
        form = self._format(group)
        if p.dtype == torch.float16:
            raise ValueError(
                "a parameter is float16, which is no place to keep weights: updates vanish and large ones overflow. "
                "Keep them in float32 and let autocast make float16 of them, or in bfloat16 with weights='bf16'"
            )
        if self.residual and p.dtype != torch.bfloat16:
            raise ValueError(
                f"weights='bf16_residual' is for bfloat16 parameters, got {p.dtype}; model.bfloat16() first"
            )
        if form is not None and form.bits < 8 and p.ndim < 2 and "weights" not in group:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)}, a bias or of a normalisation, would be rounded to "
                f"{form.name}; put such parameters into a group with weights=None, or with that format if you mean it"
            )

    def _format(self, group: Mapping[str, Any]) -> Format | None:
        given = group.get("weights", self.weights)
        return None if given is None else as_format(given)

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the optimizer; with a closure, of the gradients that it leaves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.inner.param_groups
        numbers = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        try:
            for group, some in self._portions(groups):
                self._step(group, some, numbers)
        finally:
            self.inner.param_groups = groups
        return loss

    def _portions(self, groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        for group in groups:
            some: list[nn.Parameter] = []
            values = 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                if some and values + p.numel() > _AT_ONCE:
                    yield group, some
                    some, values = [], 0
                some.append(p)
                values += p.numel()
            if some:
                yield group, some

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter], numbers: Mapping[Tensor, int]) -> None:
        masters = [self._master(p, self._format(group)) for p in parameters]
        for p, master in zip(parameters, masters):
            state = self.state.pop(p, None)
            if state is not None:
                self.state[master] = self._decoded(state, p.shape)
        self.inner.param_groups = [{**group, "params": masters}]
        self.inner.step()
        form = self._format(group)
        for p, master in zip(parameters, masters):
            state = self.state.pop(master, {})
            if self.residual:
                high, state["residual"] = split_float32(master)
                p.copy_(high)
            elif form is not None:
                p.copy_(form.rounded(master, self._rounder(state, numbers[p], p.device)))
            self.state[p] = self._encoded(state, p.shape)

    def _master(self, p: nn.Parameter, form: Format | None) -> nn.Parameter:
        """What the inner optimizer steps: the parameter itself, or a float32 copy of one in half precision."""
        if p.dtype.itemsize > 2 or not (self.residual or form is not None):
            return p
        residual = self.state[p].pop("residual", None) if p in self.state else None
        master = nn.Parameter(p.float() if residual is None else join_float32(p, residual))
        assert p.grad is not None
        master.grad = p.grad.float()
        return master

    def _rounder(self, state: dict[str, Any], number: int, device: torch.device) -> Rounder:
        """What is drawn depends on the seed, the parameter's number and how often it was rounded before."""
        if self.rounding != "stochastic":
            return Rounder(self.rounding)
        stream = RandomStream(self.seed, key=number, position=int(state.get("draws", 0)))
        drawn = stream.next(device)
        state["draws"] = torch.tensor(stream.position)  # stays on the processor: reading it must not wait
        return Rounder("stochastic", generator=drawn)

    def _encoded(self, state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        if self.states is None or shape.numel() < self.smallest:
            return state
        stored: dict[str, Any] = {}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape and value.ndim:
                codes, (scale,) = self.states.encode(value.float(), name)
                stored |= {f"{name}.codes": codes, f"{name}.scale": scale}
            else:
                stored[name] = value
        return stored

    def _decoded(self, state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        if self.states is None:
            return state
        whole = {name: value for name, value in state.items() if "." not in name}
        for key, codes in state.items():
            name, _, part = key.rpartition(".")
            if part == "codes":
                whole[name] = self.states.decode(Encoded(codes, (state[f"{name}.scale"],)), name, shape)
        return whole

    # -- state -------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of all states together."""
        values = [v for state in self.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(v.numel() * v.element_size() for v in values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; codes and scales keep their types."""
        self.inner.load_state_dict(state_dict)
        self._share()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":  # torch has made the parameter's type of it
                    self.state[p][name] = value.detach().clone().to("cpu" if name == "draws" else p.device)
