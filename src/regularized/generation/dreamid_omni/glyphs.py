"""*Talking Glyphs*: a world of two talking faces in which every mistake can be counted.

A clip has four frames of two cells, left and right, and eight steps of sound in six bins; there is no encoder to be
trained, since faces and voices can be read off the numbers. Everything is drawn anew for every batch.

    face      a hue of six (two different ones a clip), two corners missing at the top or at the bottom, a gain
    voice     a bin of six (two different ones), drawn independently of the hue: only the references tell whose it is
    word      a rhythm of four steps: 1111, 1100 or 1011
    scene     who is in which cell, who speaks first; the mouth of the speaker is open in frames in which he is heard
    picture   a face with its mouth closed, in both halves of a frame, so that it tells nothing of sides
    voice     some steps of the tone, as many as the caller says

*In pairs of one clip* references have the gain of the target, of which they are cut; *across clips* a gain of their own
and some noise. A structured caption has a state for each line that is said: the anchor of its speaker, where he is,
when, and what. A plain one says "someone left, someone right; first ..., then ...", which leaves open who.

With ``persons=1`` only one of the two who are referenced is there: in both cells, and he says both lines. Then nothing
depends on left and right, which a token of noise can hardly tell, and what remains is whose face and voice it is.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.loss import OmniBatch
from regularized.generation.dreamid_omni.model import Conditions
from regularized.generation.dreamid_omni.sampling import Clip
from regularized.mechanisms.ranges import allowed, at_least, between

__all__ = ["Pairing", "Scene", "TalkingGlyphs", "Task", "palette"]

Task: TypeAlias = Literal["r2av", "rv2av", "ra2v"]
Pairing: TypeAlias = Literal["in_pair", "cross_pair"]

FRAMES, ROWS, COLUMNS, STEPS, BINS, HUES = 4, 4, 8, 8, 6, 6
RHYTHMS = ((1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 1, 1))
SHUT, OPEN = -0.3, 1.3
TEXT = 10  # numbers of a text state: anchor (none, 1, 2), side (2), turn (2), word (3)
WORDS = {"side": 3, "turn": 5, "word": 7}


def palette() -> Tensor:
    """Red, green and blue of the six hues, (6, 3), all equally far from black.

    Examples:
        >>> palette()[0].tolist()
        [1.0, 0.25, 0.25]
    """
    angles = 2 * torch.pi * (torch.arange(HUES).unsqueeze(1) / HUES - torch.arange(3) / 3)
    return (0.5 + 0.5 * angles.cos()).round(decimals=6)


class Scene(NamedTuple):
    """What happens in B clips; whatever has two columns is of person 1 and of person 2.

    Attributes:
        hue: (B, 2) of six.
        voice: (B, 2) bins.
        shape: (B, 2) whether the corners are missing at the bottom; of one person they are, of the other not.
        gain: (B, 2) in [0.8, 1.2], of face and voice.
        there: (B, 2) person, 0 or 1, in each cell.
        speaker: (B, 2) person, 0 or 1, who speaks in each half.
        said: (B, 2) word of three in each half.
    """

    hue: Tensor
    voice: Tensor
    shape: Tensor
    gain: Tensor
    there: Tensor
    speaker: Tensor
    said: Tensor

    @classmethod
    def draw(cls, count: int, generator: torch.Generator, *, persons: int = 2) -> "Scene":
        """Scenes that are independent in everything, with both persons in them or with one."""

        def two_of(many: int) -> Tensor:
            return torch.rand(count, many, generator=generator).topk(2).indices

        there, speaker = two_of(2), two_of(2)
        if persons == 1:
            there = speaker = speaker[:, :1].expand(-1, 2)
        said = torch.randint(len(RHYTHMS), (count, 2), generator=generator)
        return cls(two_of(HUES), two_of(BINS), two_of(2), _gain(count, generator), there, speaker, said)

    @property
    def alone(self) -> Tensor:
        """(B,) whether one person is in both cells."""
        return self.there[:, 0] == self.there[:, 1]

    @property
    def side(self) -> Tensor:
        """(B, 2) cell of the speaker of each half; the left one where he is in both."""
        return (self.there[:, :1] != self.speaker).long()


class TalkingGlyphs:
    """Batches of the world, one task and one layout each.

    Args:
        structured: captions with anchors; default True. False: plain ones.
        lengths: shortest and longest reference voice, drawn for each person and batch; default 2 to 8 steps.
        noise: on references across clips; default 0.1.
        persons: who are in a clip, of two that are referenced; default 2.

    Attributes:
        tasks: what it can supply: all three.

    Raises:
        ValueError: lengths that are no range, or negative noise; at a call, an unknown task or pairing.

    Examples:
        >>> world = TalkingGlyphs(lengths=(2, 4))
        >>> batch, scene = world.batch(5, "rv2av", "cross_pair", torch.Generator().manual_seed(0))
        >>> batch.video.shape, batch.audio.shape, batch.given.pictures.shape
        (torch.Size([5, 3, 4, 4, 8]), torch.Size([5, 8, 6]), torch.Size([5, 3, 2, 4, 8]))
    """

    tasks: tuple[Task, ...] = ("r2av", "rv2av", "ra2v")

    @allowed(noise=at_least(0.0), persons=between(1, 2, whole=True))
    def __init__(
        self, *, structured: bool = True, lengths: tuple[int, int] = (2, 8), noise: float = 0.1, persons: int = 2
    ) -> None:
        if not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(f"lengths must be a shortest and a longest voice of at least one step, got {lengths}")
        self.structured = structured
        self.lengths = lengths
        self.noise = noise
        self.persons = persons

    @staticmethod
    def config() -> JointAVConfig:
        """The tiny model, for the captions of this world."""
        from dataclasses import replace

        return replace(JointAVConfig.tiny(), text=TEXT, text_len=4)

    def sample(self, count: int, task: str, pairing: str, generator: torch.Generator) -> OmniBatch:
        """What training takes: :meth:`batch` without its scenes."""
        return self.batch(count, task, pairing, generator)[0]

    def batch(self, count: int, task: str, pairing: str, generator: torch.Generator) -> tuple[OmniBatch, Scene]:
        """Draw clips.

        Args:
            count: B.
            task: ``"r2av"``, ``"rv2av"`` (a grey version of the video is given) or ``"ra2v"`` (the audio is given, and
                no voices).
            pairing: ``"in_pair"`` (with masks) or ``"cross_pair"``.
            generator: of everything that is drawn, on the CPU.
        """
        if task not in self.tasks or pairing not in ("in_pair", "cross_pair"):
            raise ValueError(
                f"this world has the tasks {self.tasks}, in_pair and cross_pair; got {task!r} and {pairing!r}"
            )
        scene = Scene.draw(count, generator, persons=self.persons)
        low, high = self.lengths
        lengths = torch.randint(low, high + 1, (2,), generator=generator).tolist()
        own = pairing == "in_pair"
        gain = scene.gain if own else _gain(count, generator)
        pictures, voices = _pictures(scene, gain), _voices(scene, gain, lengths)
        if not own:
            pictures = pictures + self.noise * torch.randn(pictures.shape, generator=generator)
            voices = tuple(voice + self.noise * torch.randn(voice.shape, generator=generator) for voice in voices)
        clip = self.render(scene)
        given = Conditions(
            self.caption(scene),
            pictures,
            () if task == "ra2v" else voices,
            source_video=0.5 * clip.video.mean(dim=1, keepdim=True).expand_as(clip.video) if task == "rv2av" else None,
            driving_audio=clip.audio if task == "ra2v" else None,
        )
        masks = _masks(scene, generator) if own else (None, None)
        return OmniBatch(clip.video, clip.audio, given, *masks), scene

    def render(self, scene: Scene) -> Clip:
        """The clips as they should be."""
        count = len(scene.hue)
        rhythm = torch.tensor(RHYTHMS, dtype=torch.float32)[scene.said]  # (B, halves, steps)
        heard = rhythm.flatten(1).unflatten(1, (FRAMES, -1)).amax(dim=2)  # whether any step of a frame is loud
        speaker = scene.speaker.repeat_interleave(FRAMES // 2, dim=1)
        video = torch.empty(count, FRAMES, 2, 3, ROWS, ROWS)
        for cell in range(2):
            face = _of(scene.there[:, cell], _faces(scene, scene.gain)).unsqueeze(1).repeat(1, FRAMES, 1, 1, 1)
            mouth = heard * (scene.there[:, cell, None] == speaker)
            face[:, :, :, 2, 1:3] = (SHUT + (OPEN - SHUT) * mouth).view(count, FRAMES, 1, 1)
            video[:, :, cell] = face
        bins = F.one_hot(scene.voice.gather(1, scene.speaker), BINS)
        loud = 2 * scene.gain.gather(1, scene.speaker).unsqueeze(-1) * rhythm
        audio = loud.unsqueeze(-1) * bins.unsqueeze(2)  # (B, halves, steps, bins)
        frames = video.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, FRAMES, ROWS, COLUMNS)
        return Clip(2 * frames - 1, audio.flatten(1, 2) - 0.5)

    def caption(self, scene: Scene) -> Tensor:
        """Text states, each number whether a word is there: (B, 2, 10) structured, (B, 4, 10) plain.

        A text encoder gathers in a line what is said of it. So a structured caption has a state for each line: anchor,
        side (of two persons), turn, word. A plain one has four: someone left, someone right, what is said first, and
        then.
        """
        count, both = len(scene.hue), torch.arange(2).expand(len(scene.hue), 2)

        def state(anchor: Tensor | int, **said: Tensor) -> Tensor:
            found = torch.zeros(count, TEXT)
            for offset, values in [
                (0, torch.as_tensor(anchor).expand(count)),
                *((WORDS[n], v) for n, v in said.items()),
            ]:
                found.scatter_(1, offset + values.unsqueeze(1), 1.0)
            return found

        if self.structured:
            where = {} if self.persons == 1 else {"side": scene.side}
            states = [
                state(
                    1 + scene.speaker[:, h],
                    turn=both[:, h],
                    word=scene.said[:, h],
                    **{name: values[:, h] for name, values in where.items()},
                )
                for h in range(2)
            ]
        else:
            states = [state(0, side=both[:, side]) for side in range(2)]
            states += [state(0, turn=both[:, h], word=scene.said[:, h]) for h in range(2)]
        said: Tensor = TEXT**0.5 * torch.stack(states, dim=1)
        return said


def _gain(count: int, generator: torch.Generator) -> Tensor:
    return 0.8 + 0.4 * torch.rand(count, 2, generator=generator)


def _faces(scene: Scene, gain: Tensor) -> Tensor:
    """(B, 2, 3, 4, 4) faces with closed mouths, before they are scaled to [-1, 1]."""
    colour = palette()[scene.hue] * gain.unsqueeze(-1)
    faces = colour[..., None, None].repeat(1, 1, 1, ROWS, ROWS)
    missing = torch.zeros(2, ROWS, ROWS)
    missing[0, 0, [0, -1]] = 1.0
    missing[1, -1, [0, -1]] = 1.0
    faces = faces * (1 - missing[scene.shape].unsqueeze(2))
    faces[..., 2, 1:3] = SHUT
    return faces


def _pictures(scene: Scene, gain: Tensor) -> Tensor:
    """(B, 3, 2, 4, 8) a frame for each person, with the face in both halves."""
    faces = _faces(scene, gain).transpose(1, 2)
    return 2 * torch.cat([faces, faces], dim=-1) - 1


def _voices(scene: Scene, gain: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Tones of both persons, (B, R_k, 6)."""
    tones = F.one_hot(scene.voice, BINS) * 2 * gain.unsqueeze(-1) - 0.5
    return tuple(tones[:, person, None].repeat(1, length, 1) for person, length in enumerate(lengths))


def _of(person: Tensor, values: Tensor) -> Tensor:
    """(B, ...) what belongs to a person of each clip, of (B, 2, ...)."""
    return values[torch.arange(len(person)), person]


def _masks(scene: Scene, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the references of a pair were cut: a frame in which a person is silent, two steps of each half."""
    count, every = len(scene.hue), torch.arange(len(scene.hue))
    video, audio = torch.zeros(count, FRAMES, 2), torch.zeros(count, 2, STEPS // 2)
    frame = torch.randint(FRAMES // 2, (count, 2), generator=generator)
    start = torch.randint(STEPS // 2 - 1, (count, 2), generator=generator)
    for side in range(2):
        silent = (scene.speaker[:, 0] == scene.there[:, side]).long()  # he speaks in the other half
        video[every, silent * (FRAMES // 2) + frame[:, side], side] = 1.0
        for step in range(2):
            audio[every, side, start[:, side] + step] = 1.0
    cells = video.view(count, 1, FRAMES, 1, 2, 1).expand(-1, -1, -1, -1, -1, COLUMNS // 2)
    return cells.reshape(count, 1, FRAMES, 1, COLUMNS), audio.flatten(1).unsqueeze(-1)
