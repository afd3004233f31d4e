"""Structured captions: whoever is in the clip has an anchor, <sub1>, <sub2>, ..., in every field.

The released files wrap four fields in tags, and the times of speech behind them. What the model is given has neither
tags, nor times, nor the field that describes the sound: both streams get the same text. Words that are spoken stand
between <S> and <E>; the first person who is named since the last speech says them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Line", "StructuredCaption", "model_text"]

_ANCHOR = re.compile(r"<sub(\d+)>")
_IMAGE = re.compile(r"<img(\d+)>")
_MARK = re.compile(r"<S>|<E>")
_FIELDS = {
    "images": "IMAGE_CAPTIONS",
    "video": "VISUAL_DESCRIPTION",
    "audio": "AUDIO_DESCRIPTION",
    "joint": "CO_ANALYSIS",
}


class Line(NamedTuple):
    """Something that is said.

    Attributes:
        person: number of the anchor.
        words: what he says.
    """

    person: int
    words: str


def model_text(caption: str) -> str:
    """What the model is given of a caption: the times and the description of the sound, all tags, and empty lines go.

    Args:
        caption: with tags or without.

    Examples:
        >>> times = "[SPEAKER_TIMESTAMPS_START]{}[SPEAKER_TIMESTAMPS_END]"
        >>> model_text(f"[CO_ANALYSIS_START]\\n<sub1> says, <S>Yes.<E>\\n[CO_ANALYSIS_END]\\n\\n{times}")
        '<sub1> says, <S>Yes.<E>'
    """
    for block in ("SPEAKER_TIMESTAMPS", "AUDIO_DESCRIPTION"):
        caption = re.sub(rf"\[{block}_START\].*?\[{block}_END\]", "", caption, flags=re.DOTALL)
    caption = re.sub(r"\[[A-Z_]+\]", "", caption.strip())
    return re.sub(r"\n\s*\n", "\n", caption).strip()


@dataclass(frozen=True, slots=True)
class StructuredCaption:
    """The four fields.

    Args:
        images: for each reference picture what it shows, ``"a woman with black hair, identified as <sub1>"``.
        video: scene, appearance and actions.
        audio: what is heard; not given to the model.
        joint: what happens and is said together: ``"<sub1> turns and says, <S>Well?<E>"``.

    Raises:
        ValueError: <S> and <E> do not pair, somebody speaks who is not named, or a picture names nobody or several.

    Examples:
        >>> caption = StructuredCaption(
        ...     images=["A man, identified as <sub1>.", "A painting, identified as <sub2>."],
        ...     video="<sub1> is on the left, <sub2> on the right.",
        ...     audio="Water.",
        ...     joint="<sub1> looks at <sub2> and says, <S>Well?<E> <sub2> replies, <S>Well.<E>",
        ... )
        >>> caption.lines()
        [Line(person=1, words='Well?'), Line(person=2, words='Well.')]
        >>> caption.check(pictures=2, voices=2)
        >>> print(model_text(caption.text()))
        <img1>: A man, identified as <sub1>.
        <img2>: A painting, identified as <sub2>.
        <sub1> is on the left, <sub2> on the right.
        <sub1> looks at <sub2> and says, <S>Well?<E> <sub2> replies, <S>Well.<E>
    """

    images: Sequence[str]
    video: str
    audio: str
    joint: str

    def __post_init__(self) -> None:
        for number, text in enumerate(self.images, start=1):
            if len(named := _anchors(text)) != 1:
                raise ValueError(
                    f"the caption of picture {number} must name one person by an anchor, it names "
                    f"{sorted(named) or 'nobody'}: {text!r}; write '..., identified as <sub{number}>'"
                )
        self.lines()

    @property
    def persons(self) -> set[int]:
        """Numbers of the anchors that occur anywhere."""
        return _anchors(" ".join((*self.images, self.video, self.audio, self.joint)))

    def lines(self) -> list[Line]:
        """Who says what, in order."""
        found, start, begun = [], 0, None
        for mark in _MARK.finditer(self.joint):
            if (mark[0] == "<S>") != (begun is None):
                raise ValueError(
                    f"<S> and <E> must take turns, but {mark[0]} at character {mark.start()} of the joint caption has "
                    f"no partner: {self.joint!r}"
                )
            if begun is None:
                begun = mark.end()
                named = _ANCHOR.search(self.joint, start, mark.start())
                if named is None:
                    raise ValueError(
                        f"speech without owner: nobody is named between characters {start} and {mark.start()} of the "
                        f"joint caption, in front of <S>: {self.joint!r}; write '<sub1> says, <S>...<E>'"
                    )
                person = int(named[1])
            else:
                found.append(Line(person, self.joint[begun : mark.start()]))
                begun, start = None, mark.end()
        if begun is not None:
            raise ValueError(f"<S> at character {begun - 3} of the joint caption has no <E>: {self.joint!r}")
        return found

    def check(self, *, pictures: int, voices: int | None = None) -> None:
        """Compare the anchors with the references that are there.

        Args:
            pictures: reference pictures; there must be a caption for each.
            voices: reference voices, one a person; None where the sound is given (RA2V).

        Raises:
            ValueError: numbers differ, an anchor has no picture, or a person of a picture is never told about.
        """
        shown = set().union(*(_anchors(text) for text in self.images))
        told = _anchors(" ".join((self.video, self.audio, self.joint)))
        if len(self.images) != pictures:
            raise ValueError(f"the caption describes {len(self.images)} pictures, but {pictures} are given")
        if voices is not None and voices != len(shown):
            raise ValueError(f"the pictures show {len(shown)} persons {_names(shown)}, but {voices} voices are given")
        if missing := told - shown:
            raise ValueError(f"{_names(missing)} in the caption, but no picture shows them; add it, or leave them out")
        if idle := shown - told:
            raise ValueError(f"pictures show {_names(idle)}, but the caption does not tell what they do")

    def text(self) -> str:
        """The whole caption with its tags, as the released files have it."""
        images = "\n".join(f"<img{number}>: {text}" for number, text in enumerate(self.images, start=1))
        fields = {"images": images, "video": self.video, "audio": self.audio, "joint": self.joint}
        return "\n\n".join(f"[{tag}_START]\n{fields[name]}\n[{tag}_END]" for name, tag in _FIELDS.items())

    @classmethod
    def parse(cls, text: str) -> "StructuredCaption":
        """Read a caption with tags.

        Raises:
            ValueError: a field is missing, or what the constructor refuses.
        """
        fields = {}
        for name, tag in _FIELDS.items():
            match = re.search(rf"\[{tag}_START\](.*?)\[{tag}_END\]", text, flags=re.DOTALL)
            if match is None:
                raise ValueError(f"the caption has no [{tag}_START] ... [{tag}_END]")
            fields[name] = match[1].strip()
        images = [line.partition(":")[2].strip() for line in fields.pop("images").splitlines() if _IMAGE.match(line)]
        return cls(images, **fields)


def _anchors(text: str) -> set[int]:
    return {int(number) for number in _ANCHOR.findall(text)}


def _names(persons: set[int]) -> str:
    return ", ".join(f"<sub{person}>" for person in sorted(persons))
