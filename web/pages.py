"""Three pages for people: the sagas, one saga as a timeline with the undo beside each step, and the audit log.

Rendered on the server and read only; the one script reloads the page while a saga is on its way. What is shown comes
from `SagaService` alone, through the same parsing as the API; who may see it is `sign_in.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlencode

import msgspec
import quart
from quart import Response
from quart_trio import QuartTrio

from saga.access import Permission
from saga.audit import AuditAction, AuditFilter
from saga.audit_trail import AuditPage
from saga.error_codes import INTERNAL_MESSAGE, told_text
from saga.errors import NotFound, RequestError, Unavailable
from saga.mapping import rfc3339
from saga.model import Saga, SagaStatus, StepAction, StepLog
from saga.payload_mask import PayloadMask
from saga.ports import SagaFilter
from saga.service import SagaService
from saga.workflow import Step
from web import schema
from web.asgi_scope import PRINCIPAL
from web.errors import headers_of, status_of
from web.parsing import parse_query
from web.sign_in import PAGE_HEADERS

PAGES: Mapping[str, Permission] = {
    "sagas_page": Permission.READ_SAGAS,
    "saga_page": Permission.READ_SAGAS,
    "audit_page": Permission.READ_AUDIT,
}
"""What each page, by its endpoint, asks of its reader."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One step on the timeline: what was done, what was undone, and the words for what is under way or due."""

    number: int
    name: str
    calls: str
    undone_by: str | None
    done: StepLog | None
    undone: StepLog | None
    doing: str
    undoing: str


def add_pages(app: QuartTrio, service: SagaService, payload_mask: PayloadMask) -> None:
    """Adds `/`, `/sagas/{saga_id}` and `/audit`."""

    def masked_json(value: object) -> str:
        return _json(payload_mask.value(value))

    app.jinja_env.filters.update(instant=rfc3339, ms=_ms, json=masked_json, masked=payload_mask.text)

    @app.get("/")
    async def sagas_page() -> Response:
        chosen = {name: value for name, value in quart.request.args.items() if value}
        try:
            # A form sends its empty fields too; they do not filter.
            query = parse_query(urlencode(chosen).encode(), schema.ListSagasQuery)
            where = SagaFilter(
                workflow_name=query.workflow_name,
                status=query.status,
                correlation_id=query.correlation_id,
                compensation_failed=True if query.compensation_failed == "true" else None,
            )
            page = await service.list_sagas(where, page=query.page, page_size=query.page_size, cursor=query.cursor)
        except RequestError as error:
            return await _page("message.html", status_of(error)[0], title="That cannot be listed", message=str(error))
        older = urlencode({**chosen, "cursor": page.next_cursor}) if page.next_cursor else None
        return await _page("sagas.html", 200, page=page, chosen=chosen, older=older, statuses=list(SagaStatus))

    @app.get("/sagas/<saga_id>")
    async def saga_page(saga_id: str) -> Response:
        try:
            detail = await service.get(saga_id)
            workflow = await service.workflow_of(detail.saga)
        except NotFound as error:
            return await _page("message.html", 404, title="No such saga", message=str(error))
        rows = [_row(number, step, detail.saga, detail.step_logs) for number, step in enumerate(workflow.steps)]
        asked: AuditPage | None = None
        if cast(dict[str, Any], quart.request.scope)[PRINCIPAL].may(Permission.READ_AUDIT):
            asked = await service.audit.entries(AuditFilter(saga_id=detail.saga.saga_id))
        return await _page("saga.html", 200, saga=detail.saga, rows=rows, asked=asked)

    @app.get("/audit")
    async def audit_page() -> Response:
        chosen = {name: value for name, value in quart.request.args.items() if value}
        try:
            query = parse_query(urlencode(chosen).encode(), schema.ListAuditQuery)
            page = await service.audit.entries(
                schema.audit_filter(query), page_size=query.page_size, cursor=query.cursor
            )
        except RequestError as error:
            return await _page("message.html", status_of(error)[0], title="That cannot be listed", message=str(error))
        older = urlencode({**chosen, "cursor": page.next_cursor}) if page.next_cursor else None
        return await _page("audit.html", 200, page=page, chosen=chosen, older=older, actions=list(AuditAction))


def _row(number: int, step: Step, saga: Saga, logs: list[StepLog]) -> Row:
    # The newest log of each action: a compensation that was run again has an older one.
    latest = {log.action: log for log in logs if log.step_index == number}
    attempt = f"attempt {saga.attempt}" if saga.attempt else ""
    runs = saga.status is SagaStatus.RUNNING and number == saga.current_step
    undoes = saga.undo_plan[:1] == (number,)
    return Row(
        number=number + 1,
        name=step.name,
        calls=f"{step.service} · {step.method}",
        undone_by=step.compensate,
        done=latest.get(StepAction.EXECUTE),
        # Of one that runs again, what came of it before is history.
        undone=None if number in saga.undo_plan else latest.get(StepAction.COMPENSATE),
        doing=attempt if runs else "",
        undoing=attempt if undoes else "to be undone" if number in saga.undo_plan else "",
    )


async def error_page(error: Exception, request_id: str) -> Response:
    """A page in place of the one that `error` prevented."""
    status, _ = status_of(error)
    title = "Not now" if isinstance(error, Unavailable) else "That went wrong"
    message = f"{INTERNAL_MESSAGE}; the log tells more under {request_id}" if status == 500 else told_text(error)
    page = await _page("message.html", status, title=title, message=message)
    page.headers.update(headers_of(error))
    return page


async def _page(template: str, status: int, **values: object) -> Response:
    text = await quart.render_template(template, **values)
    return Response(text, status, {"Content-Type": "text/html; charset=utf-8", **PAGE_HEADERS})


def _ms(log: StepLog) -> str:
    ended: datetime | None = log.completed_at
    return "" if ended is None else f"{(ended - log.started_at).total_seconds() * 1000:.0f} ms"


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
