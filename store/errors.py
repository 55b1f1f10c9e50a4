"""What can be wrong with a database before or beneath the port; all of it is the environment's or the operator's.

saga.errors.SagaError
+-- saga.errors.Unavailable
|   +-- StoreInUse              another process has the embedded database open
|   +-- StoreRefuses            the database is there and will not have us: a person has to mend that
+-- MigrationError              schema and code do not fit
    +-- SchemaNewer             the database was migrated by a newer release than this
    +-- MigrationChanged        a migration that was applied is not the file at hand
"""

from __future__ import annotations

from saga.errors import SagaError, Unavailable


class StoreInUse(Unavailable):
    """Another process has the embedded database open; the text names the file."""


class StoreRefuses(Unavailable):
    """The database is there and will not have us: the password, its name, a right, a certificate, TLS that it has not.
    Waiting does not help a server that is just being started; one that runs goes on trying, as a person may mend it
    over there."""


class MigrationError(SagaError):
    """Schema and code do not fit each other; nothing was changed."""


class SchemaNewer(MigrationError):
    """The database has migrations this release does not know."""


class MigrationChanged(MigrationError):
    """A migration was applied from another text than the file at hand."""
