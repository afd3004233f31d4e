"""PS-KD where plain training becomes over-confident: few, noisy digits that a network can memorise.

*The paper's comparison* (claims ``nll``, ``ece``, ``error``, ``aurc``, ``ece_label_smoothing``): cross-entropy, label
smoothing and PS-KD with the same optimiser settings, weight decay 5e-4. ``own_history``: a control whose history is
swapped between samples of the same class does worse, so it is the *sample's* past prediction that helps.

*What a user would try first*: temperature scaling after plain training (``nll_scaled``), and more weight decay
(``nll_tuned``, ``ece_tuned``: every arm with as many trials, chosen by the negative log-likelihood on validation data).

Data: 400 of scikit-learn's digits under heavy pixel noise that stays with each image, and as many for validation. Half
a minute for five seeds on two cores. A claim is refuted by an interval of the gain that lies below the smallest effect
of the card. *Paper* scale: CIFAR-100 and a pre-activation ResNet-18, for machines with a GPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import Split, cifar, digits
from regularized.evidence.experiment import About, Measurements, Tuning, Unavailable
from regularized.evidence.models import mlp, preact_resnet18, seeded
from regularized.mechanisms.calibration import (
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
    fit_temperature,
    reliability,
)
from regularized.mechanisms.prediction_store import DenseStore
from regularized.overfitting.ps_kd import ProgressiveDistillationLoss, progressive_loss

DEFAULTS: Mapping[str, Any] = {
    "lr": 0.05,
    "weight_decay": 5e-4,
    "smoothing": 0.0,
    "alpha": None,  # a number: PS-KD
    "shuffled": False,
    "scaled": False,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"data": "digits", "train": 100, "hidden": 32, "epochs": 3, "batch": 25, "noise": 1.5, "jitter": 0.7},
    # Ours. `noise` is the standard deviation of what is added to each image once: the problem is hard and the training
    # set memorisable. `jitter` is added afresh at each visit, as augmentation. Both in units of the scaled inputs.
    "laptop": {"data": "digits", "train": 400, "hidden": 128, "epochs": 80, "batch": 50, "noise": 1.5, "jitter": 0.7},
    # The official command for CIFAR-100: 300 epochs, batch 128, learning rate 0.1, times 0.1 at epochs 150 and 225 (the
    # laptop has the same shares), momentum 0.9 with Nesterov, weight decay 5e-4, alpha 0.8. We hold 5,000 of its 50,000
    # training images out for validation. Tuned arms: ours, twice the weight decay, since nobody tunes at this size.
    "paper": {
        "data": "cifar100",
        "validation": 5000,
        "epochs": 300,
        "batch": 128,
        "lr": 0.1,
    },
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        "cross_entropy_tuned": {"lr": 0.1, "weight_decay": 1e-3},
        "label_smoothing_tuned": {"lr": 0.1, "weight_decay": 1e-3, "smoothing": 0.1},
        "ps_kd_tuned": {"lr": 0.1, "weight_decay": 1e-3, "alpha": 0.8},
    }
}

# Weight decay and alpha are the paper's; smoothing is the usual 0.1; the learning rate suits the small network.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "cross_entropy": {"weight_decay": 5e-4},
    "cross_entropy_scaled": {"weight_decay": 5e-4, "scaled": True},
    "label_smoothing": {"weight_decay": 5e-4, "smoothing": 0.1},
    "ps_kd_shuffled": {"weight_decay": 5e-4, "alpha": 0.8, "shuffled": True},
    "ps_kd": {"weight_decay": 5e-4, "alpha": 0.8},
    # The best of TUNING (regularized tune ps_kd), not chosen by hand.
    "cross_entropy_tuned": {"lr": 0.1, "weight_decay": 2e-2},
    "label_smoothing_tuned": {"weight_decay": 2e-2, "smoothing": 0.02},
    "ps_kd_tuned": {"weight_decay": 2e-2, "alpha": 0.3},
}

_DECAYS = (5e-3, 2e-2, 5e-2)
TUNING = Tuning(
    metric="validation_nll",
    direction="lower",
    grids={
        "cross_entropy_tuned": [
            {"lr": lr, "weight_decay": decay} for lr in (0.02, 0.05, 0.1, 0.2) for decay in _DECAYS
        ],
        "label_smoothing_tuned": [
            {"smoothing": share, "weight_decay": decay} for share in (0.02, 0.05, 0.1, 0.2) for decay in _DECAYS
        ],
        "ps_kd_tuned": [{"alpha": alpha, "weight_decay": decay} for alpha in (0.3, 0.5, 0.8, 1.0) for decay in _DECAYS],
    },
)


def data(seed: int, settings: Mapping[str, Any]) -> tuple[Split, Tensor, Tensor]:
    """Training and test set, and validation inputs and labels: as many as for training, or a tenth of CIFAR's."""
    if settings["data"] == "cifar100":
        split, held = cifar(100), settings["validation"]
        mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]  # constants of the official code
        std = torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]
        x, test_x = (split.train_x - mean) / std, (split.test_x - mean) / std
        return Split(x[:-held], split.train_y[:-held], test_x, split.test_y), x[-held:], split.train_y[-held:]
    count = settings["train"]
    split = digits(2 * count, seed=seed)
    draws = torch.Generator().manual_seed(seed + 1)
    x, test_x = (
        images + settings["noise"] * torch.randn(images.shape, generator=draws)
        for images in (split.train_x, split.test_x)
    )
    train = Split(x[:count], split.train_y[:count], test_x, split.test_y)
    return train, x[count:], split.train_y[count:]


def model(seed: int, settings: Mapping[str, Any]) -> nn.Module:
    """The network, from its own seed."""
    if settings["data"] == "cifar100":
        return seeded(seed, preact_resnet18, 100)
    return seeded(seed, mlp, [64, settings["hidden"], settings["hidden"], 10])


class ShuffledHistory(nn.Module):
    """The control: PS-KD with the history of *another* sample of the same class, the same one in every epoch."""

    def __init__(self, labels: Tensor, num_classes: int, *, epochs: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.store = DenseStore(len(labels), num_classes)
        self.epochs, self.alpha = epochs, alpha
        partner = torch.arange(len(labels))
        draws = torch.Generator().manual_seed(seed)
        for label in range(num_classes):
            (members,) = torch.where(labels.cpu() == label)
            members = members[torch.randperm(len(members), generator=draws)]
            partner[members] = members.roll(1)
        self.register_buffer("partner", partner)

    def set_epoch(self, epoch: int) -> None:
        """As that of the loss."""
        self.current_alpha = self.alpha * (epoch + 1) / self.epochs if epoch else 0.0

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """As that of the loss, but read at the partner's row."""
        log_p = logits.log_softmax(dim=1)
        history = self.store.read(self.get_buffer("partner")[index])
        loss = progressive_loss(log_p, labels, history, self.current_alpha)
        self.store.write(index, log_p.detach().exp())
        return loss


def criterion(settings: Mapping[str, Any], labels: Tensor, classes: int, seed: int) -> nn.Module:
    """The loss of an arm, called with logits, labels and index."""
    if settings["shuffled"]:
        return ShuffledHistory(labels, classes, epochs=settings["epochs"], alpha=settings["alpha"], seed=seed)
    if settings["alpha"] is not None:
        return ProgressiveDistillationLoss(len(labels), classes, epochs=settings["epochs"], alpha=settings["alpha"])
    return _WithoutHistory(settings["smoothing"])


class _WithoutHistory(nn.CrossEntropyLoss):
    def __init__(self, smoothing: float) -> None:
        super().__init__(label_smoothing=smoothing)

    def set_epoch(self, epoch: int) -> None:
        pass

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(logits, labels)


def about(settings: Mapping[str, Any]) -> About:
    """Noisy digits that each seed splits again, or CIFAR-100."""
    if settings["data"] == "cifar100":
        return About("45,000 CIFAR-100 images", 45_000, "ResNet-18, 11M weights", 11_000_000, 10_000 / 45_000)
    train, hidden = settings["train"], settings["hidden"]
    weights = 75 * hidden + hidden**2
    return About(
        f"{train} noisy digits of 8x8 pixels",
        train,
        f"MLP, {weights // 1000}k weights",
        weights,
        (1797 - 2 * train) / train,
    )


def run(settings: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm with one seed; error and ECE in per cent, AURC times 1000, as the paper prints them."""
    device = _device(settings)
    published = settings["data"] == "cifar100"
    split, validation_x, validation_y = data(seed, settings)
    x, y, test_x, test_y = (t.to(device) for t in (split.train_x, split.train_y, split.test_x, split.test_y))
    validation_x, validation_y = validation_x.to(device), validation_y.to(device)
    net = model(seed, settings).to(device)
    loss_of = criterion(settings, split.train_y, 100 if published else 10, seed + 4).to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=settings["lr"], momentum=0.9, nesterov=True, weight_decay=settings["weight_decay"]
    )
    epochs = settings["epochs"]
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)
    order, draws = torch.Generator().manual_seed(seed + 2), torch.Generator(device).manual_seed(seed + 3)
    augment: Callable[[Tensor], Tensor] = (
        (lambda images: _crop_and_flip(images, draws))
        if published
        else lambda images: images + settings["jitter"] * torch.randn(images.shape, generator=draws, device=device)
    )

    curves: dict[str, list[tuple[float, float]]] = {"error": [], "nll": [], "ece": []}
    for epoch in range(epochs):
        net.train()
        loss_of.set_epoch(epoch)  # type: ignore[operator]
        for index in torch.randperm(len(y), generator=order).to(device).split(settings["batch"]):
            optimizer.zero_grad()
            loss_of(net(augment(x[index])), y[index], index).backward()
            optimizer.step()
        steps.step()
        logits, validation_logits = _predict(net, test_x), _predict(net, validation_x)
        if settings["scaled"]:
            temperature = fit_temperature(validation_logits, validation_y)
            logits, validation_logits = logits / temperature, validation_logits / temperature
        now = _measure(logits, test_y)
        for name, curve in curves.items():
            curve.append((epoch + 1.0, now[name]))

    metrics = {
        **now,
        "train_error": _measure(_predict(net, x), y)["error"],
        "validation_nll": _measure(validation_logits, validation_y)["nll"],
        **{f"best_{name}": min(value for _, value in curve) for name, curve in curves.items()},
    }
    return Measurements(metrics=metrics, curves=curves, data=split.fingerprint)


@torch.no_grad()
def _predict(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(images) for images in x.split(2048)])


def _measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    p = logits.double().softmax(dim=1)
    diagram = reliability(p, labels)
    return {
        "error": 100.0 * float((p.argmax(dim=1) != labels).double().mean()),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "ece": 100.0 * float(diagram.expected_calibration_error),
        "overconfidence": 100.0 * float(diagram.overconfidence),
        "aurc": 1000.0 * float(area_under_risk_coverage(p, labels)),
        "eaurc": 1000.0 * float(excess_area_under_risk_coverage(p, labels)),
    }


def _crop_and_flip(images: Tensor, draws: torch.Generator) -> Tensor:
    """Random crop of each image padded by 4, and a random flip."""
    count, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    top, left = torch.randint(9, (2, count, 1), generator=draws, device=device)
    pixels = torch.arange(32, device=device)
    flip = torch.rand(count, 1, generator=draws, device=device) < 0.5
    rows, columns = top + pixels, left + torch.where(flip, 31 - pixels, pixels)
    crop = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crop.permute(0, 3, 1, 2).contiguous()


def _device(settings: Mapping[str, Any]) -> torch.device:
    if settings["data"] != "cifar100":
        return torch.device("cpu")
    cifar(100)  # says first which data is missing
    if not torch.cuda.is_available():
        raise Unavailable(
            "the paper scale trains a pre-activation ResNet-18 on CIFAR-100 for 300 epochs and needs a CUDA "
            "GPU; none is here"
        )
    return torch.device("cuda")
