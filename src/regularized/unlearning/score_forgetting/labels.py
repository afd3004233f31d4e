"""Which labels a step draws: kept ones, the forgotten one, and what stands in for it. No data are needed.

The authors take labels from a loader over the remaining real images, of which nothing else is used. Their random
stand-in is written for ten classes and replaces the forgotten label by 9; here it is any kept class.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regularized.mechanisms.ranges import between, count

__all__ = ["LabelSampler"]


class LabelSampler:
    """Draws labels for a distillation that forgets one class, or none.

    Args:
        num_classes: C; labels are 0 ... C - 1.
        forget: c_f, the class to forget; None for none.
        override: c_o, the class whose samples its prompt shall give; None draws a kept one for each sample.
        frequencies: (C,) how often each class is drawn among the kept ones, not negative; they need not sum to one, and
            that of ``forget`` is not looked at. Default None, all alike.

    Raises:
        ValueError: a label is outside 0 ... C - 1, ``override`` is ``forget``, or stands alone; too few classes are
            left; frequencies do not fit.

    Examples:
        >>> labels = LabelSampler(4, forget=0, override=1)
        >>> sorted(set(labels.kept(100, torch.Generator().manual_seed(0)).tolist()))
        [1, 2, 3]
        >>> labels.stand_in(3, torch.Generator()).tolist()
        [1, 1, 1]
    """

    def __init__(
        self,
        num_classes: int,
        *,
        forget: int | None,
        override: int | None = None,
        frequencies: Sequence[float] | Tensor | None = None,
    ) -> None:
        count(1)("num_classes", num_classes)
        label = between(0, num_classes - 1, meaning="a label", whole=True)
        label.or_none("plain distillation")("forget", forget)
        label.or_none("a kept class at random")("override", override)
        if override is not None and override == forget:
            raise ValueError(
                f"override must be another class than forget, got {override} for both: nothing would be forgotten"
            )
        if override is not None and forget is None:
            raise ValueError(f"there is nothing to override: got override={override} and forget=None; name the class")
        kept = num_classes - (forget is not None)
        if kept < 1 or (kept == 1 and forget is not None and override is None):
            raise ValueError(
                f"of {num_classes} classes {kept} would be left beside forget={forget}; an override is drawn from two "
                "or more. Name it: override="
            )
        chances = torch.ones(num_classes) if frequencies is None else torch.as_tensor(frequencies).float().cpu().clone()
        if chances.shape != (num_classes,):
            raise ValueError(f"frequencies must be ({num_classes},), one a class, got {tuple(chances.shape)}")
        if forget is not None:
            chances[forget] = 0.0
        if not bool(((chances >= 0) & chances.isfinite()).all()) or not bool(chances.any()):
            raise ValueError(
                f"frequencies must be finite, not negative, and positive for a kept class; got {chances.tolist()}"
            )
        self.num_classes = num_classes
        self.forget = forget
        self.override = override
        self._chances: dict[torch.device, Tensor] = {torch.device("cpu"): chances}

    def kept(self, number: int, generator: torch.Generator) -> Tensor:
        """Labels of kept classes, (number,), on the generator's device."""
        device = generator.device
        if device not in self._chances:
            self._chances[device] = self._chances[torch.device("cpu")].to(device)
        return torch.multinomial(self._chances[device], number, replacement=True, generator=generator)

    def forgotten(self, number: int, generator: torch.Generator) -> Tensor:
        """The label to forget, (number,)."""
        assert self.forget is not None
        return torch.full((number,), self.forget, device=generator.device)

    def stand_in(self, number: int, generator: torch.Generator) -> Tensor:
        """What the teacher is asked for in its place, (number,)."""
        if self.override is None:
            return self.kept(number, generator)
        return torch.full((number,), self.override, device=generator.device)
