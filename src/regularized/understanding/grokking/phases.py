"""Phases of a training: when the labels were memorised, when the rule was grokked, when the noise was dropped.

    Doshi, Das, He, Gromov, "To grok or not to grok", 2023, arXiv 2310.13061. The names of the phases are the paper's;
    it tells them apart by its plots, so the limits are ours and arguments here.

A training log is a list of records with ``step``, ``train``, ``test`` and, where labels are corrupted, ``memorized``,
all shares in [0, 1]: what :class:`~regularized.understanding.grokking.MemorizationProbe` returns, and what
``Trainer.history`` holds with it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from regularized.mechanisms.ranges import allowed, count

__all__ = ["Phase", "TrainingPhases", "detect_phases", "phase_of"]

_MARGIN = 0.02  # a state is left only this far beyond the limit at which it was entered


class Phase(StrEnum):
    """What a network does on training data, on corrupted labels, and on test data.

    Raises:
        ValueError: there is no phase of that name.

    Examples:
        >>> Phase("coexistence").corrupted_labels_kept
        True
    """

    CONFUSION = "confusion"
    """It fits neither: too few data, or too early."""
    MEMORIZATION = "memorization"
    """It fits the training labels, and fails on the test."""
    TRANSITION = "transition"
    """Test accuracy is between low and high."""
    GENERALIZATION = "generalization"
    """Test accuracy is high, and no label was corrupted."""
    COEXISTENCE = "coexistence"
    """It fits the corrupted labels, and has learned the rule at the same time."""
    PARTIAL_INVERSION = "partial inversion"
    """It has learned the rule and dropped part of the corrupted labels."""
    FULL_INVERSION = "full inversion"
    """It has learned the rule, and answers by the rule where the label was corrupted."""
    FORGETTING = "forgetting"
    """It had learned the rule, and has lost it again: too much weight decay."""

    @property
    def corrupted_labels_kept(self) -> bool:
        """Whether the corrupted labels are still fitted in this phase."""
        return self in (Phase.MEMORIZATION, Phase.COEXISTENCE)


def phase_of(
    train: float,
    test: float,
    memorized: float = math.nan,
    *,
    chance: float = 0.0,
    high: float = 0.95,
    low: float = 0.5,
    generalized_before: bool = False,
) -> Phase:
    """The phase of a network from its accuracies.

    Args:
        train: accuracy on the training labels as given, in [0, 1].
        test: accuracy on the test.
        memorized: share of the corrupted labels that is reproduced; nan: no label is corrupted.
        chance: share of the corrupted labels that is right by chance, 1/p.
        high: from here on accuracy counts as high; default 0.95 (ours).
        low: up to here it counts as low; default 0.5 (ours).
        generalized_before: test accuracy was high once: then low accuracies are forgetting, not confusion.

    Raises:
        ValueError: an accuracy or a limit outside [0, 1], or ``low`` is not below ``high``.

    Examples:
        >>> phase_of(train=0.65, test=1.0, memorized=0.01, chance=1 / 97)
        <Phase.FULL_INVERSION: 'full inversion'>
        >>> phase_of(train=1.0, test=0.1, memorized=1.0)
        <Phase.MEMORIZATION: 'memorization'>
    """
    _check({"train": train, "test": test, "memorized": 0.0 if math.isnan(memorized) else memorized}, high, low)
    return _phase(
        train >= high,
        test >= high,
        test <= low,
        memorized <= _dropped(chance),
        corrupted=not math.isnan(memorized),
        before=generalized_before,
    )


def _dropped(chance: float) -> float:
    return 0.05 + chance  # of the corrupted labels, besides those that are right by chance


def _phase(fits: bool, knows: bool, fails: bool, dropped: bool, *, corrupted: bool, before: bool) -> Phase:
    if knows:
        if not corrupted:
            return Phase.GENERALIZATION
        if dropped:
            return Phase.FULL_INVERSION
        return Phase.COEXISTENCE if fits else Phase.PARTIAL_INVERSION
    if not fails:
        return Phase.TRANSITION
    if fits:
        return Phase.MEMORIZATION
    return Phase.FORGETTING if before else Phase.CONFUSION


@dataclass(frozen=True, slots=True)
class TrainingPhases:
    """The phases of a training, in their order, and when what was learned.

    Args:
        phases: phase and the step at which it begins.
        last: the last step of the log.
        fitted_at: step at which training accuracy became high and stayed; None: never.
        generalized_at: the same of test accuracy.
        dropped_at: step at which the corrupted labels were dropped after the rule was learned; None: never.

    Raises:
        AttributeError: it is changed.

    Examples:
        >>> log = [{"step": s, "train": min(1, s / 10), "test": float(s > 50)} for s in range(100)]
        >>> found = detect_phases(log)
        >>> [(phase.value, step) for phase, step in found.phases], found.delay
        ([('confusion', 0), ('memorization', 10), ('generalization', 51)], 41)
    """

    phases: tuple[tuple[Phase, float], ...]
    last: float
    fitted_at: float | None
    generalized_at: float | None
    dropped_at: float | None

    @property
    def delay(self) -> float | None:
        """Grokking delay: steps from high training accuracy to high test accuracy; negative if the test came first.

        None where one of them never became high.
        """
        if self.fitted_at is None or self.generalized_at is None:
            return None
        return self.generalized_at - self.fitted_at

    @property
    def final(self) -> Phase:
        """The phase at the end."""
        return self.phases[-1][0]

    def spans(self) -> list[tuple[Phase, float, float]]:
        """Phase, first step and end of each."""
        ends = [step for _, step in self.phases[1:]] + [self.last]
        return [(phase, start, end) for (phase, start), end in zip(self.phases, ends, strict=True)]


@allowed(patience=count(1))
def detect_phases(
    log: Iterable[Mapping[str, float]],
    *,
    chance: float = 0.0,
    high: float = 0.95,
    low: float = 0.5,
    patience: int = 3,
) -> TrainingPhases:
    """Phases of a whole training, from its log.

    A limit must be passed for ``patience`` records in a row, and is left again only ``0.02`` beyond it, likewise for
    ``patience`` records: spikes and chatter around a limit make no phase. A change is dated at its first record. The
    log starts in the first state that lasts.

    Args:
        log: records in the order of their steps, with ``step``, ``train``, ``test`` and perhaps ``memorized``; other
            keys are ignored.
        chance: see :func:`phase_of`; 1/p.
        high: see :func:`phase_of`.
        low: see :func:`phase_of`.
        patience: records that a change must last, >= 1; default 3. With 1 every record counts by itself.

    Raises:
        ValueError: the log is empty, a key is missing, steps do not grow, or an accuracy is outside [0, 1].

    Examples:
        >>> tests = [0.2] * 6 + [0.99] * 4
        >>> log = [{"step": 10 * k, "train": 1.0, "test": a, "memorized": 1.0} for k, a in enumerate(tests)]
        >>> log[1]["test"] = 1.0                                              # one lucky record is no grokking
        >>> detect_phases(log, chance=1 / 53).phases
        ((<Phase.MEMORIZATION: 'memorization'>, 0), (<Phase.COEXISTENCE: 'coexistence'>, 60))
    """
    records = list(log)
    if not records:
        raise ValueError("the log is empty; keep {'step': step, **probe(model)} every few steps")
    for record in records:
        if missing := {"step", "train", "test"} - set(record):
            raise ValueError(f"a record of the log lacks {sorted(missing)}; it has {sorted(record)}")
        _check({name: record[name] for name in ("train", "test")}, high, low)
    steps = [record["step"] for record in records]
    if any(b <= a for a, b in pairwise(steps)):
        raise ValueError("the steps of the log must grow from record to record")
    memorized = [record.get("memorized", math.nan) for record in records]
    corrupted = not any(math.isnan(share) for share in memorized)

    fits = _settled([record["train"] for record in records], high, patience)
    knows = _settled([record["test"] for record in records], high, patience)
    fails = _settled([-record["test"] for record in records], -low, patience)
    dropped = _settled([-share for share in memorized], -_dropped(chance), patience)

    phases: list[tuple[Phase, float]] = []
    before = False
    for k, step in enumerate(steps):
        phase = _phase(fits[k], knows[k], fails[k], dropped[k], corrupted=corrupted, before=before)
        before = before or knows[k]
        if not phases or phase is not phases[-1][0]:
            phases.append((phase, step))
    inverted = [corrupted and a and b for a, b in zip(knows, dropped, strict=True)]
    fitted_at, generalized_at, dropped_at = (
        steps[flags.index(True)] if True in flags else None for flags in (fits, knows, inverted)
    )
    return TrainingPhases(tuple(phases), steps[-1], fitted_at, generalized_at, dropped_at)


def _settled(values: Sequence[float], limit: float, patience: int) -> list[bool]:
    """Whether values are at or above a limit, with a margin on the way back, changes of short duration left out."""
    raw: list[bool] = []
    for value in values:
        held = bool(raw) and raw[-1]
        raw.append(value >= (limit - _MARGIN if held else limit))
    settled: list[bool] = []
    # A log starts in the first state that lasts, so that a spike at its beginning is none either.
    state = next((raw[k] for k in range(len(raw)) if _lasts(raw, k, patience)), raw[0])
    for k, flag in enumerate(raw):
        if flag != state and _lasts(raw, k, patience):
            state = flag
        settled.append(state)
    return settled


def _lasts(flags: Sequence[bool], k: int, patience: int) -> bool:
    return k + patience <= len(flags) and all(flag == flags[k] for flag in flags[k : k + patience])


def _check(accuracies: Mapping[str, float], high: float, low: float) -> None:
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"limits must be 0 <= low < high <= 1, got low={low}, high={high}")
    for name, value in accuracies.items():
        if not 0.0 <= value <= 1.0:
            hint = "; divide per cents by 100" if 1.0 < value <= 100.0 else ""
            raise ValueError(f"{name} must be an accuracy in [0, 1], got {value}{hint}")
