"""The whole contract: which checks a subject has, what came of each, and the file that remembers it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from regularized.evidence.contract.diagnostics import DIAGNOSTIC_CHECKS
from regularized.evidence.contract.procedures import PROCEDURE_CHECKS
from regularized.evidence.contract.subjects import AnySubject, NotApplicable, ProcedureSubject, Subject
from regularized.evidence.contract.terms import CHECKS
from regularized.evidence.kept import keep, read_kept

__all__ = ["Outcome", "Status", "all_checks", "checks_of", "load", "run", "save"]

Status: TypeAlias = Literal["passed", "not_applicable", "failed", "excepted"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one check of one subject.

    Args:
        slug: paper, or the module that the subject comes from.
        subject: its name.
        check: name of the check.
        status: ``"excepted"`` is a failure that the paper's card announces and explains.
        reason: why the check does not apply, what failed, or why that is excepted; empty where it passed.
    """

    slug: str
    subject: str
    check: str
    status: Status
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain dictionary for JSON."""
        return asdict(self)


def checks_of(subject: AnySubject) -> Mapping[str, Callable[[Any], None]]:
    """The checks of a subject's kind by name, ``it_bites`` first.

    Raises:
        TypeError: it is none of the three kinds.
    """
    if isinstance(subject, Subject):
        return CHECKS
    if isinstance(subject, ProcedureSubject):
        return PROCEDURE_CHECKS
    if not isinstance(subject, AnySubject):
        raise TypeError(
            f"a subject is a Subject, a ProcedureSubject or a DiagnosticSubject, got {type(subject).__name__}"
        )
    return DIAGNOSTIC_CHECKS


def all_checks() -> list[str]:
    """Names of the checks of all kinds, each once.

    Examples:
        >>> all_checks()[:2]
        ['it_bites', 'deterministic']
    """
    return list(dict.fromkeys([*CHECKS, *PROCEDURE_CHECKS, *DIAGNOSTIC_CHECKS]))


def run(slug: str, subjects: Iterable[AnySubject], *, exceptions: Mapping[str, str] | None = None) -> Iterator[Outcome]:
    """Check subjects, one outcome at a time.

    Args:
        slug: paper, for the outcomes.
        subjects: what the paper's contract module offers, or subjects of your own.
        exceptions: checks that are known to fail, with reasons. One that passes all the same counts as failed, since
            the exception is to be removed.

    Examples:
        >>> from regularized.evidence.contract import DiagnosticSubject
        >>> import torch
        >>> model = lambda: torch.nn.Linear(3, 2)
        >>> norm = DiagnosticSubject("norm", model, lambda m: {"norm": m.weight.detach().norm()})
        >>> [(outcome.check, outcome.status) for outcome in run("mine", [norm])][:2]
        [('it_bites', 'passed'), ('deterministic', 'passed')]
    """
    for subject in subjects:
        for name, check in checks_of(subject).items():
            yield Outcome(slug, subject.name, name, *_judged(check, subject, (exceptions or {}).get(name)))


def _judged(check: Callable[[Any], None], subject: AnySubject, excepted: str | None) -> tuple[Status, str]:
    try:
        check(subject)
    except NotApplicable as reason:
        return "not_applicable", str(reason)
    except Exception as error:
        if excepted is not None:
            return "excepted", excepted
        what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return "failed", what + str(error)
    if excepted is not None:
        return "failed", "the card excepts this check, but it passes: remove the exception"
    return "passed", ""


def save(outcomes: Sequence[Outcome], module_name: str) -> Path:
    """Write the outcomes of a paper to ``contract.json`` beside its contract module, for the documentation.

    Args:
        outcomes: from :func:`run`.
        module_name: the contract module.

    Returns:
        The file.

    Raises:
        ValueError: a check failed.
    """
    from datetime import UTC, datetime

    if failed := [f"{outcome.subject}: {outcome.check}" for outcome in outcomes if outcome.status == "failed"]:
        raise ValueError(f"not saved, since checks fail: {', '.join(failed)}")
    content = {
        "format": 1,
        "made": datetime.now(UTC).date().isoformat(),
        "outcomes": [outcome.to_dict() for outcome in outcomes],
    }
    return keep(content, module_name, "contract.json")


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote, with ``outcomes`` as :class:`Outcome`; None where nothing was saved.

    Raises:
        ValueError: the file is damaged; the message says how to make it again.
    """
    return read_kept(path, "outcomes", lambda outcome: Outcome(**outcome), command="regularized contract SLUG --save")
