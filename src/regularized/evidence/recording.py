"""Makes the evidence that ships with the package: the runs that are missing, then the ledger.

Public names:
    ``check_committed(slug, module_name)``    refuses code that no commit can bring back
    ``record(slug, module_name, claims, ...) -> Path``    tunes, runs the comparison, writes the ledger
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from regularized.evidence import confirmation, ledger, provenance, runner
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import undeclared_differences
from regularized.evidence.pool import AnyPool, Pool
from regularized.evidence.results import Failure
from regularized.evidence.runner import identity_of
from regularized.evidence.store import Store

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


def record(
    slug: str,
    module_name: str,
    claims: Sequence[Claim],
    *,
    confirmed: bool = False,
    beside: Path | None = None,
    workers: int | None = None,
    pool: Callable[..., AnyPool] = Pool,
) -> Path:
    """Make the runs of the laptop scale that the store lacks, and write them to the paper's ledger.

    An experiment with a ``TUNING`` is tuned first, so that the ledger shows how its settings were chosen. The seeds are
    those that the experiment declares. What the present ledger holds of the same code and versions is not made again,
    wherever it was made: a fresh block of seeds costs its own runs alone.

    Args:
        slug: the paper.
        module_name: its experiment.
        claims: what the card claims.
        confirmed: take over the present ledger's runs where a repetition of one seed of every arm equals them to the
            last bit, see :mod:`regularized.evidence.confirmation`; default False. Where it does not, nothing is made.
        beside: a checkout of the ledger's code, for a machine that rounds otherwise; see
            :func:`regularized.evidence.confirmation.confirm`.
        workers: parallel processes; default one for each usable core.
        pool: what makes the runs, see :mod:`regularized.evidence.engines`; default processes on this machine.

    Returns:
        The file that was written.

    Raises:
        LedgerError: the code has uncommitted changes, a claim's arms differ in undeclared settings, runs failed, the
            confirmation found a difference, or fresh seeds are needed; nothing is written then.
        Unavailable, Interrupted, StoreError, ValueError, RuntimeError: as in
            :func:`regularized.evidence.runner.reproduce`.
    """
    check_committed(slug, module_name)
    experiment = import_module(module_name)
    for claim in claims:
        if undeclared := undeclared_differences(experiment, claim):
            raise ledger.LedgerError(
                f"{slug}: the arms of claim {claim.id!r} differ in {undeclared}, which its differs does not name: "
                "share these settings, tune them in both arms over equal grids, or say that they are the idea"
            )
    if confirmed:
        found = confirmation.confirm(slug, module_name, workers=workers, pool=pool, beside=beside)
        if found.differing:
            what = "; ".join(f"{arm}: {text}" for arm, text in found.differing.items())
            raise ledger.LedgerError(
                f"{slug}: seed {found.seed} came out otherwise than in the ledger ({what}), so nothing was taken over. "
                "Declare a fresh block of seeds and make everything anew"
            )
    _keep_what_ships(slug, module_name)
    failures: list[Failure] = []
    if hasattr(experiment, "TUNING"):
        failures += runner.tune(slug, module_name, workers=workers, pool=pool).failures
    failures += runner.reproduce(slug, module_name, claims, workers=workers, pool=pool).failures
    if failures:
        raise ledger.LedgerError(f"{slug}: not written, {len(failures)} runs failed; the first: {failures[0].error}")
    return ledger.export(slug, module_name, claims)


def _keep_what_ships(slug: str, module_name: str) -> None:
    """Put the runs and trials of the present ledger into the store, where they are of the present code and versions.

    Where the store holds another result of the same run, made on a machine that rounds otherwise, the ledger's counts:
    of trials of two machines the best setting could be one that neither would choose.
    """
    key = provenance.code_key(module_name)
    shipped = ledger.load(ledger.path(module_name))
    if shipped is None or shipped.is_stale(key) or dict(shipped.runs[0].versions) != provenance.versions():
        return
    with Store() as store:
        here = {identity_of(run): run for run in store.find(slug, code_key=key, dirty=False)}
        for run in (*shipped.runs, *shipped.tuning):
            known = here.get(identity_of(run))
            if known is None or repr(known.metrics) != repr(run.metrics):
                store.add(run)  # of two, the later one counts
