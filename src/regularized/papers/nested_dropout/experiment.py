"""Do compressed features keep a network from memorising wrong labels, and does co-teaching build on them?

*Images*: 2,000 images of Fashion-MNIST for each seed, its own, with 40 % of the labels replaced by another class, for
training as for the 500 of the validation; a small convolutional network with 64 features in front of a linear
classifier without bias. Compared, at the end of training, are plain training, dropout and nested dropout, alone and
with co-teaching of two such networks afterwards. First with equal optimiser settings, as the paper does it
(``compression_end``, ``compression_with_co_teaching``, ``co_teaching_adds``). Then what a user would try first, with
eight trials for each arm on the validation images: weight decay and steps (``tuned_baseline``), stopping early
(``early_stopping``), dropout (``than_dropout``), mixup (``mixup``), a robust loss (``generalized``); and co-teaching
after the tuned networks (``tuned_with_co_teaching``). The control ``random_subset`` keeps as many channels as nested
dropout, but random ones instead of the first: all but the order (``order_matters``).

*Toy*, the paper's own: a curve through 200 points, 30 % of them anywhere, and 200 channels (``toy``).

Refuted by an interval below the smallest effect of the card: by plain training that ends within 5 points, by a random
subset that does as well, and so on. About six minutes for ten seeds on two cores, tuning included. *Paper* scale:
CIFAR-10 with 20 % symmetric noise and ResNet-18, for machines with a GPU.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.baselines import generalized_cross_entropy, mixup_loss
from regularized.evidence.classification import (
    Augmented,
    Trace,
    about_images,
    checkpoints,
    crop_and_flip,
    fit,
    outputs,
    percent,
    quality,
)
from regularized.evidence.datasets import draw, with_wrong_labels
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, data_fingerprint
from regularized.evidence.models import ResNet, resnet18, seeded, small_convnet
from regularized.evidence.requirements import need_gpu
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule, small_loss_selection
from regularized.noisy_labels.nested_dropout.cutting import cut_to_width
from regularized.noisy_labels.nested_dropout.layer import NestedLinear, draw_together, nested_layers, width_distribution
from regularized.noisy_labels.nested_dropout.width import select_width
from regularized.training.data import Source, TensorData
from regularized.training.progress import Schedule, piecewise, warmup
from regularized.training.step import Batch

DEFAULTS: dict[str, Any] = {
    "problem": "images",
    "noise": 0.4,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "batch": 100,
    "compression": None,
    "sigma": 10.0,  # of the official script for CIFAR-10
    "rate": 0.5,  # of dropout
    "mixup": 0.0,  # alpha of the Beta distribution; 0 is none
    "q": 0.0,  # of generalised cross-entropy; 0 is none
    "early_stopping": False,
    # Fine-tuning: a tenth of the first rate, 100 samples for each network; the rate of wrong labels is taken as known.
    "co_teaching": False,
    "co_lr": 0.005,
    "co_batch": 200,
    "forget_rate": 0.4,
    "gradual": 2,
    "toy_steps": 2000,
}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "digits",
        "train": 200,
        "validation": 50,
        "test": 200,
        "epochs": 3,
        "co_epochs": 2,
        "toy_steps": 20,
    },
    # Ours: the network memorises nearly all labels in 16 epochs.
    "laptop": {
        "data": "fashion_mnist",
        "train": 2000,
        "validation": 500,
        "test": 2000,
        "epochs": 16,
        "co_epochs": 5,
    },
    # The official scripts for CIFAR-10: rate 0.1, batches of 320, 350 epochs, a warm-up of 6,000 iterations; then
    # fine-tuning with rate 0.001, 100 epochs, a drop after 50, forget rate 0.2 without a rise, and frozen batch
    # normalisation. 393 epochs are 350 and the warm-up.
    "paper": {
        "data": "cifar10",
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
        "epochs": 393,
        "co_epochs": 100,
        "noise": 0.2,
        "lr": 0.1,
        "batch": 320,
        "co_lr": 0.001,
        "co_batch": 320,
        "forget_rate": 0.2,
        "gradual": 0,
    },
}

_NESTED, _CO = {"compression": "nested"}, {"co_teaching": True}
# The best of TUNING; co-teaching goes on from the same settings.
_PLAIN_TUNED: dict[str, Any] = {"lr": 0.01, "weight_decay": 5e-2}
_NESTED_TUNED: dict[str, Any] = {**_NESTED, "sigma": 40.0, "weight_decay": 2e-2}

ARMS: dict[str, dict[str, Any]] = {
    # Equal settings.
    "cross_entropy": {},
    "nested": {**_NESTED},
    "cross_entropy_co_teaching": {**_CO},
    "nested_co_teaching": {**_CO, **_NESTED},
    # The best of TUNING.
    "cross_entropy_tuned": {**_PLAIN_TUNED},
    "early_stopping": {"early_stopping": True, "lr": 0.01, "weight_decay": 2e-2},
    "mixup": {"mixup": 1.0, "weight_decay": 2e-2},
    "generalized_cross_entropy": {"q": 0.7, "weight_decay": 5e-3},
    "dropout_tuned": {"compression": "dropout", "rate": 0.3, "weight_decay": 2e-2},
    "random_subset_tuned": {"compression": "subset", "sigma": 40.0, "weight_decay": 5e-3},
    "nested_tuned": {**_NESTED_TUNED},
    "cross_entropy_tuned_co_teaching": {**_CO, **_PLAIN_TUNED},
    "nested_tuned_co_teaching": {**_CO, **_NESTED_TUNED},
    "toy_plain": {"problem": "toy"},
    "toy_nested": {"problem": "toy", **_NESTED},
}

# At paper scale the published settings replace what was tuned on the laptop; dropout's scripts have 0.3 and 0.7.
_OFFICIAL: dict[str, Any] = {"lr": 0.1, "weight_decay": 5e-4, "sigma": 10.0, "rate": 0.7}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {arm: {name: _OFFICIAL[name] for name in own if name in _OFFICIAL} for arm, own in ARMS.items()}
}

SEEDS = Seeds(first=100, why="Settings of the convolutional network were tried on seed 0.")


def _with_decays(**knob: tuple[float, ...]) -> list[dict[str, float]]:
    ((name, values),) = knob.items()
    return [{name: value, "weight_decay": decay} for value in values for decay in (5e-4, 5e-3, 2e-2, 5e-2)]


TUNING = Tuning(
    metric="validation_accuracy",  # noisy labels, which is what a user has
    direction="higher",
    grids={
        "cross_entropy_tuned": _with_decays(lr=(0.05, 0.01)),
        "early_stopping": _with_decays(lr=(0.05, 0.01)),
        "mixup": _with_decays(mixup=(1.0, 8.0)),
        "generalized_cross_entropy": _with_decays(q=(0.4, 0.7)),
        "dropout_tuned": _with_decays(rate=(0.3, 0.7)),
        "random_subset_tuned": _with_decays(sigma=(10.0, 40.0)),
        "nested_tuned": _with_decays(sigma=(10.0, 40.0)),
    },
)


def about(s: Mapping[str, Any]) -> About:
    """Images of the scale, or the synthetic curve."""
    if s["problem"] == "toy":
        return About("200 points of a curve", 200, "MLP, 41k weights", 40_800)
    model = "ResNet-18" if s["data"] == "cifar10" else "small convnet"
    return about_images(s["data"], train=s["train"], test=s["test"], model=model, build=partial(network, s))


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train and measure one arm with one seed; accuracies in per cent.

    Raises:
        Unavailable: the images are not here, or at paper scale a GPU.
    """
    return _toy(seed, settings) if settings["problem"] == "toy" else _images(seed, settings)


class RandomSubset(nn.Module):
    """The control: as many channels as nested dropout would keep, but random ones. All of them in evaluation."""

    def __init__(self, features: int, sigma: float) -> None:
        super().__init__()
        self.probabilities: Tensor = width_distribution(features, sigma=sigma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        if not self.training:
            return x
        width = int(torch.multinomial(self.probabilities, 1)) + 1
        kept = torch.randperm(x.shape[1])[:width].to(x.device)
        return torch.zeros_like(x).index_copy(1, kept, x.index_select(1, kept))


def network(s: Mapping[str, Any]) -> nn.Module:
    """Features, what compresses them, and a linear classifier without bias."""
    features: nn.Module
    if s["data"] == "cifar10":
        resnet = resnet18(10)
        assert isinstance(resnet, ResNet)
        width = resnet.head.in_features
        resnet.head = nn.Identity()  # type: ignore[assignment]
        features = resnet
    else:
        features, last = small_convnet(size=8 if s["data"] == "digits" else 28)
        assert isinstance(last, nn.Linear)
        width = last.in_features
    if s["compression"] == "nested":
        return nn.Sequential(features, NestedLinear(width, 10, sigma=s["sigma"]))
    head = nn.Linear(width, 10, bias=False)
    if s["compression"] == "dropout":
        return nn.Sequential(features, nn.Dropout(s["rate"]), head)
    if s["compression"] == "subset":
        return nn.Sequential(features, RandomSubset(width, s["sigma"]), head)
    return nn.Sequential(features, head)


def _images(seed: int, s: Mapping[str, Any]) -> Measurements:
    sizes = {"train": s["train"], "validation": s["validation"], "test": s["test"]}
    sample, true = with_wrong_labels(draw(s["data"], seed, **sizes), s["noise"], seed=seed)
    device = torch.device("cpu")
    if s["data"] == "cifar10":
        device = need_gpu(f"the paper scale trains ResNet-18 for {s['epochs']} epochs")
    train_x, validation_x, test_x = (x.to(device) for x in (sample.train_x, sample.validation_x, sample.test_x))
    train_y = sample.train_y.to(device)
    validation = TensorData(validation_x, sample.validation_y.to(device), batch_size=1000, shuffle=False)
    wrong = sample.train_y != true
    trace = Trace()

    def measure(networks: tuple[nn.Module, ...], epoch: int) -> None:
        chosen = {}
        if nested_layers(networks[0]):
            width, _ = select_width(networks, validation)
            chosen["width"] = float(width)
        tested = quality(outputs(networks, test_x), sample.test_y)
        trace.add(
            epoch,
            {
                "test_accuracy": tested["accuracy"],
                "nll": tested["nll"],
                "ece": tested["ece"],
                "validation_accuracy": quality(outputs(networks, validation_x), sample.validation_y)["accuracy"],
                **chosen,
            },
        )

    augmentation = torch.Generator().manual_seed(10 * seed + 4)

    def augmented(batches: TensorData) -> Source:
        if s["data"] != "cifar10":
            return batches
        return Augmented(batches, partial(crop_and_flip, generator=augmentation))

    batches = TensorData(train_x, train_y, batch_size=s["batch"], seed=seed)
    count = 2 if s["co_teaching"] else 1
    networks = tuple(seeded(2 * seed + k, network, s).to(device) for k in range(count))
    measured = checkpoints(s["epochs"]) if count == 1 else frozenset()

    def measure_alone(net: nn.Module, epoch: int) -> None:
        if epoch in measured:
            measure((net,), epoch)

    for k, net in enumerate(networks):
        torch.manual_seed(100 * seed + k)  # widths, dropout
        fit(
            net,
            augmented(batches),
            _loss(s, torch.Generator().manual_seed(10 * seed + 3)),
            optimizer=torch.optim.SGD(net.parameters(), lr=s["lr"], momentum=0.9, weight_decay=s["weight_decay"]),
            epochs=s["epochs"],
            schedule=_rates(s),
            first_epoch=k * s["epochs"],
            after_epoch=partial(measure_alone, net),
        )
    if s["co_teaching"]:
        measure(networks, 0)
        if nested_layers(networks[0]):
            draw_together(*networks, seed=seed)
        co = CoTeaching(
            *networks,
            optimizer=partial(torch.optim.SGD, lr=s["co_lr"], momentum=0.9, weight_decay=s["weight_decay"]),
            schedule=piecewise({0.5: 0.1}) if s["data"] == "cifar10" else 1.0,
            forget_rate=forget_schedule(s["forget_rate"], gradual=s["gradual"]),
            freeze_norm=True,
            seed=seed,
        )
        co.fit(
            augmented(TensorData(train_x, train_y, batch_size=s["co_batch"], drop_last=True, seed=seed + 1)),
            epochs=s["co_epochs"],
            after_epoch=lambda co: measure(co.networks, co.epoch),
        )

    metrics = trace.best("validation_accuracy", "higher") if s["early_stopping"] else trace.last
    if not s["early_stopping"]:  # what the networks of the end know of their training images
        logits = outputs(networks, train_x)
        metrics["memorised"] = percent(logits.argmax(dim=1)[wrong] == sample.train_y[wrong])
        losses = F.cross_entropy(logits, sample.train_y, reduction="none")
        metrics["right_among_small_losses"] = percent(~wrong[small_loss_selection(losses, s["noise"])])
    if nested_layers(networks[0]):
        sizes_of = [sum(p.numel() for p in net.parameters()) for net in (cut_to_width(networks[0]), networks[0])]
        metrics["parameters_after_cut"] = 100 * sizes_of[0] / sizes_of[1]
    return Measurements(metrics, trace.curves("test_accuracy", "validation_accuracy"), data=sample.fingerprint)


def _loss(s: Mapping[str, Any], draws: torch.Generator) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy, or a rival of the technique's; nothing in it knows of the compression."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, y = batch.inputs, batch.targets
        assert isinstance(x, Tensor)
        assert y is not None
        if s["mixup"]:
            return mixup_loss(net, x, y, s["mixup"], draws)
        return generalized_cross_entropy(net(x), y, s["q"]) if s["q"] else F.cross_entropy(net(x), y)

    return loss


def _rates(s: Mapping[str, Any]) -> Schedule:
    """Drops after 57 and 86 % of the training, as in the official script (200 and 300 of 350 epochs)."""
    if s["data"] != "cifar10":
        return piecewise({0.57: 0.1, 0.86: 0.01})
    begin = 1 - 350 / s["epochs"]  # the warm-up comes before the 350 epochs
    drops = piecewise({begin + 200 / s["epochs"]: 0.1, begin + 300 / s["epochs"]: 0.01})
    return warmup(drops, begin)


# -- the toy of the authors' README ------------------------------------------------------------------


def _toy(seed: int, s: Mapping[str, Any]) -> Measurements:
    """A sine through 200 points, 30 % of them anywhere; the width is chosen on 100 further such points."""
    numbers = torch.Generator().manual_seed(10 * seed + 1)
    x = 2 * torch.rand(300, 1, generator=numbers) - 1
    curve = torch.sin(4 * x)
    anywhere = 4 * torch.rand(300, 1, generator=numbers) - 2
    y = torch.where(torch.rand(300, 1, generator=numbers) < 0.3, anywhere, curve)
    torch.manual_seed(seed)
    # "Nested200" in the README: sigma 200.
    head = NestedLinear(200, 1, sigma=200.0)
    if s["compression"] is None:
        head.nested.hold(200)
    net = nn.Sequential(nn.Linear(1, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), head)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(s["toy_steps"]):
        F.mse_loss(net(x[:200]), y[:200]).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    grid = torch.linspace(-1, 1, 401)[:, None]

    @torch.no_grad()
    def errors(width: int) -> tuple[float, float]:
        """Mean absolute error on the further points, and distance from the true curve."""
        head.nested.keep = width
        valid = (net(x[200:]) - y[200:]).abs().mean()
        return float(valid), float((net(grid) - torch.sin(4 * grid)).square().mean().sqrt())

    found = {width: errors(width) for width in (range(1, 201) if s["compression"] else (200,))}
    best = min(found, key=lambda width: found[width][0])
    return Measurements(
        {"curve_error": found[best][1], "curve_error_all_channels": found[200][1], "width": float(best)},
        data=data_fingerprint(x.numpy(), y.numpy()),
    )
