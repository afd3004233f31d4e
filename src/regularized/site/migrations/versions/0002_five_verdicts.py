"""Five verdicts, counted in one column; claims that are true by construction stand apart.

Revision: 0002, after 0001. Papers and claims are written again from the package whenever a site starts, so that nothing
that was counted before is carried over.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COUNTS = ("failed", "undecided", "not_run")


def upgrade() -> None:
    """One column of counts for three; longer words."""
    with op.batch_alter_table("paper") as paper:
        for name in _COUNTS:
            paper.drop_column(name)
        paper.add_column(sa.Column("verdicts", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("claim") as claim:
        claim.alter_column("verdict", existing_type=sa.String(20), type_=sa.String(40), existing_nullable=False)
        claim.add_column(sa.Column("kind", sa.String(20), nullable=False, server_default="claim"))
    with op.batch_alter_table("verdict_change") as change:
        for name in ("old", "new"):
            change.alter_column(name, existing_type=sa.String(20), type_=sa.String(40), existing_nullable=False)


def downgrade() -> None:
    """Three columns of counts, at zero."""
    with op.batch_alter_table("verdict_change") as change:
        for name in ("old", "new"):
            change.alter_column(name, existing_type=sa.String(40), type_=sa.String(20), existing_nullable=False)
    with op.batch_alter_table("claim") as claim:
        claim.drop_column("kind")
        claim.alter_column("verdict", existing_type=sa.String(40), type_=sa.String(20), existing_nullable=False)
    with op.batch_alter_table("paper") as paper:
        paper.drop_column("verdicts")
        for name in _COUNTS:
            paper.add_column(sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
