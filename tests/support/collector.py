"""A collector of spans: OTLP over HTTP as OpenTelemetry's own collector takes it, in a thread of the test's process."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATIENCE_SECS = 60.0


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A span as it came; ids in hex, `parent` "" for the first of a trace, instants in nanoseconds."""

    trace_id: str
    span_id: str
    parent: str
    name: str
    kind: int
    start: int
    end: int
    failed: bool
    message: str
    tracestate: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """`status` is answered to whatever comes; only what is answered with 200 counts as collected."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: list[dict[str, str]] = []
        self._spans: list[Seen] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def spans(self, trace_id: str | None = None) -> list[Seen]:
        """What has come, oldest first; of one trace."""
        with self._lock:
            return [span for span in self._spans if trace_id in (None, span.trace_id)]

    def until(self, enough: Callable[[list[Seen]], bool]) -> list[Seen]:
        """Returns when what has come is enough."""
        give_up_at = time.monotonic() + PATIENCE_SECS
        while not enough(spans := self.spans()):
            assert time.monotonic() < give_up_at, [(span.name, span.trace_id) for span in spans]
            time.sleep(0.02)  # another process sends them when it likes
        return spans

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status = collector.status if self.path == "/v1/traces" else 404
                collector._take(dict(self.headers), ExportTraceServiceRequest.FromString(body), status == 200)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _take(self, headers: dict[str, str], request: ExportTraceServiceRequest, kept: bool) -> None:
        with self._lock:
            self.headers.append(headers)
            if kept:
                for of_resource in request.resource_spans:
                    resource = _attributes(of_resource.resource.attributes)
                    for scope in of_resource.scope_spans:
                        self._spans += [_seen(span, resource) for span in scope.spans]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _seen(span: Any, resource: dict[str, Any]) -> Seen:
    return Seen(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=span.kind,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        message=span.status.message,
        tracestate=span.trace_state,
        attributes=_attributes(span.attributes),
        resource=resource,
    )


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens for as long as the block lasts."""
    running = Collector()
    running._thread.start()
    try:
        yield running
    finally:
        running._server.shutdown()
        running._thread.join()
        running._server.server_close()
