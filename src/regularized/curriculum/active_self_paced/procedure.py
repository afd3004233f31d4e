"""Active self-paced learning (ASPL): for few labels, a large unlabelled pool, and an annotator whose time is costly.

In each round the classifiers score the pool. What they are sure of gets a pseudo-label and a weight, what they are
least sure of is asked of the annotator. Answers are *certified* and stay; pseudo-labels are computed afresh each round
and can be withdrawn. The pace rises slowly and lets harder samples in.

    "Active Self-Paced Learning for Cost-Effective and Progressive Face Identification", IEEE TPAMI, arXiv 1701.03555.
    The full text was not at hand: objective and closed forms are checked against their definition; the query rule,
    the pace update and the defaults are unconfirmed. The authors' released code (kezewang/ASPL at 31f743d; read, not
    run) follows other rules. Both are here: the defaults are the text as far as it is known, the options say what
    is the released code's.

=============  ==========================  =========================================================================
option         default, the paper's text   released code
=============  ==========================  =========================================================================
``accept``     ``"argmin"``                ``"unique"``: a label only where exactly one class has ``1 - s < lambda``
``weighting``  ``"linear"``                ``"hard"``: its linear weights never take effect
``query``      ``"ambiguity"``             ``"lowest_best_score"``, of those without a pseudo-label
``cost``       1                           1 for acceptance; its support vector machines have C = 0.001
``pace``       0.2                         0.12
``max_pace``   none                        0.9
``inner``      2                           5: it asks, and raises the pace, in every fifth iteration
``strikes``    none                        3
=============  ==========================  =========================================================================

Its pace rises as if every class were always right; here by the accuracy of each class, as in the text. It trains
squared-hinge machines but accepts by the plain margin, which is ``squared=False`` here: what ``fit`` trains is yours.

:mod:`regularized.curriculum.active_self_paced.loss` has the symbols, the weights and the labels. Here a pseudo-label
counts only where some class is positive (``no_class_weight=False``), since "none of the classes" is true of most
samples of a growing pool.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
    unique_labels,
)
from regularized.curriculum.active_self_paced.oracles import Oracle
from regularized.curriculum.active_self_paced.queries import Query, QueryName, doubtful, lowest_best_score, query_rule
from regularized.curriculum.active_self_paced.report import LabelEvent, RoundReport, write_trail
from regularized.mechanisms.ranges import Choice, allowed, at_least, count

__all__ = ["ActiveSelfPaced"]

log = logging.getLogger(__name__)

Fit: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Acceptance: TypeAlias = Literal["argmin", "unique"]


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
        max_pace: lambda never rises above it, at least ``pace``; default None, no limit (released code: 0.9).
        budget: questions in a round; default 10. 0 is plain self-paced learning.
        weighting: ``"linear"`` (default) or ``"hard"``, see
            :func:`~regularized.curriculum.active_self_paced.self_paced_weights`.
        accept: which samples get a pseudo-label: ``"argmin"`` (default), the labels of least loss, of
            :func:`~regularized.curriculum.active_self_paced.one_vs_rest_labels`; or ``"unique"``, the released code's
            :func:`~regularized.curriculum.active_self_paced.unique_labels`, where a sample weighs in every classifier
            what it weighs in that of its class.
        squared: the squared hinge loss in place of the hinge, for weights and objective; default False.
        query: ``"ambiguity"`` (default), ``"disagreement"``, ``"lowest_best_score"`` (released code), see
            :mod:`~regularized.curriculum.active_self_paced.queries`; or ``query(scores) -> (n,)``, larger first.
        inner: alternations of labels, weights and classifiers in a round; default 2.
        no_class_weight: let samples for which no class is positive count as negatives; default False. Not with
            ``accept="unique"``, which says nothing of them.
        strikes: a certified sample that the classifiers see otherwise (:func:`doubtful`) in more rounds than this is
            set aside: training leaves it out, unless it is the last of its class (ours) or is corrected. Default None,
            never (released code: 3).
        new_classes: accept answers that name the next class, m; default False.

    Attributes:
        certified: (n,) bool.
        labels: (n, m) in {-1, +1}.
        weights: (n, m) in [0, 1]; 1 for certified samples, 0 for those set aside.
        pace: (m,).
        round: rounds done.
        doubts: (n,) rounds in which the classifiers saw a certified sample otherwise; counted with ``strikes``.
        set_aside: (n,) bool, certified samples that training leaves out.
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
        accept=Choice("argmin", "unique"),
        strikes=count(0).or_none("never"),
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
        max_pace: float | None = None,
        budget: int = 10,
        weighting: Weighting = "linear",
        accept: Acceptance = "argmin",
        squared: bool = False,
        query: QueryName | Query = "ambiguity",
        inner: int = 2,
        no_class_weight: bool = False,
        strikes: int | None = None,
        new_classes: bool = False,
    ) -> None:
        start = torch.as_tensor(pace, dtype=torch.float64).expand(num_classes).clone()
        if not bool((start > 0).all()):
            raise ValueError(f"pace must be positive, got {pace}")
        if max_pace is not None and not max_pace >= float(start.max()):
            raise ValueError(f"max_pace must be at least the pace at the start ({pace}), got {max_pace}")
        if accept == "unique" and no_class_weight:
            raise ValueError(
                'accept="unique" gives no label where no class is positive; leave no_class_weight=False, or take '
                'accept="argmin"'
            )
        without = sorted(set(range(num_classes)) - set(certified.values()))
        if without:
            raise ValueError(
                f"no certified sample of class(es) {without}; label at least one of each before the first round"
            )
        self.num_samples = num_samples
        self.num_classes: int = num_classes
        self.cost = cost
        self.pace: Tensor = start
        self.first_pace: float = float(start.mean())
        self.pace_step = pace_step
        self.pace_rounds = pace_rounds
        self.max_pace = max_pace
        self.budget = budget
        self.weighting: Weighting = weighting
        self.accept: Acceptance = accept
        self.squared = squared
        self.query: Query = query_rule(query)
        self.inner = inner
        self.no_class_weight = no_class_weight
        self.strikes = strikes
        self.new_classes = new_classes
        self.round: int = 0
        self.trail: list[LabelEvent] = []
        self.certified: Tensor = torch.zeros(num_samples, dtype=torch.bool)
        self.doubts: Tensor = torch.zeros(num_samples, dtype=torch.int64)
        self.set_aside: Tensor = torch.zeros(num_samples, dtype=torch.bool)
        self.labels: Tensor = torch.full((num_samples, num_classes), -1.0, dtype=torch.float64)
        self.weights: Tensor = torch.zeros(num_samples, num_classes, dtype=torch.float64)
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
            rule = self._unique if self.accept == "unique" else self._argmin
            self.labels[free], self.weights[free] = rule(scores[free])
        return self.labels, self.weights

    def ask(self, scores: Tensor) -> list[int]:
        """Positions of the samples to ask about: the first ``budget`` of the uncertified ones by ``query``, in order.

        By ``"lowest_best_score"`` nothing is asked that has a pseudo-label at present.
        """
        check_scores(scores, shape=(self.num_samples, self.num_classes))
        unknown = ~self.certified
        if self.query is lowest_best_score:
            unknown[list(self.pseudo_labels())] = False
        free = torch.nonzero(unknown).flatten()
        if self.budget > len(free):
            warnings.warn(
                f"the budget of {self.budget} questions is larger than the {len(free)} samples left; asking about all",
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
        self.certified[sample] = self.set_aside[sample] = False
        self.doubts[sample] = 0
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
            if self.max_pace is not None:
                self.pace = self.pace.clamp(max=self.max_pace)

    def objective(self, scores: Tensor) -> float:
        """``sum v C l + f(v; lambda)`` of the pool with the present labels and weights; no norm of the classifiers."""
        scores = scores.detach().to(device="cpu", dtype=torch.float64)
        losses = one_vs_rest_hinge(scores, self.labels, squared=self.squared)
        penalty = self_paced_penalty(self.weights, self.pace, weighting=self.weighting)
        return float((self.cost * self.weights * losses + penalty).sum())

    # -- a round ------------------------------------------------------------------------------------

    def run_round(self, fit: Fit, *, oracle: Oracle | None = None) -> RoundReport:
        """One round: alternate labels, weights and classifiers, ask, set aside, certify, raise the pace.

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
        set_aside = self._set_doubtful_aside(scores) if self.strikes is not None else ()
        if asked:
            self.certify(asked, answers)
        accuracy = self._accuracy(scores)
        report = RoundReport(
            round=self.round,
            asked=tuple(asked),
            certified=int(self.certified.sum()),
            pseudo=len(self._pseudo),
            withdrawn=withdrawn,
            set_aside=set_aside,
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
        """Labels, weights, doubts, pace, round and trail: what :meth:`load_state_dict` needs to go on."""
        return {
            "certified": self.certified,
            "labels": self.labels,
            "weights": self.weights,
            "doubts": self.doubts,
            "set_aside": self.set_aside,
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
        self.doubts, self.set_aside = state["doubts"].clone(), state["set_aside"].clone()
        self.num_classes = self.labels.shape[1]
        self.first_pace, self.round = float(state["first_pace"]), int(state["round"])
        self._pseudo = {int(sample): int(label) for sample, label in state["pseudo"]}
        self.trail = [LabelEvent(**event) for event in state["trail"]]

    def save(self, folder: Path | str) -> Path:
        """Write the state as safetensors and JSON, atomically; an annotation lasts days, so save after every round."""
        from regularized.curriculum.active_self_paced.files import write_state  # safetensors, which only files need

        return write_state(folder, self.state_dict())

    def restore(self, folder: Path | str) -> "ActiveSelfPaced":
        """Load what :meth:`save` wrote."""
        from regularized.curriculum.active_self_paced.files import read_state

        self.load_state_dict(read_state(folder))
        return self

    def write_trail(self, path: Path | str) -> None:
        """Write the audit trail as CSV: round, sample, label, origin, weight."""
        write_trail(self.trail, path)

    # -- helpers ------------------------------------------------------------------------------------

    def _argmin(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of least loss with their self-paced weights."""
        labels = one_vs_rest_labels(scores, squared=self.squared)
        losses = one_vs_rest_hinge(scores, labels, squared=self.squared)
        weights = self_paced_weights(losses, self.pace, cost=self.cost, weighting=self.weighting)
        if not self.no_class_weight:
            weights = weights * (labels > 0).any(dim=1, keepdim=True)
        return labels, weights

    def _unique(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Labels that exactly one class accepts; what is positive for it is as good a negative for the others."""
        labels = unique_labels(scores, self.pace, cost=self.cost, squared=self.squared)
        losses = one_vs_rest_hinge(scores, torch.ones_like(scores), squared=self.squared)
        weights = self_paced_weights(losses, self.pace, cost=self.cost, weighting=self.weighting)
        return labels, (weights * (labels > 0)).sum(dim=1, keepdim=True).expand_as(labels)

    def _set_doubtful_aside(self, scores: Tensor) -> tuple[int, ...]:
        """Count doubts about certified samples, and leave out of training what has too many."""
        assert self.strikes is not None
        self.doubts += self.certified & doubtful(scores.detach().cpu(), self.labels)
        too_many = self.certified & ~self.set_aside & (self.doubts > self.strikes)
        chosen: list[int] = []
        for sample in torch.nonzero(too_many).flatten().tolist():
            label = int(self.labels[sample].argmax())
            of_class = self.certified & ~self.set_aside & (self.labels[:, label] > 0)
            if int(of_class.sum()) == 1:  # a classifier without a positive cannot be trained
                continue
            self.set_aside[sample] = True
            self.weights[sample] = 0.0
            self.trail.append(LabelEvent(self.round, sample, label, "set aside", 0.0))
            chosen.append(sample)
        return tuple(chosen)

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
        known = self.certified & ~self.set_aside
        new = known.to(torch.float64)[:, None]  # all certified samples are known negatives of it
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
