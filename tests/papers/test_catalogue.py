"""The catalogue: scanned folders, computed states, verdicts from the ledger."""

import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import regularized
from regularized.cli import show
from regularized.evidence.attempts import form, kept
from regularized.evidence.claims import Outcome, Verdict
from regularized.papers import catalogue as module
from regularized.papers.abstract import Sentence
from regularized.papers.card import CardError
from regularized.papers.catalogue import (
    PARTS,
    Entry,
    UnknownPaper,
    broken_cards,
    find,
    load_catalogue,
    public_names,
)
from regularized.papers.memory import Memory
from regularized.papers.proof import headlines, margin, standing

from .test_card import GOOD

PACKAGES = iter(f"catalogue_of_a_test_{number}" for number in range(1000))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one's own with papers: call it with card texts by slug, get its name and folder."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home of the user"))

    def build(**cards: str) -> tuple[str, Path]:
        name = next(PACKAGES)
        root = tmp_path / name
        for slug, text in cards.items():
            (root / slug).mkdir(parents=True)
            (root / slug / "card.toml").write_text(text)
        (root / "no_card").mkdir(parents=True)
        (root / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        return name, root

    yield build
    for name in [name for name in sys.modules if name.startswith("catalogue_of_a_test_")]:
        del sys.modules[name]


def card(slug: str, **changes: str) -> str:
    text = GOOD.replace("my_paper", slug)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_all_papers_of_the_page_have_a_card():
    """Fails when a card is lost."""
    assert len(load_catalogue()) >= 44
    assert len({entry.slug for entry in load_catalogue()}) == len(load_catalogue())
    assert not broken_cards()
    names = [name for e in load_catalogue() if e.card.implementation for name in e.card.implementation.names]
    assert set(public_names()) == {name.rpartition(".")[2] for name in names}, "a name that two papers use"


def test_reading_is_fast():
    """Fails when reading the cards does much more than parse them. Calls are counted, not seconds."""
    cards = [(entry.folder / "card.toml").read_text("utf-8") for entry in load_catalogue()]
    parsed = _calls(lambda: [*map(tomllib.loads, cards)])
    assert _calls(lambda: module._read_cards.__wrapped__("regularized.papers")) < 5 * parsed


def test_margin_orders_by_lower_ends():
    """Fails when the order among equals goes by means, which wide intervals lift, or by a bound below zero."""
    claim = replace(load_catalogue()[0].card.claims[0], smallest_effect=2.0)
    wide = Outcome(claim, Verdict.HOLDS, 100.0, (2.0, 198.0))
    narrow = Outcome(claim, Verdict.HOLDS, 5.0, (4.0, 6.0))
    assert margin([wide]) == 1.0
    assert margin([narrow]) == 2.0
    assert margin([Outcome(claim, Verdict.HOLDS, 1e9, (1e8, 1e9))]) == 10.0
    assert margin([Outcome(claim, Verdict.OPPOSITE, -5.0, (-6.0, -4.0))]) == 0.0
    assert margin([Outcome(replace(claim, smallest_effect=-1.0), Verdict.HOLDS, 5.0, (4.0, 6.0))]) == 0.0


def test_headlines_count_and_not_numbers_of_claims():
    """Fails when many small claims outweigh the abstract's, or what is untested, a toy or a sanity check counts."""
    claim = replace(load_catalogue()[0].card.claims[0], kind="claim")
    held = [Outcome(replace(claim, id=name), Verdict.HOLDS, 5.0, (4.0, 6.0)) for name in ("a", "b", "small", "smaller")]
    abstract = [Sentence("A.", ("a",)), Sentence("B and C.", ("b", "c")), Sentence("D.", untested="A theorem.")]
    assert headlines(abstract, held, toys=False) == headlines(abstract, held, toys=True) == 1.5 / 3
    assert headlines(abstract, [replace(outcome, toy=True) for outcome in held], toys=False) == 0.0
    assert headlines(abstract, [replace(outcome, toy=True) for outcome in held], toys=True) == 1.5 / 3
    sanity = [replace(outcome, claim=replace(outcome.claim, kind="sanity")) for outcome in held]
    assert headlines(abstract, sanity, toys=True) == headlines(abstract, held[2:], toys=True) == 0.0
    assert headlines((), held, toys=True) == 0.0


def _calls(work) -> int:
    with cProfile.Profile() as profile:
        assert work()
    return pstats.Stats(profile).total_calls


def test_own_package(package):
    """Fails when folders without a card count, or a catalogue outside this package cannot be read."""
    name, root = package(first=card("first"), second=card("second"))
    entries = load_catalogue(name)
    assert [entry.slug for entry in entries] == ["first", "second"]
    assert find("second", name).folder == root / "second"
    assert entries[0].module_name("bench") == f"{name}.first.bench"
    with pytest.raises(ModuleNotFoundError, match="there is no package 'nowhere'"):
        load_catalogue("nowhere")


def test_a_broken_card_costs_a_warning_and_no_other_paper(package, caplog):
    """Fails when one wrong or unfinished card takes the catalogue down, goes unnoticed, or is told twice."""
    broken = {
        "other_name": card("third"),
        "unfinished": card("unfinished", **{"A Paper: with & signs": "FILL IN"}),
        "no_toml": "slug = [",
        "too_deep": f"slug = {'[' * 100_000}",
        "too_long": f"floor = {'9' * 10_000}",
        "too_large": card("too_large", **{"floor = 1": f"floor = 1{'0' * 400}"}),
    }
    name, root = package(first=card("first"), second=card("second").replace("MyLoss", "OtherLoss"), **broken)
    (root / "bytes").mkdir()
    (root / "bytes" / "card.toml").write_bytes(b"\xff")
    for _ in range(2):
        assert [entry.slug for entry in load_catalogue(name)] == ["first", "second"]
        assert set(public_names(name)) == {"MyLoss", "OtherLoss"}
    wrong = broken_cards(name)
    assert set(wrong) == {*broken, "bytes"}
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(wrong)
    assert "must be the name of its folder, 'other_name'" in caplog.text
    with pytest.raises(CardError, match="must be filled in"):
        find("unfinished", name)
    assert find("first", name).folder == root / "first"


def test_code_of_a_paper_that_does_not_parse_makes_it_unimplemented_and_no_more(package, tmp_path):
    """Fails when half a file of one paper, or two that pass a name round in a circle, stop the listing of all."""
    name, _ = package(
        first=card("first", **{"regularized.noisy_labels.first": "broken_code_of_a_test.half"}),
        second=card("second", **{"regularized.noisy_labels.second": "broken_code_of_a_test.circle"}),
        third=card("third", **{"regularized.noisy_labels.third.MyLoss": "__main__.MyLoss"}),
    )
    code = tmp_path / "broken_code_of_a_test"
    (code / "circle").mkdir(parents=True)
    (code / "__init__.py").touch()
    (code / "half.py").write_bytes(b"class MyLoss(\0")
    (code / "circle" / "__init__.py").write_text("from broken_code_of_a_test.circle import MyLoss\n")
    assert all(entry.missing[0].endswith(".MyLoss") for entry in load_catalogue(name))


# -- memory -------------------------------------------------------------------------------------


def test_what_is_known_is_found_out_again_after_any_change(package, monkeypatch):
    """Fails when a state or a verdict is remembered beyond a change of the files that it comes from."""
    measured = next(entry for entry in load_catalogue() if entry.load_ledger() is not None)
    text = (measured.folder / "card.toml").read_text().replace(f'slug = "{measured.slug}"', 'slug = "first"')
    name, root = package(first=text)

    monkeypatch.setattr(module, "_read_cards", module._read_cards.__wrapped__)

    def look():  # as a new process does
        (entry,) = module._best_proven_first.__wrapped__(name)
        return entry.missing, entry.outcomes

    asked = []
    find_out = Entry._find_missing
    monkeypatch.setattr(Entry, "_find_missing", lambda entry: asked.append(1) or find_out(entry))
    judge = Entry._judge
    monkeypatch.setattr(Entry, "_judge", lambda entry: asked.append(2) or judge(entry))
    first = look()
    assert asked == [2, 1]
    assert look() == first, "what was remembered must be what was found"
    assert asked == [2, 1]
    shutil.copy(measured.ledger, root / "first" / "ledger.json")
    missing, outcomes = look()
    assert asked == [2, 1] * 2
    assert {outcome.verdict for outcome in outcomes} != {Verdict.NOT_RUN}
    assert look() == (missing, outcomes)
    assert look()[1] == measured.outcomes
    (root / "first" / "experiment.py").touch()
    assert "no experiment.py" in missing
    assert "no experiment.py" not in look()[0]
    (root / "first" / "experiment.py").unlink()
    assert "no experiment.py" in look()[0]


def test_an_attempt_at_odds_with_the_ledger_makes_a_claim_contested(package, monkeypatch):
    """Fails when a contradiction is not counted, still counts as holding, or is lost between two processes."""
    measured = min(
        (entry for entry in load_catalogue() if any(o.verdict is Verdict.HOLDS for o in entry.outcomes)),
        key=lambda entry: entry.ledger.stat().st_size,
    )
    held = next(o.claim for o in measured.outcomes if o.verdict is Verdict.HOLDS and o.claim.kind == "claim")
    name, root = package(**{measured.slug: (measured.folder / "card.toml").read_text()})
    folder = root / measured.slug
    shutil.copy(measured.ledger, folder / "ledger.json")
    data = json.loads(measured.ledger.read_text())
    swapped = {held.baseline: held.method, held.method: held.baseline}
    values = {(row["arm"], row["seed"]): row["metrics"] for row in data["runs"]}
    data["runs"] = [
        {**row, "metrics": values[swapped.get(row["arm"], row["arm"]), row["seed"]]} for row in data["runs"]
    ]
    maker = form.Maker("Ada", when="2026-03-02T00:00:00+00:00")
    kept.keep(form.of_data(data, maker), folder)
    monkeypatch.setattr(module, "_read_cards", module._read_cards.__wrapped__)
    for _ in range(2):  # the second time from memory
        (entry,) = module._best_proven_first.__wrapped__(name)
        outcome = next(o for o in entry.outcomes if o.claim.id == held.id)
        assert outcome.verdict is Verdict.CONTESTED
        assert [one.verdict is Verdict.HOLDS for one in outcome.attempts] == [True, False]
        counted = entry.to_dict()["verdicts"]
        before = measured.to_dict()["verdicts"]
        assert counted["contested"] >= 1
        assert counted["holds"] < before["holds"]
        assert sum(counted.values()) == sum(before.values())
        assert standing(entry) < standing(measured)
        shown = next(claim for claim in show.to_json(entry)["claims"] if claim["id"] == held.id)
        assert shown["verdict"] == "contested"
        assert [one["by"] for one in shown["attempts"]] == ["regularized", "Ada"]


def test_memory_that_cannot_be_trusted_is_none(tmp_path, monkeypatch):
    """Fails when a damaged, foreign or unwritable file of the cache is believed, or is an error."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    watched = tmp_path / "watched"
    watched.mkdir()
    memory = Memory.of("name", [watched])
    assert memory.recall("key", lambda: [1.5, "x"]) == [1.5, "x"]
    memory.save()
    (file,) = (tmp_path / "home" / "cache").iterdir()

    def known():
        return Memory.of("name", [watched]).recall("key", lambda: "found out anew")

    assert known() == [1.5, "x"]
    good = file.read_bytes()
    for damaged in (b"", good[: len(good) // 2], good.replace(b"1.5", b"2.5"), b"[]", b"\xff", b"[" * 100_000, b"null"):
        file.write_bytes(damaged)
        assert known() == "found out anew"
    file.write_bytes(good)
    assert known() == [1.5, "x"]
    (watched / "new.py").touch()
    assert known() == "found out anew"
    monkeypatch.setenv("REGULARIZED_HOME", os.devnull)  # nothing can be made below it
    memory = Memory.of("name", [watched])
    assert memory.recall("key", lambda: 1) == 1
    memory.save()


REMEMBER = """
import sys
from pathlib import Path
from regularized.papers.memory import Memory
from regularized.papers.proof import headlines, margin
for number in range(100):
    memory = Memory.of("name", [Path(sys.argv[1])])
    assert memory.recall("key", lambda: "x" * 10_000) == "x" * 10_000
    memory.recall(f"{number} {sys.argv[2]}", lambda: number)
    memory.save()
"""


def test_processes_remember_at_once(tmp_path, monkeypatch):
    """Fails when one process reads what another has half written, or parts of files are left behind."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    processes = [subprocess.Popen([sys.executable, "-c", REMEMBER, str(tmp_path / "none"), name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((tmp_path / "home" / "cache").iterdir())) == 1


def test_implemented_is_computed(package):
    """Fails when a paper counts as implemented with any of its files or names missing."""
    target = next(entry for entry in load_catalogue() if entry.implemented)
    names = str(list(target.card.implementation.names)).replace("'", '"')
    name, root = package(
        first=card("first", **{'["regularized.noisy_labels.my_paper.MyLoss"]'.replace("my_paper", "first"): names})
    )
    needed = [*(f"{part}.py" for part in PARTS), "golden.npz"]

    def missing() -> tuple[str, ...]:
        return module._read_cards.__wrapped__(name).entries[0].missing

    assert missing() == tuple(f"no {file}" for file in needed)
    for file in needed:
        (root / "first" / file).touch()
    assert missing() == ()
    (root / "first" / "card.toml").write_text(card("first"))
    assert missing() == ("no regularized.noisy_labels.first.MyLoss",)
    plain = card("first")
    start, end = plain.index("[implementation]"), plain.index("[[claims]]")
    (root / "first" / "card.toml").write_text(plain[:start] + plain[end:])
    assert missing() == ("no [implementation] in card.toml",)


def test_names_are_looked_up_without_importing():
    """Fails when a name counts that is only imported, nested, or mentioned."""
    here = "regularized.papers.catalogue"
    assert module._defines(f"{here}.Entry")
    assert module._defines(f"{here}.PACKAGE")
    assert module._defines(f"{here}.load_catalogue")
    for name in (f"{here}.Card", f"{here}.slug", f"{here}.nothing", "regularized.nowhere.Entry", "nowhere.at.all"):
        assert not module._defines(name), name


def test_a_ledger_is_read_once(monkeypatch):
    """Fails when a first start reads each ledger for its claims and again for what else it says, or that is wrong."""
    known = next(entry for entry in load_catalogue() if entry.ledger.is_file())
    entry = module.Entry(known.card, known.folder)
    ledger, read = entry.load_ledger(), []
    monkeypatch.setattr(module.Entry, "load_ledger", lambda self: read.append(self) or ledger)
    assert entry.outcomes == known.outcomes
    assert entry.measured == known.measured
    assert (entry.measured.scale, entry.measured.code_key) == (ledger.scale, ledger.code_key)
    assert len(read) == 1


def test_nearest_paper():
    """Fails when a typing error, a hyphen, or a question in the place of a slug gets no suggestion."""
    slug = next(entry.slug for entry in load_catalogue() if "_" in entry.slug)
    for asked in (slug.replace("_", "-"), slug.upper(), slug[1:]):
        with pytest.raises(UnknownPaper, match=f"Did you mean {slug}") as caught:
            find(asked)
        assert caught.value.suggestions[0] == slug
    with pytest.raises(UnknownPaper, match="Did you mean"):
        find("my labels are wrong")
    with pytest.raises(UnknownPaper, match=r"in the catalogue\. List them"):
        find("zzzzzz")


def test_verdicts_come_from_the_ledger(package, caplog):
    """Fails when a claim without runs has a verdict, or a damaged ledger takes the catalogue down or goes unnoticed."""
    name, root = package(first=card("first"), second=card("second"))
    (root / "first" / "ledger.json").write_text('{"format": 1, "slug"')
    assert [o.verdict for entry in load_catalogue(name) for o in entry.outcomes] == [Verdict.NOT_RUN] * 2
    assert "ledger.json is damaged" in caplog.text


def test_measured_papers_come_first(package):
    """Fails when the order is by date alone."""
    measured = [entry for entry in load_catalogue() if entry.load_ledger() is not None]
    name, root = package(newer=card("newer", **{"2020-06-30": "2030-01-01"}), proven=card("proven"))
    shutil.copy(measured[0].ledger, root / "proven" / "ledger.json")
    text = (measured[0].folder / "card.toml").read_text().replace(f'slug = "{measured[0].slug}"', 'slug = "proven"')
    (root / "proven" / "card.toml").write_text(text)
    entries = load_catalogue(name)
    assert entries[0].slug == "proven"
    assert {outcome.verdict for outcome in entries[0].outcomes} != {Verdict.NOT_RUN}


def test_public_names_at_the_top():
    """Fails when a technique of a card cannot be imported from the top of the package, or is another object there."""
    from importlib import import_module

    names = public_names()
    assert names
    for name, owner in names.items():
        assert getattr(regularized, name) is getattr(import_module(owner), name)
        assert name in dir(regularized)
    with pytest.raises(AttributeError, match="no attribute 'NoSuchTechnique'"):
        regularized.NoSuchTechnique  # noqa: B018


def test_two_papers_with_one_name(package, caplog):
    """Fails when one of two techniques of a name silently hides the other, or the clash takes other names along."""
    name, _ = package(
        first=card("first"), second=card("second"), third=card("third").replace("third.MyLoss", "third.OtherLoss")
    )
    assert public_names(name) == {"OtherLoss": "regularized.noisy_labels.third"}
    told = "'MyLoss' is a name of regularized.noisy_labels.first and of regularized.noisy_labels.second"
    assert told in caplog.text


@pytest.mark.parametrize("entry", [e for e in load_catalogue() if e.page], ids=lambda entry: entry.slug)
def test_usage_is_what_the_page_begins_with(entry):
    """Fails when `show` prints other code than the page, which is executed with the documentation's other blocks."""
    assert entry.usage.splitlines()[0].startswith(("import ", "from "))
    assert f"```python\n{entry.usage}\n```" in entry.page
    assert entry.page.index(entry.usage) == entry.page.index("```python\n") + len("```python\n")


def test_usage_without_a_page(package):
    """Fails when a paper of somebody else's catalogue, which has no page of ours, shows no code."""
    name, _ = package(first=card("first").replace("first.MyLoss", "co_teaching.CoTeaching"))
    entry = find("first", name)
    assert entry.page == ""
    (entry.folder / "page.md").write_text("# Mine\n\n```python\nimport torch\n```\n", encoding="utf-8")
    again = type(entry)(entry.card, entry.folder, entry.package)
    assert again.usage == "import torch"


def test_modules_of_a_paper_are_known():
    """Fails when a misspelt part is passed on to the import system."""
    with pytest.raises(ValueError, match=r"part must be one of \['experiment'"):
        load_catalogue()[0].module_name("experiments")
