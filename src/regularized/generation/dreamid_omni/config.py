"""Sizes of the two streams."""

from dataclasses import dataclass
from typing import Literal

from regularized.generation.dreamid_omni.positions import head_split
from regularized.mechanisms.ranges import check_fields, count, finite, positive

__all__ = ["JointAVConfig"]


@dataclass(frozen=True, slots=True)
class JointAVConfig:
    """Sizes of the joint audio-video transformer. Both streams have the same width, depth and heads.

    Args:
        dim: d, width of both streams.
        heads: attention heads; d over heads must be even.
        layers: blocks.
        ffn: width inside the feed-forward parts.
        video_channels: C_v of the video latents.
        audio_channels: C_a of the audio latents.
        patch: frames, rows and columns of a video token; the frames must be 1, since positions count them.
        audio_embedding: ``"conv"``, the released one: a convolution and a gated convolutional network of seven steps,
            over target and references at once, so that the last steps of one and the first of the next mix;
            ``"linear"``, in which each step stands for itself.
        freq: numbers of the sinusoid of the time of the noise.
        text: width of the text states.
        text_len: to how many text states shorter captions are padded by zeros; attention looks at these, too.
        fusion_init: factor on the initial weights of the video stream's keys and values of the audio; Ovi: 0.1.
        embedding_std: of the initial weights that embed text and time; Ovi: 0.02. None: by their sizes, as all others,
            for a model that begins from nothing.
        gate_init: what the gates of a block begin with, or None for small random numbers, as Ovi. With 1 a model that
            begins from nothing passes on what its attention finds from the first step.
        eps: of all normalisations.

    Raises:
        ValueError: a size out of range, or heads that do not divide the width.

    Examples:
        >>> JointAVConfig.dreamid_omni().dim, JointAVConfig.tiny().dim
        (3072, 48)
    """

    dim: int
    heads: int
    layers: int
    ffn: int
    video_channels: int
    audio_channels: int
    patch: tuple[int, int, int] = (1, 2, 2)
    audio_embedding: Literal["conv", "linear"] = "conv"
    freq: int = 256
    text: int = 4096
    text_len: int = 512
    fusion_init: float = 0.1
    embedding_std: float | None = 0.02
    gate_init: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("dim", "heads", "layers", "ffn", "video_channels", "audio_channels", "freq", "text", "text_len")
        check_fields(self, **{name: count(1) for name in sizes}, fusion_init=positive(), eps=positive())
        positive().or_none("by their sizes")("embedding_std", self.embedding_std)
        finite().or_none("small random numbers")("gate_init", self.gate_init)
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got {self.heads} and {self.dim}")
        if self.freq % 2:
            raise ValueError(f"freq must be even, cosines and sines, got {self.freq}")
        if self.patch[0] != 1 or min(self.patch) < 1:
            raise ValueError(f"patch must be (1, rows, columns), since positions count frames; got {self.patch}")
        head_split(self.dim // self.heads)

    @classmethod
    def dreamid_omni(cls) -> "JointAVConfig":
        """The sizes of the released weights, 11.7 billion parameters."""
        return cls(dim=3072, heads=24, layers=30, ffn=14336, video_channels=48, audio_channels=20)

    @classmethod
    def tiny(cls) -> "JointAVConfig":
        """A model for a laptop and for the *Talking Glyphs*, about 0.2 million parameters."""
        return cls(
            dim=48,
            heads=3,
            layers=3,
            ffn=96,
            video_channels=3,
            audio_channels=6,
            patch=(1, 4, 4),
            audio_embedding="linear",
            freq=16,
            text=48,
            text_len=6,
            fusion_init=1.0,
            embedding_std=None,
            gate_init=1.0,
        )
