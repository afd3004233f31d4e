"""Does an encoder that is shown fewer of the hard patches learn more than one that is shown random ones?

A small vision transformer is pretrained as a masked autoencoder on unlabelled images, three quarters of the patches
hidden. Then it is frozen, and logistic regression on the mean of its tokens is the judge (``probe_accuracy``). Measured
besides, on test images with random masks: how often the loss predictor puts two hidden patches of an image into the
right order (``pair_order_accuracy``), and by how much the loss grows when half of the hidden patches are those of the
highest scores (``chosen_over_random``).

Arms: ``untrained``, what the probe makes of an encoder as it was drawn; ``mae``, whose predictor is there and
untrained; ``mae_loss_prediction``, everything but the masks; ``hard_patches``. Arms of a seed share images, initial
weights and order, and as in the paper all settings: the rate is the one that is best for ``mae`` on validation images
of the tuning seeds, so that a choice by another arm could only help that arm. (``hard="always"``, half of the hidden
patches chosen from the first epoch on, and ``relative=False`` are the paper's ablations; no arms here.)

Laptop data: Fashion-MNIST as 16 x 16 pixels, images of each seed's own, 16 patches. *Paper* scale: ViT-B/16 for 200
epochs of ImageNet with the official script's settings, and a linear probe; needs the images, torchvision and a large
GPU, in practice several.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets.samples import draw
from regularized.evidence.experiment import About, Measurements, Tuning
from regularized.evidence.models import seeded
from regularized.mechanisms.patches import Split
from regularized.mechanisms.probes import linear_probe, logistic_probe
from regularized.papers.hard_patches.imagenet import ImageNet, imagenet
from regularized.self_supervised.hard_patches.autoencoder import MaskedAutoencoder
from regularized.self_supervised.hard_patches.encoder import PatchTransformer
from regularized.self_supervised.hard_patches.loss import reconstruction_losses
from regularized.self_supervised.hard_patches.masking import hard_patch_split
from regularized.self_supervised.hard_patches.mining import HardPatchMining, epoch_decay
from regularized.self_supervised.pretraining import Pretraining
from regularized.training.data import TensorData
from regularized.training.progress import cosine, linear, warmup

DEFAULTS: Mapping[str, Any] = {
    "data": "fashion_mnist",
    "train": 600,
    "validation": 500,
    "test": 1000,
    "size": 16,
    "patch": 4,
    "channels": 1,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "standardise": False,
    "few": 100,
    "mask_ratio": 0.75,
    "hard": "none",
    "relative": True,
    "weight": 0.0,
    # The copy follows within a few epochs: with so few steps the official one, .999 to .9999, would stay at its start.
    "decay": (0.99, 0.999, 10),
    "epochs": 40,
    "warmup": 4,
    "batch": 50,
    "lr": 0.0015,
    "weight_decay": 0.05,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "data": "digits",
        "train": 300,
        "validation": 100,
        "test": 200,
        "width": 16,
        "depth": 1,
        "epochs": 2,
        "warmup": 1,
    },
    "laptop": {},
    # scripts/pretrain_base.sh: ViT-B/16, decoders 8 x 512 x 16, "--mask_ratio 0.75", "--warmup_epochs 40",
    # "--blr 1.5e-4", "--weight_decay 0.05", 8 processes of "--batch_size 32"; "--epochs 200" is PRETRAIN.md's.
    "paper": {
        "data": "imagenet",
        "train": 1_281_167,
        "test": 50_000,
        "size": 224,
        "patch": 16,
        "channels": 3,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "decay": (0.999, 0.9999, 100),
        "epochs": 200,
        "warmup": 40,
        "batch": 256,
        "lr": 1.5e-4,
    },
}

ARMS: Mapping[str, Mapping[str, Any]] = {
    # The rate of DEFAULTS is the best of TUNING.
    "untrained": {"epochs": 0, "warmup": 0},
    "mae": {},
    "mae_loss_prediction": {"weight": 1.0},
    "hard_patches": {"weight": 1.0, "hard": "rising"},
}

TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={"mae": [{"lr": rate} for rate in (1.5e-3, 3e-3, 6e-3)]},
)

SHARES: Mapping[str, Any] = {"none": 0.0, "rising": linear(0.0, 0.5, unit="epoch"), "always": 0.5}


def about(s: Mapping[str, Any]) -> About:
    """Each seed has images of its own."""
    blocks = 12 * (s["depth"] * s["width"] ** 2 + 2 * s["decoder_depth"] * s["decoder_width"] ** 2)
    weights = blocks + s["patch"] ** 2 * s["channels"] * (s["width"] + s["decoder_width"])
    names = {
        "fashion_mnist": "unlabelled Fashion-MNIST images of 16x16 pixels",
        "digits": "unlabelled digits of 16x16 pixels",
        "imagenet": "unlabelled ImageNet images",
    }
    again = s["test"] / s["train"] if s["data"] == "digits" else 0.0
    model = f"vision transformer with two decoders, {weights / 1e6:.2g}M weights"
    return About(f"{s['train']:,} {names[s['data']]}", s["train"], model, weights, again)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Pretrain one arm with one seed, and probe its encoder.

    Raises:
        Unavailable: paper scale without ImageNet, torchvision or a large GPU.
    """
    model = autoencoder(s, seed)
    mining = HardPatchMining(
        model,
        mask_ratio=s["mask_ratio"],
        hard=SHARES[s["hard"]],
        relative=s["relative"],
        weight=s["weight"],
        decay=epoch_decay(*s["decay"][:2], epochs=s["decay"][2]),
    )
    if s["data"] == "imagenet":
        return _at_paper_scale(mining, imagenet(s["batch"], s["size"]), s, seed)
    sample = draw(s["data"], seed, train=s["train"], validation=s["validation"], test=s["test"])
    train, validation, test = (sixteen(part) for part in (sample.train_x, sample.validation_x, sample.test_x))
    data = TensorData(train, batch_size=s["batch"], drop_last=True, seed=seed)
    records = _training(mining, s, seed).fit(data, epochs=s["epochs"])
    probe = partial(logistic_probe, model.encoder)
    labelled, few = (train, sample.train_y), (train[: s["few"]], sample.train_y[: s["few"]])
    metrics = {
        "probe_accuracy": 100 * probe(labelled, (test, sample.test_y)),
        "few_label_accuracy": 100 * probe(few, (test, sample.test_y)),
        "validation_accuracy": 100 * probe(labelled, (validation, sample.validation_y)),
        **difficulty_metrics(mining, test, seed),
    }
    return Measurements(metrics, _curves(records), data=sample.fingerprint)


def _curves(records: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(float(epoch + 1), record[name]) for epoch, record in enumerate(records)]
        for name in ("reconstruction", "ranking")
    }


def _at_paper_scale(mining: HardPatchMining, data: ImageNet, s: Mapping[str, Any], seed: int) -> Measurements:
    """On the GPU, with a linear layer trained on the frozen features."""
    mining.to("cuda")
    records = _training(mining, s, seed).fit(data.crops, epochs=s["epochs"])
    accuracy = 100 * linear_probe(mining.model.encoder, data.train, data.test, epochs=100, batch_size=4096)
    images = next(iter(data.test))[0].to("cuda")
    return Measurements(
        {"probe_accuracy": accuracy, **difficulty_metrics(mining, images, seed)},
        _curves(records),
        data="ImageNet-1K",
    )


def sixteen(images: Tensor) -> Tensor:
    """Images of 28 x 28 (framed to 32) averaged over 2 x 2 pixels, those of 8 x 8 interpolated: (n, 1, 16, 16)."""
    if images.shape[-1] == 8:
        return F.interpolate(images.float(), size=16, mode="bilinear", align_corners=False)
    # The frame is as dark as the background, which is the darkest there is.
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=float(images.min())), 2)


def autoencoder(s: Mapping[str, Any], seed: int) -> MaskedAutoencoder:
    """Encoder and both decoders, of an initialisation that depends on nothing but the seed."""

    def build() -> nn.Module:
        encoder = PatchTransformer(
            s["size"],
            patch_size=s["patch"],
            channels=s["channels"],
            width=s["width"],
            depth=s["depth"],
            heads=s["heads"],
        )
        return MaskedAutoencoder(
            encoder,
            decoder_width=s["decoder_width"],
            decoder_depth=s["decoder_depth"],
            decoder_heads=s["decoder_heads"],
            standardise=s["standardise"],
        )

    model = seeded(seed, build)
    assert isinstance(model, MaskedAutoencoder)
    return model


def _training(mining: HardPatchMining, s: Mapping[str, Any], seed: int) -> Pretraining:
    """AdamW without decay of vectors, the rate times a line for some epochs, falling as half a cosine."""

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, 0.95))

    schedule = warmup(cosine(), s["warmup"] / max(s["epochs"], 1))
    return Pretraining(mining, optimizer=optimizer, schedule=schedule, seed=seed)


@torch.no_grad()
def difficulty_metrics(mining: HardPatchMining, images: Tensor, seed: int) -> dict[str, float]:
    """How well the predictor orders hidden patches, and what hiding those of the highest scores does to the loss.

    Scores come from the slow copy where there is one, as in training.
    """
    model = mining.model.eval()
    scorer = model if mining.teacher is None else cast(MaskedAutoencoder, mining.teacher.module)
    draws = torch.Generator(images.device).manual_seed(seed)
    arguments: dict[str, Any] = {"mask_ratio": mining.mask_ratio, "generator": draws}
    scores = scorer.scores(images)

    def errors(split: Split) -> tuple[Tensor, Tensor]:
        out = model(images, split)
        assert out.predicted is not None
        return out.predicted, reconstruction_losses(out.patches, model.targets(images, split))

    predicted, random = errors(hard_patch_split(scores, hard=0.0, **arguments))
    chosen = errors(hard_patch_split(scores, hard=0.5, **arguments))[1]
    harder = random.unsqueeze(2) > random.unsqueeze(1)
    right = harder & (predicted.unsqueeze(2) > predicted.unsqueeze(1))
    return {
        "pair_order_accuracy": 100 * float(right.sum() / harder.sum()),
        "random_mask_loss": float(random.mean()),
        "chosen_over_random": 100 * float(chosen.mean() / random.mean() - 1),
    }
