"""Cost of emulated formats beside plain training, of optimizer states in few bits, and of the cast beside torchao's."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from regularized.compression.low_precision.blocks import MX
from regularized.compression.low_precision.convert import convert
from regularized.compression.low_precision.optimizer import LowPrecisionOptimizer, States
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, on_first_call, perceptron, placed, stepper
from regularized.evidence.language_models import next_token_loss, small_lm

ADAMW = partial(torch.optim.AdamW, lr=1e-4)
SGD = partial(torch.optim.SGD, lr=1e-3)
VOCABULARY = 1024


def _language_model(width: int, layers: int) -> nn.Module:
    return small_lm(0, VOCABULARY, width=width, layers=layers, heads=width // 64).to(device())


def _stack(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(2)))


def _converted(model: nn.Module, recipe: str) -> nn.Module:
    convert(model, recipe, exclude=["head"])
    return model


def _language(recipe: str, width: int, layers: int, tokens: tuple[int, int]) -> tuple[StepFunction, StepFunction]:
    windows = torch.randint(VOCABULARY, tokens, generator=torch.Generator().manual_seed(0)).to(device())

    def step(model: nn.Module) -> StepFunction:
        return stepper(lambda: next_token_loss(model, windows), ADAMW(model.parameters()))

    return (
        on_first_call(lambda: step(_language_model(width, layers))),
        on_first_call(lambda: step(_converted(_language_model(width, layers), recipe))),
    )


def _linear(recipe: str, width: int, rows: int) -> tuple[StepFunction, StepFunction]:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device())

    def step(model: nn.Module) -> StepFunction:
        return stepper(lambda: model(x).square().mean(), SGD(model.parameters()))

    return step(placed(_stack, width)), step(_converted(placed(_stack, width), recipe))


def _small(recipe: str) -> tuple[StepFunction, StepFunction]:
    x, y = batch((100, 784))
    models = placed(perceptron), _converted(placed(perceptron), recipe)
    plain, method = (classifier_step(model, x, y, SGD) for model in models)
    return plain, method


def _states(states: States, width: int, layers: int) -> tuple[StepFunction, StepFunction]:
    windows = torch.randint(VOCABULARY, (4, 129), generator=torch.Generator().manual_seed(0)).to(device())

    def step(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> StepFunction:
        model = _language_model(width, layers)
        return stepper(lambda: next_token_loss(model, windows), wrap(ADAMW(model.parameters())))

    return (
        on_first_call(lambda: step(lambda inner: inner)),
        on_first_call(lambda: step(lambda inner: LowPrecisionOptimizer(inner, states=states))),
    )


def _kept(states: States, width: int, layers: int) -> tuple[int, int]:
    """Bytes of the states after a step."""
    sizes = []
    for few in (False, True):
        model = _language_model(width, layers)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = LowPrecisionOptimizer(ADAMW(model.parameters()), states=states if few else None)
        optimizer.step()
        sizes.append(optimizer.state_bytes())
    return sizes[0], sizes[1]


def _beside_torchao() -> tuple[StepFunction, StepFunction]:
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)).to(device())
    form = MX("e4m3")

    def theirs() -> Tensor:
        scale, codes = to_mx(x, torch.float8_e4m3fn, 32)
        out: Tensor = to_dtype(codes, scale, torch.float8_e4m3fn, 32, torch.float32)
        return out

    assert torch.equal(theirs(), form.quantize(x)), "they give other values"
    return lambda: _done(theirs()), lambda: _done(form.quantize(x))


def _done(x: Tensor) -> None:
    """A step gives nothing back."""


def workloads() -> list[Workload]:
    """Wide and narrow models, the worst case, other recipes, states, and the cast alone beside torchao's."""
    rows = [
        Workload(
            "mxfp8, 2 linear layers of width 1024, 512 rows",
            partial(_linear, "mxfp8", 1024, 512),
            "where the three products are nearly all of a step",
            floor=1.1,
        ),
        Workload("mxfp8, LM d 256, L 2, T 128, B 4", partial(_language, "mxfp8", 256, 2, (4, 129)), floor=1.25),
        Workload(
            "mxfp8, MLP 784-256-10, B 100",
            partial(_small, "mxfp8"),
            "the worst case: a step of a millisecond",
            floor=2.0,
        ),
        Workload(
            "mxfp4_random, LM d 256, L 2, T 128, B 4",
            partial(_language, "mxfp4_random", 256, 2, (4, 129)),
            "a random number for every value of the four backward operands, and six rotations",
            floor=1.5,
        ),
    ]
    for states, floor in (("8bit", 1.1), ("4bit", 1.1)):
        rows.append(
            Workload(
                f"AdamW with {states} states, LM d 256, L 2, T 128, B 4",
                partial(_states, states, 256, 2),  # type: ignore[arg-type]
                "size: bytes of the states",
                floor=floor,
                kept=partial(_kept, states, 256, 2),  # type: ignore[arg-type]
            )
        )
    if find_spec("torchao") is not None:
        rows.append(
            Workload(
                "MXFP8 cast and back, 2048 x 1024, beside torchao's",
                _beside_torchao,
                "ratio to torchao's emulation in eager mode, equal values",
                floor=1.0,
            )
        )
    return rows
