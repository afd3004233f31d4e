"""Smaller files by a generalised Gaussian prior: at what loss, and is it the prior?

*Images.* A small convolutional network learns 2,000 images of Fashion-MNIST, ten seeds with images of their own. The
penalty of BackSlash is in the loss for the first 80 % of the steps. Every trained network is written to files of seven
steps of rounding with :func:`~regularized.compression.generalized_gaussian.save_compressed`, read again, and judged by
what it costs: **per cent of errors plus half the binary logarithm of the file's bits a weight**, so that a file of half
the size is worth half a point. The step that costs least on validation images is taken; so is the strength of the
penalty, or of plain training the learning rate, with as many trials in each arm. Compared: plain training
(``fewer_bits``, ``accuracy_kept``, ``survives_pruning``); and everything but the idea, the same penalty with a fixed
shape, L1, L2 and L0.5 (``adaptive_l1``, ``adaptive_l2``, ``adaptive_half``); and the repository's decoupled form
(``loss_or_step``). Made of plain networks: RF8 beside no rounding and beside FP8 E4M3 (``eight_bits``,
``eight_bits_e4m3``), and DeepShape with two epochs of fine-tuning beside these two epochs alone (``deepshape_bits``,
``deepshape_accuracy``).

*Text.* A language model of 0.28 million weights learns 180,000 tokens of Python's library, of its own for each seed;
its costs are nats a token plus a fiftieth of that logarithm. BackSlash beside plain training (``text_bits``,
``text_loss``) and beside L1 (``text_adaptive``); initial weights of shape 1 beside Gaussian ones of the same variance
(``initialization_early``, ``initialization``).

Refuted by an interval below the smallest effect of the card. About twelve minutes for ten seeds on one core, tuning
included. *Paper* scale: BERT on IMDB, and a language model of GPT-2's size from scratch, for machines with a GPU.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.generalized_gaussian import (
    CompressedSize,
    Shrinker,
    code_length,
    deepshape_,
    initialize_,
    load_compressed,
    rate,
    rf8,
    save_compressed,
    weight_moments,
)
from regularized.evidence.classification import Trace, about_images, checkpoints, fit, outputs, percent
from regularized.evidence.corpora import Text, draw_text
from regularized.evidence.datasets import draw
from regularized.evidence.datasets.samples import Sample
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning
from regularized.evidence.language_models import LanguageModel, evaluate, next_token_loss, small_lm
from regularized.evidence.language_models import fit as fit_text
from regularized.evidence.models import seeded, small_convnet
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.mechanisms.pruning import magnitude_masks, pruned
from regularized.training.data import TensorData
from regularized.training.progress import cosine
from regularized.training.step import Batch

DEFAULTS: Mapping[str, Any] = {
    "task": "images",
    "lr": 1e-3,
    "strength": 0.0,  # lambda
    "shape": None,  # nu; None: that of the weights at each step
    "decoupled": False,
    "init_shape": None,  # None: the network's own initialisation
    "finish": None,  # "fine_tune" or "deepshape": two epochs more
    "cast": None,  # "rf8" or "e4m3"
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "data": "digits",
        "train": 100,
        "validation": 100,
        "test": 200,
        "epochs": 2,
        "batch": 25,
        "corpus": "library",
        "characters": (20_480, 4096, 8192),
        "width": 16,
        "layers": 1,
        "steps": 10,
    },
    "laptop": {
        "data": "fashion_mnist",
        "train": 2000,
        "validation": 1500,
        "test": 1500,
        "epochs": 10,
        "batch": 100,
        "corpus": "library",
        "characters": (500_000, 12_288, 32_768),
        "width": 64,
        "layers": 3,
        "steps": 120,
    },
    # BERT-base on IMDB, and 124 million weights on tokens of OpenWebText; rates and lengths are the usual ones, since
    # the paper's could not be read.
    "paper": {
        "data": "imdb",
        "train": 20_000,
        "validation": 5000,
        "test": 25_000,
        "epochs": 4,
        "batch": 32,
        "corpus": "openwebtext",
        "characters": (0, 0, 0),
        "width": 768,
        "layers": 12,
        "steps": 50_000,
    },
}

# The best of TUNING (regularized tune generalized_gaussian), not chosen by hand.
_PLAIN = {"lr": 2.5e-3}
_TEXT = {"task": "text", "init_shape": 2.0, "lr": 2e-2}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": _PLAIN,
    "backslash": {"lr": 3e-3, "strength": 3.0},
    "decoupled": {"lr": 3e-3, "strength": 60.0, "decoupled": True},
    # Controls: everything but the shape that follows the weights.
    "l1": {"lr": 3e-3, "strength": 30.0, "shape": 1.0},
    "l2": {"lr": 3e-3, "strength": 100.0, "shape": 2.0},
    "half": {"lr": 3e-3, "strength": 6.0, "shape": 0.5},
    # Made of plain networks.
    "plain_rf8": {**_PLAIN, "cast": "rf8"},
    "plain_e4m3": {**_PLAIN, "cast": "e4m3"},
    "fine_tuned": {**_PLAIN, "finish": "fine_tune"},
    "deepshape": {**_PLAIN, "finish": "deepshape"},
    "text_plain": _TEXT,
    "text_backslash": {**_TEXT, "strength": 6.0},
    "text_l1": {**_TEXT, "strength": 12.0, "shape": 1.0},
    "text_laplace_init": {**_TEXT, "init_shape": 1.0},
}

SEEDS = Seeds()


def _each(name: str, *values: float) -> list[dict[str, float]]:
    return [{name: value} for value in values]


_RATES = _each("lr", 5e-3, 1e-2, 1.5e-2, 2e-2, 4e-2)
# Four trials each; L2's best was at the edge, so every arm got one more: L2 beyond it, the others beside their best.
TUNING = Tuning(
    metric="validation_cost",
    direction="lower",
    grids={
        "plain": _each("lr", 1e-3, 2e-3, 2.5e-3, 3e-3, 5e-3),
        "backslash": _each("strength", 1.0, 3.0, 5.0, 10.0, 20.0),
        "decoupled": _each("strength", 10.0, 30.0, 60.0, 100.0, 300.0),
        "l1": _each("strength", 10.0, 20.0, 30.0, 60.0, 120.0),
        "l2": _each("strength", 30.0, 100.0, 300.0, 1000.0, 3000.0),
        "half": _each("strength", 1.0, 3.0, 6.0, 10.0, 30.0),
        "text_plain": _RATES,
        "text_laplace_init": _RATES,
        "text_backslash": _each("strength", 3.0, 4.0, 6.0, 12.0, 24.0),
        "text_l1": _each("strength", 3.0, 6.0, 9.0, 12.0, 24.0),
    },
)

STEPS = tuple(2.0**-k for k in range(1, 8))
"""Steps of rounding that every network is written with."""

# What a file of half the size may cost: half a point of accuracy, a fiftieth of a nat a token.
EXCHANGE = {"images": 0.5, "text": 0.02}


class Pull:
    """BackSlash in a loop of one's own: in the loss, or after the step; none in the last fifth of the steps.

    Args:
        net: whose parameters are paid for, all of them.
        s: settings.
        steps: optimizer steps of the run.
    """

    def __init__(self, net: nn.Module, s: Mapping[str, Any], steps: int) -> None:
        self.weights = list(net.parameters())
        self.settings = s
        self.left = round(0.8 * steps) if s["strength"] else 0
        self.shrinker = Shrinker(self.weights, s["strength"], shape=s["shape"]) if s["decoupled"] else None

    def added_to(self, loss: Tensor) -> Tensor:
        """The loss of the step, with the penalty if there is one."""
        if self.left <= 0 or self.shrinker is not None:
            return loss
        whole: Tensor = loss + self.settings["strength"] * rate(self.weights, shape=self.settings["shape"])
        return whole

    def after_step(self, *_: object) -> None:
        """To be called after each optimizer step."""
        if self.left > 0 and self.shrinker is not None:
            self.shrinker.step()
        self.left -= 1


def cheapest_file(
    net: nn.Module, distortion: Callable[[nn.Module], float], exchange: float
) -> tuple[nn.Module, CompressedSize, float]:
    """The network read from the file that costs least, the size of the file, and its cost.

    Args:
        net: the trained network.
        distortion: what is lost with a network, on data to choose by.
        exchange: cost of twice the bits a weight, in the unit of the distortion.
    """
    need_package("constriction", 'pip install "regularized[compression]"')
    candidates = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(STEPS):
            size = save_compressed(folder, net, step=step, name=str(number))
            read = copy.deepcopy(net)
            load_compressed(folder, read, name=str(number))
            candidates.append((read, size, distortion(read) + exchange * math.log2(size.bits)))
    return min(candidates, key=lambda candidate: candidate[2])


def cast_weights(net: nn.Module, kind: str) -> None:
    """Round all weights of two dimensions or more to an 8-bit format, in place."""
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1 and kind == "rf8":
                p.copy_(rf8(p))
            elif p.ndim > 1:
                scale = p.abs().max() / torch.finfo(torch.float8_e4m3fn).max
                p.copy_((p / scale).to(torch.float8_e4m3fn).to(p.dtype) * scale)


def described(net: nn.Module) -> dict[str, float]:
    """Shape of all weights together, and their bits at a step of 1/256 by the exponential-Golomb code."""
    weights = list(net.parameters())
    length = code_length(weights)
    return {
        "shape": float(weight_moments(weights).shape),
        "golomb_bits": length.mean_bits,
        "entropy": length.entropy,
    }


def about(s: Mapping[str, Any]) -> About:
    """Images or text of the scale."""
    if s["task"] == "text":
        if s["corpus"] == "openwebtext":
            return About("9 billion tokens of OpenWebText", 9_000_000_000, "decoder, 124M weights", 124_000_000)
        weights = sum(p.numel() for p in language_model(0, s).parameters())
        tokens = round(s["characters"][0] / 2.8)
        return About(f"{tokens:,} tokens of Python's library", tokens, f"decoder, {weights:,} weights", weights)
    if s["data"] == "imdb":
        return About("IMDB, 20,000 reviews", 20_000, "BERT-base", 110_000_000, 25_000 / 20_000)
    sizes = {"train": s["train"], "test": s["test"]}
    return about_images(s["data"], **sizes, model="small convnet", build=partial(network, s))


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train, write, read and measure one arm with one seed; accuracies in per cent, losses in nats a token.

    Raises:
        Unavailable: the data, constriction, or at paper scale a GPU is missing.
    """
    return (_text if settings["task"] == "text" else _images)(settings, seed)


# -- images -----------------------------------------------------------------------------------------------


def network(s: Mapping[str, Any]) -> nn.Module:
    """A small convolutional network."""
    return small_convnet(size=8 if s["data"] == "digits" else 28)


def _images(s: Mapping[str, Any], seed: int) -> Measurements:
    device = torch.device("cpu")
    if s["data"] == "imdb":
        device = need_gpu("the paper scale fine-tunes BERT-base on IMDB", gigabytes=20)
        sample, net = _imdb(seed)
    else:
        sample = draw(s["data"], seed, train=s["train"], validation=s["validation"], test=s["test"])
        net = seeded(seed, network, s)
    net.to(device)
    data = TensorData(sample.train_x.to(device), sample.train_y.to(device), batch_size=s["batch"], seed=seed)
    validation_x, test_x = sample.validation_x.to(device), sample.test_x.to(device)
    trace, measured = Trace(), checkpoints(s["epochs"])

    def accuracy(model: nn.Module) -> float:
        return percent(outputs(model, test_x).argmax(dim=1) == sample.test_y)

    def validation_error(model: nn.Module) -> float:
        return 100.0 - percent(outputs(model, validation_x).argmax(dim=1) == sample.validation_y)

    def measure(epoch: int) -> None:
        if epoch in measured:
            trace.add(epoch, {"shape": float(weight_moments(net.parameters()).shape)})

    optimizer = torch.optim.Adam(net.parameters(), lr=s["lr"])
    pull = Pull(net, s, s["epochs"] * len(data))
    optimizer.register_step_post_hook(pull.after_step)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return pull.added_to(F.cross_entropy(net(batch.inputs), batch.targets))

    fit(net, data, loss, optimizer=optimizer, epochs=s["epochs"], schedule=cosine(), after_epoch=measure)
    if s["finish"]:
        if s["finish"] == "deepshape":
            deepshape_(net)
        again = torch.optim.Adam(net.parameters(), lr=s["lr"] / 4)
        fit(net, data, loss, optimizer=again, epochs=2, schedule=cosine(), first_epoch=s["epochs"])
    if s["cast"]:
        cast_weights(net, s["cast"])
    exchange = EXCHANGE["images"]
    read, size, cost = cheapest_file(net, validation_error, exchange)
    read_accuracy = accuracy(read)
    metrics = {
        "test_accuracy": accuracy(net),
        "file_accuracy": read_accuracy,
        "file_bits": size.bits,
        "file_ratio": size.ratio,
        "file_bytes": float(size.files),
        "cost": 100.0 - read_accuracy + exchange * math.log2(size.bits),
        "validation_cost": cost,
        **described(net),
    }
    with pruned(net, magnitude_masks(net, 0.2)):
        metrics["test_accuracy_80_percent_pruned"] = accuracy(net)
    return Measurements(metrics, trace.curves("shape"), data=sample.fingerprint)


def _imdb(seed: int) -> tuple[Sample, nn.Module]:
    """IMDB's reviews as token ids, and BERT-base with a head of its own seed."""
    need_package("transformers", 'pip install "regularized[huggingface]"')
    folder = need_files(
        {
            "bert-base-uncased": "the weights of google-bert/bert-base-uncased in Hugging Face's form",
            "aclImdb/train/pos": "IMDB's reviews (ai.stanford.edu/~amaas/data/sentiment)",
            "aclImdb/test/pos": "IMDB's reviews for testing",
        }
    )
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "bert-base-uncased")

    def read(part: str) -> tuple[Tensor, Tensor]:
        files = [
            (file, y)
            for y, name in enumerate(("neg", "pos"))
            for file in sorted((folder / "aclImdb" / part / name).glob("*.txt"))
        ]
        texts = [file.read_text(encoding="utf-8") for file, _ in files]
        ids = tokenizer(texts, truncation=True, max_length=256, padding="max_length", return_tensors="pt").input_ids
        return ids, torch.tensor([y for _, y in files])

    (x, y), (test_x, test_y) = read("train"), read("test")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, held = order[:20_000], order[20_000:]
    bert = seeded(
        seed, partial(AutoModelForSequenceClassification.from_pretrained, folder / "bert-base-uncased", num_labels=2)
    )
    return Sample(x[train], y[train], x[held], y[held], test_x, test_y), _Bert(bert)


class _Bert(nn.Module):
    """BERT from padded token ids alone to logits."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids, 0 where padded, to (B, 2)."""
        logits: Tensor = self.bert(input_ids=ids, attention_mask=ids.ne(0).long()).logits
        return logits


# -- text -------------------------------------------------------------------------------------------------


def language_model(seed: int, s: Mapping[str, Any], vocabulary: int = 1024) -> LanguageModel:
    """A decoder; with a shape its linear layers are drawn anew, of variance one over the inputs."""
    model = small_lm(seed, vocabulary, width=s["width"], layers=s["layers"], heads=max(1, s["width"] // 32))
    if s["init_shape"] is not None:
        draws = torch.Generator().manual_seed(10 * seed + 1)
        initialize_(model, shape=s["init_shape"], xi=1.0, fan="in", include=(nn.Linear,), generator=draws)
    return model


def _text(s: Mapping[str, Any], seed: int) -> Measurements:
    device, batch = torch.device("cpu"), 16
    if s["corpus"] == "openwebtext":
        device, batch = need_gpu("the paper scale trains 124 million weights from scratch", gigabytes=40), 480
        train, validation, test = _openwebtext()
        vocabulary, fingerprint = 50_304, "openwebtext"
    else:
        sizes = dict(zip(("train", "validation", "test"), s["characters"], strict=True))
        text: Text = draw_text(s["corpus"], seed, **sizes)
        train, validation, test = text.train, text.validation, text.test
        vocabulary, fingerprint = text.vocabulary.size, text.fingerprint
    model = language_model(seed, s, vocabulary).to(device)
    train, validation, test = (part.to(device) for part in (train, validation, test))
    pull = Pull(model, s, s["steps"])
    early: dict[str, float] = {}

    def loss(model: nn.Module, windows: Tensor) -> Tensor:
        return pull.added_to(next_token_loss(model, windows))

    def after_step(done: int) -> None:
        pull.after_step()
        if done == s["steps"] // 4:
            early["early_loss"] = evaluate(model, test)

    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=0.0)
    curve = fit_text(
        model, train, optimizer, steps=s["steps"], batch=batch, seed=seed, loss=loss, after_step=after_step
    )
    exchange = EXCHANGE["text"]
    read, size, cost = cheapest_file(model, partial(evaluate, tokens=validation), exchange)
    file_loss = evaluate(read, test)
    rounded = copy.deepcopy(model)
    cast_weights(rounded, "rf8")
    metrics = {
        "test_loss": evaluate(model, test),
        "file_loss": file_loss,
        "file_bits": size.bits,
        "file_ratio": size.ratio,
        "file_bytes": float(size.files),
        "cost": file_loss + exchange * math.log2(size.bits),
        "validation_cost": cost,
        "rf8_loss": evaluate(rounded, test),
        **early,
        **described(model),
    }
    return Measurements(metrics, {"training_loss": curve}, data=fingerprint, curve_unit="step")


def _openwebtext() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in the files that nanoGPT's ``prepare.py`` writes; the first half of the held-out ones to choose by."""
    folder = need_files(
        {f"openwebtext/{part}.bin": "tokens of OpenWebText as nanoGPT prepares them" for part in ("train", "val")}
    )
    train, held = (
        torch.from_file(str(folder / "openwebtext" / f"{part}.bin"), size=size // 2, dtype=torch.uint16).long()
        for part, size in ((part, (folder / "openwebtext" / f"{part}.bin").stat().st_size) for part in ("train", "val"))
    )
    half = len(held) // 2
    return train, held[:half], held[half:]
