"""Answers to comments, arXiv papers that readers propose, and what the last imports brought.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A column and two tables."""
    with op.batch_alter_table("comment") as comment:
        comment.add_column(sa.Column("thread_id", sa.Integer(), nullable=True))
        comment.create_foreign_key(
            "fk_comment_thread_id_comment", "comment", ["thread_id"], ["id"], ondelete="SET NULL"
        )
    op.create_index("ix_comment_thread_id", "comment", ["thread_id"])
    op.create_table(
        "submission",
        sa.Column("arxiv", sa.String(length=20), nullable=False),
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["person_id"], ["person.id"], name="fk_submission_person_id_person", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("arxiv", name="pk_submission"),
    )
    op.create_index("ix_submission_person_id", "submission", ["person_id"])
    op.create_table(
        "last_import",
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("added", sa.Integer(), nullable=False),
        sa.Column("seen", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("worked_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("source", name="pk_last_import"),
    )


def downgrade() -> None:
    """Remove them."""
    op.drop_table("last_import")
    op.drop_table("submission")
    op.drop_index("ix_comment_thread_id", "comment")
    with op.batch_alter_table("comment") as comment:
        comment.drop_constraint("fk_comment_thread_id_comment", type_="foreignkey")
        comment.drop_column("thread_id")
