"""Cost of annealed training beside plain training and its rivals, of packed layers, and of the Hessian traces.

The model is a Llama of width 256 with 4 layers (28 linear layers that are quantized) and 512 token ids, 3.3 million
weights, 8 x 128 tokens a step, everything in float32: the size at which the official layer takes 2.44 times as long.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regularized.compression.hestia.files import save_packed
from regularized.compression.hestia.layer import anneal_weights, annealed_weights
from regularized.compression.hestia.packed import pack_weights
from regularized.compression.hestia.traces import Probes, hessian_traces
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, on_first_call, stepper
from regularized.evidence.language_models import LanguageModel, next_token_loss, small_lm
from regularized.papers.hestia.quantized_training import quantized_training

VOCABULARY, LR = 512, 1e-4
Build = Callable[[], LanguageModel]
_wide = partial(small_lm, 0, VOCABULARY, width=256, layers=4, heads=4, hidden=640)
_narrow = partial(small_lm, 0, VOCABULARY, width=32, layers=2, heads=2)


def _windows(count: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (count, length + 1), generator=generator).to(device())


def _plain() -> StepFunction:
    model, windows = _wide().to(device()), _windows(8, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    return stepper(lambda: next_token_loss(model, windows), optimizer)


def _annealed(pressure: float, temperature: float, group_size: int) -> StepFunction:
    model, windows = _wide().to(device()), _windows(8, 128)
    anneal_weights(model, group_size=group_size, exclude=["head"])
    for weight in annealed_weights(model).values():
        weight.set(pressure=pressure, temperature=temperature)
    return stepper(lambda: next_token_loss(model, windows), torch.optim.AdamW(model.parameters(), lr=LR))


def _parq() -> StepFunction:
    """In the middle of its annealing, with a scale for each row."""
    model, windows = _wide().to(device()), _windows(8, 128)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"]
    settings = {"quantizer": "parq", "steps": 100_000, "lr": LR}
    training = quantized_training(model, settings, traces=dict.fromkeys(layers, 1.0), head="head", group_size=-1)
    return stepper(lambda: next_token_loss(model, windows), training.optimizer)


def _pair(
    plain: Callable[[], StepFunction], method: Callable[[], StepFunction]
) -> Callable[[], tuple[StepFunction, StepFunction]]:
    return lambda: (on_first_call(plain), on_first_call(method))


# -- packed -------------------------------------------------------------------------------------------


def _hard() -> LanguageModel:
    model = _wide().to(device()).eval()
    anneal_weights(model, group_size=128, exclude=["head"])
    pack_weights(model)
    return model


def _forward(build: Build, tokens: int) -> StepFunction:
    model, windows = build().eval(), _windows(1, tokens - 1)

    @torch.no_grad()
    def step() -> None:
        model(windows)

    return step


def _dense() -> LanguageModel:
    return _wide().to(device())


def _bytes() -> tuple[float, float]:
    """Of the files of the whole model, embedding and head included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(_wide().state_dict(), folder / "dense.safetensors")
        save_packed(_hard(), folder / "packed")
        packed = sum(file.stat().st_size for file in (folder / "packed").iterdir())
        return (folder / "dense.safetensors").stat().st_size, packed


# -- traces -------------------------------------------------------------------------------------------


def _traces(probes: Probes) -> StepFunction:
    model, windows = _narrow().to(device()), _windows(8, 64)

    def step() -> None:
        hessian_traces(
            model, next_token_loss, [windows], sketch=1, queries=1, batches=1, probes=probes, exclude=["head"]
        )

    return step


def workloads() -> list[Workload]:
    """Training beside plain training and beside PARQ; forward passes from codes; traces."""
    size = "Llama d 256, 4 layers, 8 x 128 tokens"
    return [
        Workload(
            f"{size}, pressure 0.5, one scale a tensor",
            _pair(_plain, partial(_annealed, 0.5, 0.3, 0)),
            "the first fifth of training; the official layer takes 2.44 times as long here",
        ),
        Workload(f"{size}, pressure 1, groups of 128", _pair(_plain, partial(_annealed, 1.0, 0.3, 128))),
        Workload(
            f"{size}, beside torchao's PARQ",
            _pair(_parq, partial(_annealed, 1.0, 0.3, -1)),
            "a PARQ step counts as 1; a scale a row in both",
        ),
        Workload(
            "forward pass from codes, 1 x 512 tokens",
            _pair(partial(_forward, _dense, 512), partial(_forward, _hard, 512)),
            "28 weights are unpacked in each; size: files of the whole model",
            floor=1.0,
            kept=_bytes,
        ),
        Workload(
            "forward pass from codes, 1 token",
            _pair(partial(_forward, _dense, 1), partial(_forward, _hard, 1)),
            "unpacking is nearly all of it",
            floor=1.0,
        ),
        Workload(
            "Hessian traces of 14 layers, joint probes beside one layer at a time",
            _pair(partial(_traces, "exact"), partial(_traces, "joint")),
            "the official way counts as 1; Llama d 32, 8 x 64 tokens",
            floor=1 / 14,
        ),
    ]
