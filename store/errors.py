"""What can be wrong with a database before or beneath the port; all of it is the environment's or the operator's.

saga.errors.SagaError
+-- saga.errors.Unavailable
|   +-- StoreInUse              another process has the embedded database open
+-- MigrationError              schema and code do not fit
    +-- SchemaNewer             the database was migrated by a newer release than this
    +-- MigrationChanged        a migration that was applied is not the file at hand
"""

from __future__ import annotations

from saga.errors import SagaError, Unavailable


class StoreInUse(Unavailable):
    """Another process has the embedded database open; the text names the file."""


class MigrationError(SagaError):
    """Schema and code do not fit each other; nothing was changed."""


class SchemaNewer(MigrationError):
    """The database has migrations this release does not know."""


class MigrationChanged(MigrationError):
    """A migration was applied from another text than the file at hand."""
