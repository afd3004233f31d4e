"""How much does a transformer lose when channels are missing, and what of that do channel sampling and tokens save?

Three kinds of images with channels that mean different things. *Images*: Fashion-MNIST, 16 x 16 pixels, and three more
channels made of each (edges across, edges along, a mean), for each seed its own. *Bands*: four bands of Landsat, 3 x 3
pixels, six kinds of land. *Directions*: a diffusion scan of a brain in 65 directions, where a label is the axis of the
fibres, and a channel says something only to who knows its direction; training and test are other slices.

A plain ViT and one with tokens of channels, with and without hierarchical channel sampling, are trained on all channels
and judged on subsets of them: every size of subset counts alike. For a plain ViT missing channels are 0, with or
without scaling up the others, whichever is better on validation images. Controls: channels dropped by a coin each, as
many on average (``directions_coin``); and tokens of channels without a vector for the channel, so that nothing says
which is which (``bands_unnamed``). ``*_few_complete``: three in four training images lack two of four channels.

Learning rates get the same trials in each arm. About ten minutes of one core for ten seeds, tuning included. *Paper*
scale: So2Sat in 18 channels, ViT-S/8, 100 epochs, on a GPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.classification import fit, percent
from regularized.evidence.datasets.multichannel import diffusion_scan, edges_and_mean, landsat
from regularized.evidence.datasets.samples import Sample, display_name, draw, sampling
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning
from regularized.evidence.models import seeded
from regularized.evidence.requirements import need_gpu
from regularized.papers.channel_vit.networks import PlainViT
from regularized.papers.channel_vit.so2sat import so2sat
from regularized.robustness.channel_vit.model import ChannelViT
from regularized.robustness.channel_vit.sampling import draw_channels, mask_channels
from regularized.training.data import TensorData
from regularized.training.progress import cosine, warmup
from regularized.training.step import Batch

DEFAULTS: dict[str, Any] = {
    "input": "images",
    "tokens": "joint",  # of a place, or of a place and a channel
    "named": True,  # tokens of channels say which channel they are of
    "sampling": "none",
    "lr": 5e-3,
    "weight_decay": (0.04, 0.04),  # at the beginning and at the end
    "warmup": 0.1,
    "complete": 1.0,  # share of the training images that have all channels; the others have the first half
    "drop_path": 0.0,
}

_DIGITS = {"data": "digits", "train": 200, "validation": 50, "test": 100, "epochs": 2, "batch": 50}
_SMALL = {"width": 32, "depth": 2, "heads": 2}
_SO2SAT = {"data": "so2sat", "train": 352_366, "validation": 2_000, "test": 24_119, "epochs": 100, "batch": 256}
_SO2SAT |= {"patch": 8, "width": 384, "depth": 12, "heads": 6}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "images": {**_DIGITS, "patch": 4, **_SMALL},
        "bands": {**_DIGITS, "patch": 4, **_SMALL},
        "directions": {**_DIGITS, "patch": 4, **_SMALL},
    },
    "laptop": {
        "images": {
            "data": "fashion_mnist",
            "train": 2000,
            "validation": 500,
            "test": 1000,
            "epochs": 10,
            "batch": 100,
            "patch": 8,
            **_SMALL,
        },
        "bands": {
            "data": "landsat",
            "train": 3000,
            "validation": 500,
            "test": 1500,
            "epochs": 8,
            "batch": 120,
            "patch": 3,
            **_SMALL,
        },
        # Slices of 100 voxels.
        "directions": {
            "data": "diffusion_scan",
            "train": 600,
            "validation": 200,
            "test": 200,
            "epochs": 12,
            "batch": 40,
            "patch": 3,
            **_SMALL,
        },
    },
    "paper": {"images": _SO2SAT, "bands": _SO2SAT, "directions": _SO2SAT},
}

_CHANNEL: dict[str, Any] = {"tokens": "channel"}
_SAMPLED: dict[str, Any] = {"sampling": "hierarchical"}

_IDEAS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_sampling": _SAMPLED,
    "channel_vit": _CHANNEL,
    "channel_vit_sampling": {**_CHANNEL, **_SAMPLED},
    "vit_few_complete": {**_SAMPLED, "complete": 0.25},
    "channel_vit_few_complete": {**_CHANNEL, **_SAMPLED, "complete": 0.25},
    "bands_vit": {"input": "bands"},
    "bands_vit_sampling": {"input": "bands", **_SAMPLED},
    "bands_channel_vit": {"input": "bands", **_CHANNEL},
    "bands_unnamed": {"input": "bands", **_CHANNEL, **_SAMPLED, "named": False},
    "bands_channel_vit_sampling": {"input": "bands", **_CHANNEL, **_SAMPLED},
    "directions_vit": {"input": "directions"},
    "directions_vit_sampling": {"input": "directions", **_SAMPLED},
    "directions_coin": {"input": "directions", **_CHANNEL, "sampling": "coin"},
    "directions_channel_vit_sampling": {"input": "directions", **_CHANNEL, **_SAMPLED},
}

# The best of TUNING (regularized tune channel_vit). 0.02 was added once, since some of the best were 0.01 then; three
# arms, all without sampling, end there.
_TUNED = {
    "vit": 0.01,
    "vit_sampling": 0.01,
    "channel_vit": 0.02,
    "channel_vit_sampling": 0.01,
    "bands_vit": 0.02,
    "bands_vit_sampling": 0.005,
    "bands_channel_vit": 0.02,
    "bands_channel_vit_sampling": 0.01,
    "directions_vit": 0.005,
    "directions_vit_sampling": 0.01,
    "directions_channel_vit_sampling": 0.01,
}
# Controls, and arms with incomplete images, have the rate of the arm that they vary.
_VARIES = {
    "vit_few_complete": "vit_sampling",
    "channel_vit_few_complete": "channel_vit_sampling",
    "bands_unnamed": "bands_channel_vit_sampling",
    "directions_coin": "directions_channel_vit_sampling",
}

ARMS: dict[str, dict[str, Any]] = {arm: {**own, "lr": _TUNED[_VARIES.get(arm, arm)]} for arm, own in _IDEAS.items()}

# Batches of 256: 5e-4; the paper's other numbers are the same for all arms.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {arm: {"lr": 5e-4, "weight_decay": (0.04, 0.4), "drop_path": 0.1} for arm in ARMS}
}

SEEDS = Seeds()

_RATES = (0.002, 0.005, 0.01, 0.02)

TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={arm: [{"lr": lr} for lr in _RATES] for arm in _TUNED},
)

Net: TypeAlias = PlainViT | ChannelViT


def about(s: Mapping[str, Any]) -> About:
    """Images of the scale and a transformer for them."""
    of = s[s["input"]]
    channels, size, classes = _shape(of["data"])
    with torch.device("meta"):
        weights = sum(p.numel() for p in _network(s, channels, size, classes).parameters())
    what = {
        "so2sat": "places of So2Sat in 18 channels",
        "landsat": "places of Landsat in four bands",
        "diffusion_scan": "voxels of a diffusion scan in 65 directions",
    }
    data = what.get(of["data"]) or f"{display_name(of['data'])} in four channels"
    of_one_pool = of["data"] in what or sampling(of["data"]) == "resplit"
    return About(
        f"{of['train']:,} {data}",
        of["train"],
        f"{'Channel ViT' if s['tokens'] == 'channel' else 'ViT'}, {weights / 1e3:,.0f}k weights",
        weights,
        resplit=of["test"] / of["train"] if of_one_pool else 0.0,
    )


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm on all channels and judge it on subsets of them; accuracies in per cent.

    Raises:
        Unavailable: the images are not here, or at paper scale a GPU.
    """
    of = s[s["input"]]
    device = torch.device("cpu")
    if of["data"] == "so2sat":
        device = need_gpu(f"the paper scale trains ViT-S/8 for {of['epochs']} epochs", gigabytes=40)
    sample = draw_sample(of, seed)
    channels, size, classes = _shape(of["data"])
    net = seeded(seed, _network, s, channels, size, classes).to(device)
    assert isinstance(net, PlainViT | ChannelViT)
    torch.manual_seed(100 * seed + 1)  # skipped branches

    draws = torch.Generator().manual_seed(100 * seed + 2)
    feed = partial(_training_batch, net, s["sampling"], channels, draws)
    optimizer, decay = _adamw(net, s)
    fit(
        net,
        Mixed(sample.train_x, sample.train_y, s["complete"], batch=of["batch"], seed=seed),
        lambda _, batch: F.cross_entropy(feed(batch).float(), _targets(batch).to(device)),
        optimizer=optimizer,
        epochs=of["epochs"],
        schedule=warmup(cosine(), s["warmup"]),
        before_epoch=lambda epoch: decay(epoch / of["epochs"]),
    )
    net.eval()
    subsets = subsets_of(channels)
    scaled = isinstance(net, PlainViT) and _scaling_helps(net, sample, subsets)
    by_size = {
        many: sum(accuracy(net, sample.test_x, sample.test_y, kept, scaled=scaled) for kept in some) / len(some)
        for many, some in subsets.items()
    }
    fewest, half = min(by_size), max(many for many in by_size if 2 * many <= channels)
    return Measurements(
        {
            "validation_accuracy": accuracy(
                net, sample.validation_x, sample.validation_y, range(channels), scaled=False
            ),
            "accuracy_all_channels": by_size[channels],
            "accuracy_half_of_the_channels": by_size[half],
            "accuracy_fewest_channels": by_size[fewest],
            "accuracy_over_subsets": sum(by_size.values()) / len(by_size),
            "scaled_in_test": float(scaled),
        },
        {f"accuracy, {s['input']}": sorted(by_size.items())},
        data=sample.fingerprint,
        curve_unit="channels left",
    )


def _shape(data: str) -> tuple[int, int, int]:
    """Channels, side of an image, classes."""
    return {"so2sat": (18, 32, 17), "landsat": (4, 3, 6), "diffusion_scan": (65, 3, 3)}.get(
        data, (4, 8 if data == "digits" else 16, 10)
    )


def _network(s: Mapping[str, Any], channels: int, size: int, classes: int) -> nn.Module:
    of = s[s["input"]]
    build = ChannelViT if s["tokens"] == "channel" else PlainViT
    net = build(
        channels,
        num_classes=classes,
        img_size=size,
        patch_size=of["patch"],
        embed_dim=of["width"],
        depth=of["depth"],
        num_heads=of["heads"],
        drop_path=s["drop_path"],
    )
    if isinstance(net, ChannelViT) and not s["named"]:
        nn.init.zeros_(net.patch_embed.channel_embed.weight)
        net.patch_embed.channel_embed.requires_grad_(False)
    return net


def draw_sample(of: Mapping[str, Any], seed: int) -> Sample:
    """The images of one seed, each channel less its training mean and over its training standard deviation."""
    sizes = [of[part] for part in ("train", "validation", "test")]
    if of["data"] == "so2sat":
        x, y = so2sat("training")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        held, rows = order[: sizes[1]], order[sizes[1] :]
        return _standardised((x[rows], y[rows]), (x[held], y[held]), so2sat("testing"))
    if of["data"] in ("landsat", "diffusion_scan"):
        x, y, *slices = landsat() if of["data"] == "landsat" else diffusion_scan()
        blocks = slices[0] if slices else torch.arange(len(y))
        order = torch.randperm(int(blocks.max()) + 1, generator=torch.Generator().manual_seed(seed))
        rows = order[blocks].argsort(stable=True)[: sum(sizes)].split(sizes)
        return _standardised(*((x[some], y[some]) for some in rows))
    sample = draw(of["data"], seed, train=sizes[0], validation=sizes[1], test=sizes[2])
    parts = []
    for part in ("train", "validation", "test"):
        x = getattr(sample, f"{part}_x")
        # 28 x 28 with a frame of 2 as 16 x 16.
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 2) if x.shape[-1] == 28 else x
        parts.append((edges_and_mean(x), getattr(sample, f"{part}_y")))
    return _standardised(*parts)


def _standardised(*parts: tuple[Tensor, Tensor]) -> Sample:
    x = parts[0][0]
    some = x[:50_000].double()
    mean = some.mean(dim=(0, 2, 3), keepdim=True).to(x.dtype)
    over = some.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6).to(x.dtype)
    (a, b), (c, d), (e, f) = ((x.sub(mean).div_(over), y) for x, y in parts)
    return Sample(a, b, c, d, e, f)


class Mixed:
    """Batches of images that all have the same channels: some with all of them, some with the first half.

    Args:
        x: (N, C, H, W).
        y: (N,).
        complete: share of the images that have all channels: the first ones.
        batch: images in a batch.
        seed: of the order.
    """

    def __init__(self, x: Tensor, y: Tensor, complete: float, *, batch: int, seed: int) -> None:
        cut, half = round(complete * len(x)), x.shape[1] // 2
        whole = TensorData(x[:cut], y[:cut], batch_size=batch, seed=seed)
        self._parts = [whole]
        if cut < len(x):
            self._parts.append(TensorData(x[cut:, :half], y[cut:], batch_size=batch, seed=seed))
        self._seed = seed

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of both kinds, in random order."""
        sources = [iter(part.batches(epoch, rank=rank, world=world)) for part in self._parts]
        turns = torch.tensor([number for number, part in enumerate(self._parts) for _ in range(len(part))])
        order = torch.randperm(len(turns), generator=torch.Generator().manual_seed(1000 * self._seed + epoch))
        for number in turns[order].tolist()[start:]:
            yield next(sources[number])


def _targets(batch: Batch) -> Tensor:
    assert batch.targets is not None
    return batch.targets


def _training_batch(net: Net, sampled: str, channels: int, draws: torch.Generator, batch: Batch) -> Tensor:
    """Logits of a batch with the channels that its step keeps; those that it lacks are the last ones."""
    x: Tensor = batch.inputs
    kept = _choice(sampled, x.shape[1], draws)
    return logits(net, x, kept, channels=channels, scaled=sampled != "none")


def _choice(sampled: str, planes: int, draws: torch.Generator) -> list[int]:
    if sampled == "none":
        return list(range(planes))
    if sampled == "hierarchical":
        return draw_channels(planes, draws)
    # A coin for each channel that keeps as many on average; at least one stays.
    keep = (planes + 1) / (2 * planes)
    kept = (torch.rand(planes, generator=draws) < keep).nonzero().flatten().tolist()
    return kept or torch.randint(planes, (1,), generator=draws).tolist()


def logits(net: Net, x: Tensor, kept: Sequence[int], *, channels: int, scaled: bool) -> Tensor:
    """Of images with some of their channels: left out, or for a plain ViT 0.

    Args:
        net: either kind.
        x: (B, n, H, W), the first n channels.
        kept: those that stay.
        channels: C.
        scaled: a plain ViT gets the others times n / m.
    """
    device = net.pos_embed.device
    if isinstance(net, ChannelViT):
        ids = torch.tensor(kept)
        output: Tensor = net(x[:, kept].to(device, torch.float32), channels=ids)
        return output
    planes = list(range(x.shape[1]))
    if scaled:
        x = x if len(kept) == len(planes) else mask_channels(x, kept)
    elif len(kept) < len(planes):
        x = mask_channels(x, kept, present=kept)
    padded = F.pad(x.to(device, torch.float32), (0, 0, 0, 0, 0, channels - x.shape[1]))
    output = net(padded)
    return output


@torch.no_grad()
def accuracy(net: Net, x: Tensor, y: Tensor, kept: Sequence[int], *, scaled: bool) -> float:
    """In per cent, with some of the channels."""
    training = net.training
    net.eval()
    found = torch.cat(
        [logits(net, part, kept, channels=x.shape[1], scaled=scaled).argmax(dim=1).cpu() for part in x.split(1000)]
    )
    net.train(training)
    return percent(found == y)


def _scaling_helps(net: Net, sample: Sample, subsets: Mapping[int, Sequence[Sequence[int]]]) -> bool:
    """Whether a plain ViT is better on validation images if the channels that are left are scaled up."""
    few = [kept for some in subsets.values() for kept in some if len(kept) < sample.validation_x.shape[1]]
    totals = [
        sum(accuracy(net, sample.validation_x, sample.validation_y, kept, scaled=scaled) for kept in few)
        for scaled in (False, True)
    ]
    return totals[1] > totals[0]


def subsets_of(channels: int) -> dict[int, list[tuple[int, ...]]]:
    """Subsets by size: all of up to four channels; of more, six of each of some sizes, always the same."""
    if channels <= 4:
        return {many: list(combinations(range(channels), many)) for many in range(1, channels + 1)}
    draws = torch.Generator().manual_seed(0)
    sizes = [many for many in (2, 4, 8, 16, 32, 64) if many < channels]
    some = {
        many: [tuple(torch.randperm(channels, generator=draws)[:many].tolist()) for _ in range(6)] for many in sizes
    }
    return {**some, channels: [tuple(range(channels))]}


def _adamw(net: Net, s: Mapping[str, Any]) -> tuple[torch.optim.Optimizer, Callable[[float], None]]:
    """AdamW with decay for matrices alone, and what sets the decay for a share of the training (half a cosine)."""
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=s["lr"],
        weight_decay=s["weight_decay"][0],
        fused=True,
    )
    first, last = s["weight_decay"]

    def set_decay(done: float) -> None:
        optimizer.param_groups[0]["weight_decay"] = last + (first - last) * (1 + math.cos(math.pi * done)) / 2

    return optimizer, set_decay
