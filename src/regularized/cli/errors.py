"""Exit codes, and the errors that a person can mend: one line on standard error, no traceback."""

from enum import IntEnum

__all__ = ["CommandError", "Exit", "exit_of"]


class Exit(IntEnum):
    """What the exit code of a command says."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    INTERRUPTED = 130


MEANING = {
    Exit.OK: "done; a claim that does not hold is a result, too",
    Exit.FAILED: "a run failed, a golden vector disagrees, or a file is damaged",
    Exit.USAGE: "the command was called wrongly",
    Exit.NOT_FOUND: "there is no such paper or file",
    Exit.UNAVAILABLE: "not available here: code, data, package or hardware is missing",
    Exit.INTERRUPTED: "interrupted; finished runs are kept",
}


class CommandError(Exception):
    """A command cannot go on.

    Args:
        message: what is wrong and how to mend it.
        code: exit code.
    """

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code


def exit_of(error: BaseException) -> Exit | None:
    """Exit code of an error that a person can mend; None for a defect of ours, which needs its traceback."""
    from regularized.evidence.experiment import Unavailable
    from regularized.papers.card import CardError
    from regularized.papers.catalogue import UnknownPaper

    if isinstance(error, CommandError):
        return error.code
    if isinstance(error, UnknownPaper):
        return Exit.NOT_FOUND
    if isinstance(error, Unavailable) or (isinstance(error, ImportError) and "pip install" in str(error)):
        return Exit.UNAVAILABLE
    if isinstance(error, CardError):
        return Exit.FAILED
    from regularized.evidence.conformance import GoldenError
    from regularized.evidence.ledger import LedgerError
    from regularized.evidence.report import ReportError
    from regularized.evidence.store import StoreError

    return Exit.FAILED if isinstance(error, GoldenError | LedgerError | ReportError | StoreError) else None
