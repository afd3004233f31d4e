"""One contract for every technique: what a paper offers to be checked, and the checks.

A paper's ``contract.py`` returns *subjects*, the smallest settings in which its technique works: terms, whole
procedures, or diagnostics. Each check takes a subject and raises ``AssertionError`` with what went wrong, or
:class:`NotApplicable` with the reason. Third parties can run them on their own techniques::

    for outcome in run("mine", [my_subject]):
        print(outcome.check, outcome.status, outcome.reason)

or, from a module with a function ``subjects()``, by ``regularized contract --module my_module``.

The first check is that the technique changes anything at all: without it the others could pass by doing nothing.
"""

from regularized.evidence.contract.diagnostics import DIAGNOSTIC_CHECKS
from regularized.evidence.contract.kit import Classification, plain
from regularized.evidence.contract.pairs import check_pair
from regularized.evidence.contract.procedures import PROCEDURE_CHECKS
from regularized.evidence.contract.subjects import (
    AnySubject,
    DiagnosticSubject,
    NotApplicable,
    ProcedureSubject,
    Subject,
    Terms,
    needs_gpu,
)
from regularized.evidence.contract.suite import Outcome, Status, all_checks, checks_of, load, run, save
from regularized.evidence.contract.terms import CHECKS

__all__ = [
    "CHECKS",
    "DIAGNOSTIC_CHECKS",
    "PROCEDURE_CHECKS",
    "AnySubject",
    "Classification",
    "DiagnosticSubject",
    "NotApplicable",
    "Outcome",
    "ProcedureSubject",
    "Status",
    "Subject",
    "Terms",
    "all_checks",
    "check_pair",
    "checks_of",
    "load",
    "needs_gpu",
    "plain",
    "run",
    "save",
]
