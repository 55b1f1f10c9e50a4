"""Whom a log line is about, beside what its event says: kept for each request and each run of a saga.

Whoever begins one of them opens its fields, whoever learns more adds to them, and the formatter puts them into every
line that is written meanwhile, by a library too. They follow the context of the task, into the tasks it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from saga.model import Saga
from saga.tracing import trace_id_of

_NONE: Mapping[str, str] = {}
_fields: ContextVar[dict[str, str] | None] = ContextVar("log_fields", default=None)


def current() -> Mapping[str, str]:
    """The fields of the line that is being written."""
    return _fields.get() or _NONE


@contextmanager
def about(**fields: str) -> Iterator[dict[str, str]]:
    """Lines within the block have these fields, and those of the block around it. What `note_saga` adds within it, in
    whichever task, is in the value too."""
    opened = {**(_fields.get() or _NONE), **fields}
    token = _fields.set(opened)
    try:
        yield opened
    finally:
        _fields.reset(token)


@contextmanager
def about_no_one() -> Iterator[None]:
    """Lines within the block are about the process, whichever saga or request has come upon what they tell."""
    token = _fields.set(None)
    try:
        yield
    finally:
        _fields.reset(token)


@contextmanager
def about_saga(saga: Saga) -> Iterator[None]:
    """Lines within the block are about this saga."""
    with about(trace_id=trace_id_of(saga)):
        note_saga(saga)
        yield


def note_saga(saga: Saga) -> None:
    """The request, or the run, turned out to be about this saga; a request in a trace of its caller's stays there.
    Outside of both there is nothing to add to."""
    fields = _fields.get()
    if fields is not None:
        fields["saga_id"] = saga.saga_id
        fields.setdefault("trace_id", trace_id_of(saga))
        if saga.correlation_id is not None:
            fields["correlation_id"] = saga.correlation_id
