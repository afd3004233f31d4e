"""The paper's scale: OPT-125M from scratch on OpenWebText, in bfloat16 on one GPU."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.experiment import Measurements, data_fingerprint
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.training.progress import Progress, cosine, warmup

__all__ = ["next_tokens", "pretrain", "pretrain_opt"]

CONTEXT = 1024
MICRO_BATCH = 24
VALIDATION = 4_000_000  # tokens, the last of the file

Prepare = Callable[..., torch.optim.Optimizer]


def pretrain_opt(s: Mapping[str, Any], seed: int, prepare: Prepare) -> Measurements:
    """One arm at the paper's scale.

    Args:
        s: its settings.
        seed: of initialisation, batches and draws.
        prepare: surgery and optimizer, see :func:`regularized.papers.sst.experiment.prepare`.

    Raises:
        Unavailable: transformers, the tokens or a large GPU are missing.
    """
    need_package("transformers", 'pip install "regularized[transformers]"')
    folder = need_files(
        {
            "openwebtext/tokens.bin": "OpenWebText as ids of OPT's tokenizer, uint16, one after another; about 18 GB. "
            "numpy.array(ids, dtype='uint16').tofile(...)"
        }
    )
    device = need_gpu("the paper scale pretrains OPT-125M on 19.7 billion tokens", gigabytes=70)
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = OPTForCausalLM(OPTConfig(hidden_size=s["width"], num_hidden_layers=s["layers"]))
    return pretrain(model.to(device), folder / "openwebtext" / "tokens.bin", s, seed, prepare)


def pretrain(
    model: nn.Module,
    tokens: Path,
    s: Mapping[str, Any],
    seed: int,
    prepare: Prepare,
    *,
    context: int = CONTEXT,
    micro_batch: int = MICRO_BATCH,
    held_out: int = VALIDATION,
) -> Measurements:
    """Train a causal model of transformers on a file of tokens, and measure its loss on the last of them.

    Args:
        model: on its device.
        tokens: file of uint16 ids.
        s: settings; ``batch`` windows make a step.
        seed: of batches and draws.
        prepare: surgery and optimizer.
        context: tokens of a window.
        micro_batch: windows of a forward pass.
        held_out: tokens for validation, the last of the file.
    """
    device = next(model.parameters()).device
    text = torch.from_file(str(tokens), size=tokens.stat().st_size // 2, dtype=torch.uint16)
    train, last = text[:-held_out], text[-held_out:]
    whole = sum(p.numel() for p in model.parameters())
    optimizer = prepare(
        model,
        ["layers"],
        s,
        seed,
        iteration=s["iteration"],
        warm_up=s["warm_up"],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=s["lr"], betas=(0.9, 0.95)),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = warmup(cosine(1.0, 0.1), 0.05)
    batches = next_tokens(train, micro_batch, context, seed)
    parts = max(1, s["batch"] // micro_batch)
    curve: list[tuple[float, float]] = []
    model.train()
    for step in range(s["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * rate(Progress(step + 1, s["steps"] + 1))
        total = torch.zeros((), device=device)
        for _ in range(parts):
            loss = _loss(model, next(batches).to(device)) / parts
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, s["steps"] // 50) == 0:
            curve.append((step + 1.0, float(total)))
    model.eval()
    windows = last[: len(last) // (context + 1) * (context + 1)].view(-1, context + 1).long()
    with torch.no_grad():
        losses = [len(part) * _loss(model, part.to(device)) for part in windows.split(micro_batch)]
    held = float(torch.stack(losses).sum()) / len(windows)
    return Measurements(
        metrics={
            "perplexity": math.exp(held),
            "test_loss": held,
            "train_loss": curve[-1][1],
            "trained_percent": 100.0 * sum(p.numel() for p in trained) / whole,
        },
        curves={"train_loss": curve},
        data=data_fingerprint(last.numpy()),
        curve_unit="step",
    )


def next_tokens(text: Tensor, count: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows that begin anywhere in a text, (count, length + 1), without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (count,), generator=draw)
        yield torch.stack([text[start : start + length + 1] for start in starts.tolist()]).long()


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first, in bfloat16 where there is a GPU."""
    kind = windows.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        logits: Tensor = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
