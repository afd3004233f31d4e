"""A language model, trained in full precision, goes on with ternary weights: does a soft start help, and the Hessian?

Claims: ``better_than_straight_through`` (the whole method against rounding with an identity gradient, what most do),
``relaxation`` (softmax annealing against a control that has all but the softmax: the same rising pressure, with hard
rounding), ``hessian_factor`` (temperatures by Hessian traces against one for all), ``code_not_text`` (large traces
colder, as the code does it, against softer for longer, as the text says), ``pressure`` (against quantizing all of the
weight from the first step), ``dead_zone`` (more weights leave the level 0), and beyond the paper ``better_than_parq``.

A seed has text of its own, 537,000 characters of the standard library's sources, and one model in full precision, a
Llama of 0.28 million weights after 240 steps of 1,024 tokens, with the Hessian traces of its 21 linear layers. All arms
go on from it for 100 steps and end with ternary weights in these layers, a scale a row; embedding and head stay in full
precision, as in the paper. Judged by the loss of the *hard* model on 82,000 characters of test text. Straight-through,
annealed, the whole method and PARQ had four rates each on two seeds of tuning; controls share the settings of what
they control. About eleven minutes of one core for tuning and ten seeds.

*Paper* scale: Llama-3.2-1B on 8.3 billion tokens (see ``llama.py``).
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from regularized.compression.hestia import traces as traces_module
from regularized.compression.hestia.layer import freeze_weights
from regularized.compression.hestia.quantizer import to_codes
from regularized.compression.hestia.traces import hessian_traces
from regularized.evidence import language_models
from regularized.evidence.corpora import Text, draw_text
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning
from regularized.evidence.language_models import evaluate, fit, next_token_loss, random_windows, small_lm
from regularized.evidence.pretrained import models_folder
from regularized.papers.hestia.llama import run_llama
from regularized.papers.hestia.quantized_training import quantized_training

DEFAULTS: Mapping[str, Any] = {
    "quantizer": "annealed",  # or torchao's "parq"
    "temperature": None,  # at the beginning: None is the optimal one, 0 hard rounding throughout
    "compress": 0.2,
    "alpha": 0.0,  # of the factors from Hessian traces; 0 is one temperature for all layers
    "factor_on": "temperature",
    "lr": 1e-2,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "model": "small",
        "train": 20_480,
        "held_out": 8_192,
        "width": 16,
        "layers": 1,
        "pretraining": 6,
        "steps": 6,
        "probes": 1,
    },
    "laptop": {
        "model": "small",
        "train": 536_576,
        "held_out": 81_920,
        "width": 64,
        "layers": 3,
        "pretraining": 240,
        "steps": 100,
        "probes": 4,
    },
    # "group 128, AdamW lr 5e-5, batch 256 x 1024 tokens, 8.3B tokens": the paper; 10 and 20 probes: its code.
    "paper": {"model": "llama", "steps": 31_700, "probes": 10, "lr": 5e-5},
}

# lr is the best of TUNING (regularized tune hestia); controls have that of what they control.
_SOFT = {"lr": 1e-2}
_HESSIAN = {"lr": 1e-2, "alpha": 0.4}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "straight_through": {"temperature": 0.0, "compress": 0.0, "lr": 3e-3},
    "parq": {"quantizer": "parq", "lr": 1e-2},
    "hard_pressure": {**_SOFT, "temperature": 0.0},
    "annealed": _SOFT,
    "annealed_at_once": {**_SOFT, "compress": 0.0},
    "hestia": _HESSIAN,
    "hestia_as_in_text": {**_HESSIAN, "factor_on": "progress"},
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {arm: {"lr": SCALES["paper"]["lr"]} for arm in ARMS}
}

SEEDS = Seeds()

_RATES = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
TUNING = Tuning(
    metric="validation_nll",
    direction="lower",
    grids=dict.fromkeys(("straight_through", "parq", "annealed", "hestia"), _RATES),
)


def about(settings: Mapping[str, Any]) -> About:
    """Text of the seed's own; Ultra-FineWeb."""
    if settings["model"] == "llama":
        return About("8.3 billion tokens of Ultra-FineWeb", 8_300_000_000, "Llama-3.2-1B", 1_235_814_400)
    tokens = settings["train"] // 2_670
    weights = sum(p.numel() for p in _network(settings, 0, 1024).parameters())
    return About(
        f"{tokens},000 tokens of Python sources", 1000 * tokens, f"Llama, {weights / 1e6:.2f}M weights", weights
    )


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Go on from one seed's model in full precision in one arm; losses in nats a token, shares in per cent.

    Raises:
        Unavailable: torchao for its arm; at paper scale whatever is missing.
    """
    if settings["model"] == "llama":
        return run_llama(settings, seed)
    s = settings
    text = draw_text("library", seed, train=s["train"], validation=s["held_out"] // 2, test=s["held_out"])
    model, traces = _in_full_precision(s, text, seed)
    metrics = {"nll_in_full_precision": evaluate(model, text.test)}
    before = {name: to_codes(model.get_submodule(name).weight, group_size=-1)[0] for name in traces}  # type: ignore[arg-type]
    training = quantized_training(model, s, traces=traces, head="head", group_size=-1)
    curve = fit(model, text.train, training.optimizer, steps=s["steps"], seed=seed, after_step=training.after_step)
    metrics["soft_test_nll"] = training.in_the_last_step(lambda: evaluate(model, text.test))
    freeze_weights(model)
    metrics["test_nll"] = evaluate(model, text.test)
    metrics["validation_nll"] = evaluate(model, text.validation)
    return Measurements({**metrics, **_moved(model, before)}, {"train_nll": curve}, text.fingerprint, "step")


def _moved(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """Which weights have another level than before, of the hard model; in per cent."""
    changed = zero = left = total = 0
    for name, old in before.items():
        new = torch.sign(model.get_submodule(name).weight.detach()).to(torch.int8) + 1  # type: ignore[operator]
        changed += int((new != old).sum())
        left += int(((old == 1) & (new != 1)).sum())
        zero += int((old == 1).sum())
        total += old.numel()
    return {"changed_level": 100.0 * changed / total, "left_zero": 100.0 * left / zero}


# -- the model that all arms begin with ----------------------------------------------------------------


def _network(s: Mapping[str, Any], seed: int, vocabulary: int) -> nn.Module:
    return small_lm(seed, vocabulary, width=s["width"], layers=s["layers"], heads=2)


def _in_full_precision(s: Mapping[str, Any], text: Text, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """The trained model of a seed, and the Hessian trace of each layer that will be quantized.

    It is the same in all arms, and two thirds of a run's time: whoever needs it first keeps it for the others, under a
    name that hangs on all that makes it.
    """
    model = _network(s, seed, text.vocabulary.size)
    makers = [inspect.getsource(module).encode() for module in (language_models, traces_module)]
    settings = {name: s[name] for name in ("width", "layers", "pretraining", "probes")}
    known_by = json.dumps([seed, settings, text.fingerprint, torch.__version__, inspect.getsource(_recipe)]).encode()
    file = models_folder() / f"hestia-{hashlib.sha256(b''.join([known_by, *makers])).hexdigest()[:16]}.pt"
    if not file.exists():
        traces = _recipe(model, s, text, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        torch.save({"model": model.state_dict(), "traces": traces}, written)
        written.replace(file)
    kept = torch.load(file, weights_only=True)
    model.load_state_dict(kept["model"])
    return model, kept["traces"]


def _recipe(model: nn.Module, s: Mapping[str, Any], text: Text, seed: int) -> dict[str, float]:
    """AdamW at 1e-2, then traces from two batches."""
    fit(model, text.train, AdamW(model.parameters(), lr=1e-2), steps=s["pretraining"], seed=seed)
    draws = torch.Generator().manual_seed(seed)
    windows = [random_windows(text.train, 16, 65, draws) for _ in range(2)]
    return hessian_traces(
        model,
        next_token_loss,
        windows,
        sketch=s["probes"],
        queries=s["probes"],
        batches=2,
        exclude=["head"],
        seed=seed,
    )
