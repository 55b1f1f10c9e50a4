"""Log lines: one event name and its fields a line, on standard error."""

from __future__ import annotations

import logging
import sys
import time

FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s %(message)s"


def configure(level: str, *, worker: int | None = None) -> None:
    """Sets the process's log level and form; `worker`: its number among several, which each line then names. Libraries
    speak from WARNING up: their chatter would drown ours."""
    handler = logging.StreamHandler(sys.stderr)
    form = FORMAT if worker is None else FORMAT.replace("%(name)s", f"worker-{worker} %(name)s")
    formatter = logging.Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("saga").setLevel(level)
    # Its pool tells with a traceback each time that the database is away, which we say in a line.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    # Of a broker that is away it would say so many times a second; saga.outbox says it once, with the reason.
    logging.getLogger("aiokafka").propagate = False
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
