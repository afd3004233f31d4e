"""Cost of a step with hard patches beside a masked autoencoder's step on the same images."""

from functools import partial
from typing import Any

import torch

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.self_supervised.hard_patches.autoencoder import MaskedAutoencoder
from regularized.self_supervised.hard_patches.encoder import PatchTransformer
from regularized.self_supervised.hard_patches.mining import HardPatchMining
from regularized.training.progress import Progress

LAST = Progress(step=0, total_steps=1, epoch=199, total_epochs=200)  # where most patches are chosen
FIRST = Progress(step=0, total_steps=1, epoch=0, total_epochs=200)  # less than one patch: the copy does not run


def _mining(mine: bool, predictor_depth: int | None) -> HardPatchMining:
    encoder = PatchTransformer(64, patch_size=8, width=192, depth=6, heads=6)
    model = MaskedAutoencoder(
        encoder,
        decoder_width=96,
        decoder_depth=4,
        decoder_heads=6,
        predictor_depth=predictor_depth if mine else 0,
    )
    return HardPatchMining(model) if mine else HardPatchMining(model, hard=0.0, weight=0.0)


def _build(progress: Progress, predictor_depth: int | None, batch: int) -> tuple[StepFunction, StepFunction]:
    images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device())

    def step(mine: bool) -> StepFunction:
        mining: Any = placed(partial(_mining, mine, predictor_depth))
        optimizer = torch.optim.AdamW(mining.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
        train = stepper(lambda: mining(images, progress).loss, optimizer)

        def whole() -> None:
            train()
            mining.after_step(progress)

        return whole

    return step(False), step(True)


def workloads() -> list[Workload]:
    """The official scheme, a shallow predictor, and the epochs in which the copy has nothing to choose."""
    return [
        Workload("ViT 192 x 6, decoders 96 x 4, 64 patches, B16, official scheme", partial(_build, LAST, None, 16)),
        Workload(
            "the same, predictor of 2 layers",
            partial(_build, LAST, 2, 16),
            floor=1.8,
            note="counted for ViT-B with 8 layers in the reconstructor",
        ),
        Workload(
            "the same as the first, in an epoch without hard patches",
            partial(_build, FIRST, None, 16),
            note="the copy does not run, it only follows",
            floor=1.4,
        ),
    ]
