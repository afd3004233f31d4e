"""Cards and ledgers in tables: complete, once, and nothing that people did is lost."""

import datetime
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, func, select, text

from regularized.evidence.claims import Verdict, count_verdicts
from regularized.papers.catalogue import load_catalogue
from regularized.papers.memory import Memory
from regularized.papers.proof import best_proven_first
from regularized.site import queries, trending
from regularized.site.database import migrate, open_database
from regularized.site.models import Alias, Base, ClaimRow, Paper, Person, SearchText, VerdictChange, Vote
from regularized.site.queries import Filters, Period
from regularized.site.settings import Settings, SettingsError
from regularized.site.sync import find_known, sync_catalogue, title_key

ENTRIES = load_catalogue()
MEASURED = [entry for entry in ENTRIES if entry.ledger.is_file()]
NOW = 2_000_000_000


def test_migrations_make_the_tables_of_the_models(tmp_path):
    """Fails when a column is added to a model and no migration makes it; running twice changes nothing."""
    engine = open_database(f"sqlite:///{tmp_path / 'new.sqlite'}")
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_object": lambda _o, name, kind, *_: kind != "table" or not name.startswith("paper_fts")},
        )
        assert compare_metadata(context, Base.metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def filled(kind):
    """A value of a column's type."""
    return {"INTEGER": 1, "BIGINT": 1, "DOUBLE": 0.0, "BOOLEAN": False, "DATE": datetime.date(2026, 3, 2)}.get(
        str(kind).split("(")[0], "x"
    )


@pytest.mark.parametrize("revision", ["0001", "0003", "0004"])
def test_an_upgrade_keeps_what_people_did(tmp_path, revision):
    """Fails when a table that is made anew takes the rows with it that belong to its own: votes, comments, sessions."""
    engine = open_database(f"sqlite:///{tmp_path / 'old.sqlite'}")
    migrate(engine, revision)
    kept = ("person", "paper", "vote", "comment", "claim", "paper_tag", "login_session", "follow")
    with engine.begin() as connection:
        old = MetaData()
        old.reflect(connection, only=kept)
        for name in kept:
            values = {column.name: filled(column.type) for column in old.tables[name].columns}
            values |= {"name": "Admin"} if name == "person" else {}
            connection.execute(old.tables[name].insert().values(values))
    migrate(engine)
    with engine.begin() as connection:
        counts = [connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar() for name in kept]
        assert counts == [1] * len(kept)
        # 0004 takes away names that only moderators may have; whoever has one since then was let to.
        name = ("Admin", "x") if revision == "0004" else ("", None)
        assert connection.exec_driver_sql("SELECT name, name_key FROM person").one() == name
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        connection.exec_driver_sql("DELETE FROM person")
        assert connection.exec_driver_sql("SELECT count(*) FROM vote").scalar() == 0


def test_downgrade_leaves_nothing(tmp_path):
    """Fails when a table is forgotten on the way down."""
    from alembic import command
    from alembic.config import Config

    from regularized.site import database

    engine = open_database(f"sqlite:///{tmp_path / 'down.sqlite'}")
    migrate(engine)
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with engine.connect() as connection:
        left = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())
    assert left <= {"alembic_version", "sqlite_sequence"}


def test_every_paper_and_claim_is_there_once(site):
    """Fails when a paper, a claim or a verdict is lost or doubled on the way from cards and ledgers."""
    with site.read() as session:
        for entry in ENTRIES:
            paper = queries.by_slug(session, entry.slug)
            assert (paper.title, paper.date, paper.runs) == (entry.card.title, entry.card.date, entry.implemented)
            rows = [(claim.name, claim.verdict, claim.effect) for claim in paper.claims]
            assert rows == [(o.claim.id, o.verdict.value, o.effect) for o in entry.outcomes]
            counted = count_verdicts(entry.outcomes)
            assert paper.held == counted[Verdict.HOLDS]
            assert paper.verdicts == {verdict.value: count for verdict, count in counted.items()}
        assert session.scalar(select(func.count()).select_from(Paper)) == len(ENTRIES)


def test_default_order_is_that_of_the_catalogue(site):
    """Fails when the site orders by anything else than evidence first; votes must not count."""
    with site.write.begin() as session:
        last = session.scalars(select(Paper).order_by(Paper.standing, Paper.date).limit(1)).one()
        last.votes, last.heat = 1000, 1e6
    with site.read() as session:
        listed = [paper.slug for paper in queries.list_papers(session, per_page=100).papers]
    assert listed == [entry.slug for entry in sorted(ENTRIES, key=best_proven_first)]
    measured = {entry.slug for entry in MEASURED}
    assert set(listed[: len(measured)]) == measured


def test_synchronising_again_changes_nothing(site):
    """Fails when a start writes rows that have not changed, or adds papers again."""
    with site.write.begin() as session:
        changes = sync_catalogue(session, ENTRIES, now=NOW)
    assert (changes.added, changes.updated, changes.verdicts, changes.gone) == (0, 0, 0, 0)
    with site.read() as session:
        assert session.scalar(select(func.max(Paper.changed_at))) < NOW


class Renamed:
    """An entry of the catalogue with some things changed, of which nothing is known yet."""

    def __init__(self, entry, **changed):
        self._entry, self._changed = entry, {"memory": Memory(None, ""), **changed}

    def __getattr__(self, name):
        return self._changed.get(name, getattr(self._entry, name))


def test_evidence_that_is_older_than_its_code(site):
    """Fails when a start reads all code of all experiments, or evidence of other code is not marked once known."""
    entry = next(entry for entry in MEASURED if entry.implemented)

    def shown_as_stale(memory: Memory) -> bool:
        with site.write.begin() as session:
            sync_catalogue(session, [replace(entry, memory=memory)], now=NOW)
            return queries.by_slug(session, entry.slug).card["evidence"]["stale"]

    memory = Memory(None, "")
    assert not shown_as_stale(memory)
    assert not memory.knows(f"{entry.slug} code_key")
    memory.recall(f"{entry.slug} code_key", lambda: "of other code")
    assert shown_as_stale(memory)


def test_a_changed_verdict_is_written_down(site):
    """Fails when the digest and the feed of verdicts would not hear of a verdict that became another one."""
    entry = MEASURED[0]
    first, *rest = entry.outcomes
    other = Verdict.HOLDS if first.verdict is Verdict.OPEN else Verdict.OPEN
    turned = replace(first, verdict=other)
    renamed = Renamed(entry, outcomes=(turned, *rest))
    changed = [renamed if e is entry else e for e in ENTRIES]
    with site.write.begin() as session:
        changes = sync_catalogue(session, changed, now=NOW)
        row = session.scalars(select(VerdictChange)).one()
    assert (changes.updated, changes.verdicts) == (1, 1)
    assert (row.claim, row.old, row.new, row.at) == (first.claim.id, first.verdict.value, other.value, NOW)
    with site.read() as session:
        assert queries.by_slug(session, entry.slug).held == count_verdicts((turned, *rest))[Verdict.HOLDS]


def test_a_card_that_is_gone_keeps_its_row_and_its_votes(site):
    """Fails when removing a card deletes what people said, or leaves a paper that claims to run."""
    gone = MEASURED[0]
    with site.write.begin() as session:
        person = Person(email="a@example.org", name="", created_at=1)
        session.add(person)
        session.flush()
        paper = queries.by_slug(session, gone.slug)
        session.add(Vote(person_id=person.id, paper_id=paper.id, at=1))
    with site.write.begin() as session:
        assert sync_catalogue(session, [e for e in ENTRIES if e is not gone], now=NOW).gone == 1
    with site.read() as session:
        paper = queries.by_slug(session, gone.slug)
        assert (paper.runs, paper.has_card, paper.standing) == (False, False, 0.0)
        assert session.scalar(select(func.count()).select_from(Vote)) == 1
    with site.write.begin() as session:
        assert sync_catalogue(session, ENTRIES, now=NOW + 1).updated == 1
        assert queries.by_slug(session, gone.slug).runs


def test_an_imported_paper_that_gets_a_card_is_the_same_paper(site):
    """Fails when a card doubles a paper that people have voted for already, or breaks its old address."""
    entry = ENTRIES[-1]
    with site.write.begin() as session:
        paper = queries.by_slug(session, entry.slug)
        number = paper.id
        paper.slug, paper.has_card, paper.fingerprint = "paper-before", False, ""
    with site.write.begin() as session:
        changes = sync_catalogue(session, ENTRIES, now=NOW)
    assert (changes.added, changes.updated) == (0, 1)
    with site.read() as session:
        assert queries.by_slug(session, entry.slug).id == queries.by_slug(session, "paper-before").id == number
        assert session.scalars(select(Alias.slug)).one() == "paper-before"


def test_known_papers_are_found_by_identifier_and_by_title(site):
    """Fails when another spelling of a title makes a second paper."""
    card = ENTRIES[0].card
    with site.read() as session:
        for found in (
            find_known(session, arxiv=card.arxiv),
            find_known(session, title=card.title.upper().replace(" ", "  ") + "."),
        ):
            assert found.slug == card.slug
        assert find_known(session, title="Another title altogether") is None
        assert find_known(session, title="…") is None
    assert title_key("…") == ""


def test_filters(site):
    """Fails when a filter is ignored, or joins in a way that doubles rows."""
    with site.read() as session:

        def slugs(**filters):
            page = queries.list_papers(session, filters=Filters(**filters), per_page=100)
            assert page.total == len(page.papers) == len({paper.slug for paper in page.papers})
            return {paper.slug for paper in page.papers}

        family, tag = ENTRIES[0].card.families[0], ENTRIES[0].card.tags[0]
        assert slugs(family=family) == {e.slug for e in ENTRIES if family in e.card.families}
        assert slugs(tag=tag) == {e.slug for e in ENTRIES if tag in e.card.tags}
        assert slugs(year=2024) == {e.slug for e in ENTRIES if e.card.date.year == 2024}
        assert slugs(runs=True) == {e.slug for e in ENTRIES if e.implemented}
        for verdict in Verdict:
            expected = {e.slug for e in ENTRIES if any(o.verdict is verdict for o in e.outcomes)}
            assert slugs(verdict=verdict.value) == expected
        assert slugs(family=family, year=1999) == set()


@pytest.mark.parametrize(
    ("kind", "name", "first", "after"),
    [
        ("day", "2024-02-29", "2024-02-29", "2024-03-01"),
        ("week", "2026-W01", "2025-12-29", "2026-01-05"),
        ("week", "2020-W53", "2020-12-28", "2021-01-04"),
        ("month", "2024-12", "2024-12-01", "2025-01-01"),
        ("month", "2024-01", "2024-01-01", "2024-02-01"),
    ],
)
def test_periods(kind, name, first, after):
    """Fails at the turn of a year, of a leap day, or of a week that belongs to two years."""
    period = Period.parse(kind, name)
    assert (period.first.isoformat(), (period.last + datetime.timedelta(days=1)).isoformat(), period.name) == (
        first,
        after,
        name,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("day", name) for name in ("2024-2-3", "2023-02-29", "20240203", "")),
        *(("week", name) for name in ("2026-W54", "2026W10", "2026-W10-3")),
        *(("month", name) for name in ("2024-13", "٢٠٢٤-01")),
    ],
)
def test_what_is_no_period(kind, name):
    """Fails when an address that means nothing is taken for a date."""
    with pytest.raises(ValueError, match=r"day|month|week|year|isoformat"):
        Period.parse(kind, name)


def test_periods_around_skip_the_empty_ones(site):
    """Fails when previous and next lead to days without papers."""
    with site.read() as session:
        days = sorted({entry.card.date for entry in ENTRIES})
        middle = days[len(days) // 2]
        before, after = queries.periods_around(session, Period("day", middle))
        assert (before.first, after.first) == (days[len(days) // 2 - 1], days[len(days) // 2 + 1])
        assert queries.periods_around(session, Period("day", days[0]))[0] is None
        assert queries.periods_around(session, Period("day", days[-1]))[1] is None


def test_heat_is_the_score_that_the_formula_gives(site, clock):
    """Fails when the stored heat and the documented sum part, in value or in order, at any time."""
    week = trending.HALF_LIFE
    with site.write.begin() as session:
        people = [Person(email=f"{i}@example.org", name="", created_at=1) for i in range(5)]
        session.add_all(people)
        session.flush()
        first, second = session.scalars(select(Paper).limit(2))
        votes = {first.id: [0, 0, 0, 0], second.id: [2 * week, 2 * week]}
        for paper in (first, second):
            for person, at in zip(people, votes[paper.id]):
                session.add(Vote(person_id=person.id, paper_id=paper.id, at=int(clock.now) + at))
            session.flush()
            trending.update(session, paper)
        for later in (2 * week, 10 * week, 500 * week):
            now = int(clock.now) + later
            for paper in (first, second):
                expected = sum(2.0 ** (-(now - int(clock.now) - at) / week) for at in votes[paper.id])
                assert trending.score(paper.heat, now) == pytest.approx(expected)
        assert [paper.id for paper in queries.list_papers(session, "trending").papers] == [second.id, first.id]


def test_one_person_does_not_lift_a_paper_by_talking(site):
    """Fails when each comment of one person counts."""
    from regularized.site.models import Comment

    with site.write.begin() as session:
        person = Person(email="a@example.org", name="", created_at=1)
        session.add(person)
        paper = session.scalars(select(Paper).limit(1)).one()
        session.flush()
        for at in (100, 200, 300):
            session.add(Comment(paper_id=paper.id, person_id=person.id, body="x", html="x", at=at))
        session.flush()
        trending.update(session, paper)
        assert paper.comments == 3
        assert trending.score(paper.heat, 300) == pytest.approx(trending.COMMENT_WEIGHT)


def test_words_of_a_removed_text_are_not_found(site):
    """Fails when a trigger of the full-text index is missing: deleted or changed texts would still be found."""
    with site.write.begin() as session:
        row = session.scalars(select(SearchText).limit(1)).one()
        found = text("SELECT count(*) FROM paper_fts WHERE paper_fts MATCH 'xylophonic'")
        row.title = "xylophonic"
        session.flush()
        assert session.scalar(found) == 1
        row.title = "another"
        session.flush()
        assert session.scalar(found) == 0
        session.execute(text("INSERT INTO paper_fts(paper_fts) VALUES ('integrity-check')"))


def test_settings_are_checked(tmp_path, monkeypatch):
    """Fails when a wrong setting surfaces as a traceback later, or a guessable secret is accepted."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    for name, value in {
        "REGULARIZED_SITE_URL": "ftp://x",
        "REGULARIZED_SITE_SECRET": "short",
        "REGULARIZED_SITE_PROXIES": "many",
    }.items():
        with pytest.raises(SettingsError, match=name):
            Settings.from_environment({name: value})
    with pytest.raises(SettingsError, match="SECURITY"):
        Settings.from_environment({"REGULARIZED_SMTP_HOST": "x", "REGULARIZED_SMTP_SECURITY": "ssl"})
    for url in ("mysql://x/y", "nonsense"):
        with pytest.raises(SettingsError, match="database"):
            open_database(url)
    first, second = Settings.from_environment({}), Settings.from_environment({})
    assert first.secret == second.secret
    assert len(first.secret) > 40
    assert (tmp_path / "site" / "secret").stat().st_mode & 0o077 == 0
    assert first.secret not in repr(first)


def test_dates_in_lists_are_days(site):
    """Fails when a claim's row outlives its claim."""
    entry = MEASURED[0]
    fewer = [Renamed(entry, outcomes=entry.outcomes[1:]) if e is entry else e for e in ENTRIES]
    with site.write.begin() as session:
        sync_catalogue(session, fewer, now=NOW)
        paper = queries.by_slug(session, entry.slug)
        names = set(session.scalars(select(ClaimRow.name).where(ClaimRow.paper_id == paper.id)))
    assert names == {outcome.claim.id for outcome in entry.outcomes[1:]}
    assert isinstance(paper.date, datetime.date)
