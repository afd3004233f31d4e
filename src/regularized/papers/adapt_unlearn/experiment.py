"""A generator of clothes shall stop making one class. Real images are gone; a classifier says what is unwanted.

Each seed trains a GAN of its own on images of ten classes; the class to unlearn is the seed's last digit. Two
classifiers have seen other images: one plays the users and sorts generated samples, the other one judges the result and
gives the features of the Fréchet distance. No unlearning arm sees a real image.

``pretrained``: what there is before. ``adapted``: the first adapted generator. ``extrapolation``: weights a step away
from the adapted ones, without training; ``far_extrapolation``: a longer step. ``positives_only``: training on the
samples that nobody flagged. ``exponential_repulsion``, ``inverse_repulsion``, ``negative_square``: the same, kept away
from the adapted weights by EL2, IL2 or NL2 of the paper. ``strong_repulsion``: EL2 with the weight 1, and
``random_reference``, its control: kept away from weights that lie as far away, in another direction.

Claims: ``unlearning`` (most unwanted samples are gone) and ``quality`` (what stays is as good);
``over_extrapolation``, ``extrapolation_ruins``; ``repulsion_helps`` and ``strong_repulsion_helps`` (more goes than
without it), ``direction_matters`` (than with the control); ``inverse``, ``negative_square`` and its ``..._quality``
(the other two forms); ``adapting`` (stage 1 does its work). A claim is refuted by an interval below the smallest
effect of the card.

Four arms have six trials, judged by what a user can measure: the share of unwanted samples, by the users' classifier,
times the Fréchet distance from the positives in its features. Ten minutes for ten seeds on a core, with the trials.
*Paper* scale: MNIST of 32 x 32 pixels, sizes and steps of the authors' script, a convolutional GAN in place of
StyleGAN2.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.classification import fit
from regularized.evidence.datasets.idx import FASHION_MNIST, MNIST, labelled_images
from regularized.evidence.datasets.samples import disjoint_rows, display_name, eight_by_eight, resplit
from regularized.evidence.experiment import About, Illustrated, Tuning, data_fingerprint
from regularized.evidence.models import mlp, seeded, small_convnet
from regularized.evidence.requirements import need_gpu
from regularized.training.data import TensorData
from regularized.training.step import Batch
from regularized.unlearning.adapt_unlearn.feedback import Feedback, collect_feedback, percent_unlearned, sample
from regularized.unlearning.adapt_unlearn.gan import GAN, GANSettings
from regularized.unlearning.adapt_unlearn.procedure import AdaptThenUnlearn
from regularized.unlearning.adapt_unlearn.term import Repulsion
from regularized.unlearning.frechet import frechet_distance

PACKAGES = {"torchmetrics": "lightning"}

DEFAULTS: Mapping[str, Any] = {
    # Or "pretrained", "adapted", "extrapolated"; "retrained" never sees the class, and would double the time.
    "use": "unlearned",
    "kind": "exponential",
    "weight": 0.0,
    "references": "adapted",  # or "random"
    "step": 0.0,  # of the extrapolation, in distances to the adapted weights
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {  # even and odd digits: so short a training makes some of both
        **{"data": "digits", "net": "mlp", "width": 32, "latents": 8, "classes": 2},
        **{"train": 500, "judge": 400, "test": 400, "judge_epochs": 10},
        **{"pretrain_steps": 300, "batch": 32, "lr": 2e-3, "r1": 1.0, "r1_every": 4, "ema": 0.95},
        **{"feedback": 400, "samples": 400, "adaptations": 2, "adapt_steps": 10, "unlearn_steps": 10, "anchor": 20.0},
    },
    # Ours, by what runs in half a minute for all arms of a seed; rates and steps from a pilot on seed 1000.
    "laptop": {
        **{"data": "fashion_mnist", "net": "mlp", "width": 128, "latents": 32, "classes": 10},
        **{"train": 2000, "judge": 1000, "test": 1000, "judge_epochs": 30},
        **{"pretrain_steps": 3000, "batch": 64, "lr": 1e-3, "r1": 0.2, "r1_every": 4, "ema": 0.995},
        **{
            "feedback": 3000,
            "samples": 3000,
            "adaptations": 3,
            "adapt_steps": 600,
            "unlearn_steps": 200,
            "anchor": 20.0,
        },
    },
    # "latent 128", "5 adaptations", "2001 iterations", "1001 iterations", "batch 16", "lr 0.002", "R1 10 every 16",
    # "5000 positives", "lambda 5e8": the authors' script. Pretraining is ours.
    "paper": {
        **{"data": "mnist", "net": "conv", "width": 64, "latents": 128, "classes": 10},
        **{"train": 40_000, "judge": 5_000, "test": 5_000, "judge_epochs": 20},
        **{"pretrain_steps": 50_000, "batch": 16, "lr": 2e-3, "r1": 10.0, "r1_every": 16, "ema": 0.5 ** (32 / 10_000)},
        **{"feedback": 5_600, "samples": 5_000, "adaptations": 5, "adapt_steps": 2_001, "unlearn_steps": 1_001},
        "anchor": 5e8,
    },
}

ARMS: Mapping[str, Mapping[str, Any]] = {
    "pretrained": {"use": "pretrained"},
    "adapted": {"use": "adapted"},
    "extrapolation": {"use": "extrapolated", "step": 0.05},
    "far_extrapolation": {"use": "extrapolated", "step": 1.0},  # a pilot's, that unlearnt as much as training
    "positives_only": {},
    # Of these two the weakest of the trials is best.
    "exponential_repulsion": {"weight": 0.001},
    "inverse_repulsion": {"kind": "inverse", "weight": 0.001},
    "negative_square": {"kind": "negative_square", "weight": 0.01},
    # Untuned, of a weight that shows: the default of the library.
    "strong_repulsion": {"weight": 1.0},
    "random_reference": {"references": "random", "weight": 1.0},
}

_WEIGHTS = [{"weight": weight} for weight in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)]
TUNING = Tuning(
    metric="trade_off",
    direction="lower",
    grids={
        "extrapolation": [{"step": step} for step in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)],
        "exponential_repulsion": _WEIGHTS,
        "inverse_repulsion": _WEIGHTS,
        "negative_square": _WEIGHTS,
    },
)


class Data(NamedTuple):
    """A seed's images in [0, 1], (n, 1, H, W), and labels; all parts are disjoint."""

    train: tuple[Tensor, Tensor]  # of the GAN
    user: tuple[Tensor, Tensor]  # of the classifier that sorts samples
    judge: tuple[Tensor, Tensor]  # of the one that judges
    test: tuple[Tensor, Tensor]  # that samples are compared with


class Judge(NamedTuple):
    """A classifier, and the features in front of its head."""

    net: nn.Sequential

    def unwanted(self, images: Tensor, which: int) -> Tensor:
        """Which images it takes for the class, (n,) bool."""
        with torch.no_grad():
            labels: Tensor = self.net(images).argmax(dim=1)
        return labels == which

    def features(self, images: Tensor) -> Tensor:
        """(n, d)."""
        with torch.no_grad():
            found: Tensor = self.net[:-1](images)
        return found


class Start(NamedTuple):
    """What all arms of a seed begin with; nobody changes it."""

    data: Data
    user: Judge
    judge: Judge
    gan: Mapping[str, Any]  # state of the pretrained GAN
    averaged: nn.Module  # its averaged generator
    feedback: Feedback
    unwanted: int


def about(s: Mapping[str, Any]) -> About:
    """Small images, and the weights of a generator."""
    again = resplit(s["data"], train=s["train"], test=s["test"])
    generator, _ = networks(s, 0)
    weights = sum(p.numel() for p in generator.parameters())
    size = "32x32" if s["net"] == "conv" else "8x8"
    name = display_name(s["data"]).removesuffix(" of 8x8 pixels")
    kind = "convolutional GAN" if s["net"] == "conv" else "MLP GAN"
    return About(
        f"{s['train']:,} {name} of {size} pixels", s["train"], f"{kind}, {weights // 1000}k weights", weights, again
    )


def run(s: Mapping[str, Any], seed: int) -> Illustrated:
    """What an arm's generator makes of the unwanted class, and how far its samples are from real ones."""
    later = {"use", "kind", "weight", "references", "step", "adaptations", "adapt_steps", "unlearn_steps", "anchor"}
    start = begin(tuple((name, s[name]) for name in s if name not in later), seed)
    curve: list[tuple[float, float]] = []
    generator = _generator(s, seed, start, curve)
    made = sample(generator, s["latents"], s["samples"], seed=seed + 1)
    before = sample(start.averaged, s["latents"], s["samples"], seed=seed + 1)
    judged = start.judge.unwanted(made, start.unwanted)
    share = float(judged.double().mean())
    share_before = float(start.judge.unwanted(before, start.unwanted).double().mean())
    kept = start.data.test[0][start.data.test[1] != start.unwanted]
    told = float(start.user.unwanted(made, start.unwanted).double().mean())
    apart = distance(start.user, start.feedback.positives, made)
    return Illustrated(
        metrics={
            "unwanted_share": 100.0 * share,
            "unlearned": percent_unlearned(share_before, share),
            "frechet": distance(start.judge, kept, made),
            "frechet_of_kept": distance(start.judge, kept, made[~judged] if int((~judged).sum()) >= 100 else made),
            "trade_off": (told + 0.01) * apart,
            "user_accuracy": _accuracy(start.user, start.data.test),
        },
        curves={"unwanted_by_user": curve},
        data=data_fingerprint(*(tensor.cpu().numpy() for part in start.data for tensor in part)),
        curve_unit="step",
        images={"samples": mosaic(made)},
    )


def distance(judge: Judge, real: Tensor, made: Tensor) -> float:
    """Fréchet distance in the features of a classifier."""
    return float(frechet_distance(judge.features(real), judge.features(made)))


def mosaic(images: Tensor, *, rows: int = 6, columns: int = 16) -> Any:
    """The first images side by side, (H, W) in [0, 1]."""
    tiles = images[: rows * columns, 0].cpu()
    height, width = tiles.shape[1:]
    return tiles.view(rows, columns, height, width).permute(0, 2, 1, 3).reshape(rows * height, columns * width).numpy()


# -- the arms -----------------------------------------------------------------------------------


def _generator(s: Mapping[str, Any], seed: int, start: Start, curve: list[tuple[float, float]]) -> nn.Module:
    """The averaged generator of an arm."""
    if s["use"] == "pretrained":
        return start.averaged
    if s["use"] == "retrained":
        images, labels = start.data.train
        return pretrained(s, seed, images[labels != start.unwanted]).ema.module
    procedure = unlearning(s, seed, start, adaptations=1 if s["use"] == "adapted" else s["adaptations"])
    if s["use"] == "adapted":
        procedure.fit(until=1)
        return procedure.gan.ema.module
    procedure.load_state_dict(adapted(s, seed, start))
    if s["use"] == "extrapolated":
        return extrapolated(procedure, start.averaged, s["step"])
    if s["references"] == "random":
        turn_references(procedure.repulsion, procedure.gan.generator, seed)
    every = max(1, s["unlearn_steps"] // 10)
    steps = 0

    def watch(work: AdaptThenUnlearn) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            made = sample(work.gan.ema.module, s["latents"], 1000, seed=seed + 2)
            curve.append((float(steps), 100.0 * float(start.user.unwanted(made, start.unwanted).double().mean())))

    procedure.fit(after_step=watch)
    return procedure.gan.ema.module


def unlearning(s: Mapping[str, Any], seed: int, start: Start, *, adaptations: int) -> AdaptThenUnlearn:
    """The procedure of an arm, on the pretrained networks."""
    gan = _gan(s, seed)
    gan.load_state_dict(start.gan)
    cap = None if s["kind"] != "negative_square" else 1e12  # as good as none: the paper's form, without a warning
    return AdaptThenUnlearn(
        gan.generator,
        gan.discriminator,
        start.feedback,
        latents=s["latents"],
        anchor=s["anchor"],
        repulsion=Repulsion(kind=s["kind"], weight=s["weight"], cap=cap),
        adaptations=adaptations,
        adapt_steps=s["adapt_steps"],
        unlearn_steps=s["unlearn_steps"],
        batch_size=s["batch"],
        settings=_settings(s),
        seed=seed,
    )


_ADAPTED: dict[str, Any] = {}


def adapted(s: Mapping[str, Any], seed: int, start: Start) -> Mapping[str, Any]:
    """The state behind the adaptations, which are the same for all arms of a seed."""
    key = (id(start), seed, s["adaptations"], s["adapt_steps"], s["anchor"])
    if _ADAPTED.get("key") != key:
        fresh = unlearning({**s, "kind": "exponential", "weight": 1.0}, seed, start, adaptations=s["adaptations"])
        fresh.fit(until=s["adaptations"])
        _ADAPTED.update(key=key, start=start, state=fresh.state_dict())
    state: Mapping[str, Any] = _ADAPTED["state"]
    return state


@torch.no_grad()
def extrapolated(procedure: AdaptThenUnlearn, averaged: nn.Module, step: float) -> nn.Module:
    """theta_G + step (theta_G - mean of theta_N), without training."""
    generator = procedure.gan.generator
    generator.load_state_dict(averaged.state_dict())
    means = (procedure.repulsion.get_buffer(f"mean:{n.replace('.', '/')}") for n in procedure.repulsion.names)
    for p, mean in zip(generator.parameters(), means, strict=True):
        p.add_(p - mean, alpha=step)
    return generator


@torch.no_grad()
def turn_references(repulsion: Repulsion, generator: nn.Module, seed: int) -> None:
    """Put the mean of the references elsewhere: as far away, tensor by tensor, in a direction that says nothing."""
    draws = torch.Generator().manual_seed(10 * seed + 3)
    for name, p in zip(repulsion.names, generator.parameters(), strict=True):
        mean = repulsion.get_buffer(f"mean:{name.replace('.', '/')}")
        noise = torch.randn(p.shape, generator=draws).to(p)
        mean.copy_(p + noise * (mean - p).norm() / noise.norm())


# -- what all arms of a seed share --------------------------------------------------------------


@lru_cache(maxsize=1)
def begin(common: tuple[tuple[str, Any], ...], seed: int) -> Start:
    """Data, classifiers, the pretrained GAN and its sorted samples."""
    s = dict(common)
    data = load(s, seed)
    unwanted = seed % s["classes"]
    user, judge = (classifier(s, part, 10 * seed + k) for k, part in enumerate((data.user, data.judge)))
    gan = pretrained(s, seed, data.train[0])
    averaged = gan.ema.module.eval()
    feedback = collect_feedback(
        averaged,
        lambda made: user.unwanted(made, unwanted),
        latents=s["latents"],
        samples=s["feedback"],
        seed=seed,
    )
    return Start(data, user, judge, gan.state_dict(), averaged, feedback, unwanted)


def load(s: Mapping[str, Any], seed: int) -> Data:
    """A seed's own images."""
    sizes = (s["train"], s["judge"], s["judge"], s["test"])
    if s["net"] == "conv":
        device = need_gpu("the paper scale trains convolutional GANs for 50,000 steps")
        images, labels = labelled_images({"mnist": MNIST, "fashion_mnist": FASHION_MNIST}[s["data"]])
        (rows,) = disjoint_rows(len(labels), seed, (sum(sizes),), seeds=1)
        x, y = F.pad(images[rows].float() / 255.0, (2, 2, 2, 2)).to(device), labels[rows].to(device)
        x = x[:, None]
    else:
        pixels, y = eight_by_eight(s["data"], seed, sum(sizes))
        x, y = pixels.float().view(-1, 1, 8, 8), y % s["classes"]
    return Data(*zip(x.split(sizes), y.split(sizes), strict=True))


def classifier(s: Mapping[str, Any], part: tuple[Tensor, Tensor], seed: int) -> Judge:
    """Trained on its images."""
    x, y = part
    if s["net"] == "conv":
        built = seeded(seed, small_convnet, s["classes"], size=32)
    else:
        built = seeded(seed, lambda: nn.Sequential(nn.Flatten(), *mlp([64, 128, 32, s["classes"]])))
    net = built.to(x.device)
    assert isinstance(net, nn.Sequential)
    data = TensorData(x, y, batch_size=64, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    fit(net, data, _cross_entropy, optimizer=optimizer, epochs=s["judge_epochs"])
    return Judge(net.eval())


def _cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    assert batch.targets is not None
    return F.cross_entropy(net(batch.inputs), batch.targets)


def _accuracy(judge: Judge, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return 100.0 * float((judge.net(part[0]).argmax(dim=1) == part[1]).double().mean())


def pretrained(s: Mapping[str, Any], seed: int, images: Tensor) -> GAN:
    """A GAN trained on real images."""
    gan = _gan(s, seed)
    gan.fit(images, steps=s["pretrain_steps"], batch_size=s["batch"])
    return gan


def _gan(s: Mapping[str, Any], seed: int) -> GAN:
    generator, discriminator = networks(s, seed)
    return GAN(generator, discriminator, latents=s["latents"], settings=_settings(s), seed=seed)


def _settings(s: Mapping[str, Any]) -> GANSettings:
    adam: Callable[..., torch.optim.Optimizer] = partial(torch.optim.Adam, lr=s["lr"], betas=(0.0, 0.99))
    return GANSettings(adam, adam, r1=s["r1"], r1_every=s["r1_every"], ema_decay=s["ema"])


def networks(s: Mapping[str, Any], seed: int) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator."""
    if s["net"] == "conv":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pair = seeded(seed, conv_generator, s["width"], s["latents"]), seeded(seed + 1, conv_discriminator, s["width"])
        return pair[0].to(device), pair[1].to(device)
    h = s["width"]
    return seeded(seed, dense_generator, h, s["latents"]), seeded(seed + 1, dense_discriminator, h)


def dense_generator(width: int, latents: int) -> nn.Sequential:
    """Latents to images of 8 x 8 pixels in (0, 1)."""
    layers: list[nn.Module] = []
    for ins, outs in ((latents, width), (width, width), (width, width)):
        layers += [nn.Linear(ins, outs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))


def dense_discriminator(width: int) -> nn.Sequential:
    """Images of 8 x 8 pixels to scores."""
    hidden = (nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 1))


def conv_generator(width: int, latents: int) -> nn.Sequential:
    """Latents to images of 32 x 32 pixels in (0, 1)."""
    layers: list[nn.Module] = [
        nn.Linear(latents, 4 * width * 16),
        nn.Unflatten(1, (4 * width, 4, 4)),
        nn.LeakyReLU(0.2),
    ]
    for ins, outs in ((4 * width, 4 * width), (4 * width, 2 * width), (2 * width, width)):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(ins, outs, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1), nn.Sigmoid())


def conv_discriminator(width: int) -> nn.Sequential:
    """Images of 32 x 32 pixels to scores."""
    layers: list[nn.Module] = []
    for ins, outs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(ins, outs, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, 1))
