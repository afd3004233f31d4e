"""How much does a student learn from a teacher that knows nothing? Probes, lottery tickets and connectivity.

*Probes* (claims ``student_beats_teacher`` to ``locality_without_norm``): a student copies the outputs of an untrained
network on the unlabelled images; the accuracy of a logistic regression on its 16 features is compared with that on the
teacher's. Controls: Gaussian noise instead of images; a teacher whose batch normalisation uses the batch like the
student's (the copy is a fixed point then); starts near to and far from the teacher. The teacher of a seed and depth is
the same in all arms. Refuted, if the student gains less than the smallest effect of the card, or a control as much.

*Checkpoints* (claims ``lottery_ticket`` to ``ticket_needs_real_inputs``): the same supervised budget on 300 labels from
the initialisation, from the student that was distilled from it, and from a student distilled on noise; each with the
learning rate that it prefers. Iterative magnitude pruning with rewinding to that checkpoint, and the error along the
line between two runs from it. Refuted, if the student's checkpoint is no better than the initialisation.

Laptop data: Fashion-MNIST as 8 x 8 pixels, images of each seed's own; a perceptron; about two seconds a run.
Distillation has no setting that was tuned: there are no labels to tune it with, and the settings are the paper's.
*Paper* scale: CIFAR-10, ResNet-18, on a GPU.
"""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import Split, cifar, eight_by_eight_split
from regularized.evidence.datasets.samples import eight_by_eight_name, resplit
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, Unavailable
from regularized.evidence.models import ResNet
from regularized.mechanisms.mode_connectivity import barrier, errors_between
from regularized.mechanisms.probes import knn_probe, linear_probe, logistic_probe
from regularized.mechanisms.pruning import iterative_magnitude_pruning
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init
from regularized.self_supervised.random_teacher.teacher import RandomTeacher
from regularized.training.data import TensorData

DEFAULTS: dict[str, Any] = {
    "encoder": "mlp",
    "depth": 2,
    "norm": True,
    "alpha": 0.0,
    "inputs": "images",
    "statistics": "running",
    "supervised": False,
    "supervised_lr": 1e-2,
    "rate": 0.4,
}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "digits",
        "train": 200,
        "test": 500,
        "embedding": 16,
        "head": {"hidden": (32,), "bottleneck": 8, "out_features": 32},
        "epochs": 2,
        "batch": 100,
        "probe_every": 1,
        "labels": 60,
        "supervised_epochs": 2,
        "supervised_batch": 30,
        "rounds": 1,
        "points": 3,
    },
    # Ours: 16 features, so that the probe is not saturated; 60 epochs of 5 steps.
    "laptop": {
        "data": "fashion_mnist",
        "train": 1000,
        "test": 2000,
        "embedding": 16,
        "head": {"hidden": (128, 128), "bottleneck": 64, "out_features": 512},
        "epochs": 60,
        "batch": 200,
        "probe_every": 10,
        "labels": 300,
        "supervised_epochs": 30,
        "supervised_batch": 50,
        "rounds": 5,
        "rate": 0.4,  # 0.6^5 = 7.8 % of the weights are left; after one more round whole layers are gone
        "points": 11,
    },
    # configs/cifar10_distillation_v2.json: batch 256, head 2048-2048-256-65536, temperatures 1, AdamW 1e-3 without
    # decay, no augmentation; "100 epochs". The supervised phases: 50 epochs of AdamW, batch 256 (defaults of
    # finetune.py); its pruning rate and rounds are unknown, 20 % and ten rounds are ours. "encoder" may be "vgg11".
    "paper": {
        "data": "cifar10",
        "train": 50_000,
        "encoder": "resnet18",
        "embedding": 512,
        "head": {"hidden": (2048, 2048), "bottleneck": 256, "out_features": 65536},
        "epochs": 100,
        "batch": 256,
        "probe_every": 10,
        "labels": 45_000,
        "supervised_epochs": 50,
        "supervised_batch": 256,
        "supervised_lr": 1e-3,
        "rounds": 10,
        "rate": 0.2,
        "points": 11,
    },
}

_DEEP = {"depth": 5}
ARMS: dict[str, dict[str, Any]] = {
    "random_teacher": {"epochs": 0},
    "student": {},
    "student_noise_inputs": {"inputs": "noise"},
    "student_same_statistics": {"statistics": "batch"},
    "deep_random_teacher": {**_DEEP, "epochs": 0},
    "deep_student": _DEEP,
    "deep_student_noise_inputs": {**_DEEP, "inputs": "noise"},
    "student_far_start": {**_DEEP, "alpha": 1.0},
    "student_near_start": {**_DEEP, "alpha": 0.2},
    "plain_far_start": {**_DEEP, "norm": False, "alpha": 1.0},
    "plain_near_start": {**_DEEP, "norm": False, "alpha": 0.2},
    # The learning rates were chosen by TUNING.
    "supervised_from_init": {"supervised": True, "epochs": 0, "supervised_lr": 5e-3},
    "supervised_from_student": {"supervised": True, "supervised_lr": 2e-3},
    "supervised_from_noise_student": {"supervised": True, "inputs": "noise", "supervised_lr": 1e-2},
}

# The settings that the laptop's arms tune are the scale's there.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {arm: {"supervised_lr": SCALES["paper"]["supervised_lr"]} for arm in ARMS}
}

_RATES = [{"supervised_lr": lr} for lr in (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)]
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={arm: _RATES for arm, settings in ARMS.items() if settings.get("supervised")},
)


SEEDS = Seeds(
    20,
    first=200,
    share=3000 / 60_000,
    why="Ten seeds left nine claims open. For twenty fresh ones `regularized outlook random_teacher --share "
    "0.05` said before the first run that deep_student_beats_teacher and needs_real_inputs would rather "
    "be decided than not.",
)


def about(s: Mapping[str, Any]) -> About:
    """Small images, or CIFAR-10."""
    if s["data"] == "cifar10":
        return About("50,000 CIFAR-10 images", 50_000, "ResNet-18, 11M weights", 11_000_000, 0.2)
    train, weights = s["train"], 64 * 128 + (s["depth"] - 1) * 128**2 + 128 * s["embedding"]
    model = f"MLP of depth {s['depth']}, {weights // 1000}k weights"
    again = resplit(s["data"], train=train, test=s["test"])
    return About(f"{train:,} {eight_by_eight_name(s['data'])}", train, model, weights, again)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Distil, probe, and for the supervised arms train from the checkpoint.

    Raises:
        Unavailable: at paper scale, CIFAR-10 or a GPU is not there.
    """
    device = "cpu"
    small = s["data"] != "cifar10"
    if small:
        split = eight_by_eight_split(s["data"], seed, train=s["train"], test=s["test"])
    else:
        split = _normalised(cifar(10))
        if not torch.cuda.is_available():
            raise Unavailable("the paper scale trains a ResNet-18 on CIFAR-10 for 100 epochs and needs a CUDA GPU")
        device = "cuda"
    parts = [t.to(device) for t in (split.train_x, split.train_y, split.test_x, split.test_y)]
    train, test = (parts[0], parts[1]), (parts[2], parts[3])

    teacher, student, match_inputs = _networks(s, seed, parts[0])
    probe = partial(logistic_probe if small else linear_probe, train=train, test=test)
    curve = [(0.0, 100 * probe(student.encoder))]
    metrics = {"teacher_probe": 100 * probe(teacher.encoder)}
    loss = _distil(student, teacher, match_inputs, s, seed, lambda e: curve.append((e, 100 * probe(student.encoder))))
    metrics |= {
        "probe_accuracy": curve[-1][1],
        "gain": curve[-1][1] - metrics["teacher_probe"],
        "knn_accuracy": 100 * knn_probe(student.encoder, train, test, k=min(20, len(parts[0]))),
        "distillation_loss": loss,
    }
    curves = {"probe_accuracy": curve}
    if s["supervised"]:
        found, of_rounds = _supervised(student.encoder, train, test, s, seed)
        metrics |= found
        curves |= of_rounds
    return Measurements(metrics, curves, data=split.fingerprint)


# -- without labels -------------------------------------------------------------------------------


def _networks(s: Mapping[str, Any], seed: int, images: Tensor) -> tuple[EncoderWithHead, EncoderWithHead, Tensor]:
    """Teacher, student at its start, and the inputs that both see; each from a stream of its own."""

    def network(stream: int) -> EncoderWithHead:
        net = EncoderWithHead(_encoder(s), BottleneckHead(s["embedding"], **s["head"]))
        draw_weights(net, generator=torch.Generator().manual_seed(10 * seed + stream))
        return net.to(images.device)

    teacher = network(1)
    student = interpolate_init(teacher, network(2), s["alpha"])
    if s["inputs"] == "noise":
        images = torch.randn(images.shape, generator=torch.Generator().manual_seed(10 * seed + 3)).to(images)
    return teacher, student, images


def _encoder(s: Mapping[str, Any]) -> nn.Module:
    if s["encoder"] == "resnet18":
        net = ResNet((2, 2, 2, 2), 10)
        net.head = nn.Identity()  # type: ignore[assignment]
        return net
    if s["encoder"] == "vgg11":
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.Flatten())
    layers = []
    for fan_in, fan_out in pairwise([64, *[128] * s["depth"], s["embedding"]]):
        layers.append(nn.Linear(fan_in, fan_out))
        if s["norm"]:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _distil(
    student: EncoderWithHead, teacher: EncoderWithHead, inputs: Tensor, s: Mapping[str, Any], seed: int, record: Any
) -> float:
    """The label-free phase; the loss of the last batch, 0 without an epoch."""
    if s["epochs"] == 0:
        return 0.0
    wide = s["head"]["out_features"] > 4096
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # the arm that is a fixed point is so on purpose
        match = RandomTeacher(student, copy.deepcopy(teacher), statistics=s["statistics"], chunk=64 if wide else None)
    if s["statistics"] == "running":
        match.remember(inputs)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    data = TensorData(inputs, batch_size=s["batch"], drop_last=True, seed=10 * seed + 4)
    for epoch in range(s["epochs"]):
        student.train()
        for batch in data.batches(epoch):
            loss = match(batch.inputs, batch.index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if (epoch + 1) % s["probe_every"] == 0 or epoch + 1 == s["epochs"]:
            record(float(epoch + 1))
    return float(loss.detach())


# -- from a checkpoint, with labels ---------------------------------------------------------------


def _supervised(
    encoder: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], s: Mapping[str, Any], seed: int
) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """Pruning with rewinding to the checkpoint, and the line between two dense runs from it."""
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(10 * seed + 5)).to(train[0].device)
    rows, held_out = order[: s["labels"]], order[s["labels"] :]
    x, y = train[0][rows], train[1][rows]
    classifier = nn.Linear(s["embedding"], 10)
    draw_weights(classifier, generator=torch.Generator().manual_seed(10 * seed + 6))
    checkpoint = nn.Sequential(copy.deepcopy(encoder), classifier).to(x.device)

    def fit(model: nn.Module, order_seed: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=s["supervised_lr"])
        data = TensorData(x, y, batch_size=s["supervised_batch"], drop_last=True, seed=order_seed)
        model.train()
        for epoch in range(s["supervised_epochs"]):
            for batch in data.batches(epoch):
                assert batch.targets is not None
                F.cross_entropy(model(batch.inputs), batch.targets).backward()
                optimizer.step()
                optimizer.zero_grad()

    def calibrate(model: nn.Module) -> None:
        torch.optim.swa_utils.update_bn(x.split(1000), model)

    def error(model: nn.Module) -> float:
        return 100 - _accuracy(model, *test)

    ends = [copy.deepcopy(checkpoint) for _ in range(2)]
    for number, end in enumerate(ends):
        fit(end, 10 * seed + 7 + number)
    line = errors_between(ends[0], ends[1], error, points=s["points"], calibrate=calibrate)

    sparse = copy.deepcopy(checkpoint)
    rounds = iterative_magnitude_pruning(
        sparse,
        lambda model: fit(model, 10 * seed + 7),
        rounds=s["rounds"],
        rate=s["rate"],
        evaluate=lambda model: _accuracy(model, *test),
    )
    metrics = {
        "dense_accuracy": _score(rounds[0].score),
        "sparse_accuracy": _score(rounds[-1].score),
        "density": rounds[-1].density,
        "barrier": barrier(line),
        "validation_accuracy": _accuracy(sparse, train[0][held_out], train[1][held_out]),
    }
    shares = torch.linspace(0, 1, len(line)).tolist()
    return metrics, {
        "accuracy_by_round": [(float(i), _score(r.score)) for i, r in enumerate(rounds)],
        "error_on_the_line": list(zip(shares, line.tolist(), strict=True)),
    }


def _score(score: float | None) -> float:
    assert score is not None
    return score


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(int((model(part).argmax(dim=1) == labels).sum()) for part, labels in zip(x.split(2000), y.split(2000)))
    return 100.0 * hits / len(x)


def _normalised(split: Split) -> Split:
    """Mean 0 and deviation 1 of each channel over the training set."""
    mean = split.train_x.mean(dim=(0, 2, 3), keepdim=True)
    deviation = split.train_x.std(dim=(0, 2, 3), keepdim=True)
    train_x, test_x = ((x - mean) / deviation for x in (split.train_x, split.test_x))
    return Split(train_x, split.train_y, test_x, split.test_y)
