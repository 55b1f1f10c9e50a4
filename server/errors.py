"""Errors of the command line and of starting up: an operator's to mend.

ConfigInvalid (server/config.py)    the configuration breaks rules
CannotStart                         the environment does not allow what is configured
"""

from __future__ import annotations


class CannotStart(Exception):
    """The server, or a command, cannot run as it is configured; the text says what to change."""


def refused_by_database(error: Exception) -> CannotStart:
    """The database is there and will not have us: the cause in its words, and where to look."""
    return CannotStart(f"{error}; see `database` in the configuration, or DATABASE_URL")
