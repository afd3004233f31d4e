"""With a fixed, small text and compute to spare: which recipe ends lowest, and what is left of it in one small model?

Decoders of one layer learn two pages of Python's documentation, byte by byte, for many epochs. They have from one to
six weights a token, as the paper's have. A recipe says what is done with ever more compute, and an arm is a recipe:
``small_standard`` and ``large_standard`` decay at 0.1 and stop in time (epochs are tuned); ``small_regularized`` and
``large_regularized`` decay as strongly as is best; ``growing`` is the latter in four widths, with the law in the number
of weights; ``ensemble_same`` and ``ensemble_lighter`` are four small members, with the law in their number, by the
settings of the single model, and with twice the epochs and half the decay; ``joint`` is the latter in four widths.
``distilled`` is one small model that learnt from text of the ensemble beside the real text, and ``self_distilled`` one
whose teacher is a single model: all but the ensemble.

Measured is ``loss``, in nats a byte on held-out text, of what a recipe gives in the end: a single model (mean of four
starts), or an ensemble. ``asymptote`` is where its law ends; where losses do not fall with size it is the lowest of
them, and where they show no end yet, it lies as far below the last as they fell in all. Laws in the number of members
take the mean over all subsets of a size.

The arms that are tuned get five trials on two seeds (four, and one more beyond an edge at which a best lay), by the
loss of a single model on validation text. About 30 seconds a seed for all arms, on one core of 2024. *Paper* scale: see
``published.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.corpora import TokenText, draw_text
from regularized.evidence.experiment import About, Measurements, Tuning
from regularized.evidence.language_models import small_lm
from regularized.overfitting.infinite_compute.ensemble import subset_losses
from regularized.overfitting.infinite_compute.law import PowerLaw
from regularized.overfitting.infinite_compute.mixture import MixtureLoader
from regularized.overfitting.infinite_compute.procedure import EnsembleTraining
from regularized.overfitting.infinite_compute.sampling import sample_text
from regularized.overfitting.infinite_compute.search import member_settings
from regularized.overfitting.infinite_compute.stacked import StackedModels
from regularized.papers.infinite_compute.published import PAPER, PUBLISHED_SETTINGS, SHAPES, published_text
from regularized.training.data import TensorData

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"corpus": "library", "unit": 4, "shorten": 8, "members": 2, "validation": 4096, "test": 4096, "pool": 16},
    "laptop": {},
    "paper": PAPER,
}

DEFAULTS: dict[str, Any] = {
    "corpus": "documentation",
    "train": 4096,
    "validation": 8_192,
    "test": 16_384,
    "unit": 8,
    "multiples": [2],  # widths, in units
    "members": 4,
    "vocabulary": 128,  # ASCII; any other byte is the last of them
    "context": 32,
    "batch": 16,
    "epochs": [8],  # for each width, of a single model
    "lr": [3e-2],
    "decay": [0.1],
    "shorten": 1,
    "lighter": False,  # members by `member_settings`
    "deploy": "single",
    "law": "members",
    "teacher": "none",
    "teacher_weight": 0.75,
    "student_decay": 0.1,  # the paper's, of students
    "pool": 256,  # windows that a teacher writes
    "students": 2,  # their mean is the student's loss
}

SMALL: dict[str, Any] = {"epochs": [8], "lr": [3e-2], "decay": [1.0]}
LARGE: dict[str, Any] = {"epochs": [8], "lr": [3e-2], "decay": [3.0]}
# Half the small width as the small one, and three quarters of the large as the large one.
FOUR: dict[str, Any] = {"multiples": [1, 2, 3, 4]} | {
    name: SMALL[name] * 2 + LARGE[name] * 2 for name in ("epochs", "lr", "decay")
}

ARMS: dict[str, dict[str, Any]] = {
    "small_standard": {"multiples": [2], "epochs": [16], "lr": [1e-2]},
    "large_standard": {"multiples": [4], "epochs": [8], "lr": [1e-2]},
    "small_regularized": {"multiples": [2], **SMALL},
    "large_regularized": {"multiples": [4], **LARGE},
    "growing": {**FOUR, "law": "size"},
    "ensemble_same": {"multiples": [2], **SMALL, "deploy": "ensemble"},
    "ensemble_lighter": {"multiples": [2], **SMALL, "deploy": "ensemble", "lighter": True},
    "joint": {**FOUR, "deploy": "ensemble", "lighter": True, "law": "both"},
    "self_distilled": {"multiples": [2], **SMALL, "teacher": "single"},
    "distilled": {"multiples": [2], **SMALL, "teacher": "ensemble"},
}

_STANDARD = [{"epochs": [e], "lr": [lr]} for e, lr in ((4, 3e-2), (8, 3e-2), (8, 1e-2), (16, 1e-2), (32, 1e-2))]
_REGULARIZED = [
    {"decay": [decay], "lr": [lr]} for decay, lr in ((0.5, 3e-2), (1.0, 3e-2), (3.0, 3e-2), (6.0, 3e-2), (6.0, 1e-2))
]
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {"paper": PUBLISHED_SETTINGS}

TUNING = Tuning(
    metric="validation_loss",
    direction="lower",
    grids={
        "small_standard": _STANDARD,
        "large_standard": _STANDARD,
        "small_regularized": _REGULARIZED,
        "large_regularized": _REGULARIZED,
    },
)


def about(s: Mapping[str, Any]) -> About:
    """Each seed has passages of its own."""
    width = s["unit"] * max(s["multiples"])
    names = {
        "documentation": "characters of Python's documentation",
        "library": "characters of the sources of Python's standard library",
        "dclm": "tokens of DCLM",
    }
    weights = _weights(width, s["vocabulary"]) * (s["members"] if s["deploy"] == "ensemble" else 1)
    model = f"Llama-like decoder, {weights / 1000:.0f}k weights"
    return About(f"{s['train']:,} {names[s['corpus']]}", s["train"], model, weights)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Carry out one recipe.

    Raises:
        Unavailable: the text is not there.
    """
    text = _of(s, seed)
    settings = [
        {"width": s["unit"] * multiple, "epochs": epochs, "lr": lr, "weight_decay": decay}
        for multiple, epochs, lr, decay in zip(s["multiples"], s["epochs"], s["lr"], s["decay"], strict=True)
    ]
    of = {
        name: s[name] for name in ("corpus", "train", "validation", "test", "vocabulary", "members", "context", "batch")
    }
    key = tuple(sorted(of.items()))
    groups = [_trained(key, seed, *_numbers(own, lighter=s["lighter"], shorten=s["shorten"])) for own in settings]
    if s["teacher"] != "none":
        groups = [_students(s, key, seed, settings[0])]
    deployed = 0 if s["deploy"] == "single" else s["members"] - 1
    last = groups[-1]
    curves: dict[str, list[tuple[float, float]]] = {
        "loss of k members": [(float(k), loss) for k, loss in enumerate(last.test, start=1)],
        "training loss": [(float(epoch), loss) for epoch, loss in enumerate(last.training, start=1)],
    }
    by_size = [group.test[0] for group in groups]
    if s["law"] == "size":
        asymptote = _asymptote([_weights(int(own["width"]), s["vocabulary"]) for own in settings], by_size)
    elif s["law"] == "members":
        asymptote = _asymptote(range(1, len(last.test) + 1), last.test)
    else:
        ends = [_asymptote(range(1, len(group.test) + 1), group.test) for group in groups]
        asymptote = _asymptote([_weights(int(own["width"]), s["vocabulary"]) for own in settings], ends)
    return Measurements(
        metrics={
            "loss": last.test[deployed],
            "asymptote": asymptote,
            "validation_loss": last.validation[deployed],
            "training_loss": last.training[-1],
            **{f"loss_at_{own['width']}": loss for own, loss in zip(settings, by_size, strict=True)},
        },
        curves=curves,
        data=text.fingerprint,
        curve_unit="members or epochs",
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Models of one size that were trained together, and the losses of 1 ... K of them on held-out text."""

    models: StackedModels
    validation: list[float]
    test: list[float]
    training: list[float]


@lru_cache(maxsize=2)
def _text(corpus: str, seed: int, train: int, validation: int, test: int, vocabulary: int) -> TokenText:
    if corpus == "dclm":
        return published_text()
    text = draw_text(corpus, seed, train=train, validation=validation, test=test, vocabulary=256)
    return TokenText(*(part.clamp_max(vocabulary - 1) for part in (text.train, text.validation, text.test)))


def _windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, one window behind the other."""
    count = (len(tokens) - 1) // context
    return tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context)


def _numbers(settings: Mapping[str, float], *, lighter: bool, shorten: int) -> tuple[int, int, float, float]:
    own = member_settings(settings) if lighter else settings
    return int(own["width"]), max(1, int(own["epochs"]) // shorten), float(own["lr"]), float(own["weight_decay"])


@lru_cache(maxsize=16)  # several recipes contain the same training
def _trained(key: tuple[Any, ...], seed: int, width: int, epochs: int, lr: float, decay: float) -> _Group:
    """A model of several starts, or an ensemble: the training is the same."""
    s = dict(key)
    text = _of(s, seed)
    data = TensorData(*_windows(text.train, s["context"]), batch_size=s["batch"])
    return _group(s, _seeds(seed, s["members"]), text, width, epochs, lr, decay, data)


def _students(s: Mapping[str, Any], key: tuple[Any, ...], seed: int, settings: Mapping[str, float]) -> _Group:
    """Fresh models that learn from a teacher's text, and see the real one as often as a single model does."""
    single = s["teacher"] == "single"
    teacher = _trained(key, seed, *_numbers(settings, lighter=not single, shorten=s["shorten"])).models.eval()
    text = _of(s, seed)
    real = _windows(text.train, s["context"])
    draws = torch.Generator(text.train.device).manual_seed(seed)
    start = real[0].flatten()[torch.randint(real[0].numel(), (s["pool"], 1), generator=draws, device=draws.device)]

    def logits(tokens: Tensor) -> Tensor:
        every: Tensor = teacher.shared(tokens)
        return every[0] if single else every.mean(dim=0)

    written = sample_text(logits, start, s["context"], generator=draws)
    width, epochs, lr, _ = _numbers(settings, lighter=False, shorten=s["shorten"])
    sets = [TensorData(*pair, batch_size=s["batch"]) for pair in (real, (written[:, :-1], written[:, 1:]))]
    seeds = _seeds(seed + 50_000, s["students"])
    mixtures = [MixtureLoader(*sets, teacher_weight=s["teacher_weight"], seed=own) for own in seeds]
    return _group(s, seeds, text, width, epochs, lr, s["student_decay"], mixtures)


def _group(
    s: Mapping[str, Any],
    seeds: Sequence[int],
    text: TokenText,
    width: int,
    epochs: int,
    lr: float,
    decay: float,
    data: TensorData | Sequence[MixtureLoader],
) -> _Group:
    """Train models from these seeds together, and look at them."""
    layers, heads, hidden = _shape(width)
    training = EnsembleTraining(
        [
            small_lm(own, s["vocabulary"], width=width, layers=layers, heads=heads, hidden=hidden).to(text.train.device)
            for own in seeds
        ],
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95)),
        weight_decay=decay,
        seeds=seeds,
    )
    losses = [sum(epoch) / len(epoch) for epoch in training.fit(data, epochs=epochs)]
    validation, test = (_losses(training.models, _windows(part, s["context"])) for part in (text.validation, text.test))
    return _Group(training.models, validation, test, losses)


@torch.no_grad()
def _losses(models: StackedModels, windows: tuple[Tensor, Tensor]) -> list[float]:
    """Of 1 ... K members, in nats a byte."""
    models.eval()
    total = torch.zeros(models.size, dtype=torch.float64)
    for x, y in zip(*(part.split(64) for part in windows), strict=True):
        total += y.numel() * subset_losses(models.shared(x).flatten(1, 2), y.flatten()).double()
    return [float(loss) for loss in total / windows[1].numel()]


def _seeds(seed: int, count: int) -> list[int]:
    """Of initialisation and order of each model."""
    return [100 * seed + number for number in range(count)]


def _of(s: Mapping[str, Any], seed: int) -> TokenText:
    return _text(s["corpus"], seed, s["train"], s["validation"], s["test"], s["vocabulary"])


def _weights(width: int, vocabulary: int) -> int:
    """Of a decoder with embedding and head apart."""
    layers, _, hidden = _shape(width)
    return width * (2 * vocabulary + 1 + layers * (4 * width + 3 * hidden + 2))


def _shape(width: int) -> tuple[int, int, int]:
    """Layers, heads and inner width: the paper's where the width is the paper's, else one small layer."""
    return SHAPES.get(width, (1, 2, 16 * math.ceil(width / 6)))


def _asymptote(sizes: Sequence[int], losses: Sequence[float]) -> float:
    """Where the law ends, but no further below the last point than all points fell.

    Where losses do not fall, or are fewer than a law needs, it is the lowest of them.
    """
    if len(losses) < 3 or any(b >= a for a, b in pairwise(losses)):
        return min(losses)
    return max(PowerLaw.fit(list(sizes), losses).asymptote, 2 * losses[-1] - losses[0])
