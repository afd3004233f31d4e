"""The lists of what abstracts claim: complete, of claims that exist, and nothing else stops for a wrong one."""

import pytest

from regularized.papers.abstract import FILE, Sentence, coverage, load_abstract
from regularized.papers.card import CardError
from regularized.papers.catalogue import load_catalogue

IMPLEMENTED = [entry for entry in load_catalogue() if entry.implemented]
GOOD = """
[[abstract]]
says = "It is fast."
tested_by = ["speed"]

[[abstract]]
says = "Proven."
untested = "A theorem."
"""


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.slug)
def test_every_headline_is_tested_or_explained(entry):
    """Fails for a paper that runs and leaves its abstract out, or names a claim that its card has not."""
    found = load_abstract(entry.folder, {claim.id for claim in entry.card.claims})
    assert len(found) >= 2, f"list what the abstract of {entry.slug} claims in {FILE}"
    assert any(sentence.tested_by for sentence in found)


def test_reading(tmp_path):
    """Fails when a row is lost, or its two kinds are mixed up."""
    (tmp_path / FILE).write_text(GOOD)
    found = load_abstract(tmp_path, {"speed"})
    assert found == (Sentence("It is fast.", ("speed",)), Sentence("Proven.", untested="A theorem."))
    assert coverage(found) == "1 of 2 claims of the abstract are tested"
    assert load_abstract(tmp_path / "none", set()) == ()
    assert [list(pair) for sentence in found for pair in sentence.pairs()] == [["sentence", "claim", "reason"]] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("speed", "sped"), "no claims ['sped']; it has ['speed']"),
        (GOOD.replace('tested_by = ["speed"]', ""), "row 1: give either"),
        (GOOD.replace("untested", 'tested_by = ["speed"]\nuntested'), "row 2: give either"),
        (GOOD.replace('["speed"]', '"speed"'), "must be a list"),
        (GOOD.replace('says = "Proven."', ""), "row 2: `says`"),
        (GOOD.replace('"A theorem."', '" "'), "`untested` must be the reason"),
        (GOOD.replace("says", "said"), "'said' is no key"),
        ("abstract = 3", "[[abstract]]"),
        ("[[abstract", "cannot be read"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, text, says):
    """Fails when a mistake passes silently, or the message names neither file nor row."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CardError) as raised:
        load_abstract(tmp_path, {"speed"})
    assert says in str(raised.value)
    assert FILE in str(raised.value)
