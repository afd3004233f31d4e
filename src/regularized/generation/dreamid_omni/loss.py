"""Masked flow matching of two streams at one time of the noise.

Symbols of arXiv 2602.12160 and their names here:

    z_v, z_a         ``video``, ``audio``              latents of the target: (B, C_v, L_v, H, W), (B, L_a, C_a)
    T                ``text``                          states of the caption, for both streams
    I_k, A_k         ``pictures``, ``voices``          references of person k, as latents, without noise
    V_src, A_dri     ``source_video``, ``driving_audio``   structure; nothing is zero
    X_v, X_a         ``Conditions.join``               Eqs. 2, 3:  [z ; references] + [structure ; 0]
    M                ``margin``                        distance of the persons' slots on the axis of time
    gamma            ``Layout.gamma``                  L_v / L_a, frames that an audio step lasts
    s                ``sigma``                         share of noise, the same for both streams; t = 1000 s
    e                ``noise``
    z_s              (1 - s) z + s e                   what the model sees of the target
    v                e - z                             velocity, what it is to say
    M_v, M_a         ``mask_video``, ``mask_audio``    1 where a reference was cut out of the target, in pairs of
                                                       one clip: copying there earns nothing
    lambda_v, _a     ``weights``                       of the two losses

    loss             lambda_v mean (1 - M_v) |v_v - v^_v|^2  +  lambda_a mean (1 - M_a) |v_a - v^_a|^2

The means are over all numbers of the target of a stream, masked ones included, and never over references. The paper
writes the loss with the noise e; the released sampler reads the output as a velocity, so a velocity it is here. Neither
lambda nor the density of s are stated: they are 1, and that of a logistic of a normal number, shifted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regularized.generation.dreamid_omni.model import Conditions, SymmetricConditionalDiT
from regularized.mechanisms.ranges import allowed, at_least, positive, share

__all__ = [
    "JointLoss",
    "OmniBatch",
    "draw_sigma",
    "drop_conditions",
    "joint_flow_matching_loss",
    "masked_velocity_error",
    "noised",
]


class OmniBatch(NamedTuple):
    """Clips of one task and one layout.

    Attributes:
        video: z_v (B, C_v, L_v, H, W).
        audio: z_a (B, L_a, C_a).
        given: text, references, structure.
        mask_video: M_v, broadcast against ``video``; 1 where the loss does not look. None is 0.
        mask_audio: M_a, likewise.
    """

    video: Tensor
    audio: Tensor
    given: Conditions
    mask_video: Tensor | None = None
    mask_audio: Tensor | None = None

    def check(self) -> None:
        """Refuse masks that leave nothing to learn. It reads them, so it belongs in front of a training step.

        Raises:
            ValueError: a mask covers a whole stream of every clip.
        """
        for name, mask in (("mask_video", self.mask_video), ("mask_audio", self.mask_audio)):
            if mask is not None and mask.device.type == "cpu" and bool((mask >= 1).all()):
                raise ValueError(
                    f"{name} covers everything, so that stream would learn nothing; cut the references out of a part "
                    "of the clip, or set its weight to 0"
                )


class JointLoss(NamedTuple):
    """The loss and its two parts, scalars."""

    loss: Tensor
    video: Tensor
    audio: Tensor


@allowed(shift=positive())
def draw_sigma(count: int, *, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Shares of noise: the logistic of a normal number, shifted as a sampler's.

    Args:
        count: how many.
        shift: 1 (default) leaves them as they are; Ovi samples with 5.
        generator: on the CPU; default the global one.

    Returns:
        (count,) in (0, 1), on the CPU.

    Examples:
        >>> float(draw_sigma(10_001, generator=torch.Generator().manual_seed(0)).median().round(decimals=1))
        0.5
    """
    sigma = torch.randn(count, generator=generator).sigmoid()
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_s = (1 - s) z + s e.

    Args:
        clean: (B, ...).
        noise: the same shape.
        sigma: (B,).

    Examples:
        >>> noised(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25])).tolist()
        [[0.25, 0.25]]
    """
    return torch.lerp(clean, noise, sigma.to(clean).view(-1, *[1] * (clean.ndim - 1)))


def masked_velocity_error(said: Tensor, clean: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ``(1 - M) (v - v^)^2`` over all numbers of the target.

    Args:
        said: v^, velocities of the target and, behind it along the sequence, anything: it is not looked at.
        clean: z, (B, C, L, H, W) or (B, L, C).
        noise: e.
        mask: M, broadcast against ``clean``; None is 0.

    Returns:
        Scalar: 0 where M is 1 everywhere.

    Examples:
        >>> z, e = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
        >>> float(masked_velocity_error(torch.zeros(1, 5, 1), z, e, torch.tensor([[[1.0], [0.0]]])))
        0.5
    """
    said = said[:, :, : clean.shape[2]] if clean.ndim == 5 else said[:, : clean.shape[1]]
    error = (noise - clean - said).square()
    return (error if mask is None else error * (1.0 - mask.to(error))).mean()


@allowed(dropout=share())
def drop_conditions(given: Conditions, *, dropout: float = 0.1, generator: torch.Generator | None = None) -> Conditions:
    """Leave out the text, and the references, of some clips, each by itself: what guidance needs at sampling.

    What is left out are zeros that stay in the sequence.

    Args:
        given: conditions of B clips.
        dropout: share of the clips without text, and without references; default 0.1 (ours; the paper states none).
        generator: on the CPU; default the global one.

    Examples:
        >>> given = Conditions(torch.ones(1, 1, 2), voices=(torch.ones(1, 3, 2),))
        >>> bool(drop_conditions(given, dropout=1.0).voices[0].any())
        False
    """
    if dropout == 0:
        return given
    kept = (torch.rand(2, len(given.text), generator=generator) >= dropout).to(given.text)
    text, reference = kept.view(2, -1, 1, 1)
    return given._replace(
        text=given.text * text,
        pictures=None if given.pictures is None else given.pictures * reference.view(-1, 1, 1, 1, 1),
        voices=tuple(voice * reference for voice in given.voices),
    )


@allowed(dropout=share(), shift=positive())
def joint_flow_matching_loss(
    model: SymmetricConditionalDiT,
    batch: OmniBatch,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    dropout: float = 0.1,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> JointLoss:
    """The loss of a batch of clips of one task: one forward pass of the model.

    Args:
        model: the transformer.
        batch: targets, conditions, masks.
        weights: lambda_v and lambda_a; default 1 and 1 (ours; the paper states none).
        dropout: see :func:`drop_conditions`; default 0.1 (ours).
        shift: see :func:`draw_sigma`; default 1.
        generator: of times, noise and dropped conditions, on the CPU; default the global one.

    Returns:
        Scalars with their graph.

    Raises:
        ValueError: shapes do not fit, or a weight is negative.

    Examples:
        >>> from regularized.generation.dreamid_omni import JointAVConfig
        >>> model = SymmetricConditionalDiT(JointAVConfig.tiny())
        >>> batch = OmniBatch(torch.zeros(2, 3, 4, 4, 8), torch.zeros(2, 8, 6), Conditions(torch.zeros(2, 6, 48)))
        >>> parts = joint_flow_matching_loss(model, batch, generator=torch.Generator().manual_seed(0))
        >>> round(parts.loss.item()), bool(parts.loss == parts.video + parts.audio)  # heads start at zero
        (2, True)
    """
    for name, weight in zip(("of the video", "of the audio"), weights):
        at_least(0.0)(f"the weight {name}", weight)
    z_v, z_a = batch.video, batch.audio
    device = z_v.device
    sigma = draw_sigma(len(z_v), shift=shift, generator=generator).to(device, z_v.dtype)
    e_v = torch.randn(z_v.shape, generator=generator).to(z_v)
    e_a = torch.randn(z_a.shape, generator=generator).to(z_a)
    given = drop_conditions(batch.given, dropout=dropout, generator=generator)
    said = model(noised(z_v, e_v, sigma), noised(z_a, e_a, sigma), 1000.0 * sigma, given)
    video = masked_velocity_error(said.video, z_v, e_v, batch.mask_video)
    audio = masked_velocity_error(said.audio, z_a, e_a, batch.mask_audio)
    return JointLoss(weights[0] * video + weights[1] * audio, video, audio)
