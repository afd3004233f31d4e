"""Alembic's environment: migrates the connection that it is handed. It is run by alembic, never imported."""

from alembic import context

from regularized.site.models import Base


def _run() -> None:
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
    )
    context.run_migrations()


if hasattr(context, "config"):
    _run()
