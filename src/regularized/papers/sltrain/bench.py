"""What SLTrain costs beside dense training with Adam, and beside GaLore: time and memory of a step, bytes kept.

The language models are LLaMA of 20, 60 and 130 million weights, the latter two the paper's, in bfloat16, with one short
text in a step, as in its figure of memory: peaks are what they are measured for, and with so few tokens, building the
weights is most of the time. *Per layer* means that each parameter has an optimizer of its own, which steps as soon as
the gradient is there and frees it, as in that figure and in GaLore's package. The figure has moments of 8 bits beside
that, ours are bfloat16: on a processor bitsandbytes makes float32 copies of whole tensors, which is more than it saves.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, on_first_call, stepper
from regularized.evidence.language_models import LanguageModel, next_token_loss
from regularized.evidence.models import seeded
from regularized.pretraining.sltrain.model import convert

_LLAMA = {
    "LLaMA 20M": {"width": 256, "layers": 4, "heads": 4, "hidden": 688},
    "LLaMA 60M": {"width": 512, "layers": 8, "heads": 8, "hidden": 1376},
    "LLaMA 130M": {"width": 768, "layers": 12, "heads": 12, "hidden": 2048},
}
_RANKS = {"LLaMA 20M": 64, "LLaMA 60M": 128, "LLaMA 130M": 256}
_VOCABULARY, _TOKENS = 32_000, 64

Adam = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0, fused=True)


def _galore() -> Any:
    """GaLore's own AdamW, where its package and transformers are; without its 8-bit sibling, which needs bitsandbytes.

    Imported here and not in a step: what an import takes is no memory of the step.
    """
    spec = find_spec("galore_torch")
    if spec is None or spec.origin is None or find_spec("transformers") is None:
        return None
    package = ModuleType("galore_torch")  # its __init__ would import bitsandbytes
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules.setdefault("galore_torch", package)
    return import_module("galore_torch.adamw").AdamW


GaLore = _galore()
if sys.platform == "linux":
    # glibc keeps freed blocks of up to 32 MB for itself and cuts them up; here each tensor goes back when it is freed,
    # so that the peak of the process is that of its tensors. M_MMAP_THRESHOLD is -3.
    ctypes.CDLL(None).mallopt(-3, 65_536)


def _layer(rank: int, *, convert_it: bool) -> StepFunction:
    """One layer of width 1,024 with 4,096 tokens a step."""
    model = seeded(0, nn.Sequential, nn.Linear(1024, 1024, bias=False))
    if convert_it:
        convert(model, rank=rank, include=[""], generator=torch.Generator().manual_seed(0))
    model.to(device())
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)).to(device()).requires_grad_(True)
    return stepper(lambda: model(x).square().mean(), Adam(model.parameters()))


def _model(name: str, *, convert_it: bool) -> LanguageModel:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # from the start, so that building the model is no peak
    try:
        model = seeded(0, LanguageModel, _VOCABULARY, **_LLAMA[name])
    finally:
        torch.set_default_dtype(usual)
    assert isinstance(model, LanguageModel)
    if convert_it:
        convert(model, rank=_RANKS[name], generator=torch.Generator().manual_seed(0))
    return model.to(device())


def _language_step(
    name: str, *, convert_it: bool, optimize: Callable[[LanguageModel], Callable[[Tensor], None]]
) -> StepFunction:
    model = _model(name, convert_it=convert_it)
    windows = torch.randint(_VOCABULARY, (1, _TOKENS + 1), generator=torch.Generator().manual_seed(0)).to(device())
    update = optimize(model)
    return lambda: update(next_token_loss(model, windows))


def _at_once(model: LanguageModel) -> Callable[[Tensor], None]:
    optimizer = Adam(model.parameters())

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def _per_layer(model: LanguageModel, make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Callable[[Tensor], None]:
    """Each parameter is updated within the backward pass, and its gradient freed."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(partial(_take_step, make(parameter)))
    return lambda loss: loss.backward()


def _take_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _adam_per_layer(model: LanguageModel) -> Callable[[Tensor], None]:
    return _per_layer(model, lambda parameter: Adam([parameter]))


def _galore_per_layer(name: str, model: LanguageModel) -> Callable[[Tensor], None]:
    """As its package does it: the layers of the blocks through projections of the same rank, the rest by Adam."""
    projected = {id(m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)}
    settings = {"rank": _RANKS[name], "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}

    def make(parameter: nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [parameter], **(settings if id(parameter) in projected else {})}
        made: torch.optim.Optimizer = GaLore([group], lr=3e-3, no_deprecation_warning=True)
        return made

    return _per_layer(model, make)


def _kept(name: str) -> tuple[float, float]:
    """Bytes of the state dict, positions included."""
    dense, converted = (
        _bytes(_model(name, convert_it=convert_it).state_dict().values()) for convert_it in (False, True)
    )
    return dense, converted


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.nbytes for t in tensors))


def _pair(plain: Callable[[], StepFunction], method: Callable[[], StepFunction]) -> tuple[StepFunction, StepFunction]:
    return on_first_call(plain), on_first_call(method)


def _beside(name: str, words: str, plain: Any, method: Any, note: str = "") -> Workload:
    return Workload(
        f"{name}, {words}",
        partial(
            _pair,
            partial(_language_step, name, convert_it=False, optimize=plain),
            partial(_language_step, name, convert_it=True, optimize=method),
        ),
        note,
        floor=_floor(_RANKS[name], _TOKENS),
        kept=partial(_kept, name),
    )


def _floor(rank: int, tokens: int) -> float:
    """Of a converted layer: the weight is built twice, and two thin products are added to those of the gradient."""
    return 1 + 8 * rank / (6 * tokens)


def workloads() -> list[Workload]:
    """A layer at many tokens, for the time; the paper's models with few, for the memory, beside Adam and GaLore."""
    rows = [
        Workload(
            f"one layer 1024 x 1024, rank {rank}, 4,096 tokens",
            partial(_pair, partial(_layer, rank, convert_it=False), partial(_layer, rank, convert_it=True)),
            floor=_floor(rank, 4096),
        )
        for rank in (128, 256)
    ]
    rows.append(_beside("LLaMA 60M", "Adam in both", _at_once, _at_once))
    figure = "the paper's figure, with 8-bit moments: 0.49 of the memory at 350M, 0.42 at 1B, 0.27 at 7B"
    rows += [
        _beside(name, "Adam per layer beside Adam", _at_once, _adam_per_layer, figure)
        for name in ("LLaMA 60M", "LLaMA 130M")
    ]
    if GaLore is not None:
        without = "equal rank; GaLore's decompositions, one in 200 steps, are not in its time"
        rows += [
            _beside(name, "Adam per layer beside GaLore's", partial(_galore_per_layer, name), _adam_per_layer, without)
            for name in ("LLaMA 20M", "LLaMA 60M")
        ]
    return rows
