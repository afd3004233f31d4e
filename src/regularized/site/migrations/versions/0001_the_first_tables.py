"""The first tables.

Revision: 0001, after None.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

COLUMNS = ("searches", "problem", "title", "tags", "families", "claims", "use", "summary", "names")


def _sqlite_search() -> None:
    """FTS5 over `search_text`, whose rows it does not copy; triggers keep it up to date."""
    columns = ", ".join(COLUMNS)
    old, new = (", ".join(f"{row}.{name}" for name in COLUMNS) for row in ("old", "new"))
    forget = f"INSERT INTO paper_fts(paper_fts, rowid, {columns}) VALUES ('delete', old.paper_id, {old})"
    learn = f"INSERT INTO paper_fts(rowid, {columns}) VALUES (new.paper_id, {new})"
    for statement in (
        f"CREATE VIRTUAL TABLE paper_fts USING fts5({columns}, content='search_text', content_rowid='paper_id', "
        "tokenize='porter unicode61 remove_diacritics 2')",
        f"CREATE TRIGGER search_text_insert AFTER INSERT ON search_text BEGIN {learn}; END",
        f"CREATE TRIGGER search_text_delete AFTER DELETE ON search_text BEGIN {forget}; END",
        f"CREATE TRIGGER search_text_update AFTER UPDATE ON search_text BEGIN {forget}; {learn}; END",
    ):
        op.execute(sa.text(statement.replace(":", r"\:")))


def _postgresql_search() -> None:
    """A text-search vector with the weights A to D, computed by the database, and its index."""
    weights = {"A": ("searches", "problem"), "B": ("title", "tags", "names"), "C": ("families",)}
    weights["D"] = tuple(name for name in COLUMNS if not any(name in names for names in weights.values()))
    vector = " || ".join(
        f"setweight(to_tsvector('english', {name}), '{letter}')" for letter, names in weights.items() for name in names
    )
    op.execute(f"ALTER TABLE search_text ADD COLUMN vector tsvector GENERATED ALWAYS AS ({vector}) STORED")
    op.execute("CREATE INDEX ix_search_text_vector ON search_text USING gin(vector)")


def upgrade() -> None:
    """Make the tables and the full-text index."""
    op.create_table(
        "paper",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("slug", sa.String(length=120), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("title_key", sa.String(length=300), nullable=False),
        sa.Column("arxiv", sa.String(length=20), nullable=True),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("listed_on", sa.Date(), nullable=False),
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("added_at", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("abstract", sa.Text(), nullable=False),
        sa.Column("authors", sa.JSON(), nullable=False),
        sa.Column("authors_count", sa.Integer(), nullable=False),
        sa.Column("organization", sa.Text(), nullable=False),
        sa.Column("venue", sa.Text(), nullable=False),
        sa.Column("listed_comments", sa.Integer(), nullable=False),
        sa.Column("listed_votes", sa.Integer(), nullable=False),
        sa.Column("families", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("code_url", sa.Text(), nullable=False),
        sa.Column("card", sa.JSON(), nullable=False),
        sa.Column("has_card", sa.Boolean(), nullable=False),
        sa.Column("runs", sa.Boolean(), nullable=False),
        sa.Column("held", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("undecided", sa.Integer(), nullable=False),
        sa.Column("not_run", sa.Integer(), nullable=False),
        sa.Column("standing", sa.Double(), nullable=False),
        sa.Column("margin", sa.Double(), nullable=False),
        sa.Column("votes", sa.Integer(), nullable=False),
        sa.Column("comments", sa.Integer(), nullable=False),
        sa.Column("heat", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_paper"),
        sa.UniqueConstraint("arxiv", name="uq_paper_arxiv"),
        sa.UniqueConstraint("slug", name="uq_paper_slug"),
    )
    op.create_index("ix_paper_added_at", "paper", ["added_at", "id"])
    op.create_index("ix_paper_best", "paper", ["standing", "margin", "date", "id"])
    op.create_index("ix_paper_date", "paper", ["date", "id"])
    op.create_index("ix_paper_has_card", "paper", ["has_card"])
    op.create_index("ix_paper_heat", "paper", ["heat", "id"])
    op.create_index("ix_paper_listed_on", "paper", ["listed_on", "standing", "margin", "date", "id"])
    op.create_index("ix_paper_runs", "paper", ["runs"])
    op.create_index("ix_paper_title_key", "paper", ["title_key"])

    op.create_table(
        "person",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_person"),
        sa.UniqueConstraint("email", name="uq_person_email"),
    )
    op.create_table(
        "rate_count",
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("window", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("key", "window", name="pk_rate_count"),
    )
    op.create_index("ix_rate_count_window", "rate_count", ["window"])

    op.create_table(
        "search_word",
        sa.Column("word", sa.String(length=60), nullable=False),
        sa.PrimaryKeyConstraint("word", name="pk_search_word"),
    )
    op.create_table(
        "sign_in_token",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("goes_to", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_sign_in_token"),
    )
    op.create_index("ix_sign_in_token_expires_at", "sign_in_token", ["expires_at"])

    op.create_table(
        "subscription",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("frequency", sa.String(length=10), nullable=False),
        sa.Column("families", sa.JSON(), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("confirmed_at", sa.BigInteger(), nullable=True),
        sa.Column("sent_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_subscription"),
        sa.UniqueConstraint("email", name="uq_subscription_email"),
    )
    op.create_table(
        "alias",
        sa.Column("slug", sa.String(length=120), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_alias_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("slug", name="pk_alias"),
    )
    op.create_table(
        "claim",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.Column("verdict", sa.String(length=20), nullable=False),
        sa.Column("effect", sa.Double(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_claim_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_claim"),
        sa.UniqueConstraint("paper_id", "name", name="uq_claim_paper_id_name"),
    )
    op.create_index("ix_claim_verdict", "claim", ["verdict"])

    op.create_table(
        "comment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("html", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_comment_paper_id_paper", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["person_id"], ["person.id"], name="fk_comment_person_id_person", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_comment"),
    )
    op.create_index("ix_comment_paper_id", "comment", ["paper_id"])
    op.create_index("ix_comment_person_id", "comment", ["person_id"])

    op.create_table(
        "embedding",
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(length=120), nullable=False),
        sa.Column("text_key", sa.String(length=64), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_embedding_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("paper_id", "model", name="pk_embedding"),
    )
    op.create_table(
        "follow",
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("family", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["person_id"], ["person.id"], name="fk_follow_person_id_person", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("person_id", "family", name="pk_follow"),
    )
    op.create_table(
        "login_session",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["person_id"], ["person.id"], name="fk_login_session_person_id_person", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", name="pk_login_session"),
    )
    op.create_index("ix_login_session_expires_at", "login_session", ["expires_at"])
    op.create_index("ix_login_session_person_id", "login_session", ["person_id"])

    op.create_table(
        "paper_family",
        sa.Column("family", sa.String(length=40), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_paper_family_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("family", "paper_id", name="pk_paper_family"),
    )
    op.create_index("ix_paper_family_paper_id", "paper_family", ["paper_id"])

    op.create_table(
        "paper_tag",
        sa.Column("tag", sa.String(length=80), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_paper_tag_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tag", "paper_id", name="pk_paper_tag"),
    )
    op.create_index("ix_paper_tag_paper_id", "paper_tag", ["paper_id"])

    op.create_table(
        "search_text",
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("searches", sa.Text(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("families", sa.Text(), nullable=False),
        sa.Column("claims", sa.Text(), nullable=False),
        sa.Column("use", sa.Text(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("names", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_search_text_paper_id_paper", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("paper_id", name="pk_search_text"),
    )
    op.create_table(
        "verdict_change",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("claim", sa.String(length=80), nullable=False),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.Column("old", sa.String(length=20), nullable=False),
        sa.Column("new", sa.String(length=20), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["paper_id"], ["paper.id"], name="fk_verdict_change_paper_id_paper", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_verdict_change"),
    )
    op.create_index("ix_verdict_change_at", "verdict_change", ["at"])
    op.create_index("ix_verdict_change_paper_id", "verdict_change", ["paper_id"])

    op.create_table(
        "vote",
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("paper_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["paper.id"], name="fk_vote_paper_id_paper", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["person_id"], ["person.id"], name="fk_vote_person_id_person", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("person_id", "paper_id", name="pk_vote"),
    )
    op.create_index("ix_vote_paper_id", "vote", ["paper_id"])
    if op.get_context().dialect.name == "sqlite":
        _sqlite_search()
    else:
        _postgresql_search()


def downgrade() -> None:
    """Remove them."""
    if op.get_context().dialect.name == "sqlite":
        op.execute("DROP TABLE paper_fts")
    op.drop_table("vote")
    op.drop_table("verdict_change")
    op.drop_table("search_text")
    op.drop_table("paper_tag")
    op.drop_table("paper_family")
    op.drop_table("login_session")
    op.drop_table("follow")
    op.drop_table("embedding")
    op.drop_table("comment")
    op.drop_table("claim")
    op.drop_table("alias")
    op.drop_table("subscription")
    op.drop_table("sign_in_token")
    op.drop_table("search_word")
    op.drop_table("rate_count")
    op.drop_table("person")
    op.drop_table("paper")
