"""What the documents say that can be compared with the code."""

import re
from pathlib import Path
from typing import Any, cast

from k1s0.system.saga.v1 import saga_pb2

import rpc.server_errors
import web.errors
from rpc import guarded_h2, http2, inbound, outcomes
from rpc.outbound import ANSWER_SECS
from saga import admission, manners, peers
from saga.access import GRANTS, Permission, Role
from saga.door_limits import (
    BODY_SECS,
    HANDSHAKE_SECS,
    HEAD_SECS,
    MAX_HEADERS,
    MOST_HANDSHAKES,
    SMALL_BODY_BYTES,
    STALLED_SECS,
    DoorLimits,
)
from saga.drain import Drain
from saga.model import TERMINAL
from saga.transitions import TRANSITIONS
from server.config import LimitsConfig
from web import guarded_tcp_server
from web.api import Api
from web.serving import KEEP_ALIVE_SECS

ROOT = Path(__file__).resolve().parent.parent
ARROW = re.compile(r"^ +(\S+) --> (\S+?)(?:: (\w+))?$", re.MULTILINE)
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
MADE_APART = {
    **dict.fromkeys(("GET /", "GET /audit", "GET /sagas/{saga_id}", "GET /sign-in"), "200"),
    **dict.fromkeys(("GET /metrics", "GET /openapi.json", "GET /docs"), "200"),
    **dict.fromkeys(("POST /sign-in", "POST /sign-out"), "303"),
}
"""Routes that are no operations of the API, pages and documents, with what they answer."""


def rows(first: str) -> list[list[str]]:
    """The rows of api.md's tables whose first cell matches, as cells."""
    lines = [line for line in API.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [cells for cells in found if re.fullmatch(first, cells[0])]


def test_the_state_diagram_has_every_arrow_of_the_table_and_no_other() -> None:
    text = (ROOT / "docs/semantics.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    drawn = ARROW.findall(diagram)

    moves = [(str(state), str(to), fact.__name__) for state, row in TRANSITIONS.items() for fact, to in row.items()]
    ends = [("[*]", "STARTED", ""), *((str(state), "[*]", "") for state in TERMINAL)]
    assert sorted(drawn) == sorted(moves + ends)
    assert len(drawn) == len(diagram.strip().splitlines())


def test_every_link_between_the_documents_leads_to_a_file() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert broken == []


def test_the_document_of_limits_has_the_numbers_of_the_code() -> None:
    text = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    limits = LimitsConfig()
    silent_secs = peers.SILENT_SECS + peers.PROBES * peers.PROBE_SECS
    for told in (
        f"| `max_connections` | {limits.max_connections} |",
        f"| `max_requests` | {limits.max_requests} |",
        f"| `max_starts` | {limits.max_starts} |",
        f"into the database | {admission.STALLED_SECS:g} s; older",
        f"| {DoorLimits().max_body_bytes >> 20} MiB a port",
        f"one alone may be longer | {DoorLimits().max_answer_bytes >> 20} MiB a port",
        f"| {manners.IDLE_FRAMES:g} at once; {manners.IDLE_FRAMES_A_SEC:g} a second come back",
        f"head of a request in HTTP/2 | {manners.MAX_HEAD_BYTES >> 10} KiB |",
        f"| a message for health or reflection | {inbound.PIECE_BYTES >> 10} KiB |",
        f"once it has begun | {HEAD_SECS:g} s; in HTTP/1 with the time below | {HEAD_SECS:g} s |",
        f"beyond {SMALL_BODY_BYTES >> 10} KiB of each",
        f"| headers of a request | {MAX_HEADERS} |",
        f"| {MOST_HANDSHAKES} a port |",
        f"| TLS handshake | {HANDSHAKE_SECS:g} s | {HANDSHAKE_SECS:g} s |",
        f"however slowly it comes | {HEAD_SECS:g} s | {HEAD_SECS:g} s |",
        f"| {BODY_SECS:g} s, then 400 | {BODY_SECS:g} s, then",
        f"| {KEEP_ALIVE_SECS:g} s | {guarded_h2.IDLE_SECS:g} s, then GOAWAY |",
        f"| {STALLED_SECS:g} s for each {guarded_tcp_server.PIECE_BYTES >> 10} KiB; over HTTP/2",
        f"| {STALLED_SECS:g} s; {ANSWER_SECS:g} s for a message",
        f"| {http2.UNSENT_BYTES >> 20} MiB beyond the requests",
        f"| {outcomes.MAX_MESSAGE_CHARS} characters are kept |",
        f"| {silent_secs} s: the system asks after {peers.SILENT_SECS} s",
    ):
        assert told in text, told


def test_the_api_document_has_every_route_with_what_it_answers_and_no_other() -> None:
    told = {call.strip("`"): statuses for call, statuses, _ in rows("`(GET|POST) /.*`")}

    operations = Api(cast(Any, None), Drain(), cast(Any, None)).operations
    offered = {f"{each.method} {each.path}": ", ".join(map(str, each.replies)) for each in operations}
    assert told == offered | MADE_APART


def test_the_api_document_has_every_error_of_both_doors_and_no_other() -> None:
    over_http = {(int(status), code.strip("`")) for status, code, _ in rows(r"\d{3}")}
    over_grpc = {(status.strip("`"), re.findall(r"`(SYS_\w+)`", told)[0]) for status, told in rows(r"`[A-Z_]+`")}

    assert over_http == set(web.errors.STATUS.values())
    assert over_grpc == {(status.name, reason) for status, reason in rpc.server_errors.STATUS.values()}


def test_the_api_document_has_every_grpc_method_and_no_other() -> None:
    (service,) = saga_pb2.DESCRIPTOR.services_by_name.values()
    told = [name for cells in rows("(`[A-Z][A-Za-z]+`(, )?)+") for name in re.findall(r"`(\w*[a-z]\w*)`", cells[0])]
    assert sorted(told) == sorted(method.name for method in service.methods)


def test_the_access_document_has_the_matrix_of_roles() -> None:
    text = (ROOT / "docs/access.md").read_text(encoding="utf-8")
    header, *lines = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    told = {
        subject: {role for role, cell in zip(header[1:], cells, strict=True) if cell == "yes"}
        for subject, *cells in lines
    }
    meant = {
        "sagas: list, read, watch": Permission.READ_SAGAS,
        "workflows: list, read": Permission.READ_WORKFLOWS,
        "the audit log": Permission.READ_AUDIT,
        "sagas: start, cancel, retry compensations": Permission.WRITE_SAGAS,
        "workflows: register": Permission.WRITE_WORKFLOWS,
    }
    assert told == {
        subject: {role.value for role in Role if permission in GRANTS[role]} for subject, permission in meant.items()
    }
    assert set(meant.values()) == set(Permission) - {Permission.OPEN}
