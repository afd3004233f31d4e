"""Cost of a SORSA step beside a step of PEFT's LoRA of the same rank, and of the start beside PiSSA's.

The model is a Llama of width 256 with 4 layers (28 linear layers) and 512 tokens in its vocabulary, 8 x 128 tokens a
step, rank 16, everything in float32.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, trained
from regularized.evidence.pretrained import tiny_llama
from regularized.fine_tuning.sorsa.peft import inject
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty

RANK, LR = 16, 3e-5
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _base() -> nn.Module:
    model: Any = tiny_llama(0, vocab_size=512, width=256, layers=4)
    model.to(device())
    return model  # type: ignore[no-any-return]


def _lora(base: nn.Module, start: Any = True) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_PROJECTIONS, init_lora_weights=start)
    return peft.get_peft_model(base, config)


def _trainer(model: nn.Module, penalty: OrthonormalPenalty | None = None) -> StepFunction:
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    tokens = torch.randint(512, (8, 128), generator=torch.Generator().manual_seed(0)).to(device())

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if penalty is not None:
            penalty.add_gradient()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _step() -> tuple[StepFunction, StepFunction]:
    adapted = inject(_base(), _PROJECTIONS, r=RANK)
    return _trainer(_lora(_base())), _trainer(adapted, OrthonormalPenalty(adapted, lr=LR))


def _start(niter: int | None) -> tuple[StepFunction, StepFunction]:
    base = _base()
    pissa = "pissa" if niter is None else f"pissa_niter_{niter}"

    def theirs() -> None:
        _lora(copy.deepcopy(base), pissa)

    def ours() -> None:
        inject(copy.deepcopy(base), _PROJECTIONS, r=RANK, niter=niter)

    return theirs, ours


def workloads() -> list[Workload]:
    """A training step, and the decomposition of all layers at the start, exact and randomised."""
    return [
        Workload(
            "training step, Llama d 256, 4 layers, 8 x 128 tokens, r 16, beside PEFT's LoRA",
            _step,
            "an unpenalised LoRA step of the same rank counts as 1",
        ),
        Workload("start, exact decomposition of 28 weights, beside PEFT's PiSSA", partial(_start, None), floor=1.0),
        Workload("start, niter=4, beside PEFT's pissa_niter_4", partial(_start, 4), floor=1.0),
    ]
