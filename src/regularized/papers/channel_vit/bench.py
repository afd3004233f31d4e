"""What tokens of channels cost beside a plain ViT on the same images, and what sampling gives back.

The transformer and the images are those at which the authors' code was timed before (width 192, four blocks, five
channels of 32 x 32 pixels, patches of 8, batches of 16): it took 4.23 times as long as their own plain ViT, and with
sampling 1.96 times. Theirs is licensed for non-commercial use alone, so it does not run beside ours here.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, device, placed, stepper
from regularized.papers.channel_vit.networks import PlainViT
from regularized.robustness.channel_vit.model import ChannelViT
from regularized.robustness.channel_vit.sampling import HierarchicalChannelSampling, Mode

_SHAPE = {"num_classes": 10, "img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
_PLACES = 16  # patches of a channel


def _build(channels: int, tokens: type[nn.Module], sampling: Mode | None) -> tuple[StepFunction, StepFunction]:
    x, y = batch((16, channels, 32, 32))
    plain = placed(PlainViT, channels, **_SHAPE)
    method = placed(tokens, channels, **_SHAPE, drop_path=0.0)
    draw = HierarchicalChannelSampling(sampling or "select").to(device())
    draw.train(sampling is not None)
    adamw = partial(torch.optim.AdamW, lr=5e-4, fused=True)

    def logits() -> Tensor:
        some, ids = draw(x)
        found: Tensor = method(some) if sampling == "mask" else method(some, ids)
        return found

    return (
        stepper(lambda: F.cross_entropy(plain(x), y), adamw(plain.parameters())),
        stepper(lambda: F.cross_entropy(logits(), y), adamw(method.parameters())),
    )


def _floor(channels: float) -> float:
    """Tokens over those of a plain ViT, each with a class token: what the linear layers cost."""
    return (1 + _PLACES * channels) / (1 + _PLACES)


def workloads() -> list[Workload]:
    """Five and three channels, all of them and sampled; sampling in front of a plain ViT."""
    rows = [Workload("plain ViT, 5 channels, sampling", partial(_build, 5, PlainViT, "mask"), floor=1.0)]
    for channels, official, sampled in ((3, "", ""), (5, "the authors' code: 4.23", "the authors' code: 1.96; ")):
        rows += [
            Workload(
                f"Channel ViT, {channels} channels",
                partial(_build, channels, ChannelViT, None),
                note=official,
                floor=_floor(channels),
            ),
            Workload(
                f"Channel ViT, {channels} channels, sampling",
                partial(_build, channels, ChannelViT, "select"),
                note=f"{sampled}a step has 1 to {channels} channels, the ratio is that of the median step",
                floor=_floor((channels + 1) / 2),
            ),
        ]
    return rows
