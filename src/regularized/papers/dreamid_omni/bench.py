"""Cost of references in a training step of the joint transformer, and of where they stand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.loss import OmniBatch, joint_flow_matching_loss
from regularized.generation.dreamid_omni.model import Conditions, SymmetricConditionalDiT
from regularized.generation.dreamid_omni.positions import Layout, SynRoPE

ADAM = partial(torch.optim.AdamW, lr=1e-4)
CONFIG = replace(
    JointAVConfig.tiny(), dim=96, heads=2, ffn=448, video_channels=16, audio_channels=20, patch=(1, 2, 2), text=64,
    text_len=32, freq=64,
)  # fmt: skip
"""A feed-forward part of 4.7 d, as at the real sizes.

The audio's embedding is linear: before three blocks the real one would weigh ten times what it does before thirty.
"""

Sizes = tuple[int, tuple[int, int], int, int]  # frames, rows and columns, audio steps, steps of a voice


class _Uncached(SynRoPE):
    """Builds its tables at every call, as the released code does in every layer."""

    def tables(
        self, layout: Layout, head: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._tables.clear()
        return super().tables(layout, head, device=device, dtype=dtype)


def _batch(sizes: Sizes, persons: int, structure: bool) -> OmniBatch:
    frames, size, steps, length = sizes
    video, audio = torch.randn(2, 16, frames, *size), torch.randn(2, steps, 20)
    pictures = torch.randn(2, 16, persons, *size).to(device()) if persons else None
    voices = tuple(torch.randn(2, length, 20).to(device()) for _ in range(persons))
    given = Conditions(torch.randn(2, 32, 64).to(device()), pictures, voices)
    video, audio = video.to(device()), audio.to(device())
    return OmniBatch(video, audio, given._replace(source_video=0.5 * video) if structure else given)


def _step(batch: OmniBatch, rope: Callable[[], SynRoPE] = SynRoPE) -> StepFunction:
    def build() -> nn.Module:
        return SymmetricConditionalDiT(CONFIG, syn_rope=rope())

    model = placed(build)
    assert isinstance(model, SymmetricConditionalDiT)
    return stepper(lambda: joint_flow_matching_loss(model, batch).loss, ADAM(model.parameters()))


def _references(sizes: Sizes) -> tuple[StepFunction, StepFunction]:
    """Two persons and a source video, against the plain joint model."""
    return _step(_batch(sizes, 0, False)), _step(_batch(sizes, 2, True))


def _placing(sizes: Sizes) -> tuple[StepFunction, StepFunction]:
    batch = _batch(sizes, 2, False)
    return _step(batch, partial(SynRoPE, placing="consecutive")), _step(batch)


def _kept(sizes: Sizes) -> tuple[StepFunction, StepFunction]:
    batch = _batch(sizes, 2, False)
    return _step(batch, _Uncached), _step(batch)


def workloads() -> list[Workload]:
    """Shares of tokens as at the real sizes: two pictures of 31 frames, two voices of 31 steps beside 157."""
    small, real = (16, (8, 8), 80, 16), (31, (8, 16), 157, 31)
    return [
        Workload(
            "references of two persons, 16 frames of 4x4 tokens, 80 audio steps",
            partial(_references, small),
            note="two pictures beside 16 frames are 12 % more video tokens, not 6 %",
        ),
        Workload("references of two persons, 31 frames of 4x8 tokens, 157 audio steps", partial(_references, real)),
        Workload(
            "shared slots beside consecutive positions, the same tokens, 16 frames", partial(_placing, small), floor=1.0
        ),
        Workload("kept tables beside tables built at every call, 16 frames", partial(_kept, small), floor=1.0),
    ]
