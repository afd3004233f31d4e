"""Active self-paced learning (ASPL): for few labels, a large unlabelled pool, and an annotator whose time is costly.

In each round the classifiers score the pool. What they are sure of gets a pseudo-label and a weight, what they are
least sure of is asked of the annotator. Answers are *certified* and stay; pseudo-labels are computed afresh each round
and can be withdrawn. The pace rises slowly and lets harder samples in.

    "Active Self-Paced Learning for Cost-Effective and Progressive Face Identification", IEEE TPAMI, arXiv 1701.03555.
    No official code. The full text was not at hand: objective and closed forms are checked against their
    definition; the query rule, the pace update and the defaults are unconfirmed.

:mod:`regularized.curriculum.active_self_paced.loss` has the symbols, the weights and the labels. Here a pseudo-label
counts only where some class is positive (``no_class_weight=False``), since "none of the classes" is true of most
samples of a growing pool.
"""

import csv
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from regularized.curriculum.active_self_paced.loss import (
    COST,
    WEIGHTING,
    Weighting,
    check_scores,
    one_vs_rest_hinge,
    one_vs_rest_labels,
    self_paced_penalty,
    self_paced_weights,
)
from regularized.curriculum.active_self_paced.oracles import Oracle
from regularized.mechanisms.ranges import allowed, at_least, count

__all__ = ["ActiveSelfPaced", "LabelEvent", "RoundReport", "ambiguity", "disagreement"]

log = logging.getLogger(__name__)

Query: TypeAlias = Callable[[Tensor], Tensor]
Fit: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_STATE = "state"


def ambiguity(scores: Tensor) -> Tensor:
    """How unsure the classifiers are: minus the gap between the two best scores. The default query rule.

    Args:
        scores: (n, m), m >= 2.

    Returns:
        (n,), larger is asked first.

    Examples:
        >>> ambiguity(torch.tensor([[1.0, 0.9], [2.0, -1.0]])).argmax()
        tensor(0)
    """
    best = scores.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


def disagreement(scores: Tensor) -> Tensor:
    """How many classifiers claim a sample beyond one, ties broken by :func:`ambiguity`.

    Args:
        scores: (n, m), m >= 2.

    Returns:
        (n,), larger is asked first.

    Examples:
        >>> disagreement(torch.tensor([[1.0, 0.2], [0.1, -1.0]])).argmax()
        tensor(0)
    """
    gap = ambiguity(scores)
    return (scores > 0).sum(dim=1).clamp(min=1) + 0.5 / (1 - gap)


@dataclass(frozen=True, slots=True)
class LabelEvent:
    """One change of one label: the audit trail is a list of these.

    Args:
        round: round in which it happened, from 0.
        sample: position in the pool.
        label: the class; -1 where a pseudo-label was withdrawn.
        origin: ``"initial"``, ``"oracle"``, ``"corrected"``, ``"pseudo"`` or ``"withdrawn"``.
        weight: weight of a pseudo-label, 1 for a certified one.
    """

    round: int
    sample: int
    label: int
    origin: str
    weight: float


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a round did.

    Args:
        round: its number, from 0.
        asked: samples that the oracle labelled.
        certified: samples with a certified label afterwards.
        pseudo: samples with a pseudo-label of positive weight.
        withdrawn: pseudo-labels of the round before that are gone.
        objective: self-paced objective of the pool, without the classifiers' norm.
    """

    round: int
    asked: tuple[int, ...]
    certified: int
    pseudo: int
    withdrawn: int
    objective: float


class ActiveSelfPaced:
    """Rounds of self-paced pseudo-labelling and active queries over a pool.

    The classifiers are yours: :meth:`run_round` calls ``fit(labels, weights) -> scores``, which trains them on the pool
    with those labels (n, m) and weights (n, m), both float64, and scores the whole pool. Samples of weight 0 can be
    skipped. Or call
    :meth:`assign`, :meth:`ask`, :meth:`certify` and :meth:`step_pace` one by one.

    Args:
        num_samples: n, size of the pool.
        certified: class of each sample that is labelled at the start, by position: ``{position: class}``. Every class
            needs at least one.
        num_classes: m >= 2; grows when the annotator names a new class.
        cost: factor C of the hinge loss; default 1 (unconfirmed).
        pace: lambda at the start, a number or one for each class; default 0.2 (unconfirmed).
        pace_step: alpha; lambda grows by ``alpha * eta`` a round, eta the accuracy of each class; default 0.08
            (unconfirmed).
        pace_rounds: tau; afterwards lambda is constant. Default 12.
        budget: questions in a round; default 10. 0 is plain self-paced learning.
        weighting: ``"linear"`` (default) or ``"hard"``, see
            :func:`~regularized.curriculum.active_self_paced.self_paced_weights`.
        query: ``query(scores) -> (n,)``, larger is asked first; default :func:`ambiguity`.
        inner: alternations of labels, weights and classifiers in a round; default 2.
        no_class_weight: let samples for which no class is positive count as negatives; default False.
        new_classes: accept answers that name the next class, m; default False.

    Attributes:
        certified: (n,) bool.
        labels: (n, m) in {-1, +1}.
        weights: (n, m) in [0, 1]; 1 for certified samples.
        pace: (m,).
        round: rounds done.
        trail: every change of a label, see :class:`LabelEvent`.

    Raises:
        ValueError: a setting is outside its range, or a class has no certified sample.

    Examples:
        >>> x = torch.tensor([[-2.0], [-1.5], [-1.0], [1.0], [1.5], [2.0]]).double()
        >>> def fit(labels, weights):  # weighted least squares, in place of your classifiers
        ...     design = torch.cat([x, torch.ones_like(x)], dim=1)
        ...     columns = []
        ...     for y, w in zip(labels.T, weights.T):
        ...         a = design.T @ (w[:, None] * design) + 1e-3 * torch.eye(2).double()
        ...         columns.append(design @ torch.linalg.solve(a, design.T @ (w * y)))
        ...     return torch.stack(columns, dim=1)
        >>> aspl = ActiveSelfPaced(6, {0: 0, 5: 1}, num_classes=2, pace=1.0, budget=1)
        >>> report = aspl.run_round(fit, oracle=lambda asked: [int(i >= 3) for i in asked])
        >>> report.certified, len(report.asked)
        (3, 1)
    """

    @allowed(
        num_classes=count(2),
        budget=count(0),
        pace_rounds=count(0),
        inner=count(1),
        cost=COST,
        pace_step=at_least(0.0),
        weighting=WEIGHTING,
    )
    def __init__(
        self,
        num_samples: int,
        certified: dict[int, int],
        *,
        num_classes: int,
        cost: float = 1.0,
        pace: float | Sequence[float] = 0.2,
        pace_step: float = 0.08,
        pace_rounds: int = 12,
        budget: int = 10,
        weighting: Weighting = "linear",
        query: Query = ambiguity,
        inner: int = 2,
        no_class_weight: bool = False,
        new_classes: bool = False,
    ) -> None:
        start = torch.as_tensor(pace, dtype=torch.float64).expand(num_classes).clone()
        if not bool((start > 0).all()):
            raise ValueError(f"pace must be positive, got {pace}")
        without = sorted(set(range(num_classes)) - set(certified.values()))
        if without:
            raise ValueError(
                f"no certified sample of class(es) {without}; label at least one of each before the first round"
            )
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.cost = cost
        self.pace = start
        self.first_pace = float(start.mean())
        self.pace_step = pace_step
        self.pace_rounds = pace_rounds
        self.budget = budget
        self.weighting: Weighting = weighting
        self.query = query
        self.inner = inner
        self.no_class_weight = no_class_weight
        self.new_classes = new_classes
        self.round = 0
        self.trail: list[LabelEvent] = []
        self.certified = torch.zeros(num_samples, dtype=torch.bool)
        self.labels = torch.full((num_samples, num_classes), -1.0, dtype=torch.float64)
        self.weights = torch.zeros(num_samples, num_classes, dtype=torch.float64)
        self._pseudo: dict[int, int] = {}
        self._certify(list(certified), list(certified.values()), origin="initial")

    # -- the blocks of the alternation -------------------------------------------------------------

    def assign(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and weights of the pool for given scores; certified samples keep label and weight 1.

        Labels come from the scores with unit weights, since weights of 0 would leave them arbitrary.

        Args:
            scores: (n, m).

        Returns:
            Labels (n, m) in {-1, +1}, and weights (n, m) in [0, 1].

        Raises:
            ValueError: scores of another shape, or not finite.
        """
        check_scores(scores, shape=(self.num_samples, self.num_classes))
        scores = scores.detach().to(device="cpu", dtype=torch.float64)
        free = ~self.certified
        if bool(free.any()):
            labels = one_vs_rest_labels(scores[free])
            losses = one_vs_rest_hinge(scores[free], labels)
            weights = self_paced_weights(losses, self.pace, cost=self.cost, weighting=self.weighting)
            if not self.no_class_weight:
                weights = weights * (labels > 0).any(dim=1, keepdim=True)
            self.labels[free], self.weights[free] = labels, weights
        return self.labels, self.weights

    def ask(self, scores: Tensor) -> list[int]:
        """Positions of the samples to ask about: the ``budget`` most ambiguous of the uncertified ones, best first."""
        check_scores(scores, shape=(self.num_samples, self.num_classes))
        free = torch.nonzero(~self.certified).flatten()
        if self.budget > len(free):
            warnings.warn(
                f"the budget of {self.budget} questions is larger than the {len(free)} samples left; asking all",
                stacklevel=2,
            )
        if not len(free) or not self.budget:
            return []
        order = self.query(scores.detach().cpu()[free]).argsort(descending=True, stable=True)
        return [int(i) for i in free[order[: self.budget]]]

    def certify(self, samples: Sequence[int], labels: Sequence[int]) -> None:
        """Fix the labels of samples as the annotator gave them.

        Raises:
            ValueError: as many labels as samples are needed; a label is out of range; a sample is already certified.
        """
        self._certify(samples, labels, origin="oracle")

    def correct(self, sample: int, label: int) -> None:
        """Change the label of a certified sample (re-certification by the annotator).

        Raises:
            ValueError: the sample is not certified, or the label is out of range.
        """
        if not bool(self.certified[sample]):
            raise ValueError(f"sample {sample} is not certified; use certify")
        self.certified[sample] = False
        self._certify([sample], [label], origin="corrected")

    def step_pace(self, accuracy: Tensor | Sequence[float]) -> None:
        """Raise the pace of each class by ``pace_step`` times its accuracy, while the rounds are below ``pace_rounds``.

        Args:
            accuracy: (m,) in [0, 1].
        """
        eta = torch.as_tensor(accuracy, dtype=torch.float64)
        if eta.shape != (self.num_classes,) or not bool(((eta >= 0) & (eta <= 1)).all()):
            raise ValueError(
                f"accuracy must be {self.num_classes} numbers in [0, 1], one for each class, got {accuracy}"
            )
        if self.round < self.pace_rounds:
            self.pace = self.pace + self.pace_step * eta

    def objective(self, scores: Tensor) -> float:
        """``sum v C l + f(v; lambda)`` of the pool with the present labels and weights; no norm of the classifiers."""
        losses = one_vs_rest_hinge(scores.detach().to(device="cpu", dtype=torch.float64), self.labels)
        penalty = self_paced_penalty(self.weights, self.pace, weighting=self.weighting)
        return float((self.cost * self.weights * losses + penalty).sum())

    # -- a round ------------------------------------------------------------------------------------

    def run_round(self, fit: Fit, *, oracle: Oracle | None = None) -> RoundReport:
        """One round: alternate labels, weights and classifiers, ask, certify, raise the pace.

        An oracle that has no answers yet (:class:`~regularized.curriculum.active_self_paced.oracles.AnswersPending`)
        stops the round before anything is certified; call again when there are answers.

        Args:
            fit: ``fit(labels, weights) -> scores``; weights are ``C v``. In the very first call only certified samples
                have a weight.
            oracle: ``oracle(positions) -> classes``; None asks nobody.

        Returns:
            What happened.
        """
        before = self.labels.clone(), self.weights.clone()
        scores = fit(self.labels.clone(), self.cost * self.weights)
        for _ in range(self.inner):
            labels, weights = self.assign(scores)
            scores = fit(labels.clone(), self.cost * weights)
        asked = self.ask(scores) if oracle is not None else []
        answers: Sequence[int] = []
        if asked and oracle is not None:
            try:
                answers = oracle(asked)
            except BaseException:  # no answers yet, or Ctrl-C: the same round, asked again, must ask the same
                self.labels, self.weights = before
                raise
        withdrawn = self._record_pseudo_labels()
        if asked:
            self.certify(asked, answers)
        accuracy = self._accuracy(scores)
        report = RoundReport(
            round=self.round,
            asked=tuple(asked),
            certified=int(self.certified.sum()),
            pseudo=len(self._pseudo),
            withdrawn=withdrawn,
            objective=self.objective(_widen(scores, self.num_classes)),
        )
        self.step_pace(accuracy)
        self.round += 1
        log.info("%s", report)
        return report

    def pseudo_labels(self) -> dict[int, int]:
        """Class of each uncertified sample with a positive label of positive weight, by position."""
        positive = (self.labels > 0) & (self.weights > 0) & ~self.certified[:, None]
        rows, columns = torch.nonzero(positive, as_tuple=True)
        return dict(zip(rows.tolist(), columns.tolist(), strict=True))

    def classes(self) -> Tensor:
        """(n,) certified class or pseudo-label of each sample, -1 where there is none."""
        best, chosen = self.labels.max(dim=1)
        known = (best > 0) & (self.certified | (self.weights.gather(1, chosen[:, None])[:, 0] > 0))
        return torch.where(known, chosen, torch.full_like(chosen, -1))

    # -- memory -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Labels, weights, pace, round and trail: what :meth:`load_state_dict` needs to go on."""
        return {
            "certified": self.certified,
            "labels": self.labels,
            "weights": self.weights,
            "pace": self.pace,
            "first_pace": self.first_pace,
            "round": self.round,
            "pseudo": sorted(self._pseudo.items()),
            "trail": [asdict(event) for event in self.trail],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the number of classes may have grown since.

        Raises:
            ValueError: the state is of a pool of another size.
        """
        if len(state["certified"]) != self.num_samples:
            raise ValueError(
                f"the state is of a pool of {len(state['certified'])} samples, this one has {self.num_samples}"
            )
        self.certified, self.labels = state["certified"].clone(), state["labels"].clone()
        self.weights, self.pace = state["weights"].clone(), state["pace"].clone()
        self.num_classes = self.labels.shape[1]
        self.first_pace, self.round = float(state["first_pace"]), int(state["round"])
        self._pseudo = {int(sample): int(label) for sample, label in state["pseudo"]}
        self.trail = [LabelEvent(**event) for event in state["trail"]]

    def save(self, folder: Path | str) -> Path:
        """Write the state as safetensors and JSON, atomically; an annotation lasts days, so save after every round."""
        from regularized.training import checkpoint  # safetensors, which nothing else here needs

        final = Path(folder)
        partial = final.with_name(final.name + ".part")
        partial.mkdir(parents=True, exist_ok=True)
        checkpoint.write_part(partial, _STATE, self.state_dict())
        for file in final.glob(f"{_STATE}.*") if final.exists() else ():
            file.replace(file.with_name(file.name + ".old"))
        final.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(final / file.name)
        partial.rmdir()
        for file in final.glob("*.old"):
            file.unlink()
        return final

    def restore(self, folder: Path | str) -> "ActiveSelfPaced":
        """Load what :meth:`save` wrote."""
        from regularized.training import checkpoint

        self.load_state_dict(checkpoint.load(Path(folder), _STATE))
        return self

    def write_trail(self, path: Path | str) -> None:
        """Write the audit trail as CSV: round, sample, label, origin, weight."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(LabelEvent.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(event) for event in self.trail)

    # -- helpers ------------------------------------------------------------------------------------

    def _certify(self, samples: Sequence[int], labels: Sequence[int], *, origin: str) -> None:
        if len(samples) != len(labels):
            raise ValueError(f"{len(labels)} labels came for {len(samples)} samples")
        if len(set(samples)) != len(samples):
            raise ValueError("a sample stands twice in one answer")
        for sample in samples:
            if not 0 <= sample < self.num_samples:
                raise ValueError(f"sample {sample} is outside the pool of {self.num_samples}")
            if bool(self.certified[sample]):
                raise ValueError(f"sample {sample} is already certified; use correct() to change its label")
        grown = self.num_classes
        for sample, label in zip(samples, labels, strict=True):
            grown += int(self.new_classes and label == grown)
            if not 0 <= label < grown:
                hint = "" if self.new_classes else "; set new_classes=True to let classes grow"
                raise ValueError(f"label {label} of sample {sample} is not one of the classes 0 ... {grown - 1}{hint}")
        while self.num_classes < grown:
            self._add_class()
        for sample, label in zip(samples, labels, strict=True):
            self.certified[sample] = True
            self.labels[sample] = -1.0
            self.labels[sample, label] = 1.0
            self.weights[sample] = 1.0
            self._pseudo.pop(int(sample), None)
            self.trail.append(LabelEvent(self.round, int(sample), int(label), origin, 1.0))

    def _add_class(self) -> None:
        """A new classifier with the pace of the start; nobody but certified samples belongs to it yet."""
        self.labels = torch.cat([self.labels, -torch.ones(self.num_samples, 1, dtype=torch.float64)], dim=1)
        new = self.certified.to(torch.float64)[:, None]  # all certified samples are known negatives of it
        self.weights = torch.cat([self.weights, new], dim=1)
        self.pace = torch.cat([self.pace, self.pace.new_tensor([self.first_pace])])
        self.num_classes += 1

    def _record_pseudo_labels(self) -> int:
        now = self.pseudo_labels()
        gone = [sample for sample in self._pseudo if sample not in now]
        for sample in gone:
            self.trail.append(LabelEvent(self.round, sample, -1, "withdrawn", 0.0))
        for sample, label in now.items():
            if self._pseudo.get(sample) != label:
                self.trail.append(LabelEvent(self.round, sample, label, "pseudo", float(self.weights[sample, label])))
        self._pseudo = now
        return len(gone)

    def _accuracy(self, scores: Tensor) -> Tensor:
        """Share of the certified samples on which each classifier has the right sign."""
        scores = _widen(scores.detach().to(device="cpu", dtype=torch.float64), self.num_classes)
        right = (scores[self.certified] > 0) == (self.labels[self.certified] > 0)
        return right.double().mean(dim=0)


def _widen(scores: Tensor, classes: int) -> Tensor:
    """Scores with a column of -1 for each class that came after them."""
    missing = classes - scores.shape[1]
    return scores if not missing else torch.cat([scores, -scores.new_ones(len(scores), missing)], dim=1)
