"""Does a sparse plus low-rank language model, pretrained from scratch, end below a low-rank one and near a dense one?

A Llama-like decoder learns to predict the source files of Python's standard library, byte by byte: on bytes a model
that looks back one token only is poor, so the layers of the blocks, which are what is replaced, decide. Embedding,
norms and head stay dense, as in the paper; the density of 0.03 and a rank of a quarter of the width are the paper's.
Measured: loss on text that nobody trained on, in nats a byte, and its perplexity; how many numbers are trained; what
weights, gradients, moments and positions take.

Arms: ``full_rank`` and ``low_rank``; ``sltrain``; and two controls that spend as many numbers as it in every layer:
``more_rank`` on factors alone, and ``sparse_only`` on random fixed entries alone. Each arm has as many trials of its
rate, judged by the loss on validation text of the tuning seeds. About five seconds a run on an idle core.

*Million* scale: 0.9 million weights, four times the time. *Paper* scale: LLaMA of 60 million weights on C4 with the
official script's settings; needs the text, the tokenizer and a large GPU.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regularized.evidence.corpora import Text, TokenText, draw_text
from regularized.evidence.experiment import About, Measurements, Tuning
from regularized.evidence.language_models import LanguageModel, evaluate, fit, small_lm
from regularized.papers.sltrain.c4 import published_text, published_training
from regularized.pretraining.sltrain.model import convert

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"width": 32, "layers": 1, "heads": 2, "rank": 8, "steps": 20, "train": 40_960, "test": 8192},
    "laptop": {},
    "million": {"width": 128, "heads": 4, "rank": 32},
    # scripts/llm_pretrain/sltrain60m.sh: "--rank 128", "--sp_ratio 0.03", "--lora_alpha 32", "--lr 0.003",
    # "--num_training_steps 11000", "--total_batch_size 512", sequences of 256 tokens, "--weight_decay 0", no clipping.
    "paper": {
        "corpus": "c4",
        "vocabulary": 32_100,
        "width": 512,
        "layers": 8,
        "heads": 8,
        "hidden": 1376,
        "rank": 128,
        "scale": 0.25,
        "lr": 3e-3,
        "steps": 11_000,
        "batch": 512,
        "context": 256,
        "clip": None,
    },
}

DEFAULTS: dict[str, Any] = {
    "corpus": "library",
    "vocabulary": 256,
    "train": 520_000,
    "validation": 40_960,
    "test": 81_920,
    "width": 64,
    "layers": 4,
    "heads": 2,
    "hidden": None,
    "spend": "weights",
    "rank": 16,
    "density": 0.03,
    "scale": 1.0,  # alpha over rank
    "lr": 3e-3,
    "steps": 150,
    "batch": 16,
    "context": 64,
    "clip": 1.0,
}

ARMS: dict[str, dict[str, Any]] = {
    # Rates: the best of TUNING.
    "full_rank": {"spend": "weights", "lr": 5e-3},
    "low_rank": {"spend": "factors", "lr": 5e-3},
    "more_rank": {"spend": "more factors", "lr": 5e-3},
    "sparse_only": {"spend": "entries", "lr": 1.2e-2},
    "sltrain": {"spend": "factors and entries", "lr": 5e-3},
}

# The paper's, for all arms; it swept the rate of full rank from 1e-3 to 5e-3.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {"paper": {arm: {"lr": 3e-3} for arm in ARMS}}

TUNING = Tuning(
    metric="validation_loss",
    direction="lower",
    grids={arm: [{"lr": rate} for rate in (2e-3, 5e-3, 1.2e-2, 3e-2)] for arm in ARMS},
)


def about(s: Mapping[str, Any]) -> About:
    """Each seed has passages of its own."""
    hidden = s["hidden"] or 16 * math.ceil(s["width"] / 6)
    weights = (
        2 * s["vocabulary"] * s["width"] + s["layers"] * s["width"] * (4 * s["width"] + 3 * hidden + 2) + s["width"]
    )
    tokens = s["steps"] * s["batch"] * s["context"]
    names = {"library": "the sources of Python's standard library", "c4": "C4"}
    return About(
        f"{tokens:,} tokens of {names[s['corpus']]}",
        tokens,
        f"Llama-like decoder, {weights / 1e6:.1f}M weights",
        weights,
    )


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Pretrain one arm with one seed.

    Raises:
        Unavailable: paper scale without C4, its tokenizer or a large GPU.
    """
    text: Text | TokenText
    if s["corpus"] == "c4":
        text, training = published_text(), published_training()
    else:
        sizes = {part: s[part] for part in ("train", "validation", "test")}
        text, training = draw_text(s["corpus"], seed, **sizes, vocabulary=s["vocabulary"]), {}
    shape = {part: s[part] for part in ("width", "layers", "heads", "hidden")}
    model = small_lm(seed, s["vocabulary"], **shape)
    _shrink(model, s, torch.Generator().manual_seed(seed))
    model.to(text.train.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=0.0)
    windows = {part: s[part] for part in ("batch", "context", "clip")}
    curve = fit(model, text.train, optimizer, steps=s["steps"], seed=seed, **windows, **training)
    validation, test = (evaluate(model, part, context=s["context"]) for part in (text.validation, text.test))
    trained = sum(p.numel() for p in model.parameters())
    return Measurements(
        metrics={
            "validation_loss": validation,
            "test_loss": test,
            "test_perplexity": math.exp(test),
            "trained_numbers": float(trained),
            "state_megabytes": _bytes_of_state(model, optimizer) / 1e6,
        },
        curves={"training loss": curve},
        data=text.fingerprint,
        curve_unit="step",
    )


def _shrink(model: LanguageModel, s: Mapping[str, Any], draws: torch.Generator) -> None:
    """Spend as many numbers in each layer of the blocks as the method does (``factors`` fewer), in the arm's way."""
    if s["spend"] == "weights":
        return
    for name, linear in [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")
    ]:
        entries, sides = linear.weight.numel(), sum(linear.weight.shape)
        numbers = s["rank"] * sides + math.floor(s["density"] * entries)
        rank, density = {
            "factors": (s["rank"], 0.0),
            "more factors": (round(numbers / sides), 0.0),
            "entries": (0, numbers / entries),
            "factors and entries": (s["rank"], s["density"]),
        }[s["spend"]]
        convert(model, rank=rank, density=density, alpha=s["scale"] * max(rank, 1), include=[name], generator=draws)


def _bytes_of_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, a gradient for each, positions, and the optimizer's tensors."""
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(2 * p.nbytes for p in model.parameters()) + sum(t.nbytes for t in [*model.buffers(), *moments])
