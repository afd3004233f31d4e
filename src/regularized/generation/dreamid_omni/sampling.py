"""From noise to a clip: Euler steps along the velocity, references held clean.

:mod:`regularized.generation.dreamid_omni.loss` has the symbols. The released code integrates by UniPC in 50 steps; an
Euler step of the same grid is the plain form, and what it loses in few steps it loses for every position scheme alike.
"""

import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from regularized.generation.dreamid_omni.guidance import Guidance, code_guidance, paper_guidance
from regularized.generation.dreamid_omni.model import Conditions, SymmetricConditionalDiT, Velocity
from regularized.mechanisms.ranges import allowed, count, positive

__all__ = ["Clip", "sample", "shifted_sigmas"]


class Clip(NamedTuple):
    """Latents of a clip.

    Attributes:
        video: (B, C_v, L_v, H, W).
        audio: (B, L_a, C_a).
    """

    video: Tensor
    audio: Tensor


@allowed(steps=count(1), shift=positive())
def shifted_sigmas(steps: int, *, shift: float = 5.0) -> Tensor:
    """Shares of noise at which a sampler stands, from 1 on; behind the last one comes 0.

    ``sigma' = shift sigma / (1 + (shift - 1) sigma)`` of ``sigma`` from 1 in equal parts: more steps where there is
    much noise.

    Args:
        steps: of the sampler.
        shift: default 5 (released code); 1 leaves the parts equal.

    Returns:
        (steps,) float64.

    Examples:
        >>> shifted_sigmas(4, shift=3.0).tolist()
        [1.0, 0.9, 0.75, 0.5]
    """
    sigma = 1.0 - torch.arange(steps, dtype=torch.float64) / steps
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


@torch.no_grad()
@allowed(steps=count(1), shift=positive())
def sample(
    model: SymmetricConditionalDiT,
    given: Conditions,
    *,
    frames: int,
    audio_steps: int,
    size: tuple[int, int],
    steps: int = 50,
    shift: float = 5.0,
    guidance: Guidance | None = None,
    negative: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Clip:
    """Make clips from text, references and structure.

    The forward passes of the guidance are made in one, as a batch. References stand in every step as they were given;
    only the target is integrated.

    Args:
        model: the transformer, used in evaluation mode as it is (it has no dropout).
        given: text, references, structure, of B clips.
        frames: L_v.
        audio_steps: L_a.
        size: rows and columns of the video latents.
        steps: default 50 (released code).
        shift: default 5 (released code).
        guidance: default :class:`~regularized.generation.dreamid_omni.Guidance`, the released code's.
        negative: (B, states, width) text in place of the dropped one; default zeros.
        generator: of the noise, on the CPU; default the global one.

    Returns:
        Latents of the clips.

    Raises:
        ValueError: a setting outside its range, or conditions that do not fit.

    Warns:
        UserWarning: the sound is given together with reference voices.

    Examples:
        >>> from regularized.generation.dreamid_omni import JointAVConfig
        >>> model = SymmetricConditionalDiT(JointAVConfig.tiny())
        >>> clip = sample(model, Conditions(torch.zeros(2, 6, 48)), frames=4, audio_steps=8, size=(4, 8), steps=2)
        >>> clip.video.shape, clip.audio.shape
        (torch.Size([2, 3, 4, 4, 8]), torch.Size([2, 8, 6]))
    """
    if given.driving_audio is not None and given.voices:
        warnings.warn(
            f"the sound is given, and {len(given.voices)} reference voices besides: the paper's RA2V has none, and a "
            "model trained so was never shown both; leave voices=()",
            stacklevel=2,
        )
    guidance = Guidance() if guidance is None else guidance
    text, config = given.text, model.config
    device, dtype = text.device, next(model.parameters()).dtype
    batch = len(text)
    shapes = ((batch, config.video_channels, frames, *size), (batch, audio_steps, config.audio_channels))
    video, audio = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    at = given.layout(video, audio, config.patch)
    variants = [_without(given, name, negative) for name in guidance.needed]
    sigmas = [*shifted_sigmas(steps, shift=shift).tolist(), 0.0]
    texts = torch.cat([one.text for one in variants])
    for sigma, following in pairwise(sigmas):
        joined = [one.join(video, audio) for one in variants]
        x_v, x_a = torch.cat([one[0] for one in joined]), torch.cat([one[1] for one in joined])
        t = torch.full((len(x_v),), 1000.0 * sigma, device=device, dtype=dtype)
        out = model.joined(x_v, x_a, t, texts, texts, at)
        targets = Velocity(out.video[:, :, :frames], out.audio[:, :audio_steps])
        v = _guided(
            guidance,
            dict(zip(guidance.needed, zip(targets.video.chunk(len(variants)), targets.audio.chunk(len(variants))))),
        )
        video, audio = video + (following - sigma) * v.video, audio + (following - sigma) * v.audio
    return Clip(video, audio)


def _without(given: Conditions, what: str, negative: Tensor | None) -> Conditions:
    """The conditions with something left out; what is left out are zeros that stay in the sequence."""
    if what in ("no_text", "nothing"):
        given = given._replace(text=torch.zeros_like(given.text) if negative is None else negative)
    if what in ("no_pictures", "no_references", "nothing") and given.pictures is not None:
        given = given._replace(pictures=torch.zeros_like(given.pictures))
    if what in ("no_voices", "no_references", "nothing"):
        given = given._replace(voices=tuple(torch.zeros_like(voice) for voice in given.voices))
    return given


def _guided(guidance: Guidance, found: dict[str, tuple[Tensor, Tensor]]) -> Velocity:
    full = found["full"]
    out = []
    for stream, no_ref in enumerate(("no_pictures", "no_voices")):
        weights = {"w_text": guidance.text[stream], "w_ref": guidance.ref[stream]}
        if len(found) == 1:
            out.append(full[stream])
        elif guidance.formula == "paper":
            out.append(
                paper_guidance(found["nothing"][stream], found["no_references"][stream], full[stream], **weights)
            )
        else:
            # What has no weight was not computed, and its place is taken by what cancels it.
            text, ref = (found.get(name, full)[stream] for name in ("no_text", no_ref))
            out.append(code_guidance(full[stream], text, ref, **weights))
    return Velocity(*out)
