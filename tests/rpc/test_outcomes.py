"""The tables that judge an attempt have a row for everything the libraries can come up with."""

from __future__ import annotations

import inspect
import socket
import ssl

import grpclib.exceptions
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from h2.errors import ErrorCodes

from rpc.outcomes import (
    CODE_OF_FAILURE,
    OUTCOME_OF_RESET,
    OUTCOME_OF_STATUS,
    clean_text,
    failed_before_leaving,
    lost_by_reset,
)
from saga.ports import Outcome


def test_every_status_has_an_outcome() -> None:
    assert set(OUTCOME_OF_STATUS) == set(Status)


def test_the_statuses_of_unknown_outcome_are_those_of_the_contract() -> None:
    unknown = {status.name for status, outcome in OUTCOME_OF_STATUS.items() if outcome is Outcome.UNKNOWN}
    assert unknown == {"DEADLINE_EXCEEDED", "UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED"}
    assert [status for status, outcome in OUTCOME_OF_STATUS.items() if outcome is Outcome.DONE] == [Status.OK]


def test_every_http2_error_code_has_an_outcome_and_only_refused_streams_are_not_done() -> None:
    assert set(OUTCOME_OF_RESET) == set(ErrorCodes)
    not_done = [code for code, (outcome, _) in OUTCOME_OF_RESET.items() if outcome is Outcome.NOT_DONE]
    assert not_done == [ErrorCodes.REFUSED_STREAM]


def test_every_exception_of_grpclib_has_a_row() -> None:
    classes = [
        item
        for _, item in inspect.getmembers(grpclib.exceptions, inspect.isclass)
        if issubclass(item, Exception) and item.__module__ == "grpclib.exceptions"
    ]
    assert len(classes) >= 3
    for item in classes:
        assert any(issubclass(item, kind) for kind, _ in CODE_OF_FAILURE), item


def test_every_code_told_is_a_grpc_code() -> None:
    told = {code for _, code in CODE_OF_FAILURE} | {code for _, code in OUTCOME_OF_RESET.values()}
    assert told <= {status.name for status in Status}


@pytest.mark.parametrize("code", [None, 0, 7, 13, 99, 2**32 - 1])
def test_a_reset_with_any_code_is_told(code: int | None) -> None:
    lost = lost_by_reset(code)
    assert lost.outcome is (Outcome.NOT_DONE if code == 7 else Outcome.UNKNOWN)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "refused"),
        socket.gaierror(-2, "unknown name"),
        TimeoutError(),
        ssl.SSLError("bad"),
        GRPCError(Status.UNAVAILABLE),
        ValueError("odd"),
    ],
)
def test_what_fails_before_the_call_leaves_is_not_done(error: Exception) -> None:
    lost = failed_before_leaving(error, "connecting to shop:1")
    assert lost.outcome is Outcome.NOT_DONE
    assert lost.message.startswith("connecting to shop:1: ")
    assert len(lost.message) > len("connecting to shop:1: ")


def test_text_of_a_participant_is_cleaned_and_cut() -> None:
    assert clean_text("a\x00b\ud800c\r\n\td ü\x7f") == "a�b�c d ü�"
    assert clean_text("x" * 5000) == "x" * 1999 + "…"
    assert clean_text("plain") == "plain"
