"""Clips that can be looked at and listened to: WAV and GIF, and those of the *Talking Glyphs* in particular."""

import wave
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.generation.dreamid_omni.sampling import Clip

__all__ = ["picture_strip", "save_clip", "tones", "write_gif", "write_wav"]

RATE = 16_000
"""Samples a second of the released vocoder, and of :func:`tones`."""


def write_wav(path: str | Path, samples: Tensor, *, rate: int = RATE) -> Path:
    """Write sound as 16-bit WAV.

    Args:
        path: the file.
        samples: (n,) one channel, or (channels, n), in [-1, 1]; what lies beyond is clipped.
        rate: samples a second; default 16000.

    Returns:
        The file.

    Raises:
        ValueError: another shape, or samples that are not finite.

    Examples:
        >>> import tempfile
        >>> file = write_wav(Path(tempfile.mkdtemp()) / "beep.wav", torch.zeros(16))
        >>> file.stat().st_size
        76
    """
    channels = samples.detach().float().cpu()
    channels = channels.unsqueeze(0) if channels.ndim == 1 else channels
    if channels.ndim != 2 or not bool(channels.isfinite().all()):
        raise ValueError(f"samples must be (n,) or (channels, n) and finite, got {tuple(samples.shape)}")
    values = (32767 * channels.clamp(-1, 1)).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(values))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(values.mT.flatten().contiguous().view(torch.uint8).tolist()))
    return Path(path)


def write_gif(path: str | Path, frames: Tensor, *, seconds: float = 0.25) -> Path:
    """Write frames as a GIF that repeats; needs Pillow, which comes with matplotlib.

    Args:
        path: the file.
        frames: (T, 3, H, W) in [0, 1]; what lies beyond is clipped.
        seconds: that a frame lasts; default 0.25. GIF counts in hundredths.

    Returns:
        The file.

    Raises:
        ValueError: another shape.

    Examples:
        >>> import tempfile
        >>> file = write_gif(Path(tempfile.mkdtemp()) / "clip.gif", torch.rand(2, 3, 4, 4))
        >>> file.read_bytes()[:6]
        b'GIF89a'
    """
    from PIL import Image

    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"frames must be (T, 3, H, W), got {tuple(frames.shape)}")
    values = (255 * frames.detach().float().cpu().clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
    size = (frames.shape[3], frames.shape[2])
    first, *others = (Image.frombytes("RGB", size, bytes(frame.flatten().tolist())) for frame in values)
    first.save(str(path), format="GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
    return Path(path)


def picture_strip(video: Tensor, *, zoom: int = 8) -> Tensor:
    """Frames of a clip side by side, with a line between them.

    Args:
        video: (3, L, H, W) in [-1, 1].
        zoom: pixels that a pixel becomes.

    Returns:
        (H zoom, L W zoom and lines, 3) in [0, 1].

    Examples:
        >>> picture_strip(torch.zeros(3, 4, 4, 8), zoom=2).shape
        torch.Size([8, 70, 3])
    """
    frames = (video.detach().float().cpu() / 2 + 0.5).clamp(0, 1).transpose(0, 1)
    frames = frames.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    lined = F.pad(frames, (0, 2), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
    return lined[:, :-2]


def tones(audio: Tensor, *, step: float = 0.25, rate: int = RATE) -> Tensor:
    """Sound of the *Talking Glyphs*: each bin a tone, a fourth apart, as loud as it says.

    Args:
        audio: (L_a, bins), -0.5 silent, 1.5 at a gain of one.
        step: seconds of a step; default 0.25.
        rate: samples a second; default 16000.

    Returns:
        (n,) in [-1, 1].

    Examples:
        >>> tones(torch.full((8, 6), -0.5)).abs().max() == 0, tones(torch.zeros(8, 6)).shape
        (tensor(True), torch.Size([32000]))
    """
    level = (audio.detach().double().cpu() + 0.5).clamp_min(0) / 2
    length = round(step * rate)
    time = torch.arange(length * len(level), dtype=torch.float64) / rate
    pitches = 196.0 * (4 / 3) ** torch.arange(level.shape[1], dtype=torch.float64)
    # A step rises and falls, so that it does not click and two steps of one tone are heard as two.
    envelope = (torch.linspace(0, 1, length, dtype=torch.float64) * torch.pi).sin().sqrt()
    loud = (level.unsqueeze(1) * envelope.view(1, -1, 1)).flatten(0, 1)
    sound = (loud * (2 * torch.pi * time.unsqueeze(1) * pitches).sin()).sum(dim=1)
    return (0.6 * sound).clamp(-1, 1).float()


def save_clip(folder: str | Path, clip: Clip, *, number: int = 0, zoom: int = 24) -> tuple[Path, Path]:
    """Write one clip of the *Talking Glyphs* as ``clip.gif`` and ``clip.wav``, of equal length.

    Args:
        folder: where to; made if it is not there.
        clip: latents of some clips.
        number: which of them.
        zoom: pixels that a pixel becomes.

    Returns:
        The two files.

    Examples:
        >>> import tempfile
        >>> video, audio = torch.zeros(1, 3, 4, 4, 8), torch.zeros(1, 8, 6)
        >>> [file.name for file in save_clip(tempfile.mkdtemp(), Clip(video, audio))]
        ['clip.gif', 'clip.wav']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step = 0.25
    frames = (clip.video[number].transpose(0, 1) / 2 + 0.5).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    seconds = step * clip.audio.shape[1] / len(frames)
    return (
        write_gif(folder / "clip.gif", frames, seconds=seconds),
        write_wav(folder / "clip.wav", tones(clip.audio[number], step=step)),
    )
