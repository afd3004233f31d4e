"""Do compressed features keep a network from memorising wrong labels, and does co-teaching build on them?

*Digits*: 1,000 training images with 40 % of the labels replaced by another class, 200 clean validation images, 597 for
the test; a perceptron with 128 features in front of a linear classifier without bias. Compared, at the end of training,
are plain training, dropout and nested dropout, alone and with co-teaching of two such networks afterwards. First with
equal optimiser settings, as the paper does it (``compression_end``, ``compression_with_co_teaching``,
``co_teaching_adds``); then each arm tuned with 24 trials on the validation images (``tuned_baseline``,
``than_dropout``, ``tuned_with_co_teaching``, ``than_dropout_with_co_teaching``). The control ``random_subset`` keeps as
many channels as nested dropout, but random ones instead of the first: all but the order (``order_matters``).
``early_stopping`` asks what is left of the gain for somebody who stops at the best validation epoch.

*Toy*, the paper's own: a curve through 200 points, 30 % of them anywhere, and 200 channels (``toy``).

Refuted by an interval below the smallest effect of the card: by plain training that ends within 5 points, by a random
subset that does as well, and so on. About three minutes for five seeds on two cores. *Paper* scale: CIFAR-10 with 20 %
symmetric noise and ResNet-18, for machines with a GPU.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import Split, cifar, digits, flip_labels
from regularized.evidence.experiment import About, Measurements, Tuning, Unavailable, data_fingerprint
from regularized.evidence.models import ResNet, resnet18, seeded
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule, small_loss_selection
from regularized.noisy_labels.nested_dropout.cutting import cut_to_width
from regularized.noisy_labels.nested_dropout.layer import NestedLinear, draw_together, nested_layers, width_distribution
from regularized.noisy_labels.nested_dropout.width import select_width
from regularized.training.data import TensorData
from regularized.training.progress import Progress, Schedule, piecewise, warmup
from regularized.training.step import Batch

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"data": "digits", "train": 200, "validation": 50, "epochs": 3, "co_epochs": 2, "toy_steps": 20},
    # Ours: the perceptron memorises nearly all labels in 70 epochs. Drops of the rate after 57 and 86 % of the
    # training, as in the official script (200 and 300 of 350 epochs).
    "laptop": {"data": "digits", "train": 1000, "validation": 200, "epochs": 70, "co_epochs": 15, "toy_steps": 2000},
    # The official scripts for CIFAR-10: rate 0.1, batches of 320, 350 epochs, a warm-up of 6,000 iterations; then
    # fine-tuning with rate 0.001, 100 epochs, a drop after 50, forget rate 0.2 without a rise, and frozen batch
    # normalisation. 393 epochs are 350 and the warm-up.
    "paper": {
        "data": "cifar10",
        "train": 45_000,
        "validation": 5_000,
        "epochs": 393,
        "co_epochs": 100,
        "toy_steps": 2000,
        "noise": 0.2,
        "lr": 0.1,
        "batch": 320,
        "weight_decay": 5e-4,
        "co_lr": 0.001,
        "co_batch": 320,
        "forget_rate": 0.2,
        "gradual": 0,
        "sigma": 10.0,
        "rate": 0.7,  # of dropout: the scripts have 0.3 and 0.7
    },
}

DEFAULTS: dict[str, Any] = {
    "problem": "images",
    "noise": 0.4,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "batch": 100,
    "compression": None,
    "co_teaching": False,
    # Fine-tuning: a tenth of the first rate, 100 samples for each network; the rate of wrong labels is taken as known.
    "co_lr": 0.005,
    "co_batch": 200,
    "forget_rate": 0.4,
    "gradual": 5,
    "sigma": 10.0,
    "rate": 0.5,
}

_DROPOUT, _NESTED = {"compression": "dropout"}, {"compression": "nested"}
_CO = {"co_teaching": True}

ARMS: dict[str, dict[str, Any]] = {
    # Equal settings; sigma is that of the official script for CIFAR-10.
    "cross_entropy": {},
    "nested": {**_NESTED, "sigma": 10.0},
    "cross_entropy_co_teaching": {**_CO},
    "nested_co_teaching": {**_CO, **_NESTED, "sigma": 10.0},
    # The best of TUNING.
    "cross_entropy_tuned": {"lr": 0.01, "weight_decay": 0.01},
    "dropout_tuned": {**_DROPOUT, "rate": 0.9, "lr": 0.01, "weight_decay": 5e-3},
    "random_subset_tuned": {"compression": "subset", "sigma": 60.0, "lr": 0.05, "weight_decay": 5e-3},
    "nested_tuned": {**_NESTED, "sigma": 320.0, "lr": 0.01, "weight_decay": 5e-3},
    "cross_entropy_tuned_co_teaching": {**_CO, "weight_decay": 2e-2, "co_lr": 0.05},
    "dropout_tuned_co_teaching": {**_CO, **_DROPOUT, "rate": 0.1, "weight_decay": 2e-2, "co_lr": 0.02},
    "nested_tuned_co_teaching": {**_CO, **_NESTED, "sigma": 320.0, "weight_decay": 2e-2, "co_lr": 0.05},
    "toy_plain": {"problem": "toy"},
    "toy_nested": {"problem": "toy", **_NESTED},
}

# At paper scale the published settings replace what was tuned on the laptop.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {arm: {name: SCALES["paper"].get(name, own[name]) for name in own} for arm, own in ARMS.items()}
}


def _grid(**choices: tuple[float, ...]) -> list[dict[str, float]]:
    combined: list[dict[str, float]] = [{}]
    for name, values in choices.items():
        combined = [{**one, name: value} for one in combined for value in values]
    return combined


# With 320 of 128 channels all widths are about equally likely: no weaker compression is left beyond it.
_SIGMAS = (10.0, 40.0, 80.0, 320.0)
# Whatever else an arm chooses, it chooses from these too.
_ONE: dict[str, tuple[float, ...]] = {"lr": (0.05, 0.01), "weight_decay": (5e-4, 5e-3, 2e-2)}
_TWO: dict[str, tuple[float, ...]] = {"weight_decay": (5e-3, 2e-2, 5e-2), "co_lr": (0.02, 0.05)}
_DECAYS = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
TUNING = Tuning(
    metric="validation_accuracy",  # 200 clean samples: what the method, too, needs for its width
    direction="higher",
    seeds=(1000, 1001, 1002),
    grids={
        "cross_entropy_tuned": _grid(lr=(0.05, 0.02, 0.01, 0.005), weight_decay=_DECAYS),
        "dropout_tuned": _grid(rate=(0.3, 0.5, 0.7, 0.9), **_ONE),
        "random_subset_tuned": _grid(sigma=(15.0, 30.0, 60.0, 320.0), **_ONE),
        "nested_tuned": _grid(sigma=_SIGMAS, **_ONE),
        "cross_entropy_tuned_co_teaching": _grid(weight_decay=_DECAYS, co_lr=(0.005, 0.02, 0.05, 0.1)),
        "dropout_tuned_co_teaching": _grid(rate=(0.1, 0.3, 0.5, 0.7), **_TWO),
        "nested_tuned_co_teaching": _grid(sigma=_SIGMAS, **_TWO),
    },
)


def about(s: Mapping[str, Any]) -> About:
    """Digits that each seed splits again, CIFAR-10, or the synthetic curve."""
    if s["problem"] == "toy":
        return About("200 points of a curve", 200, "200 channels", 200)
    if s["data"] == "cifar10":
        return About("45,000 CIFAR-10 images", 45_000, "ResNet-18, 11M weights", 11_000_000, 10_000 / 45_000)
    train, rest = s["train"], 1797 - s["train"] - s["validation"]
    return About(f"{train:,} digits of 8x8 pixels", train, "MLP, 51k weights", 50_816, rest / train)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train and measure one arm with one seed; accuracies in per cent.

    Raises:
        Unavailable: at paper scale, CIFAR-10 or a GPU is not there.
    """
    return _toy(seed, s) if s["problem"] == "toy" else _images(seed, s)


def data(seed: int, s: Mapping[str, Any]) -> tuple[Split, Tensor, TensorData]:
    """Split with noisy training labels, the true ones, and clean validation batches."""
    n, m = s["train"], s["validation"]
    split = digits(n + m, seed=seed) if s["data"] == "digits" else cifar(10)
    rows = torch.randperm(n + m, generator=torch.Generator().manual_seed(10 * seed + 1))
    train, held = rows[:n], rows[n:]
    true = split.train_y[train]
    noise = torch.Generator().manual_seed(10 * seed + 2)
    noisy = flip_labels(true, s["noise"], num_classes=10, generator=noise)
    validation = TensorData(split.train_x[held], split.train_y[held], batch_size=1000, shuffle=False)
    return Split(split.train_x[train], noisy, split.test_x, split.test_y), true, validation


class RandomSubset(nn.Module):
    """The control: as many channels as nested dropout would keep, but random ones. All of them in evaluation."""

    def __init__(self, features: int, sigma: float) -> None:
        super().__init__()
        self.probabilities = width_distribution(features, sigma=sigma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        if not self.training:
            return x
        width = int(torch.multinomial(self.probabilities, 1)) + 1
        kept = torch.randperm(x.shape[1])[:width].to(x.device)
        return torch.zeros_like(x).index_copy(1, kept, x.index_select(1, kept))


def network(s: Mapping[str, Any]) -> nn.Module:
    """Features, what compresses them, and a linear classifier without bias."""
    backbone: nn.Module
    if s["data"] == "digits":
        width = 128
        backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU())
    else:
        backbone = resnet18(10)
        assert isinstance(backbone, ResNet)
        width = backbone.head.in_features
        backbone.head = nn.Identity()  # type: ignore[assignment]
    if s["compression"] == "nested":
        return nn.Sequential(backbone, NestedLinear(width, 10, sigma=s["sigma"]))
    head = nn.Linear(width, 10, bias=False)
    if s["compression"] == "dropout":
        return nn.Sequential(backbone, nn.Dropout(s["rate"]), head)
    if s["compression"] == "subset":
        return nn.Sequential(backbone, RandomSubset(width, s["sigma"]), head)
    return nn.Sequential(backbone, head)


def _images(seed: int, s: Mapping[str, Any]) -> Measurements:
    device = _device(s)
    split, true, validation = data(seed, s)
    validation = validation.to(device)
    train_x, test_x = split.train_x.to(device), split.test_x.to(device)
    wrong = split.train_y != true
    last: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {"test_accuracy": [], "validation_accuracy": []}

    def measure(networks: tuple[nn.Module, ...], epoch: int) -> None:
        if nested_layers(networks[0]):
            last["width"], accuracy = select_width(networks, validation)
        else:
            x, y = validation.inputs, validation.targets
            assert y is not None
            accuracy = float((_classes(networks, x) == y).double().mean())
        last["validation_accuracy"] = 100 * accuracy
        last["test_accuracy"] = _percent(_classes(networks, test_x).cpu() == split.test_y)
        for name, curve in curves.items():
            curve.append((float(epoch), last[name]))

    batches = TensorData(train_x, split.train_y.to(device), batch_size=s["batch"], seed=seed)
    count = 2 if s["co_teaching"] else 1
    networks = tuple(seeded(2 * seed + k, network, s).to(device) for k in range(count))
    for k, net in enumerate(networks):
        torch.manual_seed(100 * seed + k)  # widths, dropout, augmentation
        first = (lambda epoch, net=net: measure((net,), epoch)) if count == 1 else None
        _train(net, batches, s, order=k * s["epochs"], after_epoch=first)
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
        co_batches = TensorData(
            train_x, split.train_y.to(device), batch_size=s["co_batch"], drop_last=True, seed=seed + 1
        )
        co.fit(
            co_batches if s["data"] == "digits" else _Augmented(co_batches),
            epochs=s["co_epochs"],
            after_epoch=lambda co: measure(co.networks, co.epoch),
        )

    predicted = _classes(networks, train_x).cpu()
    last["memorised"] = _percent(predicted[wrong] == split.train_y[wrong])
    picked = small_loss_selection(_losses(networks, train_x, split.train_y), s["noise"])
    last["right_among_small_losses"] = _percent(~wrong[picked])
    # Stopped where the validation accuracy was best; of equals the first.
    best = max(range(len(curves["test_accuracy"])), key=lambda i: curves["validation_accuracy"][i][1])
    last["early_stopped_accuracy"] = curves["test_accuracy"][best][1]
    if nested_layers(networks[0]):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (cut_to_width(networks[0]), networks[0])]
        last["parameters_after_cut"] = 100 * sizes[0] / sizes[1]
    clean = (split.train_x, true, split.test_x, split.test_y)
    return Measurements(last, curves, data=data_fingerprint(*(t.numpy() for t in clean)))


def _train(
    net: nn.Module,
    batches: TensorData,
    s: Mapping[str, Any],
    *,
    order: int,
    after_epoch: Callable[[int], None] | None,
) -> None:
    """The plain loop of a user: nothing in it knows of the compression."""
    optimizer = torch.optim.SGD(net.parameters(), lr=s["lr"], momentum=0.9, weight_decay=s["weight_decay"])
    rate, total = _rates(s), s["epochs"] * len(batches)
    source = batches if s["data"] == "digits" else _Augmented(batches)
    for epoch in range(s["epochs"]):
        net.train()
        for number, batch in enumerate(source.batches(order + epoch)):
            for group in optimizer.param_groups:
                group["lr"] = s["lr"] * rate(Progress(epoch * len(batches) + number, total))
            assert batch.targets is not None
            F.cross_entropy(net(batch.inputs), batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        if after_epoch is not None:
            after_epoch(epoch + 1)


def _rates(s: Mapping[str, Any]) -> Schedule:
    if s["data"] == "digits":
        return piecewise({0.57: 0.1, 0.86: 0.01})
    begin = 1 - 350 / s["epochs"]  # the warm-up comes before the 350 epochs
    drops = piecewise({begin + 200 / s["epochs"]: 0.1, begin + 300 / s["epochs"]: 0.01})
    return warmup(drops, begin)


class _Augmented:
    """Batches of images, cropped at random from a margin of 4 (the same for a batch) and flipped one by one."""

    def __init__(self, batches: TensorData) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Any:
        for batch in self._batches.batches(epoch, start=start, rank=rank, world=world):
            top, left = torch.randint(9, (2,)).tolist()
            images = F.pad(batch.inputs, (4, 4, 4, 4))[..., top : top + 32, left : left + 32]
            flip = (torch.rand(len(images)) < 0.5).to(images.device)
            yield Batch(torch.where(flip[:, None, None, None], images.flip(-1), images), batch.targets)


@torch.no_grad()
def _outputs(networks: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for net in networks:
        net.eval()
    return torch.cat([torch.stack([net(part) for net in networks]).mean(0) for part in x.split(2000)])


def _classes(networks: tuple[nn.Module, ...], x: Any) -> Tensor:
    return _outputs(networks, x).argmax(1)


def _losses(networks: tuple[nn.Module, ...], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(_outputs(networks, x).cpu(), y, reduction="none")


def _percent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()


def _device(s: Mapping[str, Any]) -> torch.device:
    if s["data"] == "digits":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Unavailable(
            f"the paper scale trains ResNet-18 for {s['epochs']} epochs and needs a CUDA GPU; none is here"
        )
    return torch.device("cuda")


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
