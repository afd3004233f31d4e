"""The contract: every technique in the catalogue passes the same checks, without asking.

Subjects are found by scanning the catalogue; nothing is listed here. An exception stands in the card and must be real:
a check that is excepted and passes fails the suite.
"""

import importlib
import inspect
import json
from collections import defaultdict
from dataclasses import replace

import pytest
from tests.contracts import BROKEN, is_of_small_images, offered

from regularized.cli.show import to_json
from regularized.evidence import contract
from regularized.evidence.claims import Verdict
from regularized.evidence.conformance import conform
from regularized.evidence.experiment import resolve, run_arm, seeds_of, undeclared_differences
from regularized.evidence.store import canonical
from regularized.evidence.verdicts import MINIMUM_SEEDS
from regularized.papers.catalogue import load_catalogue

IMPLEMENTED = [entry for entry in load_catalogue() if entry.implemented]
SUBJECTS = [(entry, subject) for entry in IMPLEMENTED for subject in offered(entry)]
SAVED = {e.slug: (contract.load(e.folder / "contract.json") or {"outcomes": []})["outcomes"] for e in IMPLEMENTED}
CASES = [(entry, subject, name) for entry, subject in SUBJECTS for name in contract.checks_of(subject)]


def test_there_is_something_to_check():
    """Fails when scanning finds nothing, which would make every test below vacuous."""
    assert IMPLEMENTED
    assert {entry.card.slug for entry, _ in SUBJECTS} == {entry.card.slug for entry in IMPLEMENTED}


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.slug)
def test_it_loads(entry):
    """Fails for the paper whose code is broken, and for no other."""
    if entry.slug in BROKEN:
        raise BROKEN[entry.slug]


def test_a_paper_that_does_not_load_leaves_the_others_their_tests(monkeypatch):
    """Fails when the broken contract of one paper stops the collection of all."""
    broken = replace(IMPLEMENTED[0], package="no_such_package")
    monkeypatch.setattr("tests.contracts.BROKEN", {})
    assert offered(broken) == []
    assert offered(IMPLEMENTED[0])


@pytest.mark.parametrize(
    ("entry", "subject", "name"), CASES, ids=[f"{entry.slug}-{subject.name}-{name}" for entry, subject, name in CASES]
)
def test_contract(entry, subject, name):
    """Fails when a technique breaks a promise, or the table in the documentation says something else than this run."""
    excepted = name in {exception.check for exception in entry.card.exceptions}
    status, reason = "passed", ""
    try:
        contract.checks_of(subject)[name](subject)
    except contract.NotApplicable as why:
        status, reason = "not_applicable", str(why)
    except Exception:
        if not excepted:
            raise
        status = "excepted"
    assert not (excepted and status == "passed"), "remove the exception from the card: the check passes"
    saved = {(o.subject, o.check): o for o in SAVED[entry.slug]}.get((subject.name, name))
    again = f"write the table again: regularized contract {entry.slug} --save"
    assert saved is not None, f"the documentation does not know this check: {again}"
    if name != "gpu":  # which may be there or not
        assert saved.status == status, again
        assert status != "not_applicable" or saved.reason == reason, again
    if status == "not_applicable":
        pytest.skip(f"needs a GPU: {reason}" if name == "gpu" else f"not applicable: {reason}")


def test_every_technique_bites():
    """Fails where the first check, without which the others say nothing, is excepted or does not apply somewhere."""
    bites = [o for outcomes in SAVED.values() for o in outcomes if o.check == "it_bites"]
    assert len(bites) == len(SUBJECTS)
    assert {outcome.status for outcome in bites} == {"passed"}


def test_saved_outcomes_are_of_today():
    """Fails when the table of the documentation still names a subject or a check that is gone."""
    saved = [(slug, outcome.subject, outcome.check) for slug, outcomes in SAVED.items() for outcome in outcomes]
    assert saved == [(entry.slug, subject.name, name) for entry, subject, name in CASES]


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_conform(entry):
    rows = conform(entry.card.slug, entry.conformance(), entry.golden)
    assert rows
    wrong = [row for row in rows if not row.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_exceptions_name_checks(entry):
    """An exception for a check that does not exist would silence nothing, and hide a typing error."""
    assert {exception.check for exception in entry.card.exceptions} <= set(contract.all_checks())


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_claims_speak_of_the_experiment(entry):
    """Every claim names arms that exist, and a smallest effect; arms that were tuned had the same budget."""
    experiment = entry.experiment()
    for claim in entry.card.claims:
        assert claim.baseline in experiment.ARMS, claim.id
        assert claim.method in experiment.ARMS, claim.id
        assert claim.smallest_effect is not None, claim.id
        assert claim.scale in experiment.SCALES, claim.id
        undeclared = undeclared_differences(experiment, claim)
        assert not undeclared, f"{claim.id}: its arms differ in {undeclared}, which its differs does not name"
    assert {"smoke", "laptop", "paper"} <= set(experiment.SCALES)
    tuning = getattr(experiment, "TUNING", None)
    if tuning is not None:
        assert set(tuning.grids) <= set(experiment.ARMS)
        assert len({len(grid) for grid in tuning.grids.values()}) == 1


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_smoke_experiment(entry):
    """Every arm runs at smoke scale, on the data of its baseline; every claim's metric comes out as a finite number."""
    experiment = entry.experiment()
    measured = {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS}
    for claim in entry.card.claims:
        for arm in (claim.baseline, claim.method):
            value = measured[arm].metrics[claim.metric]
            assert value == value, f"{claim.id}: {claim.metric} of {arm} is nan"
    assert all(m.data for m in measured.values()), "an experiment must give the fingerprint of its data"
    if is_of_small_images(entry):
        assert_paired_and_tuned_by_what_is_measured(experiment, measured)


def assert_paired_and_tuned_by_what_is_measured(experiment, measured):
    """No arm draws other images than its baseline, and trials have a judge."""
    seen = defaultdict(set)
    for arm, run in measured.items():
        settings = resolve(experiment, arm, "smoke")
        seen[settings.get("problem", settings.get("task"))].add(run.data)
    assert all(len(fingerprints) == 1 for fingerprints in seen.values()), seen
    assert all(experiment.TUNING.metric in measured[arm].metrics for arm in experiment.TUNING.grids)


def what_is_taken(thing):
    """The section that says it: the fields of a tuple, or the arguments, unless Python or torch takes them."""
    if hasattr(thing, "_fields"):
        return "Attributes:"
    ours = not inspect.isclass(thing) or thing.__init__.__module__.startswith("regularized.")
    return "Args:" if ours and inspect.signature(thing).parameters else None


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_public_names_are_documented(entry):
    """Each public name of the card imports, and tells arguments, errors and an example in its docstring."""
    for name in entry.card.implementation.names:
        module, attribute = name.rsplit(".", 1)
        thing = getattr(importlib.import_module(module), attribute)
        text = inspect.getdoc(thing) or ""
        assert attribute in importlib.import_module(module).__all__, f"{name} is not in __all__"
        if takes := what_is_taken(thing):
            assert takes in text, f"{name} does not document its {takes}"
        assert ">>>" in text, f"{name} has no example"
        if inspect.isclass(thing):
            assert "Raises:" in text, f"{name} does not document its errors"


# -- what ships as evidence -------------------------------------------------------------------------


def is_current(entry):
    """Whether the ledger is of the present code. One that is not says so wherever it is shown."""
    shipped = entry.load_ledger()
    return shipped is not None and not shipped.is_stale(entry.code_key)


def needs_current(entry):
    """Ends a test of a ledger of older code, of which nothing is promised."""
    if not is_current(entry):
        pytest.skip("not applicable: the ledger is of older code")


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_no_verdict_but_open_from_fewer_than_ten_seeds(entry):
    """Fails when a ledger of the first edition, or one that was cut, still decides."""
    for outcome in entry.outcomes:
        undecided = outcome.verdict in (Verdict.OPEN, Verdict.NOT_RUN)
        assert undecided or len(outcome.seeds) >= MINIMUM_SEEDS, outcome.claim.id


# Papers that run and have no ledger yet, with the reason; none may stay here once it has one.
UNMEASURED: dict[str, str] = {}


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_evidence_of_other_code_is_told(entry):
    """Fails when a ledger of code that has changed passes for one of the present code, or one is missing unsaid."""
    evidence = to_json(entry)["evidence"]
    if entry.slug in UNMEASURED:
        assert evidence is None, f"{entry.slug} has a ledger: take it out of UNMEASURED"
        assert {outcome.verdict for outcome in entry.outcomes} == {Verdict.NOT_RUN}, (
            "an untuned experiment has verdicts"
        )
        return
    assert evidence is not None, f"{entry.slug} has no ledger; write it with `regularized ledger {entry.slug}`"
    assert evidence["stale"] is not is_current(entry)


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_arms_have_the_settings_that_tuning_chose(entry):
    """Fails when a setting was typed in that the recorded trials do not support, for the baseline above all."""
    needs_current(entry)
    experiment = entry.experiment()
    tuning = getattr(experiment, "TUNING", None)
    if tuning is None:
        return
    result = entry.load_ledger().to_result(entry.card.claims, module_name=entry.module_name("experiment"))
    assert result.tuning is not None, f"the ledger of {entry.card.slug} has no tuning; run `regularized tune` first"
    for arm, best in result.tuning.best.items():
        settings = resolve(experiment, arm, tuning.scale)
        chosen = {name: settings[name] for name in best}
        assert chosen == dict(best), f"{arm} has {chosen}, tuning chose {dict(best)}"


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.card.slug)
def test_ledger_judges_every_claim(entry):
    """Every claim was measured with the declared seeds, ten or more, with the settings that the arms have now."""
    needs_current(entry)
    shipped, experiment = entry.load_ledger(), entry.experiment()
    assert shipped.seeds == seeds_of(experiment).numbers
    assert {arm: dict(settings) for arm, settings in shipped.settings.items()} == {
        arm: json.loads(canonical(resolve(experiment, arm, shipped.scale))) for arm in experiment.ARMS
    }
    for outcome in entry.outcomes:
        assert outcome.verdict is not Verdict.NOT_RUN, outcome.claim.id
        assert tuple(outcome.seeds) == shipped.seeds or outcome.problem, outcome.claim.id
