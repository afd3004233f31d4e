"""Makes the evidence that ships with the package: the runs that are missing, then the ledger.

Public names:
    ``check_committed(slug, module_name)``    refuses code that no commit can bring back
    ``record(slug, module_name, claims, ...) -> Path``    tunes, runs the comparison, writes the ledger
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from regularized.evidence import ledger, provenance, runner
from regularized.evidence.claims import Claim
from regularized.evidence.results import Failure

__all__ = ["check_committed", "record"]


def check_committed(slug: str, module_name: str) -> None:
    """Refuse to measure what could never be evidence; asked first, because runs take long.

    Args:
        slug: the paper.
        module_name: its experiment.

    Raises:
        LedgerError: code that the experiment reaches differs from the commit.
    """
    if provenance.checkout_state(provenance.closure(module_name).values()).dirty:
        raise ledger.LedgerError(
            f"the code that {slug} measures has uncommitted changes: commit first, then write the ledger"
        )


def record(slug: str, module_name: str, claims: Sequence[Claim], *, seeds: int = 5, workers: int | None = None) -> Path:
    """Make the runs of the laptop scale that the store lacks, and write them to the paper's ledger.

    An experiment with a ``TUNING`` is tuned first, so that the ledger shows how its settings were chosen.

    Args:
        slug: the paper.
        module_name: its experiment.
        claims: what the card claims.
        seeds: number of seeds; default 5, the fewest that give a verdict.
        workers: parallel processes; default one for each usable core.

    Returns:
        The file that was written.

    Raises:
        LedgerError: the code has uncommitted changes, or runs failed; nothing is written then.
        Unavailable, Interrupted, StoreError, ValueError, RuntimeError: as in
            :func:`regularized.evidence.runner.reproduce`.
    """
    check_committed(slug, module_name)
    failures: list[Failure] = []
    if hasattr(import_module(module_name), "TUNING"):
        failures += runner.tune(slug, module_name, workers=workers).failures
    failures += runner.reproduce(slug, module_name, claims, seeds=seeds, workers=workers).failures
    if failures:
        raise ledger.LedgerError(f"{slug}: not written, {len(failures)} runs failed; the first: {failures[0].error}")
    return ledger.export(slug, module_name)
