"""Run by Alembic: migrates over the connection, and inside the transaction, of the one who asked for it."""

from alembic import context

from cachesrv.catalog.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
