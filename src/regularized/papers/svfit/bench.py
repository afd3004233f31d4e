"""Cost of a training step and of the start, beside PEFT's LoRA, PEFT's PiSSA and full fine-tuning in the same run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper, trained
from regularized.fine_tuning.svfit.layer import Rank
from regularized.fine_tuning.svfit.model import svfit_param_groups

_ATTENTION = ("q_proj", "v_proj")


def _language_model(width: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return cast(nn.Module, LlamaForCausalLM(config))


def _step(model: nn.Module, parameters: Sequence[Any], tokens: torch.Tensor) -> StepFunction:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    return stepper(lambda: cast(Any, model)(input_ids=tokens, labels=tokens).loss, optimizer)


def _lora(model: nn.Module, targets: Sequence[str], rank: int, initial: Any = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=initial)
    return cast(nn.Module, get_peft_model(cast(Any, model), config))


def _svfit(model: nn.Module, targets: Sequence[str], rank: Rank) -> nn.Module:
    from regularized.fine_tuning.svfit.peft import inject

    return cast(nn.Module, inject(model, targets, r=rank))


def _beside_lora(
    width: int, layers: int, batch: int, length: int, lora_rank: int | None, rank: Rank
) -> tuple[StepFunction, StepFunction]:
    """One step of LoRA (or of full fine-tuning, where there is no rank), and one of SVFit, both on PEFT."""
    tokens = torch.randint(512, (batch, length)).to(device())
    build = partial(_language_model, width, layers)
    plain, method = placed(build), _svfit(placed(build), _ATTENTION, rank)
    if lora_rank is not None:
        plain = _lora(plain, _ATTENTION, lora_rank)
    return _step(plain, trained(plain), tokens), _step(method, svfit_param_groups(method), tokens)


def _starts(width: int, layers: int, rank: int) -> tuple[StepFunction, StepFunction]:
    """PiSSA's exact decomposition in PEFT, and ours, each on layers that have no adapter yet."""

    def start(put: Callable[[nn.Module, Sequence[str], int], nn.Module]) -> StepFunction:
        weights = [nn.Linear(width, width, bias=False, device=device()) for _ in range(layers)]
        names = [str(k) for k in range(layers)]

        def one() -> None:
            model = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device()) for _ in weights))
            model.load_state_dict({f"{k}.weight": source.weight for k, source in enumerate(weights)})
            put(model, names, rank)

        return one

    return start(lambda m, names, r: _lora(m, names, r, "pissa")), start(_svfit)


def workloads() -> list[Workload]:
    """The same rank; the nearest number of parameters; full fine-tuning; the decomposition."""
    same = "adapters on query and value; the same frozen products, no gradients of the factors"
    return [
        Workload(
            "Llama width 256, 4 layers, B 8 x 128, r 16, beside LoRA r 16",
            partial(_beside_lora, 256, 4, 8, 128, 16, 16),
            same,
            floor=1.0,
        ),
        Workload(
            "the same, r full, beside LoRA r 1 (the nearest size, twice the parameters)",
            partial(_beside_lora, 256, 4, 8, 128, 1, "full"),
            "4 weights' worth of extra products in 8 of 28 layers, folded once a step",
            floor=1.1,
        ),
        Workload(
            "the same, r full, beside full fine-tuning",
            partial(_beside_lora, 256, 4, 8, 128, None, "full"),
            "no gradient of the other weights",
            floor=0.8,
        ),
        Workload(
            "start: 2 weights of 1024 x 1024, r 16, beside PiSSA (exact)",
            partial(_starts, 1024, 2, 16),
            "one decomposition of each weight; ours also takes its SHA-256, which matters less the larger it is",
            floor=1.0,
        ),
    ]
