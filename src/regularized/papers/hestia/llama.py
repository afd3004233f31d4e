"""The paper's scale: Llama-3.2-1B goes on for 8.3 billion tokens and ends with ternary weights in all but its head.

Wanted under ``REGULARIZED_DATA`` (default ``~/.cache/regularized/data``), nothing is downloaded::

    llama-3.2-1b/             meta-llama/Llama-3.2-1B in the layout of transformers, with its tokenizer
    ultra-fineweb.bin         openbmb/Ultra-FineWeb, at least 8.3 billion of that tokenizer's tokens as uint32
    wikitext-2-test.txt       the raw test text of WikiText-2

and transformers and a CUDA GPU of 80 GB; an arm takes about two days there. Group size 128, AdamW (0.9, 0.95) with
weight decay 0.01, clipping at 1, warm-up 5 % and decay 10 % to a tenth, 256 windows of 1,024 tokens a step, as in the
paper; bfloat16 autocast on float32 weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.hestia.layer import freeze_weights
from regularized.compression.hestia.traces import hessian_traces
from regularized.evidence.experiment import Measurements, data_fingerprint
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.papers.hestia.quantized_training import Training, quantized_training

__all__ = ["run_llama"]

BATCH, MICRO_BATCH, CONTEXT, GROUP = 256, 8, 1024, 128
WARM_UP, DECAY, FLOOR = 0.05, 0.1, 0.1
CALIBRATION = (5, 512)  # batches of one window, and tokens of it: the official code


def run_llama(s: Mapping[str, Any], seed: int) -> Measurements:
    """One arm.

    Args:
        s: settings of arm and scale.
        seed: of the order of the windows and the probes.

    Raises:
        Unavailable: with all that is missing.
    """
    root = need_files(
        {
            "llama-3.2-1b": "meta-llama/Llama-3.2-1B, after its licence is accepted on huggingface.co",
            "ultra-fineweb.bin": "tokens of openbmb/Ultra-FineWeb, uint32",
            "wikitext-2-test.txt": "WikiText-2, raw test text",
        }
    )
    need_package("transformers", 'pip install "regularized[huggingface]"')
    device = need_gpu("the paper scale trains Llama-3.2-1B on 8.3 billion tokens", gigabytes=75)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = root / "llama-3.2-1b"
    tokens = np.memmap(root / "ultra-fineweb.bin", dtype=np.uint32, mode="r")
    held_out = torch.from_numpy(tokens[-2_000 * CONTEXT :].astype(np.int64))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wikitext = (root / "wikitext-2-test.txt").read_text(encoding="utf-8")
    test = torch.tensor(tokenizer(wikitext, add_special_tokens=False)["input_ids"])
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    windows = _windows(tokens[: -2_000 * CONTEXT], seed, device)

    batches, length = CALIBRATION
    traces = hessian_traces(
        model,
        _loss,
        (next(windows)[:1, :length] for _ in range(batches)),
        sketch=s["probes"],
        queries=2 * s["probes"],
        batches=batches,
        exclude=["lm_head"],
        seed=seed,
    )
    metrics = {"nll_in_full_precision": _evaluate(model, test, device)}
    training = quantized_training(
        model, s, traces=traces, head="lm_head", group_size=GROUP, betas=(0.9, 0.95), weight_decay=0.01
    )
    curve = _train(model, training, windows, s)
    metrics["soft_test_nll"] = training.in_the_last_step(lambda: _evaluate(model, test, device))
    freeze_weights(model)
    metrics["test_nll"] = _evaluate(model, test, device)
    metrics["validation_nll"] = _evaluate(model, held_out, device)
    fingerprint = data_fingerprint(test.numpy(), held_out.numpy())
    return Measurements(metrics, {"train_nll": curve}, fingerprint, "step")


def _train(
    model: nn.Module, training: Training, windows: Iterator[Tensor], s: Mapping[str, Any]
) -> list[tuple[float, float]]:
    steps = s["steps"]
    curve: list[tuple[float, float]] = []
    model.train()
    for step in range(steps):
        done = (step + 1) / steps
        falling = 1.0 - (1.0 - FLOOR) * max(0.0, (done - (1.0 - DECAY)) / DECAY)
        for group in training.optimizer.param_groups:
            group["lr"] = s["lr"] * min(done / WARM_UP, falling)
        total = torch.zeros((), device=next(model.parameters()).device)
        for _ in range(BATCH // MICRO_BATCH):
            loss = _loss(model, next(windows)) * (MICRO_BATCH / BATCH)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.after_step(step + 1)
        if (step + 1) % max(1, steps // 100) == 0:
            curve.append((float(step + 1), float(total)))
    return curve


def _windows(tokens: Any, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Micro-batches (8, 1025) of windows in random order, each once an epoch."""
    count = (len(tokens) - 1) // CONTEXT
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for first in range(0, count - MICRO_BATCH + 1, MICRO_BATCH):
            starts = order[first : first + MICRO_BATCH] * CONTEXT
            rows = np.stack([tokens[start : start + CONTEXT + 1] for start in starts]).astype(np.int64)
            yield torch.from_numpy(rows).to(device)
        epoch += 1


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def _evaluate(model: nn.Module, tokens: Tensor, device: torch.device) -> float:
    """Nats a token over windows one after another."""
    training = model.training
    model.eval()
    count = (len(tokens) - 1) // CONTEXT
    rows = torch.stack([tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    total = sum(len(part) * float(_loss(model, part.to(device))) for part in rows.split(MICRO_BATCH))
    model.train(training)
    return total / count
