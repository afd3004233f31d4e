"""Cost of a step with LfU, beside plain LoRA training of the same model with stock PEFT."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, stepper, trained
from regularized.fine_tuning.lfu.regularizer import LfU

VOCABULARY, LENGTH, BATCH = 512, 128, 8


def _language_model(width: int, layers: int) -> nn.Module:
    """A random Llama with a LoRA of rank 8 and scale 2 on all linear layers of its blocks."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError('the bench of lfu needs PEFT: pip install "regularized[peft]"') from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=4 * width,
        use_cache=False,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model: nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    return model.to(device()).train()


def _build(width: int, layers: int, settings: dict[str, Any]) -> tuple[StepFunction, StepFunction]:
    plain, regularized = _language_model(width, layers), _language_model(width, layers)
    tokens = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device())
    ids, other = tokens[0], tokens[1]
    other_batch = bool(settings.get("other_batch"))
    lfu = LfU(regularized, **{k: v for k, v in settings.items() if k != "other_batch"})
    optimizers = [torch.optim.AdamW(trained(model), lr=1e-4) for model in (plain, regularized)]

    def loss(model: Any, batch: Tensor) -> Tensor:
        value: Tensor = model(input_ids=batch, labels=batch).loss
        return value

    def method_step() -> None:
        if other_batch:
            lfu.ascend(lambda model: loss(model, other))
        with lfu.record():
            value = loss(regularized, ids)
        value.backward()
        lfu.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    return stepper(lambda: loss(plain, ids), optimizers[0]), method_step


def workloads() -> list[Workload]:
    """The three kinds of step on the same batch, and the direction from another batch."""
    size = "LM d 256, L 4, T 128, B 8, vocab 512, LoRA r 8"
    build = partial(_build, 256, 4)
    return [
        Workload(size, partial(build, {}), "the adapter itself steps, same batch: two forwards, two backwards"),
        Workload(
            f"{size}, auxiliary LoRA",
            partial(build, {"aux": "lora"}),
            "a LoRA of rank 8 beside every linear layer steps: in the clean pass its product with B = 0 comes on top",
        ),
        Workload(f"{size}, steering", partial(build, {"aux": "steering"}), "one offset a layer steps"),
        Workload(
            f"{size}, another batch",
            partial(build, {"other_batch": True}),
            "the direction from a batch of its own, as the official code has it: three forwards, three backwards",
            floor=3.0,
        ),
    ]
