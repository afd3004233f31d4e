"""Guidance by text and by references: the paper's formula and the released code's, which differ.

With v(T, S) the velocity given text T and the stream's own references S (pictures for the video, voices for the audio):

    paper, Eq. 5   v(0, 0)   + w_T (v(T, 0) - v(0, 0))   + w_S (v(T, S) - v(T, 0))
    code           v(neg, S) + w_T (v(T, S) - v(neg, S)) + w_S (v(T, S) - v(T, 0))

In the paper weights of one give v(T, S); in the code that is w_T = 1, w_S = 0. A dropped text is a text of its own
(``neg``, in the code a caption of what is not wanted); dropped references are zeros that stay in the sequence.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from regularized.mechanisms.ranges import Choice, finite

__all__ = ["Guidance", "code_guidance", "paper_guidance"]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Weights of the guidance for both streams.

    Args:
        text: w_T of the video and of the audio; default 3 and 4 (released code).
        ref: w_S of the video and of the audio; default 1.5 and 2 (released code).
        formula: ``"code"`` (default, what the released weights are run with) or ``"paper"``.

    Raises:
        ValueError: a weight that is not finite, or an unknown formula.

    Examples:
        >>> Guidance.off().needed
        ('full',)
        >>> Guidance().needed
        ('full', 'no_text', 'no_pictures', 'no_voices')
        >>> Guidance(formula="paper").needed
        ('full', 'no_references', 'nothing')
    """

    text: tuple[float, float] = (3.0, 4.0)
    ref: tuple[float, float] = (1.5, 2.0)
    formula: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        Choice("code", "paper")("formula", self.formula)
        for name in ("text", "ref"):
            for stream, weight in zip(("video", "audio"), getattr(self, name)):
                finite(f"the weight of the {stream}")(name, weight)

    @classmethod
    def off(cls) -> "Guidance":
        """The conditional prediction alone, one forward pass a step."""
        return cls(text=(1.0, 1.0), ref=(0.0, 0.0), formula="code")

    @property
    def needed(self) -> tuple[str, ...]:
        """The forward passes of a step: what is left out in each."""
        if self.formula == "paper":
            if (self.text, self.ref) == ((1.0, 1.0), (1.0, 1.0)):
                return ("full",)
            return ("full", "no_references", "nothing")
        names = ["full"]
        if self.text != (1.0, 1.0):
            names.append("no_text")
        if self.ref != (0.0, 0.0):
            names += ["no_pictures", "no_voices"]
        return tuple(names)


def paper_guidance(nothing: Tensor, text: Tensor, full: Tensor, *, w_text: float, w_ref: float) -> Tensor:
    """Eq. 5 of the paper, for one stream.

    Args:
        nothing: v(0, 0).
        text: v(T, 0).
        full: v(T, S).
        w_text: w_T.
        w_ref: w_S.

    Returns:
        The guided velocity, of the same shape.

    Examples:
        >>> from torch import tensor
        >>> float(paper_guidance(tensor(1.0), tensor(2.0), tensor(4.0), w_text=3.0, w_ref=1.5))
        7.0
    """
    return nothing + w_text * (text - nothing) + w_ref * (full - text)


def code_guidance(full: Tensor, no_text: Tensor, no_ref: Tensor, *, w_text: float, w_ref: float) -> Tensor:
    """The released code's combination, for one stream.

    Args:
        full: v(T, S).
        no_text: v(neg, S).
        no_ref: v(T, S = zeros).
        w_text: w_T.
        w_ref: w_S.

    Returns:
        The guided velocity, of the same shape.

    Examples:
        >>> from torch import tensor
        >>> float(code_guidance(tensor(4.0), tensor(1.0), tensor(2.0), w_text=1.0, w_ref=0.0))
        4.0
    """
    return no_text + w_text * (full - no_text) + w_ref * (full - no_ref)
