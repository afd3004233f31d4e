"""Does a language model that CAST trains to 2:4 beat one that is cut first, and is it the decay or the teacher?

A small Llama (0.2 million weights, a vocabulary of 512 byte pairs) learns source files of Python's standard library.
Then it is trained on for 120 steps until the linear layers of its blocks are exactly 2:4, by CAST and by what one would
do otherwise; embedding and head stay dense, as in the paper. Each seed has a text of its own. Judged is the perplexity
on held-out text *after* the final cut.

Baselines: cutting by magnitude (``one_shot``); cutting, then training what is left (``fixed_mask``, which is also the
magnitude recipe of NVIDIA's ModelOpt: the same masks, bit for bit); SR-STE; and the dense model trained as long. The
control with everything but the idea is ``fixed_mask_teacher``: a fixed mask with the same teacher. CAST without
teacher, without scales, and with a thirtieth of the decay say which of its parts does it. Learning rates are tuned for
each arm, in four trials; the arms without one of CAST's parts have its rate. Refuted by an interval below the smallest
effect of the card. About five minutes of one core for ten seeds. *Paper* scale: LLaMA2-7B, for a machine with a GPU
that holds it.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from regularized.compression.cast import CAST, SparseAdamW, distillation_loss, semi_structured_mask
from regularized.evidence.corpora import Text, draw_text
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, data_fingerprint
from regularized.evidence.language_models import LanguageModel, evaluate, fit, small_lm
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.mechanisms.frozen import Frozen
from regularized.mechanisms.pruning import pruned
from regularized.papers.cast.controls import cut, quantised, sr_ste

DEFAULTS: dict[str, Any] = {
    "train": "dense",  # dense, cut, fixed, sr_ste or cast
    "lr": 1e-3,
    "l1": 0.0,
    "eta": 0.0,  # the teacher's share
    "scale_groups": 0,
    "decay": 2e-4,  # of SR-STE, its paper's
    "pattern": (2, 4),
}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "model": "small",
        "vocabulary": 272,
        "width": 16,
        "layers": 1,
        "text": 40_960,
        "dense_steps": 10,
        "steps": 20,
        "batch": 2,
        "context": 32,
    },
    "laptop": {
        "model": "small",
        "vocabulary": 512,
        "width": 64,
        "layers": 2,
        "text": 573_440,  # with 20 passages besides what two tuning seeds can share
        "dense_steps": 200,
        "steps": 120,
        "batch": 4,
        "context": 64,
    },
    # Table XI. Betas, clipping, warm-up and the fall of the rate are not in the paper.
    "paper": {"model": "llama2", "steps": 7500, "batch": 256, "context": 4096},
}

_CAST: dict[str, Any] = {"train": "cast", "eta": 1 / 3, "scale_groups": 2, "lr": 0.001, "l1": 1e-2}
# Rates are the best of TUNING; the decay is that of a first look on tuning seed 1000.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"train": "dense", "lr": 0.001},
    "one_shot": {"train": "cut"},
    "fixed_mask": {"train": "fixed", "lr": 0.004},
    "fixed_mask_teacher": {"train": "fixed", "eta": 1 / 3, "lr": 0.004},
    "sr_ste": {"train": "sr_ste", "lr": 0.002},
    "cast": _CAST,
    "cast_no_teacher": {**_CAST, "eta": 0.0},
    "cast_no_scales": {**_CAST, "scale_groups": 0},
    "cast_weak_decay": {**_CAST, "l1": _CAST["l1"] / 30},
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        arm: {"lr": 2e-5} | ({"l1": 4e-7 * own["l1"] / _CAST["l1"]} if own["train"] == "cast" else {})
        for arm, own in ARMS.items()
    }
}

SEEDS = Seeds()

_RATES = [{"lr": lr} for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
# The best rates of dense and cast lie at the end of the grid.
TUNING = Tuning(
    metric="validation_loss",
    direction="lower",
    grids=dict.fromkeys(("dense", "fixed_mask", "fixed_mask_teacher", "sr_ste", "cast"), _RATES),
)

Loss = Callable[[nn.Module, Tensor], Tensor]


def about(s: Mapping[str, Any]) -> About:
    """Text of each seed's own; the paper's mix."""
    if s["model"] == "llama2":
        windows = s["steps"] * s["batch"]
        return About(f"{windows:,} windows of Dolmino-Mix-1124", windows, "LLaMA 2, 7B weights", 7_000_000_000)
    windows = s["steps"] * s["batch"]
    weights = sum(p.numel() for p in _network(0, s["vocabulary"], s["width"], s["layers"]).parameters())
    data = f"{windows:,} windows of {s['context']} tokens of source files"
    return About(data, windows, f"small Llama, {weights:,} weights", weights)


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm with one seed, cut, and measure; perplexities are of tokens, costs in nats a token."""
    return _llama2(settings, seed) if settings["model"] == "llama2" else _small(settings, seed)


# -- what the scales share ----------------------------------------------------------------------------


def _loss(model: nn.Module, windows: Tensor, *, teacher: nn.Module | None, eta: float) -> Tensor:
    """Of every token of the windows (B, T + 1) but the first."""
    inputs, labels = windows[:, :-1], windows[:, 1:]
    taught = None if teacher is None else teacher(inputs)
    return distillation_loss(model(inputs), taught, labels, eta=eta).loss


@contextmanager
def _trained(
    model: nn.Module, names: list[str], s: Mapping[str, Any], teacher: nn.Module | None = None
) -> Iterator[tuple[torch.optim.Optimizer, Loss]]:
    """Inside, what trains a dense model as an arm does; afterwards the model is plain, and sparse unless it is dense's.

    Args:
        model: the dense start, changed in place.
        names: of the layers that get the pattern.
        s: settings.
        teacher: the dense start once more; default a copy of the model.
    """
    if s["train"] == "cast":
        options = {name: s[name] for name in ("pattern", "scale_groups", "eta")}
        cast = CAST(model, target_modules=names, teacher=teacher, **options)
        optimizer = SparseAdamW(cast.param_groups(), s["lr"], l1=s["l1"], total_steps=s["steps"])
        yield optimizer, partial(_loss, teacher=cast.teacher, eta=s["eta"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left before the cut is measured
            cast.finalize()
        return
    taught = Frozen(teacher or copy.deepcopy(model)) if s["eta"] else None
    loss = partial(_loss, teacher=taught, eta=s["eta"])
    adamw = partial(torch.optim.AdamW, model.parameters(), lr=s["lr"], weight_decay=0.0)
    if s["train"] == "fixed":
        with pruned(model, cut(model, names, s["pattern"])):
            yield adamw(), loss
    elif s["train"] == "sr_ste":
        sr_ste(model, names, s["pattern"], s["decay"])
        yield adamw(), loss
        for name in names:
            parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    else:
        yield adamw(), loss
        if s["train"] == "cut":
            cut(model, names, s["pattern"])


def _linear(model: nn.Module) -> list[str]:
    """The linear layers of the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ("head", "lm_head")
    ]


@torch.no_grad()
def _largest_residual(model: nn.Module, names: list[str], s: Mapping[str, Any]) -> float:
    """Mean size of the weights outside the pattern in per cent of those inside, of the layer where it is largest."""
    shares = []
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        mask = semi_structured_mask(weight, s["pattern"])
        shares.append(weight[~mask].abs().mean() / weight[mask].abs().mean())
    return 100.0 * float(torch.stack(shares).max())


def _measured(
    model: nn.Module,
    s: Mapping[str, Any],
    *,
    train: Callable[[torch.optim.Optimizer, Loss], list[tuple[float, float]]],
    loss_on_test: Callable[[nn.Module], float],
    teacher: nn.Module | None = None,
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train and cut; the metrics that need no other text, and the curve."""
    names = _linear(model)
    with _trained(model, names, s, teacher) as (optimizer, loss):
        curve = [] if s["train"] == "cut" else train(optimizer, loss)
        before, residual = loss_on_test(model), _largest_residual(model, names, s)
    after = loss_on_test(model)
    with quantised(model, names, bits=4):
        rounded = loss_on_test(model)
    return {
        "perplexity": math.exp(after),
        "perplexity_before_cut": math.exp(before),
        "cut_cost": after - before,
        "largest_residual": residual,
        "four_bit_cost": rounded - after,
    }, curve


# -- a small language model ---------------------------------------------------------------------------


def _network(seed: int, vocabulary: int, width: int, layers: int) -> LanguageModel:
    return small_lm(seed, vocabulary, width=width, layers=layers, heads=2)


@lru_cache(maxsize=1)  # arms of one seed run one after another
def _dense_start(
    seed: int, characters: int, vocabulary: int, width: int, layers: int, steps: int
) -> tuple[LanguageModel, Text]:
    """The pretrained model of a seed, to be copied, and its text."""
    text = draw_text("library", seed, train=characters, validation=20_480, test=40_960, vocabulary=vocabulary)
    model = _network(seed, text.vocabulary.size, width, layers)
    # The rate of a first look on tuning seed 1000; so small a network wants a higher one than the kit's 3e-3.
    fit(model, text.train, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=steps, batch=8, seed=seed)
    return model, text


def _small(s: Mapping[str, Any], seed: int) -> Measurements:
    start, text = _dense_start(seed, s["text"], s["vocabulary"], s["width"], s["layers"], s["dense_steps"])
    model = copy.deepcopy(start)

    def train(optimizer: torch.optim.Optimizer, loss: Loss) -> list[tuple[float, float]]:
        sizes = {"steps": s["steps"], "batch": s["batch"], "context": s["context"]}
        return fit(model, text.train, optimizer, seed=seed + 1, loss=loss, **sizes)

    on_test = partial(evaluate, tokens=text.test, context=s["context"])
    metrics, curve = _measured(model, s, train=train, loss_on_test=on_test)
    metrics["validation_loss"] = evaluate(model, text.validation, context=s["context"])
    return Measurements(metrics, {"training_loss": curve}, data=text.fingerprint, curve_unit="step")


# -- LLaMA 2 ------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: nn.Module = model

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        with torch.autocast("cuda", torch.bfloat16):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def _llama2(s: Mapping[str, Any], seed: int) -> Measurements:
    """The whole run on one GPU: weights, gradients, moments and masks in float32 take 115 GB, the teacher 14."""
    device = need_gpu("the paper scale trains LLaMA2-7B on 7.9 billion tokens, for about two weeks", gigabytes=145)
    need_package("transformers", 'pip install "regularized[huggingface]"')
    folder = need_files(
        {
            "llama-2-7b-hf": "LLaMA 2 7B (huggingface.co/meta-llama/Llama-2-7b-hf)",
            "dolmino-llama2.int32": "token ids of Dolmino-Mix-1124 (huggingface.co/allenai), by LLaMA 2's tokenizer, "
            "one document after another, as little-endian int32",
            "wikitext-2-test.txt": "the test text of WikiText-2, raw",
        }
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = partial(AutoModelForCausalLM.from_pretrained, folder / "llama-2-7b-hf")
    net: Any = load(dtype=torch.float32)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = _Logits(net).to(device)
    teacher = _Logits(load(dtype=torch.bfloat16)).to(device) if s["eta"] else None
    tokens = torch.from_numpy(np.memmap(folder / "dolmino-llama2.int32", dtype="<i4", mode="c"))
    text = (folder / "wikitext-2-test.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder / "llama-2-7b-hf")(text)["input_ids"]
    test = torch.tensor(ids, device=device)

    def train(optimizer: torch.optim.Optimizer, loss: Loss) -> list[tuple[float, float]]:
        def in_parts(model: nn.Module, windows: Tensor) -> Tensor:
            """One window at a time, forward again in the backward pass, so that memory is that of one."""
            parts = windows.long().to(device).split(1)
            losses = [checkpoint(loss, model, part, use_reentrant=False) for part in parts]
            return torch.stack(losses).mean().cpu()  # where the tokens are; a step takes minutes

        sizes = {"steps": s["steps"], "batch": s["batch"], "context": s["context"]}
        return fit(model, tokens, optimizer, warm_up=0.05, seed=seed, loss=in_parts, **sizes)

    on_test = partial(evaluate, tokens=test, context=s["context"], batch=1)
    metrics, curve = _measured(model, s, train=train, loss_on_test=on_test, teacher=teacher)
    data = data_fingerprint(tokens[:1_000_000].numpy(), test.cpu().numpy())
    return Measurements(metrics, {"training_loss": curve}, data=data, curve_unit="step")
