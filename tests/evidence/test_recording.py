import pytest

from regularized.evidence import provenance
from regularized.evidence.ledger import LedgerError
from regularized.evidence.provenance import CheckoutState
from regularized.evidence.recording import record
from regularized.evidence.store import Store

pytestmark = pytest.mark.usefixtures("warm_workers")


def test_nothing_is_recorded_of_failed_runs_or_uncommitted_code(fake, claim, monkeypatch):
    """Fails when a ledger is written in which the seeds of a failing arm are fewer, or runs are made in vain."""
    monkeypatch.setattr(provenance, "checkout_state", lambda files: CheckoutState("c", True))
    with pytest.raises(LedgerError, match="paper measures has uncommitted changes: commit first"):
        record("paper", fake, [claim], workers=1)
    with Store() as store:
        assert store.find("paper") == []
    monkeypatch.setattr(provenance, "checkout_state", lambda files: CheckoutState("c", False))
    monkeypatch.setenv("FAKE_FAIL", "better/1")
    with pytest.raises(LedgerError, match=r"not written, 1 runs failed; the first: RuntimeError: the loss went"):
        record("paper", fake, [claim], workers=1)
