"""The loop on a real language model: SmolLM2 on sums, or the paper's Llama on its questions."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.alignment.cream.procedure import CREAM
from regularized.alignment.huggingface import chat_prompts, generate_responses
from regularized.alignment.sampling import Responses, pack_responses
from regularized.alignment.sequence_log_probs import next_token_logits, sequence_log_probs
from regularized.evidence.datasets import data_folder
from regularized.evidence.experiment import Measurements, Unavailable, data_fingerprint
from regularized.evidence.pretrained import smollm2, smollm2_tokenizer

__all__ = ["language"]

_SYSTEM = "You answer with the result alone."


def language(s: Mapping[str, Any], seed: int) -> Measurements:
    """Fine-tune on a few answers, then rounds on prompts without any; the accuracy of the likeliest answers.

    Raises:
        Unavailable: the model or its packages are not there; at paper scale, the data or a GPU.
    """
    model, tokenizer, questions = _llama(seed) if s["world"] == "llama3" else _smollm2(seed)
    parts, start = [], 0
    for size in (s["sft"], s["validation"], s["test"], *[s["prompts"]] * (s["rounds"] + 1)):
        parts.append(questions[start : start + size])
        start += size
    examples, held, test, *rounds = parts
    end = tokenizer.eos_token_id
    _freeze(model, s["blocks"])
    base = copy.deepcopy(model)
    _fine_tune(model, tokenizer, examples, s, seed)
    cream = CREAM(
        model,
        base,
        sample=partial(generate_responses, count=s["responses"], max_new_tokens=s["new_tokens"], end=end, pad=end),
        optimizer=partial(torch.optim.AdamW, lr=s["lr"], weight_decay=0.01),
        consistency=s["consistency"],
        beta=s["beta"],
        epochs=s["epochs"],
        batch_size=s["batch"],
        seed=seed,
    )

    def accuracy(of: Sequence[tuple[str, str]]) -> float:
        prompts = chat_prompts(tokenizer, [question for question, _ in of], system=_SYSTEM)
        written = generate_responses(
            cream.policy, prompts, count=1, max_new_tokens=s["new_tokens"], temperature=0.0, end=end, pad=end
        )
        return 100.0 * sum(_right(tokenizer, row[0], answer) for row, (_, answer) in zip(written.texts(), of)) / len(of)

    accuracies, agreements = [(1.0, accuracy(test))], []
    for number in range(1, s["rounds"] + 2):
        asked = chat_prompts(tokenizer, [question for question, _ in rounds[number - 1]], system=_SYSTEM)
        agreements.append((float(number), float(cream.collect(asked).agreement.mean())))
        if number <= s["rounds"]:
            cream.train()
            cream.finish_round()
            accuracies.append((number + 1.0, accuracy(test)))
    return Measurements(
        metrics={
            "final_accuracy": accuracies[-1][1],
            "validation_accuracy": accuracy(held),
            "ranking_consistency": agreements[-1][1],
            "mean_consistency": sum(value for _, value in agreements) / len(agreements),
        },
        curves={"accuracy": accuracies, "agreement": agreements},
        data=data_fingerprint(*(torch.tensor(list(f"{q} {a}".encode())).numpy() for q, a in questions[:start])),
        curve_unit="model",
    )


def _right(tokenizer: Any, written: Sequence[int], answer: str) -> bool:
    """Whether the first number or letter that is written is the answer."""
    text = tokenizer.decode(written, skip_special_tokens=True)
    found = re.search(r"-?\d+|[A-Z]\b", text)
    return found is not None and found.group() == answer


def _freeze(model: nn.Module, blocks: int) -> None:
    """Train the last blocks alone; 0 trains everything."""
    if blocks:
        inner: Any = model
        model.requires_grad_(False)
        for block in inner.model.layers[-blocks:]:
            block.requires_grad_(True)


def _fine_tune(
    model: nn.Module, tokenizer: Any, examples: Sequence[tuple[str, str]], s: Mapping[str, Any], seed: int
) -> None:
    """One epoch on answers that are right."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=s["sft_lr"])
    prompts = chat_prompts(tokenizer, [question for question, _ in examples], system=_SYSTEM)
    responses: list[list[Tensor]] = [
        [torch.tensor([*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])]
        for _, answer in examples
    ]
    data: Responses = pack_responses(prompts, responses)
    device = next(model.parameters()).device
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(s["batch"]):
        tokens, mask = (block[rows, 0].to(device) for block in (data.tokens, data.mask))
        optimizer.zero_grad()
        (-sequence_log_probs(next_token_logits(model, tokens), tokens, mask).mean()).backward()
        optimizer.step()


def _smollm2(seed: int) -> tuple[nn.Module, Any, list[tuple[str, str]]]:
    """SmolLM2-135M-Instruct in float32, and sums of two numbers below 100."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 100, (2000, 2), generator=draw).unique(dim=0)
    numbers = numbers[torch.randperm(len(numbers), generator=draw)]
    return (
        smollm2(torch.float32),
        smollm2_tokenizer(),
        [(f"What is {a} + {b}?", str(a + b)) for a, b in numbers.tolist()],
    )


def _llama(seed: int) -> tuple[nn.Module, Any, list[tuple[str, str]]]:
    folder = data_folder()
    model_folder, data = folder / "llama-3-8b-instruct", folder / "cream_questions.jsonl"
    if missing := [str(path) for path in (model_folder, data) if not path.exists()]:
        raise Unavailable(
            f"not here: {', '.join(missing)}. Put meta-llama/Meta-Llama-3-8B-Instruct and the questions of ARC, "
            "OpenBookQA, SIQA and GSM8K (one JSON object a line, with question and answer) there, or set "
            "REGULARIZED_DATA"
        )
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 120e9:
        raise Unavailable(
            "the paper scale trains an 8 B model beside two frozen ones and needs a GPU of 140 GB or more"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    questions = [(rows[k]["question"], str(rows[k]["answer"])) for k in order]
    return model.to("cuda"), AutoTokenizer.from_pretrained(model_folder), questions
