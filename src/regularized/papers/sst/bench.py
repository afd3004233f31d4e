"""Cost of SST beside full-rank training with Adam, with its draws and decompositions too, and beside PEFT's LoRA."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, on_first_call, placed, stepper, trained
from regularized.evidence.language_models import next_token_loss, small_lm
from regularized.pretraining.sst.term import SST

ADAM = partial(torch.optim.Adam, lr=1e-3)
VOCABULARY = 1024

Finish = Callable[[nn.Module, torch.Tensor], StepFunction]
"""From a new model and its batch to a training step."""


def _full(model: nn.Module, windows: torch.Tensor) -> StepFunction:
    return stepper(lambda: next_token_loss(model, windows), ADAM(trained(model)))


def _sst(model: nn.Module, windows: torch.Tensor, **settings: Any) -> StepFunction:
    sst = SST(model, target_modules=["blocks"], **settings)
    return stepper(lambda: next_token_loss(model, windows), sst.bind(ADAM(trained(model))))


def _lora(model: nn.Module, windows: torch.Tensor, *, rank: int) -> StepFunction:
    from peft import LoraConfig, get_peft_model

    names = ["query", "key", "value", "output", "gate", "up", "down"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, modules_to_save=["embedding", "norm", "head"])
    wrapped: Any = get_peft_model(model, config)
    return stepper(lambda: next_token_loss(wrapped.base_model.model, windows), ADAM(trained(wrapped)))


def _pair(
    width: int, layers: int, batch: tuple[int, int], plain: Finish, method: Finish, *, steps: int = 1
) -> tuple[StepFunction, StepFunction]:
    """Both of equal models on equal windows; a step of the bench is ``steps`` steps of training."""
    windows = torch.randint(VOCABULARY, (batch[0], batch[1] + 1)).to(device())

    def build(finish: Finish) -> StepFunction:
        model = placed(partial(small_lm, 0), VOCABULARY, width=width, layers=layers, heads=max(2, width // 64))
        step = finish(model, windows)

        def all_of_them() -> None:
            for _ in range(steps):
                step()

        return all_of_them

    return on_first_call(partial(build, plain)), on_first_call(partial(build, method))


def _floor(width: int, layers: int, rows: int, rank: int) -> float:
    """What the layers of the blocks need more than plain ones, over all products of a step."""
    model = small_lm(0, VOCABULARY, width=width, layers=layers, heads=2)
    shapes = [tuple(linear.weight.shape) for linear in model.blocks.modules() if isinstance(linear, nn.Linear)]
    dense = sum(6 * rows * o * i for o, i in shapes)
    needed = sum(
        min(
            6 * rows * o * i + 6 * o * i * min(o, i) + 2 * o * i * rank,
            (4 * rows * min(o, i) + 2 * rows * rank) * (o + i),
        )
        for o, i in shapes
    )
    return (needed + 6 * rows * width * VOCABULARY) / (dense + 6 * rows * width * VOCABULARY)


def workloads() -> list[Workload]:
    """Few and many rows for a weight, all that an iteration and a round end with, memory, and the nearest adapter."""

    def row(width: int, layers: int, batch: tuple[int, int], rank: int, note: str = "") -> Workload:
        size = f"LM d {width}, L {layers}, {batch[0]} x {batch[1]} tokens, r {rank}"
        floor = _floor(width, layers, batch[0] * batch[1], rank)
        return Workload(size, partial(_pair, width, layers, batch, _full, partial(_sst, rank=rank)), note, floor)

    often = partial(_sst, rank=64, steps_per_iteration=5, iterations_per_round=2, warmup_steps=1)
    never = partial(_sst, rank=64, steps_per_iteration=None)
    rows = [
        row(256, 4, (16, 64), 16, "4 rows for each direction"),
        row(128, 4, (64, 64), 8, "32 rows for each direction"),
        row(768, 6, (1, 32), 48, "mostly weights: the factors are twice the weights, gradients and moments 13 %"),
        Workload(
            "LM d 128, L 4, 8 x 64 tokens, r 64: 10 steps",
            partial(_pair, 128, 4, (8, 64), never, often, steps=10),
            "ratio of SST with two draws and a decomposition in 10 steps to SST without; the paper: 12, one in 2,400",
            floor=1.0,
        ),
    ]
    if find_spec("peft") is not None:
        lora = partial(_lora, rank=16)
        rows.append(
            Workload(
                "beside LoRA: LM d 256, L 4, 16 x 64 tokens, r 16",
                partial(_pair, 256, 4, (16, 64), lora, partial(_sst, rank=16)),
                "ratio to PEFT's LoRA of the same rank on frozen weights",
                floor=1.0,
            )
        )
    return rows
