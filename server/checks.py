"""What a configuration asks for and this installation cannot do: refused before anything is opened."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from rpc.reflection import catalog_from_descriptor_set
from server.config import Config, ConfigInvalid
from server.tls import file_problems

log = logging.getLogger("saga.server")


def check(config: Config) -> None:
    """Refuses (`ConfigInvalid`) what this release cannot do, and access by anybody unless it is `insecure`."""
    _refuse_what_is_not_there(config)
    config.refuse_open_access()
    if config.auth is None and not config.server.is_loopback:
        log.warning(
            "no_access_control host=%s message=%s",
            config.server.host,
            "anyone who can reach it can start and cancel sagas",
        )


def _refuse_what_is_not_there(config: Config) -> None:
    """Better no server than one that seems to check tokens or to encrypt and does not."""
    missing = []
    missing += _missing_extra(config)
    missing += _unusable_descriptor_sets(config)
    missing += file_problems(config)
    if missing:
        raise ConfigInvalid(tuple(missing))


def _missing_extra(config: Config) -> list[str]:
    if config.observability.otlp is None:
        return []
    try:
        importlib.import_module("server.spans")
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "server":
            raise
        return [
            f"observability.otlp: expected the extra for it to be installed, but there is no {error.name}: "
            "pip install 'saga-orchestrator[otel]'"
        ]
    return []


def _unusable_descriptor_sets(config: Config) -> list[str]:
    """A file that is not there, or is none, would only be noticed by the first saga that calls the service."""
    problems = []
    for name, service in config.services.items():
        if service.descriptor_set is not None:
            try:
                catalog_from_descriptor_set(Path(service.descriptor_set).read_bytes())
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                problems.append(f"services.{name}.descriptor_set: {service.descriptor_set}: {reason}")
    return problems
