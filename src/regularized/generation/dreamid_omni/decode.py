"""What clips of the *Talking Glyphs* show, and how far it is from what was asked.

Nothing is learned here: the nearest hue, the loudest bin, the brighter mouth.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regularized.generation.dreamid_omni.glyphs import COLUMNS, FRAMES, RHYTHMS, ROWS, STEPS, Scene, palette
from regularized.generation.dreamid_omni.sampling import Clip

__all__ = ["Seen", "decode", "measure"]


class Seen(NamedTuple):
    """What is seen and heard in B clips.

    Attributes:
        hue: (B, 2) nearest hue in each cell.
        gain: (B, 2) how bright it is there, 1 for the palette's own.
        voice: (B, 2) loudest bin in each half.
        side: (B, 2) cell whose mouth is brighter in each half.
        word: (B, 2) nearest rhythm in each half.
        mouth: (B, 4) mouth of that cell in each frame.
        loudness: (B, 4) of that bin in each frame.
    """

    hue: Tensor
    gain: Tensor
    voice: Tensor
    side: Tensor
    word: Tensor
    mouth: Tensor
    loudness: Tensor


def decode(clip: Clip) -> Seen:
    """Read clips.

    Args:
        clip: video (B, 3, 4, 4, 8) and audio (B, 8, 6).

    Examples:
        >>> from regularized.generation.dreamid_omni.glyphs import TalkingGlyphs
        >>> scene = Scene.draw(3, torch.Generator().manual_seed(0))
        >>> seen = decode(TalkingGlyphs().render(scene))
        >>> bool((seen.hue == scene.hue.gather(1, scene.there)).all())
        True
    """
    count = len(clip.video)
    cells = (clip.video.float() / 2 + 0.5).view(count, 3, FRAMES, ROWS, 2, COLUMNS // 2)
    colour = cells[:, :, :, 1].mean(dim=(2, 4)).mT  # row 1 holds nothing but the colour: (B, cells, 3)
    colours = palette().to(colour)
    hue = (colour @ colours.mT).argmax(dim=2)
    nearest = colours[hue]
    gain = (colour * nearest).sum(dim=2) / nearest.square().sum(dim=2)
    mouths = cells[:, :, :, 2, :, 1:3].mean(dim=(1, 4))  # (B, frames, cells)
    side = mouths.unflatten(1, (2, -1)).mean(dim=2).argmax(dim=2)
    sound = (clip.audio.float() + 0.5).unflatten(1, (2, STEPS // 2))  # (B, halves, steps, bins)
    voice = sound.sum(dim=2).argmax(dim=2)
    loud = sound.gather(3, voice[:, :, None, None].expand(-1, -1, STEPS // 2, -1)).squeeze(3)
    rhythms = torch.tensor(RHYTHMS, dtype=loud.dtype, device=loud.device)
    level = loud.amax(dim=2, keepdim=True).clamp_min(1e-6)
    word = (loud / level).unsqueeze(2).sub(rhythms).square().sum(dim=3).argmin(dim=2)
    speaking = mouths.gather(2, side.repeat_interleave(FRAMES // 2, dim=1).unsqueeze(2)).squeeze(2)
    return Seen(hue, gain, voice, side, word, speaking, loud.flatten(1).unflatten(1, (FRAMES, -1)).amax(dim=2))


def measure(clip: Clip, scene: Scene, reference_gain: Tensor | None = None) -> dict[str, float]:
    """Shares of mistakes, over all clips.

    Args:
        clip: what was made.
        scene: what was asked.
        reference_gain: (B, 2) gain of each person's picture, for ``copy_rate``; default the scene's own.

    Returns:
        ``identity_accuracy``, percent of the cells with the face that the caption puts there; ``identity_set``, percent
        of the persons that are anywhere; ``voice_known``, percent of the halves with the voice of one of the two;
        ``binding_error``, share of the halves in which the face that speaks and the voice that is heard are of
        different persons, of those where both are known (0.5 by chance, and where none is known);
        ``speaker_confusion``, share of the halves in which the wrong side's mouth moves, or in a clip of one person the
        face is the other's (0.5 by chance, and where the face is nobody's);
        ``word_error``, share of the halves with another rhythm; ``synchrony``, correlation of mouth and loudness;
        ``copy_rate``, correlation of the gain of a face with that of its picture.

    Examples:
        >>> from regularized.generation.dreamid_omni.glyphs import TalkingGlyphs
        >>> scene = Scene.draw(50, torch.Generator().manual_seed(0))
        >>> found = measure(TalkingGlyphs().render(scene), scene)
        >>> found["identity_accuracy"], found["binding_error"], found["speaker_confusion"], found["word_error"]
        (100.0, 0.0, 0.0, 0.0)
    """
    seen = decode(clip)
    asked_hue = scene.hue.gather(1, scene.there)
    face = seen.hue.gather(1, seen.side)  # of the mouth that moves, in each half
    owner_of_face, known_face = _owner(face, scene.hue)
    owner_of_voice, known_voice = _owner(seen.voice, scene.voice)
    both = known_face & known_voice
    wrong = (owner_of_face != owner_of_voice) & both
    # In a clip of one person both mouths move, and he is known by his face.
    by_face = torch.where(known_face, (owner_of_face != scene.speaker).double(), 0.5)
    confused = torch.where(scene.alone.unsqueeze(1), by_face, (seen.side != scene.side).double())
    shown, known = _owner(seen.hue, scene.hue)
    gains = (scene.gain if reference_gain is None else reference_gain).gather(1, shown)
    return {
        "identity_accuracy": 100 * _share(seen.hue == asked_hue),
        "identity_set": 100 * _share((scene.hue.unsqueeze(2) == seen.hue.unsqueeze(1)).any(dim=2)),
        "voice_known": 100 * _share(known_voice),
        "binding_error": float(wrong.sum() / both.sum()) if bool(both.any()) else 0.5,
        "speaker_confusion": _share(confused),
        "word_error": _share(seen.word != scene.said),
        "synchrony": _correlation(seen.mouth.flatten(), seen.loudness.flatten()),
        "copy_rate": _correlation(seen.gain[known], gains[known]),
    }


def _owner(found: Tensor, of_persons: Tensor) -> tuple[Tensor, Tensor]:
    """Person, 0 or 1, whose it is, and whether it is anybody's."""
    same = found.unsqueeze(2) == of_persons.unsqueeze(1)
    return same.int().argmax(dim=2), same.any(dim=2)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _correlation(a: Tensor, b: Tensor) -> float:
    """0 where there is nothing to correlate."""
    if len(a) < 2:
        return 0.0
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if float(scale) > 0 else 0.0
