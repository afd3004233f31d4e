"""Moderators, hidden comments, reports, banned people, removed papers, and names that are one person's alone.

Revision: 0004, after 0003. Of several people with one name all but the first lose it; reserved names are lost.
"""

import sqlalchemy as sa
from alembic import op

from regularized.site.names import is_reserved, skeleton

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _fill_names() -> None:
    connection = op.get_bind()
    person = sa.table("person", sa.column("id"), sa.column("name"), sa.column("name_key"))
    taken: set[str] = set()
    for number, name in connection.execute(sa.select(person.c.id, person.c.name).order_by(person.c.id)).all():
        key = skeleton(name)[:120]
        values = {"name": "", "name_key": None}
        if key and key not in taken and not is_reserved(name):
            taken.add(key)
            values = {"name": name, "name_key": key}
        connection.execute(sa.update(person).where(person.c.id == number).values(**values))


def upgrade() -> None:
    """New columns and tables."""
    with op.batch_alter_table("person") as person:
        person.add_column(sa.Column("name_key", sa.String(length=120), nullable=True))
        person.add_column(sa.Column("role", sa.String(length=20), nullable=False, server_default=""))
        person.add_column(sa.Column("banned_because", sa.Text(), nullable=True))
    _fill_names()
    op.create_index("ix_person_name_key", "person", ["name_key"], unique=True)
    with op.batch_alter_table("comment") as comment:
        comment.add_column(sa.Column("hidden_because", sa.Text(), nullable=True))
    op.create_table(
        "report",
        sa.Column("comment_id", sa.Integer(), nullable=False),
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["comment_id"], ["comment.id"], name="fk_report_comment_id_comment", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["person_id"], ["person.id"], name="fk_report_person_id_person", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("comment_id", "person_id", name="pk_report"),
    )
    op.create_index("ix_report_person_id", "report", ["person_id"])
    op.create_table(
        "moderation_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("moderator", sa.String(length=254), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_moderation_event"),
    )
    op.create_index("ix_moderation_event_at", "moderation_event", ["at"])
    op.create_table(
        "removed_paper",
        sa.Column("title_key", sa.String(length=300), nullable=False),
        sa.Column("arxiv", sa.String(length=20), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("title_key", name="pk_removed_paper"),
    )
    op.create_index("ix_removed_paper_arxiv", "removed_paper", ["arxiv"])


def downgrade() -> None:
    """Remove them."""
    for table in ("removed_paper", "moderation_event", "report"):
        op.drop_table(table)
    with op.batch_alter_table("comment") as comment:
        comment.drop_column("hidden_because")
    op.drop_index("ix_person_name_key", "person")
    with op.batch_alter_table("person") as person:
        for name in ("name_key", "role", "banned_because"):
            person.drop_column(name)
