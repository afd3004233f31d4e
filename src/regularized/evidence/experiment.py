"""The form of an experiment: what ``papers/<slug>/experiment.py`` offers and what a run gives back.

An experiment is a plain module with::

    DEFAULTS = {"lr": 0.1, "strength": 0.0, ...}     every setting that an arm may change, with its value
    SCALES = {"smoke": {...}, "laptop": {...}, "paper": {...}}
    ARMS = {"plain": {}, "ours": {"strength": 3.0}}  what each arm changes, baselines first

    def run(settings, seed) -> Measurements          train and measure; knows neither arm nor scale
    def about(settings) -> About                     data and model in words and numbers, without loading them

and, where they are needed::

    PUBLISHED = {"paper": {"ours": {"lr": 0.02}}}    what is published for an arm at a scale, in place of what we chose
    SEEDS = Seeds(10, first=100, why="...")          default ten seeds from 0
    TUNING = Tuning(...)                             how settings were chosen: the same number of trials for each arm
    UNREPEATABLE = {"seconds"}                       metrics that differ from run to run, such as times
    DISPLAY = {"show"}                               settings that decide what is drawn, and no number
    PACKAGES = {"peft": "peft"}                      packages that a run imports, with the extra that installs each

There is one rule for settings, :func:`resolve`: ``DEFAULTS < SCALES[scale] < ARMS[arm] < PUBLISHED[scale][arm] <
overrides``, each winning over what stands before it. ``run`` gets the result, and the result is what is stored, shown
and compared. A run is known by the code that ``run`` can reach and by its resolved settings, so that choosing the
settings of one arm, or adding an arm, leaves the other arms' runs alone. For that, ``run`` must read nothing of the
tables above: what it needs, it finds in ``settings``.

It trains and measures; statistics, plots, verdicts and storage are done elsewhere, from all seeds.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.claims import Claim
from regularized.evidence.store import canonical

__all__ = [
    "About",
    "Audible",
    "Illustrated",
    "Measurements",
    "Seeds",
    "Tuning",
    "Unavailable",
    "block_of",
    "data_fingerprint",
    "describe_arms",
    "resolve",
    "run_arm",
    "seeds_of",
    "unchanged",
    "undeclared_differences",
    "unrepeatable",
]

MINIMUM = {"samples": 5_000, "weights": 100_000}
"""Data or a model below this is called a toy where the paper's has far more."""

_FAR_MORE = 10


class Unavailable(RuntimeError):
    """A scale cannot run here; the message says which data, package or hardware is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What one run of one arm with one seed measured.

    Args:
        metrics: final numbers by name.
        curves: learning curves by name, as (x, y) points; x in ``curve_unit``.
        data: fingerprint of the data that was used, see :func:`data_fingerprint`.
        curve_unit: what the x of the curves counts; default epochs.
    """

    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    data: str = ""
    curve_unit: str = "epoch"


@dataclass(frozen=True, slots=True)
class Illustrated(Measurements):
    """Measurements with pictures, which ``reproduce`` saves beside its report; the ledger does not hold them.

    Args:
        images: (H, W) grey or (H, W, 3) colour by name, values in [0, 1].
    """

    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Audible(Illustrated):
    """Measurements with sounds, too, which ``reproduce`` saves beside its report; the ledger does not hold them.

    Args:
        sounds: (n,) samples at 16 kHz by name, in [-1, 1].
    """

    sounds: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """What an arm is measured on.

    Args:
        data: in a few words, with the number of training samples: ``"2,000 Fashion-MNIST images"``.
        samples: training samples.
        model: in a few words: ``"small ResNet, 110k weights"``.
        weights: trained weights and those of a frozen base.
        resplit: 0 (default) where each seed has data of its own (synthetic, or disjoint parts of a large set). Where
            each seed splits one small pool again, the size of the test set over that of the training set: seeds are
            then less independent than they look, and intervals are widened accordingly.

    Examples:
        >>> About("1,200 digits of 8x8 pixels", 1200, "MLP, 85k weights", 85_000, resplit=597 / 1200).sampling
        'resplit'
    """

    data: str
    samples: int
    model: str
    weights: int
    resplit: float = 0.0

    @property
    def sampling(self) -> str:
        """``"fresh"`` or ``"resplit"``."""
        return "resplit" if self.resplit else "fresh"

    def is_toy_beside(self, paper: "About | None") -> bool:
        """Whether data or model are small where the paper's are at least ten times larger.

        Args:
            paper: what the paper measures on; None when that cannot be said, and then size alone decides.
        """
        for name, least in MINIMUM.items():
            ours = getattr(self, name)
            if ours < least and (paper is None or getattr(paper, name) >= _FAR_MORE * ours):
                return True
        return False

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it, with ``sampling``."""
        return {**asdict(self), "sampling": self.sampling}


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of the evidence, declared before the first run: no more and no fewer are judged.

    Args:
        count: how many; default 10, the fewest that give a verdict.
        first: the first of them; default 0. Another block, such as 100, where code, arms, thresholds or grids were
            changed after results had been seen.
        why: why another block or another number than the default; shown with the verdicts.
        share: of a large set that each ten seeds deal out anew, what one seed gets: so much two seeds of different
            tens have in common by chance, and intervals are wider for it. Default 0: synthetic data, or ten seeds.

    Examples:
        >>> Seeds(first=100, why="The control got the method's strength.").numbers
        (100, 101, 102, 103, 104, 105, 106, 107, 108, 109)
    """

    count: int = 10
    first: int = 0
    why: str = ""
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0:
            raise ValueError(f"seeds are counted from 0 and at least 1 is needed, got {self.count} from {self.first}")
        if self.first and not self.why:
            raise ValueError(f"say why the seeds start at {self.first}: what was changed after results had been seen?")
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"share is that of one seed in the data, from 0 to below 1, got {self.share}")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.first, self.first + self.count))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the hyperparameters of the arms were chosen: the same budget and the same criterion for each.

    Args:
        metric: metric that decides, measured on data that a user would have (noisy validation labels, say), not the
            test set.
        direction: ``"higher"`` or ``"lower"``.
        grids: for each arm the overrides that were tried; equally many for every arm, the chosen one among them.
        scale: scale of the trials; default ``"laptop"``.
        seeds: at least two seeds, disjoint from those of the evidence.
    """

    metric: str
    direction: str
    grids: Mapping[str, Sequence[Mapping[str, Any]]]
    scale: str = "laptop"
    seeds: tuple[int, ...] = (1000, 1001)

    def __post_init__(self) -> None:
        budgets = {arm: len(grid) for arm, grid in self.grids.items()}
        if len(set(budgets.values())) > 1:
            raise ValueError(f"every arm must get the same tuning budget, got trials {budgets}")
        if len(self.seeds) < 2:
            raise ValueError(f"settings are chosen on at least two seeds, got {list(self.seeds)}")

    def values(self, arm: str, name: str) -> set[str]:
        """The values of one setting that were tried for an arm, as text; empty where it was not tuned."""
        return {canonical({name: tried[name]}) for tried in self.grids.get(arm, ()) if name in tried}


def resolve(experiment: ModuleType, arm: str, scale: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What an arm runs with at a scale: ``DEFAULTS < SCALES[scale] < ARMS[arm] < PUBLISHED[scale][arm] < overrides``.

    Args:
        experiment: the module.
        arm: one of its arms.
        scale: one of its scales.
        overrides: settings that win over all others, in tuning; default none.

    Raises:
        ValueError: there is no such arm or scale, or a setting that neither ``DEFAULTS`` nor the scale knows is given:
            a misspelt one would change nothing.
    """
    name = experiment.__name__
    for what, table in ((arm, experiment.ARMS), (scale, experiment.SCALES)):
        if what not in table:
            raise ValueError(f"{name} has no {what!r}; it has {list(table)}")
    settings = {**experiment.DEFAULTS, **experiment.SCALES[scale]}
    published = getattr(experiment, "PUBLISHED", {}).get(scale, {}).get(arm, {})
    for given in (experiment.ARMS[arm], published, overrides or {}):
        if unknown := sorted(set(given) - set(settings)):
            raise ValueError(
                f"{name}: arm {arm!r} sets {unknown}, which has no default; add it to DEFAULTS, or is it misspelt? "
                f"There are {sorted(settings)}"
            )
        settings |= given
    return settings


def unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether no setting of an arm has another value.

    A setting that is new, or gone, is a change of code: what it does, or that it does nothing, a repetition shows.

    Args:
        before: what the arm ran with.
        now: what it would run with.
    """
    both = before.keys() & now.keys()
    return canonical({name: before[name] for name in both}) == canonical({name: now[name] for name in both})


def run_arm(experiment: ModuleType, arm: str, seed: int, scale: str, **overrides: Any) -> Measurements:
    """Run an arm by its name, here and now: for a notebook, or a test. Nothing is stored.

    Args:
        experiment: the module.
        arm: one of its arms.
        seed: the seed.
        scale: one of its scales.
        overrides: settings that win over all others.
    """
    measured: Measurements = experiment.run(resolve(experiment, arm, scale, overrides), seed)
    return measured


def seeds_of(experiment: ModuleType) -> Seeds:
    """The seeds that an experiment declares; ten from 0 where it says nothing."""
    declared: Seeds = getattr(experiment, "SEEDS", Seeds())
    return declared


_BLOCKS = range(0, 1000, 100)


def block_of(experiment: ModuleType, first: int | None) -> Seeds:
    """A block of seeds for another attempt: as many as the experiment declares, so that nobody adds some after a look.

    Args:
        experiment: the module.
        first: its first seed: the one that the experiment declares, as does None, or 0, 100, ..., 900. Data sets deal
            out their rows anew for each such block, and a start of anybody's choice would leave many blocks to choose
            from.

    Raises:
        ValueError: there is no such block, or its seeds were used to choose the settings.

    Examples:
        >>> from types import SimpleNamespace
        >>> block_of(SimpleNamespace(SEEDS=Seeds()), 300).numbers[-1]
        309
    """
    declared = seeds_of(experiment)
    if first is None or first == declared.first:
        return declared
    if first not in _BLOCKS:
        raise ValueError(
            f"a block of seeds starts at {declared.first}, as declared, or at one of {[*_BLOCKS]}; got {first!r}"
        )
    block = replace(declared, first=first, why="Another attempt, on seeds of its own.")
    tuning: Tuning | None = getattr(experiment, "TUNING", None)
    if tuning is not None and (both := sorted(set(block.numbers) & set(tuning.seeds))):
        raise ValueError(f"seeds {both} were used to choose the settings and cannot be evidence: take another block")
    return block


def describe_arms(experiment: ModuleType, scale: str) -> dict[str, dict[str, Any]]:
    """For each arm what it is measured on, and whether that is a ``toy`` beside what the paper has."""
    told = {}
    share = seeds_of(experiment).share
    for arm in experiment.ARMS:
        here: About = experiment.about(resolve(experiment, arm, scale))
        paper = experiment.about(resolve(experiment, arm, "paper")) if "paper" in experiment.SCALES else None
        told[arm] = here.to_dict() | {"toy": here.is_toy_beside(paper)} | ({"share": share} if share else {})
    return told


def undeclared_differences(experiment: ModuleType, claim: Claim, *, scale: str = "laptop") -> list[str]:
    """Settings in which the arms of a claim differ although the claim does not say so.

    A claim's ``differs`` names the idea. Besides, a setting may differ that was tuned in both arms over equal grids.
    Everything else is a comparison of something else than what the claim says.

    Args:
        experiment: the module.
        claim: one of its card's claims.
        scale: where to look; default ``"laptop"``.

    Returns:
        The names, sorted; empty when the claim is what it says.
    """
    one, other = (resolve(experiment, arm, scale) for arm in (claim.baseline, claim.method))
    drawn: Set[str] = getattr(experiment, "DISPLAY", frozenset())
    differing = {name for name in one if canonical({name: one[name]}) != canonical({name: other[name]})} - drawn
    tuning: Tuning | None = getattr(experiment, "TUNING", None)

    def tuned_alike(name: str) -> bool:
        tried = tuning.values(claim.baseline, name) if tuning else set()
        return len(tried) > 1 and tuning is not None and tried == tuning.values(claim.method, name)

    return sorted(name for name in differing - set(claim.differs) if not tuned_alike(name))


def unrepeatable(experiment: ModuleType) -> Set[str]:
    """Metrics and curves that differ from run to run, such as times."""
    names: Set[str] = getattr(experiment, "UNREPEATABLE", frozenset())
    return names


def data_fingerprint(*arrays: NDArray[Any]) -> str:
    """Short hash of the content, type and shape of arrays.

    Examples:
        >>> data_fingerprint(np.zeros(3)) == data_fingerprint(np.zeros(3)) != data_fingerprint(np.zeros(4))
        True
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
