"""What stacked members cost: beside one model that sees as many samples in a step, and beside one after the other.

*One model*: a single member with K times the batch, so that each of its products is one large one with as many
multiplications as the members' together. *One after the other*: the K members take a step each, as a plain loop does.
The least that the second ratio can be is 1/K, where all but one member's work is hidden.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, on_first_call
from regularized.evidence.language_models import small_lm
from regularized.evidence.models import mlp, seeded
from regularized.overfitting.infinite_compute.optimizer import decay_groups
from regularized.overfitting.infinite_compute.procedure import EnsembleTraining, next_token_loss
from regularized.training.progress import Progress

_CLASSES = 64
Members = Callable[[int], list[nn.Module]]


def _language(width: int, layers: int, count: int) -> list[nn.Module]:
    return [small_lm(seed, _CLASSES, width=width, layers=layers, heads=2) for seed in range(count)]


def _perceptrons(width: int, count: int) -> list[nn.Module]:
    return [seeded(seed, mlp, [width, width, width, _CLASSES]) for seed in range(count)]


_adamw = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), fused=True)


def _together(members: Members, count: int, batch: tuple[Tensor, Tensor]) -> StepFunction:
    models = [model.to(device()) for model in members(count)]
    training = EnsembleTraining(models, optimizer=_adamw, weight_decay=1.6)
    progress = Progress(50, 100)

    def step() -> None:
        training.training_step(batch, progress=progress)

    return step


def _alone(model: nn.Module, x: Tensor, y: Tensor) -> StepFunction:
    """The same recipe for one model in a plain loop."""
    model.to(device())
    optimizer = _adamw(decay_groups(model, 1.6))

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _one_large(members: Members, batch: tuple[Tensor, Tensor]) -> StepFunction:
    return _alone(members(1)[0], *(tensor.flatten(0, 1) for tensor in batch))


def _in_turn(members: Members, count: int, batch: tuple[Tensor, Tensor]) -> StepFunction:
    steps = [_alone(model, *own) for model, *own in zip(members(count), *batch, strict=True)]

    def step() -> None:
        for one in steps:
            one()

    return step


def _build(
    members: Members, count: int, make: Callable[[], tuple[Tensor, Tensor]], beside: str
) -> tuple[StepFunction, StepFunction]:
    batch = make()
    plain = partial(_one_large, members, batch) if beside == "one" else partial(_in_turn, members, count, batch)
    return on_first_call(plain), on_first_call(partial(_together, members, count, batch))


def _text(count: int, windows: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(_CLASSES, (count, windows, length + 1), generator=torch.Generator().manual_seed(0)).to(
        device()
    )
    return tokens[..., :-1], tokens[..., 1:]


def _vectors(count: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(count, rows, width, generator=draws)
    return x.to(device()), torch.randint(_CLASSES, (count, rows), generator=draws).to(device())


def workloads() -> list[Workload]:
    """Small members, which leave a machine idle, and larger ones; each beside both."""
    sizes: list[tuple[str, Members, int, Callable[[], tuple[Tensor, Tensor]]]] = [
        ("8 decoders of width 16, 4 x 32 tokens each", partial(_language, 16, 1), 8, partial(_text, 8, 4, 32)),
        (
            "4 decoders of width 64, 2 layers, 8 x 64 tokens each",
            partial(_language, 64, 2),
            4,
            partial(_text, 4, 8, 64),
        ),
        ("8 perceptrons of width 256, batch 256 each", partial(_perceptrons, 256), 8, partial(_vectors, 8, 256, 256)),
    ]
    one = "beside one model on all samples: the products of one large one"
    turn = "beside one after the other"
    return [
        Workload(
            f"{name}, {words}",
            partial(_build, members, count, make, beside),
            floor=1.0 if beside == "one" else 1 / count,
        )
        for name, members, count, make in sizes
        for beside, words in (("one", one), ("turn", turn))
    ]
