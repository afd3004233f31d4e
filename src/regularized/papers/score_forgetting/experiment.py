"""Does a class go, and do the others stay, when forgetting is built into the distillation of a diffusion model?

A class-conditional diffusion model is trained on five kinds of Fashion-MNIST (T-shirts, trousers, sneakers, bags, ankle
boots) at 8 x 8 pixels; it predicts v. It is the teacher of all arms of a seed. A generator is distilled from it without
any image; the prompt for trousers shall give T-shirts. A classifier that has learned from other images judges the
samples of each prompt; Fréchet distances are between its features of samples of kept prompts and of test images.

Arms: ``teacher`` in 50 evaluations; ``undistilled``, the teacher in one; ``distillation`` that forgets nothing;
``score_forgetting``; ``whole_batch``, as many forgotten as kept samples, as the authors have; ``forget_only``, without
the kept term, which is all that holds the rest.

Rates are tuned by what a user without images can see: how far, in pixels, the samples of kept prompts are from those of
the teacher (``validation_distance``). A first round on the tuning seeds counted the forgotten prompt as well; it chose
so low a rate for forgetting (1e-4, the end of the grid) that the kept classes were not distilled. At every rate the
class was forgotten. How good an imitation of the other class the forgotten prompt gives is ``override_distance``.
``half_way_forgotten_share`` is the forgotten class's share after half of the steps. ``sampling_speedup`` is in
processor time, beside the teacher's 50 evaluations.

*Paper* scale: CIFAR-10 with the authors' U-Net and settings, in one process instead of four; a teacher is trained
first. It needs a GPU for weeks.
"""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets.idx import FASHION_MNIST, labelled_images
from regularized.evidence.datasets.samples import disjoint_rows, draw, eight_by_eight
from regularized.evidence.experiment import About, Measurements, Tuning, data_fingerprint
from regularized.evidence.models import resnet34, seeded, small_convnet
from regularized.evidence.requirements import need_gpu
from regularized.papers.score_forgetting.networks import Perceptron, UNet
from regularized.training.randomness import preserved, seed_all
from regularized.unlearning.frechet import frechet_distance
from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion, OneStepGenerator
from regularized.unlearning.score_forgetting.procedure import ScoreForgettingDistillation
from regularized.unlearning.score_forgetting.report import PromptReport, prompt_report

DEFAULTS: Mapping[str, Any] = {
    "data": "fashion_mnist",
    "classes": (0, 1, 7, 8, 9),
    "forget": 1,  # trousers, of which the judge takes nothing else to be one; T-shirts in their place
    "override": 0,
    "train": 1300,
    "judge": 500,
    "test": 700,
    "network": "perceptron",
    "width": 128,
    "prediction": "v",
    "teacher_steps": 1500,
    "teacher_lr": 2e-3,
    "teacher_batch": 128,
    "judge_epochs": 15,
    "evaluations": 50,
    "per_prompt": 200,
    "sampler": "generator",
    "forgetting": True,
    "kept_weight": 1.0,
    "forget_weight": 0.01,  # the authors'
    "forget_share": 0.125,
    "steps": 300,
    "batch": 64,
    "lr": 2e-4,
    "decay": 0.98,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **{"data": "digits", "classes": (0, 1, 2, 3, 4), "train": 400, "judge": 200, "test": 200, "width": 32},
        **{"teacher_steps": 60, "judge_epochs": 3, "evaluations": 10, "per_prompt": 20, "steps": 12},
    },
    "laptop": {},
    "paper": {
        **{"data": "cifar10", "classes": tuple(range(10)), "forget": 0, "override": 1},
        **{"train": 40_000, "judge": 10_000, "test": 10_000, "network": "unet", "width": 128, "prediction": "eps"},
        **{"teacher_steps": 800_000, "teacher_lr": 2e-4, "judge_epochs": 60, "evaluations": 50, "per_prompt": 5000},
        **{"steps": 50_000, "batch": 512, "lr": 1e-5, "decay": 0.9999},
    },
}

# Rates: the best of TUNING.
_RATE: Mapping[str, Any] = {"lr": 1.6e-3}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"sampler": "teacher"},
    "undistilled": {"sampler": "undistilled"},
    "distillation": {"forgetting": False, "lr": 1.6e-3},
    "score_forgetting": {**_RATE},
    "whole_batch": {**_RATE, "forget_share": 1.0},
    "forget_only": {**_RATE, "kept_weight": 0.0},
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"paper": {arm: {"lr": 1e-5} for arm in ARMS}}

TUNING = Tuning(
    metric="validation_distance",
    direction="lower",
    grids={
        arm: [{"lr": rate} for rate in (4e-4, 8e-4, 1.6e-3, 3.2e-3)] for arm in ("distillation", "score_forgetting")
    },
)

UNREPEATABLE = {"sampling_speedup"}

PACKAGES = {"torchmetrics": "lightning"}


def about(s: Mapping[str, Any]) -> About:
    """Each seed has images of its own; of digits and CIFAR-10 it splits all of them again."""
    if s["network"] == "unet":
        return About("40,000 CIFAR-10 images", s["train"], "U-Net, 36M weights", 35_700_000, s["test"] / s["train"])
    network = Perceptron(64, len(s["classes"]), width=s["width"])
    weights = sum(parameter.numel() for parameter in network.parameters())
    name = {"fashion_mnist": "Fashion-MNIST images", "digits": "digits"}[s["data"]]
    again = s["test"] / s["train"] if s["data"] == "digits" else 0.0
    return About(f"{s['train']:,} {name} of 8x8 pixels", s["train"], f"MLP, {weights // 1000}k weights", weights, again)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Distil one arm with one seed, and look at what each prompt gives.

    Raises:
        Unavailable: a set is not here, or paper scale without a GPU.
    """
    device = torch.device("cpu")
    if s["network"] == "unet":
        device = need_gpu("the paper scale trains a diffusion model of CIFAR-10 and distils it", gigabytes=60)
    with preserved():
        world = _world(s, seed, device)
        curves: dict[str, list[tuple[float, float]]] = {"forgotten_class_share": [], "kept_class_accuracy": []}

        def look(distillation: ScoreForgettingDistillation, losses: object) -> None:
            if distillation.steps % (s["steps"] // 4) == 0:
                report = _report(s, world, partial(_drawn, distillation.sampler.sample, seed=distillation.steps))
                curves["forgotten_class_share"].append((distillation.steps, 100 * report.forgotten_class_share))
                curves["kept_class_accuracy"].append((distillation.steps, 100 * report.kept_class_accuracy))

        sample = _sampler(s, world, seed, look)
        metrics = _measured(s, world, partial(_drawn, sample, seed=seed))
        metrics["sampling_speedup"] = _speedup(s, world, sample)
    by_then = curves["forgotten_class_share"]
    metrics["half_way_forgotten_share"] = by_then[1][1] if by_then else metrics["forgotten_class_share"]
    return Measurements(metrics, curves if by_then else {}, data=world.fingerprint, curve_unit="step")


Sampler = Callable[..., Tensor]


def _sampler(s: Mapping[str, Any], world: "World", seed: int, look: Callable[..., object]) -> Sampler:
    if s["sampler"] == "teacher":
        return partial(world.teacher.sample, steps=s["evaluations"])
    if s["sampler"] == "undistilled":
        return OneStepGenerator(world.teacher).sample
    distillation = ScoreForgettingDistillation(
        world.teacher,
        forget=s["forget"] if s["forgetting"] else None,
        override=s["override"] if s["forgetting"] else None,
        kept_weight=s["kept_weight"],
        forget_weight=s["forget_weight"],
        forget_share=s["forget_share"],
        optimizer=partial(torch.optim.Adam, lr=s["lr"], betas=(0.0, 0.999)),
        decay=s["decay"],
        seed=seed,
    )
    distillation.fit(steps=s["steps"], batch_size=s["batch"], after_step=look)
    return distillation.sampler.sample


# -- what is measured -------------------------------------------------------------------------------


def _drawn(sample: Sampler, labels: Tensor, *, seed: int) -> Tensor:
    """The same noise for every arm."""
    return sample(labels, generator=torch.Generator().manual_seed(seed))


def _report(s: Mapping[str, Any], world: "World", sample: Callable[[Tensor], Tensor]) -> PromptReport:
    return prompt_report(
        sample,
        world.judge,
        num_classes=len(s["classes"]),
        forget=s["forget"],
        override=s["override"],
        per_class=s["per_prompt"],
        batch_size=len(s["classes"]) * min(s["per_prompt"], 500),
        device=world.device,
    )


def _measured(s: Mapping[str, Any], world: "World", sample: Callable[[Tensor], Tensor]) -> dict[str, float]:
    report = _report(s, world, sample)
    classes = torch.arange(len(s["classes"]), device=world.device)
    kept = classes[classes != s["forget"]].repeat_interleave(s["per_prompt"])
    real = world.test_x[world.test_y != s["forget"]]
    distance = frechet_distance(world.features(real), world.features(sample(kept)))
    return {
        "forgotten_class_share": 100 * report.forgotten_class_share,
        "override_share": 100 * report.override_share,
        "kept_class_accuracy": 100 * report.kept_class_accuracy,
        "kept_frechet": float(distance),
    } | _distances(s, world, sample)


def _distances(s: Mapping[str, Any], world: "World", sample: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """In pixels, from the teacher's samples of what a prompt shall give: of kept prompts, and of the forgotten one."""
    distances = []
    for label in range(len(s["classes"])):
        theirs = world.teacher_samples[s["override"] if label == s["forget"] else label]
        ours = sample(torch.full((len(theirs),), label, device=world.device))
        distances.append(float(frechet_distance(theirs.flatten(1), ours.flatten(1))))
    override = distances.pop(s["forget"])
    return {"validation_distance": sum(distances) / len(distances), "override_distance": override}


def _speedup(s: Mapping[str, Any], world: "World", sample: Sampler) -> float:
    """Processor time of the teacher's many evaluations over that of this sampler, the least of three times each."""
    labels = torch.zeros(100, dtype=torch.long, device=world.device)

    def seconds(sampler: Sampler) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            sampler(labels)
            times.append(time.process_time() - start)
        return min(times)

    return seconds(partial(world.teacher.sample, steps=s["evaluations"])) / seconds(sample)


# -- teacher and judge ------------------------------------------------------------------------------


class World(NamedTuple):
    """What the arms of a seed share."""

    teacher: ConditionalDiffusion
    teacher_samples: list[Tensor]
    judge: nn.Module
    features: Callable[[Tensor], Tensor]
    test_x: Tensor
    test_y: Tensor
    fingerprint: str
    device: torch.device


_SHARED = ("data", "classes", "train", "judge", "test", "network", "width", "prediction", "teacher_steps")
_SHARED += ("teacher_lr", "teacher_batch", "judge_epochs", "evaluations", "per_prompt")  # type: ignore[assignment]


def _world(s: Mapping[str, Any], seed: int, device: torch.device) -> World:
    settings = tuple((name, tuple(s[name]) if name == "classes" else s[name]) for name in _SHARED)
    return _prepared(settings, seed, device)


@lru_cache(maxsize=1)  # arms of one seed run one after another
def _prepared(settings: tuple[tuple[str, Any], ...], seed: int, device: torch.device) -> World:
    s = dict(settings)
    seed_all(seed)
    (x, y), judged, (test_x, test_y) = _images(s, seed)
    fingerprint = data_fingerprint(*(part.numpy() for part in (x, y, *judged, test_x, test_y)))
    judge = _judge(s, judged, seed, device)
    teacher = _teacher(s, x.to(device), y.to(device), seed, device)
    draws = torch.Generator().manual_seed(seed + 1)
    labels = [torch.full((s["per_prompt"],), label, device=device) for label in range(len(s["classes"]))]
    samples = [teacher.sample(label, steps=s["evaluations"], generator=draws) for label in labels]
    inside = judge.features if isinstance(judge, nn.Sequential) else _Inside(judge)
    features = torch.no_grad()(lambda images: torch.cat([inside(part) for part in images.split(500)]))  # type: ignore[operator]
    return World(teacher, samples, judge, features, test_x.to(device), test_y.to(device), fingerprint, device)


class _Inside(nn.Module):
    """What a residual network's last layer sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, D)."""
        seen: list[Tensor] = []
        head = self.network.head
        assert isinstance(head, nn.Module)
        handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        self.network(images)
        handle.remove()
        return seen[0]


Part = tuple[Tensor, Tensor]


def _images(s: Mapping[str, Any], seed: int) -> tuple[Part, Part, Part]:
    """Images in [-1, 1] and the number of their class, for the teacher, the judge, and the test."""
    sizes = (s["train"], s["judge"], s["test"])
    if s["data"] == "cifar10":
        sample = draw("cifar10", seed, train=s["train"], validation=s["judge"], test=s["test"])
        x = [sample.train_x, sample.validation_x, sample.test_x]
        y = [sample.train_y, sample.validation_y, sample.test_y]
        low, high = float(x[0].min()), float(x[0].max())
        x = [2 * (part - low) / (high - low) - 1 for part in x]
        return (x[0], y[0]), (x[1], y[1]), (x[2], y[2])
    if s["data"] == "digits":
        pixels, labels = eight_by_eight("digits", seed, 1797)
        images, numbers = _of_classes(pixels.view(-1, 1, 8, 8).float(), labels, s["classes"])
        rows = torch.arange(sum(sizes)).split(list(sizes))
    else:
        whole, labels = labelled_images(FASHION_MNIST)
        images, numbers = _of_classes(whole[:, None], labels, s["classes"])
        rows = disjoint_rows(len(images), seed, sizes)
        # 28 x 28 with a frame of 2: 32 x 32, of which 4 x 4 become one.
        images = F.avg_pool2d(F.pad(images.float() / 255.0, (2, 2, 2, 2)), 4)
    first, second, third = ((2 * images[part] - 1, numbers[part]) for part in rows)
    return first, second, third


def _of_classes(images: Tensor, labels: Tensor, classes: tuple[int, ...]) -> Part:
    rows, numbers = (labels[:, None] == torch.tensor(classes)).nonzero(as_tuple=True)
    return images[rows], numbers


def _judge(s: Mapping[str, Any], images: Part, seed: int, device: torch.device) -> nn.Module:
    x, y = (part.to(device) for part in images)
    many = len(s["classes"])
    judge = seeded(seed, resnet34, many) if s["network"] == "unet" else seeded(seed, small_convnet, many, size=8)
    judge.to(device)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3 if s["network"] != "unet" else 1e-3)
    for _ in range(s["judge_epochs"]):
        for rows in torch.randperm(len(x), device=device).split(50 if s["network"] != "unet" else 128):
            F.cross_entropy(judge(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return judge.eval().requires_grad_(False)


def _teacher(s: Mapping[str, Any], x: Tensor, y: Tensor, seed: int, device: torch.device) -> ConditionalDiffusion:
    classes, shape = len(s["classes"]), tuple(x.shape[1:])
    if s["network"] == "unet":
        network = seeded(seed, UNet, shape[0], shape[1], classes, width=s["width"])
    else:
        network = seeded(seed, Perceptron, x[0].numel(), classes, width=s["width"])
    teacher = ConditionalDiffusion(network.to(device), shape=shape, num_classes=classes, prediction=s["prediction"])
    optimizer = torch.optim.Adam(teacher.parameters(), lr=s["teacher_lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, s["teacher_lr"], total_steps=s["teacher_steps"], cycle_momentum=False
    )
    for _ in range(s["teacher_steps"]):
        rows = torch.randint(len(x), (s["teacher_batch"],), device=device)
        teacher.loss(x[rows], y[rows]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return teacher.eval().requires_grad_(False)
