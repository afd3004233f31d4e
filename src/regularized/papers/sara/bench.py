"""Cost of SaRA beside full fine-tuning with AdamW, and beside the nearest tuners of PEFT at equal trained weights."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, trained
from regularized.evidence.models import ResNet
from regularized.fine_tuning.sara.term import SaRA

ADAMW = partial(torch.optim.AdamW, lr=1e-4, weight_decay=1e-2)
VOCABULARY = 512


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same; heads of 64."""
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return out


class _LanguageModel(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to logits (B, T, vocabulary)."""
        logits: Tensor = self.head(self.blocks(self.embed(tokens)))
        return logits


def _language_model(width: int, depth: int) -> nn.Module:
    return placed(_LanguageModel, width, depth)


def _language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _image_loss(model: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), torch.arange(len(images), device=device()) % 10)


def _lazy(build: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], loss: Callable[[nn.Module], Tensor]) -> Any:
    """A step whose model is built when it is first taken: the other step's peak memory must not hold this model."""
    built: list[tuple[nn.Module, torch.optim.Optimizer]] = []

    def step() -> None:
        if not built:
            built.append(build())
        model, optimizer = built[0]
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _full(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    return model, ADAMW(model.parameters())


def _sara(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    sara = SaRA(model, **{"reselect_at": 0, "lambda_rank": 0, **settings})
    return model, sara.bind(ADAMW(sara.parameters()))


def _peft(make: Callable[[], nn.Module], config: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    from peft import get_peft_model

    model = get_peft_model(make(), config)
    return model, ADAMW(trained(model))


def _against_full(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    batch: Callable[[], Tensor],
    **settings: Any,
) -> tuple[StepFunction, StepFunction]:
    inputs = batch().to(device())
    of = partial(_of, loss, inputs)
    return _lazy(partial(_full, make), of), _lazy(partial(_sara, make, **settings), of)


def _of(loss: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor, model: nn.Module) -> Tensor:
    return loss(model, inputs)


_LINEAR = ("qkv", "out", "up", "down")


def _against_peft(
    width: int, depth: int, tokens: tuple[int, int], tuner: str, rank: int
) -> tuple[StepFunction, StepFunction]:
    """SHiRA trains ``rank (m + n)`` entries of every m x n matrix; SaRA and Super-Tuning here get as many in all."""
    from peft import ShiraConfig, SupertuningConfig

    make = partial(_language_model, width, depth)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    fraction = rank * sum(m + n for m, n in shapes) / sum(m * n for m, n in shapes)
    config: Any
    if tuner == "shira":
        config = ShiraConfig(r=rank, target_modules=list(_LINEAR), random_seed=0)
    else:
        config = SupertuningConfig(sparsity=1 - fraction, select_top=False, target_modules=list(_LINEAR))
    of = partial(_of, _language_loss, torch.randint(VOCABULARY, tokens).to(device()))
    include = [f"*.{name}.weight" for name in _LINEAR]
    return _lazy(partial(_peft, make, config), of), _lazy(partial(_sara, make, fraction=fraction, include=include), of)


def workloads() -> list[Workload]:
    """Language model and convolutions, plain and with the penalty; a case that is mostly weights; PEFT."""
    small, large = partial(_language_model, 256, 4), partial(_language_model, 768, 6)
    text = partial(torch.randint, VOCABULARY, (8, 129))
    images = partial(torch.randn, 16, 3, 32, 32)

    def net() -> nn.Module:
        return placed(ResNet, (2, 2, 2, 2), 10, width=32)

    rows = [
        Workload(
            "LM d 256, L 4, T 128, B 8; 5 % trained", partial(_against_full, small, _language_loss, text, fraction=0.05)
        ),
        Workload(
            "the same with the penalty (SVD)",
            partial(_against_full, small, _language_loss, text, fraction=0.05, lambda_rank=5e-3),
            "one polar factor of up to 256 x 1024 a step",
        ),
        Workload("ResNet-18 w 32, 3x32x32, B 16; 10 %", partial(_against_full, net, _image_loss, images, fraction=0.1)),
        Workload(
            "LM d 768, L 6, T 16, B 1; 5 %: mostly weights",
            partial(_against_full, large, _language_loss, partial(torch.randint, VOCABULARY, (1, 17)), fraction=0.05),
            "where the memory shows: 43M weights, AdamW holds three more tensors for each that is trained",
        ),
    ]
    if find_spec("peft") is not None:
        for tuner, name in (("shira", "SHiRA"), ("supertuning", "Super-Tuning")):
            note = f"ratio to PEFT's {name}, equally many trained weights of the same matrices"
            rows += [
                Workload(
                    f"beside {name}: LM d 256, L 4, T 128, B 8",
                    partial(_against_peft, 256, 4, (8, 129), tuner, 9),
                    note,
                ),
                Workload(
                    f"beside {name}: LM d 768, L 6, T 16, B 1", partial(_against_peft, 768, 6, (1, 17), tuner, 16), note
                ),
            ]
    return rows
