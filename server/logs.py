"""Log lines on standard error: an event a line, as JSON for machines or as text for people.

The code logs `"event key=%s other=%d"` with arguments, through the standard library; here the event and the fields are
told apart again, by the template and not by the text, so that nothing a participant or a client says can make a field
or a line. Libraries have no events: theirs is `log_message`, with the text as `message`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from itertools import islice
from math import isfinite
from types import TracebackType
from typing import Any, NamedTuple

from saga import log_fields
from server.config import LogConfig, LogFormat
from server.redaction import Mask

MAX_VALUE_CHARS = 4096
MAX_TRACEBACK_CHARS = 32 * 1024
"""A participant's or a client's text may be in a line; the line is not to be as long as it likes. Guesses."""

MAX_WAITING_BYTES = 1024 * 1024
"""What is kept of lines that nobody reads just now; more is lost, and counted."""
CHUNK_BYTES = select.PIPE_BUF
"""What a pipe that can be written to takes without waiting, in one piece."""
LAST_SECS = 1.0
"""How long the end of the process waits for whoever reads the lines."""


def configure(config: LogConfig, mask: Mask | None = None, *, worker: int | None = None) -> None:
    """Sets the process's log level and form; `mask`: what no line shows; `worker`: its number among several, which each
    line then names. Libraries speak from WARNING up: their chatter would drown ours."""
    as_json = config.format is LogFormat.JSON or (config.format is LogFormat.AUTO and not sys.stderr.isatty())
    mask = mask or Mask()
    handler = LineHandler(sys.stderr.fileno())
    handler.setFormatter(JsonLines(mask, worker) if as_json else TextLines(mask, worker))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("saga").setLevel(config.level.value.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_crash
    threading.excepthook = _log_thread_crash
    sys.unraisablehook = _log_unraisable
    # Its pool tells with a traceback each time that the database is away, which we say in a line.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    # Of a broker that is away it would say so many times a second; saga.outbox says it once, with the reason.
    logging.getLogger("aiokafka").propagate = False
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())


def flush() -> None:
    """Gives whoever reads the lines a last `LAST_SECS` to take those that wait. The interpreter does so when it ends;
    who ends without it (`os._exit`) has to."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def lines_lost() -> int:
    """How many lines nobody took in time, since this process began."""
    return sum(handler.lost_in_all for handler in logging.getLogger().handlers if isinstance(handler, LineHandler))


_log = logging.getLogger("saga.process")


def tell_why_not(problem: str, who: str = "saga") -> None:
    """Says on standard error why this process cannot run, each line of it: as lines like all others where whoever reads
    them expects JSON, else as commands do."""
    as_json = any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)
    for line in problem.splitlines():
        if as_json:
            _log.critical("cannot_start problem=%s", line)
        else:
            print(f"{who}: {line}", file=sys.stderr)


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        _log.critical("crashed", exc_info=(kind, error, trace))


def _log_thread_crash(told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None and not isinstance(told.exc_value, SystemExit):
        name = told.thread.name if told.thread is not None else "none"
        _log.error("thread_crashed thread=%s", name, exc_info=told.exc_value)


def _log_unraisable(told: Any) -> None:
    _log.error("error_ignored message=%s", told.err_msg or "in a finalizer", exc_info=told.exc_value)


# --- what is in a line -----------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """`name=%s`; or `name=http://%s:%d`, of which `form` is the right side, `arity` 2, and which is no `plain` one."""

    name: str
    form: str
    arity: int
    plain: bool


class Template(NamedTuple):
    event: str
    fields: tuple[Field, ...]


_SPEC = re.compile(r"%[-#0+]*[0-9]*(?:\.[0-9]+)?[a-zA-Z]")
_TEMPLATE = re.compile(rf"[a-z][a-z0-9_]*(?: [a-z][a-z0-9_]*=(?:[^ %]*{_SPEC.pattern})+[^ %]*)*")
_FIELD = re.compile(r" ([a-z][a-z0-9_]*)=(\S+)")
LIBRARY_EVENT = "log_message"

_templates: dict[str, Template | None] = {}
"""By the text of the template. Those of libraries are not kept: some put values into theirs."""


def template_of(message: object) -> Template | None:
    """The event and the fields a log call names; None: it is none of ours."""
    if not isinstance(message, str):
        return None
    known = _templates.get(message)
    if known is None and _TEMPLATE.fullmatch(message):
        fields = tuple(
            Field(name, form, len(_SPEC.findall(form)), _SPEC.fullmatch(form) is not None)
            for name, form in _FIELD.findall(message)
        )
        known = _templates[message] = Template(message.partition(" ")[0], fields)
    return known


class Line(NamedTuple):
    """A record, told apart. `fields` in the order of the call, then those of the context; values are masked and cut."""

    event: str
    fields: dict[str, str | int | float | bool | None]
    traceback: str | None


class Lines(logging.Formatter):
    """The base of both forms."""

    def __init__(self, mask: Mask, worker: int | None) -> None:
        super().__init__()
        self._mask = mask
        self._worker = worker
        self._second = (0, "")

    def line(self, record: logging.LogRecord) -> Line:
        template = template_of(record.msg) if record.name.partition(".")[0] == "saga" else None
        arguments = record.args if isinstance(record.args, tuple) else ()
        fields: dict[str, str | int | float | bool | None] = {}
        if template is not None and len(arguments) == sum(field.arity for field in template.fields):
            event = template.event
            left = iter(arguments)
            for name, form, arity, plain in template.fields:
                fields[name] = _value(form, next(left)) if plain else form % tuple(islice(left, arity))
        else:
            event = LIBRARY_EVENT
            fields["message"] = _message(record)
        for name, known in log_fields.current().items():
            fields.setdefault(name, known)
        # As a rule there is nothing to mask or to cut, which is seen at once for all of them. A line end parts texts
        # for the mask as their ends do.
        texts = "\n".join([value for value in fields.values() if isinstance(value, str)])
        if len(texts) > MAX_VALUE_CHARS or not texts.isascii() or self._mask(texts) != texts:
            for name, value in fields.items():
                if isinstance(value, str):
                    fields[name] = self._text(value, MAX_VALUE_CHARS)
        traceback = None
        if record.exc_info and record.exc_info[0] is not None:
            traceback = self.formatException(record.exc_info)
        if record.stack_info:
            traceback = f"{traceback}\n{record.stack_info}" if traceback else record.stack_info
        if traceback is not None:
            traceback = self._text(traceback, MAX_TRACEBACK_CHARS)
        return Line(event, fields, traceback)

    def _text(self, text: str, most: int) -> str:
        if not text.isascii():
            # A lone surrogate is no character to UTF-8, nor to readers of JSON.
            text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        text = self._mask(text)  # whole: half a secret would not be known for one
        return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"

    def instant(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{int(record.msecs):03d}Z"


class JsonLines(Lines):
    def format(self, record: logging.LogRecord) -> str:
        event, fields, traceback = self.line(record)
        line: dict[str, object] = {
            "time": self.instant(record),
            "level": record.levelname.lower(),
            "event": event,
            "logger": record.name,
        }
        if self._worker is not None:
            line["worker"] = self._worker
        for name, value in fields.items():
            line.setdefault(name, value)
        if traceback is not None:
            line["traceback"] = traceback
        # ASCII alone: whatever a terminal or a reader of lines takes for a control or a line end is escaped.
        return json.dumps(line, default=str)


_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""What needs no quotes in text: printable ASCII without blanks, quotes, `=` and backslashes."""
_CONTROL = re.compile(
    r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]|[\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class TextLines(Lines):
    def format(self, record: logging.LogRecord) -> str:
        event, fields, traceback = self.line(record)
        worker = "" if self._worker is None else f"worker-{self._worker} "
        told = [f"{self.instant(record)} {record.levelname:<7} {worker}{record.name} {event}"]
        told += [f"{name}={_quoted(value)}" for name, value in fields.items()]
        line = " ".join(told)
        if traceback is not None:
            # Indented, so that no line of it can pass for one of ours.
            line += "".join(f"\n    {_escaped(below)}" for below in traceback.splitlines())
        return line


def _quoted(value: object) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    return value if _PLAIN.fullmatch(value) else _escaped(json.dumps(value, ensure_ascii=False))


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _value(form: str, value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(form % value) if form[-1] in "fg" and isfinite(value) else str(value)
    # A repr of a text only says where it ends, which both forms of a line do by themselves.
    return repr(value) if form[-1] == "r" and not isinstance(value, str) else str(value)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # a call whose arguments do not fit still tells its template
        return str(record.msg)


# --- where lines go --------------------------------------------------------------------------------------------------


class LineHandler(logging.Handler):
    """Writes lines to a descriptor, and never waits for whoever reads them: a pipe that nobody empties must not hold up
    the loop, or every saga of this process with it.

    A line is written at once where it can be. Else it waits, up to `MAX_WAITING_BYTES` of them, for the next line or
    the end of the process; lines beyond that are lost, and the next that gets through says how many.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._ready = select.poll()
        self._ready.register(descriptor, select.POLLOUT)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self.lost = 0
        """Lines of which it has not been told yet that they are."""
        self.lost_in_all = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        except Exception:  # noqa: BLE001  # what cannot be told must not break who tells it
            line = b'{"event": "log_line_broken", "level": "error"}\n'
        if self.lost and self._waiting_bytes < MAX_WAITING_BYTES // 2:
            lost, self.lost = self.lost, 0
            self._put(self.format(_lost(lost)).encode() + b"\n")
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self.lost += 1
            self.lost_in_all += 1
        else:
            self._put(line)
        self.drain(0.0)

    def flush(self) -> None:
        self.drain(LAST_SECS)

    def _put(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)

    def drain(self, secs: float) -> None:
        """Writes what waits; for up to `secs` if whoever reads takes their time."""
        with self.lock or threading.RLock():
            ends_at = time.monotonic() + secs
            while self._waiting:
                if not self._ready.poll(max(0.0, ends_at - time.monotonic()) * 1000):
                    return
                line = self._waiting[0]
                try:
                    written = os.write(self._descriptor, line[:CHUNK_BYTES])
                except BlockingIOError:
                    return
                except OSError:
                    self._waiting.clear()  # the reader is gone, and there is nobody to tell
                    self._waiting_bytes = 0
                    return
                self._waiting_bytes -= written
                if written == len(line):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = line[written:]


def _lost(count: int) -> logging.LogRecord:
    return logging.LogRecord("saga.process", logging.WARNING, "", 0, "log_lines_lost count=%d", (count,), None)
