"""Where every token stands on the clock that video and audio share, and the rotary tables made of it.

:mod:`regularized.generation.dreamid_omni.loss` has the symbols. Positions, all on the axis of time, in frames:

    target frame f             f                       f = 0 .. L_v - 1
    target audio step i        i gamma                 gamma = L_v / L_a, so that both streams run by one clock
    picture of person k        k M                     far away from the target, at the same place as ...
    voice of person k, step j  k M + j gamma           ... his voice: M is larger than whatever stands in a slot

Rotary attention sees differences of positions alone. With a slot for each person his own voice lies at 0 .. R gamma
from his picture and everybody else's at about M or more, for every person and every length of reference. With
*consecutive* positions, the control, picture 2 stands inside the span of voice 1, and where voice 2 begins depends on
how long voice 1 is.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, count, positive

__all__ = ["Layout", "Placing", "SynRoPE", "affinity", "head_split", "rotate"]

Placing: TypeAlias = Literal["slots", "code", "consecutive"]

THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in the two sequences: the target first, then the references in order.

    Args:
        frames: L_v, latent frames of the target.
        grid: rows and columns of video tokens of a frame.
        steps: L_a, latent steps of the target's audio.
        pictures: for each reference picture the person it shows, counted from 1.
        voices: for each reference voice the person and its length R in steps.

    Raises:
        ValueError: a size below 1, a person below 1, or persons that have a picture and no voice while others have
            both.

    Examples:
        >>> layout = Layout(4, (1, 2), 8, pictures=(1, 2), voices=((1, 3), (2, 5)))
        >>> layout.gamma, layout.video_tokens, layout.audio_tokens
        (0.5, 12, 16)
    """

    frames: int
    grid: tuple[int, int]
    steps: int
    pictures: tuple[int, ...] = ()
    voices: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        sizes = {"frames": self.frames, "rows": self.grid[0], "columns": self.grid[1], "steps": self.steps}
        for name, size in sizes.items():
            count(1)(name, size)
        for person, length in self.voices:
            count(1, f"steps of the voice of person {person}")("length", length)
        for person in (*self.pictures, *(person for person, _ in self.voices)):
            count(1, "persons are counted from 1")("person", person)

    @property
    def gamma(self) -> float:
        """Frames that an audio step lasts."""
        return self.frames / self.steps

    @property
    def video_tokens(self) -> int:
        """Of target and pictures."""
        return (self.frames + len(self.pictures)) * self.grid[0] * self.grid[1]

    @property
    def audio_tokens(self) -> int:
        """Of target and voices."""
        return self.steps + sum(length for _, length in self.voices)


class SynRoPE:
    """Synchronised rotary positions: one clock for both streams, one slot for each person.

    Tables of cosine and sine are made once a layout, device and type, and kept.

    Args:
        margin: M, in frames, distance of the slots; default 150 (paper).
        placing: ``"slots"`` (default, paper); ``"code"``, in which the start of a voice is rounded down to a whole
            audio step, as in the released code; ``"consecutive"``, the control: references follow behind the target,
            each in its own stream.
        theta: base of the frequencies; default 10000 (released code).
        gamma: frames that an audio step lasts, in place of L_v / L_a; default None. The released engine has it in
            bfloat16: 0.197266 for 31 / 157.

    Raises:
        ValueError: a setting outside its range; at a layout: segments overlap.

    Examples:
        >>> layout = Layout(4, (1, 1), 8, pictures=(1, 2), voices=((1, 2), (2, 2)))
        >>> frames, steps = SynRoPE(margin=10).times(layout)
        >>> frames.tolist()
        [0.0, 1.0, 2.0, 3.0, 10.0, 20.0]
        >>> steps[8:].tolist()
        [10.0, 10.5, 20.0, 20.5]
        >>> SynRoPE(placing="consecutive").times(layout)[1][8:].tolist()
        [4.0, 4.5, 5.0, 5.5]
    """

    @allowed(
        margin=positive("in frames"),
        placing=Choice("slots", "code", "consecutive"),
        theta=positive(),
        gamma=positive("in frames").or_none("L_v / L_a"),
    )
    def __init__(
        self,
        *,
        margin: float = 150.0,
        placing: Placing = "slots",
        theta: float = THETA,
        gamma: float | None = None,
    ) -> None:
        self.margin = margin
        self.placing = placing
        self.theta = theta
        self.gamma = gamma
        self._tables: OrderedDict[tuple[Layout, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = OrderedDict()

    def times(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Positions of the frames (L_v + N,) and of the audio steps (L_a + sum R,), float64, in frames.

        Raises:
            ValueError: the margin is not larger than the target and every slot.
        """
        gamma = layout.gamma if self.gamma is None else self.gamma
        frames = torch.arange(layout.frames, dtype=torch.float64)
        steps = torch.arange(layout.steps, dtype=torch.float64)
        if self.placing == "consecutive":
            every = torch.arange(layout.frames + len(layout.pictures), dtype=torch.float64)
            return every, gamma * torch.arange(layout.audio_tokens, dtype=torch.float64)
        self._check(layout, gamma)
        slot = self.margin // gamma  # in whole audio steps, as the code counts
        pictures = [person * self.margin + place for person, place in zip(layout.pictures, _places(layout.pictures))]
        voices = [gamma * steps]
        heard: Counter[int] = Counter()
        for person, length in layout.voices:
            own = heard[person] + torch.arange(length, dtype=torch.float64)
            # k M + j gamma, and not gamma (k M / gamma + j): it must be the picture's number to the last bit.
            code = self.placing == "code"
            voices.append(gamma * (person * slot + own) if code else person * self.margin + gamma * own)
            heard[person] += length
        return torch.cat([frames, torch.tensor(pictures, dtype=torch.float64)]), torch.cat(voices)

    def _check(self, layout: Layout, gamma: float) -> None:
        spans = {"the target": float(layout.frames)}
        for person in {person for person, _ in layout.voices}:
            length = sum(own for other, own in layout.voices if other == person)
            spans[f"the voice of person {person}"] = length * gamma
        for person, number in Counter(layout.pictures).items():
            spans[f"the pictures of person {person}"] = float(number)
        widest = max(spans, key=lambda name: spans[name])
        if self.margin <= spans[widest]:
            raise ValueError(
                f"segments overlap: margin must be larger than all that stands in a slot, but {widest} takes "
                f"{spans[widest]:g} frames and margin is {self.margin:g}; give a larger margin (the paper: 150)"
            )

    def tables(self, layout: Layout, head: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Complex rotations of the tokens of both streams, (tokens, 1, head / 2), made once and kept.

        Args:
            layout: what stands in the sequences.
            head: numbers of an attention head, even.
            device: where the tables are wanted.
            dtype: real type of the queries; the tables are of float32 or wider.
        """
        key = (layout, head, device, torch.promote_types(dtype, torch.float32))
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        found = self._made(layout, head)
        wide = torch.complex128 if key[3] == torch.float64 else torch.complex64
        self._tables[key] = (found[0].to(device, wide), found[1].to(device, wide))
        if len(self._tables) > 512:  # lengths of two references of up to 20 steps, and some
            self._tables.popitem(last=False)
        return self._tables[key]

    def _made(self, layout: Layout, head: int) -> tuple[Tensor, Tensor]:
        parts = head_split(head)
        frames, steps = self.times(layout)
        rows, columns = (torch.arange(size, dtype=torch.float64) for size in layout.grid)
        shape = (len(frames), *layout.grid)
        angles = [
            _angles(frames, parts[0], self.theta).view(-1, 1, 1, parts[0] // 2).expand(*shape, -1),
            _angles(rows, parts[1], self.theta).view(1, -1, 1, parts[1] // 2).expand(*shape, -1),
            _angles(columns, parts[2], self.theta).view(1, 1, -1, parts[2] // 2).expand(*shape, -1),
        ]
        video = torch.cat(angles, dim=-1).flatten(0, 2)
        audio = torch.zeros(len(steps), head // 2, dtype=torch.float64)  # what is no time is left as it is
        audio[:, : parts[0] // 2] = _angles(steps, parts[0], self.theta)
        return _rotation(video), _rotation(audio)


def head_split(head: int) -> tuple[int, int, int]:
    """Numbers of a head that turn with time, height and width: D - 4 floor(D / 6), and 2 floor(D / 6) each.

    Raises:
        ValueError: ``head`` is odd or below 2.

    Examples:
        >>> head_split(128), head_split(16)
        ((44, 42, 42), (8, 4, 4))
    """
    if head < 2 or head % 2:
        raise ValueError(f"the numbers of a head turn in pairs, so there must be an even number of them, got {head}")
    side = 2 * (head // 6)
    return head - 2 * side, side, side


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of numbers of each head by the angles of each token.

    Args:
        x: (B, tokens, heads, D).
        table: (tokens, 1, D / 2) complex, see :meth:`SynRoPE.tables`.

    Returns:
        The same shape and type; norms stay.

    Examples:
        >>> quarter = torch.polar(torch.ones(1, 1, 1), torch.full((1, 1, 1), torch.pi / 2))
        >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), quarter).round().tolist()
        [[[[-0.0, 1.0]]]]
    """
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def affinity(query: Tensor, keys: Tensor, *, numbers: int, theta: float = THETA) -> Tensor:
    """How well a position sees others where the contents are equal: mean over keys and frequencies of cos((p - q) w).

    Args:
        query: scalar position p, in frames.
        keys: (n,) positions q.
        numbers: of a head that turn with time.
        theta: base of the frequencies.

    Returns:
        Scalar, 1 where all stand at p.

    Examples:
        >>> float(affinity(torch.tensor(3.0), torch.tensor([3.0]), numbers=8))
        1.0
    """
    return _angles((query - keys).to(torch.float64), numbers, theta).cos().mean()


def _places(persons: tuple[int, ...]) -> list[int]:
    """For each picture how many of the same person stand before it."""
    seen: Counter[int] = Counter()
    places = []
    for person in persons:
        places.append(seen[person])
        seen[person] += 1
    return places


@lru_cache(maxsize=64)
def _frequencies(numbers: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, numbers, 2, dtype=torch.float64) / numbers)


def _angles(positions: Tensor, numbers: int, theta: float) -> Tensor:
    return positions.to(torch.float64).unsqueeze(-1) * _frequencies(numbers, theta)


def _rotation(angles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
