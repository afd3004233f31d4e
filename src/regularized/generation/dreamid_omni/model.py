"""The symmetric conditional transformer: two streams that meet in every block.

:mod:`regularized.generation.dreamid_omni.loss` has the symbols.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.layer import Block, Stream
from regularized.generation.dreamid_omni.positions import Layout, SynRoPE

__all__ = ["Conditions", "SymmetricConditionalDiT", "Velocity"]


class Velocity(NamedTuple):
    """What the two streams answer, for target and references; those of the references mean nothing."""

    video: Tensor
    audio: Tensor


class Conditions(NamedTuple):
    """What a clip is made from: text, references, structure.

    Which task it is shows in what is there: R2AV has text, pictures and voices; RV2AV a source video besides; RA2V a
    driving audio, and no voices (or voices of zeros, which stay in the sequence).

    Attributes:
        text: (B, states, width) states of the caption, for both streams.
        pictures: (B, C_v, N, H, W) latents of the reference pictures, clean.
        voices: (B, R_k, C_a) latents of each reference voice, clean.
        persons: for each picture the person whom it shows, counted from 1; default 1, 2, ...
        speakers: for each voice the person; default 1, 2, ...
        source_video: (B, C_v, L_v, H, W), added to the target's latents; None is zero.
        driving_audio: (B, L_a, C_a), added to the target's latents; None is zero.

    Raises:
        ValueError: in :meth:`join` and :meth:`layout`, shapes that do not fit the target, or not one person for each
            reference.

    Examples:
        >>> given = Conditions(torch.zeros(1, 2, 4), torch.zeros(1, 3, 2, 4, 8), (torch.zeros(1, 5, 6),), speakers=(2,))
        >>> video, audio = torch.zeros(1, 3, 4, 4, 8), torch.zeros(1, 8, 6)
        >>> at = given.layout(video, audio, (1, 4, 4))
        >>> at.pictures, at.voices
        ((1, 2), ((2, 5),))
        >>> given.join(video, audio)[1].shape
        torch.Size([1, 13, 6])
    """

    text: Tensor
    pictures: Tensor | None = None
    voices: tuple[Tensor, ...] = ()
    persons: tuple[int, ...] | None = None
    speakers: tuple[int, ...] | None = None
    source_video: Tensor | None = None
    driving_audio: Tensor | None = None

    def layout(self, video: Tensor, audio: Tensor, patch: tuple[int, int, int]) -> Layout:
        """What stands in the sequences for a target of (B, C_v, L_v, H, W) and (B, L_a, C_a)."""
        pictures = 0 if self.pictures is None else self.pictures.shape[2]
        persons = tuple(range(1, pictures + 1)) if self.persons is None else self.persons
        speakers = tuple(range(1, len(self.voices) + 1)) if self.speakers is None else self.speakers
        for name, numbers, given in (("persons", persons, pictures), ("speakers", speakers, len(self.voices))):
            if len(numbers) != given:
                raise ValueError(f"{name} must name one person for each reference, got {numbers} for {given}")
        lengths = tuple(voice.shape[1] for voice in self.voices)
        grid = (video.shape[3] // patch[1], video.shape[4] // patch[2])
        return Layout(video.shape[2], grid, audio.shape[1], persons, tuple(zip(speakers, lengths)))

    def join(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 2 and 3: references appended along time, structure added to the target.

        Args:
            video: z_v (B, C_v, L_v, H, W).
            audio: z_a (B, L_a, C_a).

        Returns:
            X_v (B, C_v, L_v + N, H, W) and X_a (B, L_a + sum R, C_a).

        Raises:
            ValueError: the structure is of another size than the target, or references of other channels.
        """
        for name, structure, target in (
            ("source_video", self.source_video, video),
            ("driving_audio", self.driving_audio, audio),
        ):
            if structure is not None and structure.shape != target.shape:
                raise ValueError(
                    f"{name} must have the shape of the target, {tuple(target.shape)}, got {tuple(structure.shape)}; "
                    "cut it to the same length and scale it to the same size"
                )
        video = video if self.source_video is None else video + self.source_video
        audio = audio if self.driving_audio is None else audio + self.driving_audio
        if self.pictures is not None:
            if (want := (*video.shape[:2], *video.shape[3:])) != (
                got := (*self.pictures.shape[:2], *self.pictures.shape[3:])
            ):
                raise ValueError(
                    f"pictures must be (B, C_v, N, H, W) with (B, C_v, H, W) those of the target, {want}, got {got}; "
                    "fit them into its size"
                )
            video = torch.cat([video, self.pictures.to(video.dtype)], dim=2)
        return video, torch.cat([audio, *(voice.to(audio.dtype) for voice in self.voices)], dim=1)


class SymmetricConditionalDiT(nn.Module):
    """Two transformers, of video and of audio, that attend to each other in every block.

    Both are given the same way: noisy target and clean references one behind the other, structure added. Modules have
    the names of the released weights, see :func:`~regularized.generation.dreamid_omni.load_released`.

    Args:
        config: the sizes.
        syn_rope: the positions; default slots of 150 frames (paper).

    Attributes:
        video_model: the stream of the video.
        audio_model: the stream of the audio.
        syn_rope: the positions; tables of layouts that were seen are kept in it.

    Raises:
        ValueError: shapes that do not fit each other or the sizes.

    Examples:
        >>> model = SymmetricConditionalDiT(JointAVConfig.tiny())
        >>> text, pictures, voice = torch.randn(2, 6, 48), torch.randn(2, 3, 1, 4, 8), torch.randn(2, 5, 6)
        >>> video, audio = torch.randn(2, 3, 4, 4, 8), torch.randn(2, 8, 6)
        >>> v = model(video, audio, torch.full((2,), 500.0), Conditions(text, pictures, (voice,)))
        >>> v.video.shape, v.audio.shape, v.video.abs().max().item()
        (torch.Size([2, 3, 5, 4, 8]), torch.Size([2, 13, 6]), 0.0)
    """

    def __init__(self, config: JointAVConfig, *, syn_rope: SynRoPE | None = None) -> None:
        super().__init__()
        self.config = config
        self.syn_rope = SynRoPE() if syn_rope is None else syn_rope
        self.video_model: Stream = Stream(config, video=True)
        self.audio_model: Stream = Stream(config, video=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights: Xavier uniform, biases zero, N(0, 0.02) in text and time, heads zero (Ovi)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d):
                std = self.config.embedding_std
                if std is not None and ("text_embedding" in name or "time_embedding" in name):
                    nn.init.normal_(module.weight, std=std)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stream in (self.video_model, self.audio_model):
            nn.init.zeros_(stream.head.head.weight)
            if self.config.gate_init is not None:
                for block in stream.blocks:
                    block.get_parameter("modulation.modulation")[:, [2, 5]] = self.config.gate_init
        for block in self.video_model.blocks:
            assert isinstance(block, Block)
            for fusion in (block.cross_attn.k_fusion, block.cross_attn.v_fusion):
                fusion.weight.mul_(self.config.fusion_init)

    def forward(self, video: Tensor, audio: Tensor, t: Tensor, given: Conditions) -> Velocity:
        """Velocities of noisy latents.

        Args:
            video: z_v at t, (B, C_v, L_v, H, W).
            audio: z_a at t, (B, L_a, C_a).
            t: (B,) time of the noise in [0, 1000], the same for every token of both streams, references too.
            given: text, references, structure.

        Returns:
            (B, C_v, L_v + N, H, W) and (B, L_a + sum R, C_a); what stands behind the target means nothing.
        """
        x_v, x_a = given.join(video, audio)
        return self.joined(x_v, x_a, t, given.text, given.text, given.layout(video, audio, self.config.patch))

    def joined(self, video: Tensor, audio: Tensor, t: Tensor, text_v: Tensor, text_a: Tensor, at: Layout) -> Velocity:
        """The same of sequences that hold the references already, with a text for each stream.

        Args:
            video: X_v (B, C_v, L_v + N, H, W).
            audio: X_a (B, L_a + sum R, C_a).
            t: (B,) in [0, 1000].
            text_v: (B, states, width), at most ``text_len`` states.
            text_a: likewise.
            at: what stands in the sequences.
        """
        v, a = self.video_model, self.audio_model
        grid = (video.shape[2], video.shape[3] // self.config.patch[1], video.shape[4] // self.config.patch[2])
        x = v.patch_embedding(video).flatten(2).mT
        y = a.patch_embedding(audio)
        if x.shape[1] != at.video_tokens or y.shape[1] != at.audio_tokens:
            raise ValueError(
                f"the layout has {at.video_tokens} video and {at.audio_tokens} audio tokens, the latents make "
                f"{x.shape[1]} and {y.shape[1]}: {at}"
            )
        head = self.config.dim // self.config.heads
        of_v, of_a = self.syn_rope.tables(at, head, device=x.device, dtype=x.dtype)
        (e_v, parts_v), (e_a, parts_a) = v.time(t), a.time(t)
        told_v, told_a = v.text_embedding(self._padded(text_v)), a.text_embedding(self._padded(text_a))
        for one, other in zip(v.blocks, a.blocks, strict=True):
            assert isinstance(one, Block)
            assert isinstance(other, Block)
            m_v, m_a = one.modulation(parts_v).split(1, dim=1), other.modulation(parts_a).split(1, dim=1)
            x, y = one.among(x, m_v, of_v), other.among(y, m_a, of_a)
            # Both look at what the other was before it looked.
            x, y = one.across(x, of_v, told_v, y, of_a), other.across(y, of_a, told_a, x, of_v)
            x, y = one.alone(x, m_v), other.alone(y, m_a)
        return Velocity(self._pictures(v.head(x, e_v), grid), a.head(y, e_a))

    def _padded(self, text: Tensor) -> Tensor:
        length = self.config.text_len
        if text.shape[1] > length or text.shape[2] != self.config.text:
            raise ValueError(
                f"text must be (B, states, {self.config.text}) with at most {length} states, got {tuple(text.shape)}; "
                "shorten the caption"
            )
        return nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))

    def _pictures(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens of channels-last patches to (B, C, frames, H, W)."""
        batch, (f, h, w), (pf, ph, pw) = len(tokens), grid, self.config.patch
        patches = tokens.view(batch, f, h, w, pf, ph, pw, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, f * pf, h * ph, w * pw)
