"""Cards: the schema, and errors that name every problem."""

import datetime
import subprocess
import sys

import pytest

from regularized.papers.card import MARK, Card, CardError
from regularized.papers.catalogue import load_catalogue

GOOD = """
slug = "my_paper"
title = "A Paper: with & signs"
date = 2020-06-30
arxiv = "2007.00151"
venue = "NeurIPS 2020"
authors = ["A. Author", "B. Author"]
authors_count = 4
organization = ""
comments = 0
families = ["noisy_labels", "overfitting"]
tags = ["label noise", "loss", "classification"]
problem = "Part of my labels are wrong."
searches = ["wrong labels", "annotators disagree", "label noise", "mislabelled samples"]
summary = \"\"\"One.
Two.\"\"\"
changes = "loss"
needs = ["sample index"]
when_to_use = "Often."
when_not_to_use = "Never."

[official]
repository = "owner/name"
commit = "934af53"
licence = "MIT"

[[official.blockers]]
issue = 7
breaks = "stops at import"

[implementation]
names = ["regularized.noisy_labels.my_paper.MyLoss"]
floor = 1
floor_reason = "one softmax"

[[claims]]
id = "accuracy"
statement = "It is better."
metric = "accuracy"
direction = "higher"
baseline = "plain"
method = "ours"
differs = ["strength"]
smallest_effect = 2

[[claims.reported]]
setting = "CIFAR-10"
method = 93
source = "table 1"

[[exceptions]]
check = "compile"
reason = "a graph break"
until = "torch 3"
"""


def problems(text: str, **options) -> tuple[str, ...]:
    with pytest.raises(CardError) as caught:
        Card.parse(text, **options)
    return caught.value.problems


def test_every_value_arrives():
    """Fails when a key is dropped, or numbers and text are not normalised."""
    card = Card.parse(GOOD)
    assert card.date == datetime.date(2020, 6, 30)
    assert card.summary == "One. Two."
    assert card.families == ("noisy_labels", "overfitting")
    assert card.official is not None
    assert card.official.url == "https://github.com/owner/name"
    assert card.official.to_dict()["blockers"] == [
        {"issue": 7, "breaks": "stops at import", "url": "https://github.com/owner/name/issues/7"}
    ]
    assert card.implementation is not None
    assert (card.implementation.floor, type(card.implementation.floor)) == (1.0, float)
    claim = card.claims[0]
    assert (claim.smallest_effect, claim.kind, claim.scale) == (2.0, "claim", "laptop")
    assert (claim.reported[0].baseline, claim.reported[0].method) == (None, 93.0)
    assert card.exceptions[0].check == "compile"
    hash(card)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('slug = "my_paper"', 'slug = "My-Paper"', "slug: got 'My-Paper'; must be lower-case letters"),
        ("date = 2020-06-30", 'date = "2020-06-30"', "date: got '2020-06-30'; must be a date without quotes"),
        ("date = 2020-06-30", "date = 2020-06-30T10:00:00", "must be a date without quotes"),
        ("comments = 0", "comments = true", "comments: got True; must be a whole number"),
        ("comments = 0", "comments = -1", "must be a whole number, 0 or more"),
        (
            '"noisy_labels", "overfitting"',
            '"labels"',
            "families: got ['labels']; must be a list whose entries are one of",
        ),
        ('["label noise", "loss", "classification"]', '["loss"]', "tags: got ['loss']; must be 3 to 8 entries"),
        ('"label noise", "loss"', '"Label noise", "loss"', "tags: got ['Label noise', 'loss', 'classification']"),
        ('"label noise", "loss"', '"loss", "loss"', "must be each entry once, unlike 'loss'"),
        ('arxiv = "2007.00151"', 'arxiv = "arXiv:2007.00151"', "an arXiv identifier such as"),
        ('commit = "934af53"', 'commit = "main"', "official.commit: got 'main'; must be 7 to 40 hexadecimal digits"),
        ('repository = "owner/name"', 'repository = "name"', "official.repository: got 'name'; must be \"owner/name\""),
        ("issue = 7", "issue = 0", "official.blockers.1.issue: got 0; must be the number of an issue, 1 or more"),
        ("issue = 7", "number = 7", "official.blockers.1.number: unknown key; allowed: issue, breaks"),
        ('repository = "owner/name"', 'repository = "https://a.org"', "only a repository on GitHub, 'owner/name', has"),
        ("floor = 1", "floor = 0", "implementation.floor: got 0; must be a number above 0"),
        ("MyLoss", "My Loss", "implementation.names"),
        (
            'direction = "higher"',
            'direction = "up"',
            "claims.accuracy.direction: got 'up'; must be one of 'higher', 'lower'",
        ),
        ("smallest_effect = 2", "", "claims.accuracy.smallest_effect: missing"),
        ("smallest_effect = 2", "smallest_effect = nan", "claims.accuracy.smallest_effect: got nan; must be a finite"),
        ("method = 93", 'method = "93"', "claims.accuracy.reported.1.method: got '93'; must be a finite number"),
        ("authors_count = 4", "authors_count = 1", "authors_count: got 1, but authors names 2"),
        ('until = "torch 3"', "", "exceptions.1.until: missing"),
        ('venue = "NeurIPS 2020"', 'vanue = "NeurIPS 2020"', "venue: missing"),
        ('venue = "NeurIPS 2020"', 'vanue = "NeurIPS 2020"', "vanue: unknown key; allowed: slug, title"),
        ('venue = "NeurIPS 2020"', 'venue = "a\\nb"', "venue: got 'a\\nb'; must be one line"),
        ('problem = "Part of', 'problem = "FILL IN: Part of', "must be filled in"),
        ("[official]", "[offical]", "offical: unknown key"),
        ("[[claims]]", "[claims]", "claims: got "),
    ],
)
def test_one_problem(old, new, says):
    """Fails when a wrong value is accepted, or its error does not say key, value and what is allowed."""
    assert old in GOOD
    assert any(says in problem for problem in problems(GOOD.replace(old, new, 1))), problems(GOOD.replace(old, new, 1))


def test_all_problems_at_once():
    """Fails when reading stops at the first problem, in whatever table it is."""
    text = GOOD.replace('slug = "my_paper"', "slug = 3").replace("comments = 0", "").replace("floor = 1", "floor = []")
    text = (
        text.replace('metric = "accuracy"', "")
        .replace('source = "table 1"', "")
        .replace('reason = "a graph break"', "")
    )
    found = problems(text)
    wrong = ["slug", "comments", "implementation.floor", "claims.accuracy.metric"]
    wrong += ["claims.accuracy.reported.1.source", "exceptions.1.reason"]
    assert {problem.split(":")[0] for problem in found} == set(wrong)
    assert str(CardError("card.toml", found)).startswith("card.toml: 6 problems\n  - slug: got 3")


def test_claims_twice_and_none():
    """Fails when two claims share an id, or an implemented paper claims nothing."""
    claim = GOOD[GOOD.index("[[claims]]") : GOOD.index("[[exceptions]]")]
    assert problems(GOOD + claim) == ("claims.accuracy: this id is used twice",)
    assert problems(GOOD.replace(claim, "")) == ("claims: an implemented paper needs at least one [[claims]] table",)


def test_files(tmp_path):
    """Fails when a card that is no TOML, no text, absent, or in another's folder gives anything but its own error."""
    path = tmp_path / "another" / "card.toml"
    path.parent.mkdir()
    with pytest.raises(CardError, match="there is no such file"):
        Card.load(path)
    path.write_text(GOOD)
    with pytest.raises(CardError, match="must be the name of its folder, 'another'"):
        Card.load(path)
    path.write_text("slug = ")
    with pytest.raises(CardError, match=r"card.toml: 1 problem\n  - not valid TOML"):
        Card.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CardError, match="cannot be read as UTF-8"):
        Card.load(path)


def test_bibtex():
    """Fails when an entry drops missing authors silently, or characters that TeX reads as commands stay."""
    text = Card.parse(GOOD).bibtex()
    assert "@misc{my_paper_2020," in text
    assert "author = {A. Author and B. Author and others}" in text
    assert r"title = {{A Paper: with \& signs}}" in text
    nobody = Card.parse(GOOD.replace('"A. Author", "B. Author"', "")).bibtex()
    assert nobody.startswith("% the authors are not known here")
    assert "author =" not in nobody


def test_command(tmp_path):
    """Fails when a wrong card leaves the checker with exit code 0."""
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "bad.toml").write_text(f'slug = "{MARK}"')

    def check(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "regularized.papers.card", *(str(tmp_path / name) for name in names)]
        return subprocess.run(command, capture_output=True, text=True)

    assert check("good.toml").returncode == 0
    both = check("good.toml", "bad.toml")
    assert (both.returncode, both.stdout) == (1, "1 of 2 cards are valid\n")
    assert "slug: got 'FILL IN'; must be filled in" in both.stderr
    assert check().returncode == 2


@pytest.mark.parametrize("entry", load_catalogue(), ids=lambda entry: entry.slug)
def test_shipped_cards_read_well(entry):
    """Fails for a problem or phrase that is no sentence of a person, and a summary shorter than three sentences."""
    card = entry.card
    assert card.problem[0].isupper()
    assert card.problem[-1] in ".?!"
    assert sum(card.summary.count(stop) for stop in (". ", "? ", "; ", ": ")) >= 2
    assert all(3 <= len(phrase) <= 90 for phrase in card.searches)


def test_time_of_the_paper_scale_has_a_source():
    """Fails when hours stand in a card of which nobody knows who says so, or of what they are."""
    stated = '[paper_scale]\nhours = 12\neach = "run"\nsource = "table 3"\n'
    found = Card.parse(GOOD.replace("[official]", stated + "\n[official]")).paper_scale
    assert (found.hours, found.each, found.source) == (12.0, "run", "table 3")
    for wrong in (stated.replace("12", "0"), stated.replace('"run"', '"arm"'), stated.replace("source", "# source")):
        with pytest.raises(CardError, match="paper_scale"):
            Card.parse(GOOD.replace("[official]", wrong + "\n[official]"))
