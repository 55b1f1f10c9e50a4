"""The pauses between attempts, as numbers (spec section 1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga.workflow import DEFAULT_COMPENSATE_RETRY, DEFAULT_NON_RETRYABLE, Backoff, RetryPolicy


def delays(policy: RetryPolicy, retries: int = 5, draw: float = 0.0) -> list[float]:
    return [policy.delay_secs(retry, draw) for retry in range(retries)]


def test_exponential_doubles_from_the_initial_interval() -> None:
    assert delays(RetryPolicy(initial_interval_ms=1000)) == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_linear_grows_by_one_interval_a_retry() -> None:
    assert delays(RetryPolicy(backoff=Backoff.LINEAR, initial_interval_ms=500)) == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_constant_stays() -> None:
    assert delays(RetryPolicy(backoff=Backoff.CONSTANT, initial_interval_ms=250)) == [0.25] * 5


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (Backoff.EXPONENTIAL, [1.0, 2.0, 3.0, 3.0, 3.0]),
        (Backoff.LINEAR, [1.0, 2.0, 3.0, 3.0, 3.0]),
        (Backoff.CONSTANT, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_max_interval_caps_one_delay(backoff: Backoff, expected: list[float]) -> None:
    assert delays(RetryPolicy(backoff=backoff, initial_interval_ms=1000, max_interval_ms=3000)) == expected


def test_a_cap_below_the_initial_interval_holds_from_the_first_retry() -> None:
    assert delays(RetryPolicy(initial_interval_ms=1000, max_interval_ms=10), 2) == [0.01, 0.01]


def test_an_initial_interval_of_nought_retries_at_once() -> None:
    assert delays(RetryPolicy(initial_interval_ms=0)) == [0.0] * 5


def test_without_jitter_the_draw_changes_nothing() -> None:
    assert delays(RetryPolicy(), draw=0.0) == delays(RetryPolicy(), draw=0.999)


def test_full_jitter_reaches_down_to_nought() -> None:
    assert delays(RetryPolicy(jitter=1.0)) == [0.0] * 5


def test_a_retry_far_out_is_still_a_number() -> None:
    assert RetryPolicy().delay_secs(10_000, 0.5) == 2.0**40


@given(
    backoff=st.sampled_from(Backoff),
    initial=st.integers(0, 10_000),
    cap=st.none() | st.integers(0, 60_000),
    jitter=st.floats(0.0, 1.0),
    draw=st.floats(0.0, 1.0, exclude_max=True),
    retry=st.integers(0, 60),
)
def test_a_delay_lies_within_its_jitter_and_under_its_cap(
    backoff: Backoff, initial: int, cap: int | None, jitter: float, draw: float, retry: int
) -> None:
    plain = RetryPolicy(backoff=backoff, initial_interval_ms=initial, max_interval_ms=cap)
    spread = RetryPolicy(backoff=backoff, initial_interval_ms=initial, max_interval_ms=cap, jitter=jitter)
    full = plain.delay_secs(retry, draw)
    delay = spread.delay_secs(retry, draw)
    assert full * (1 - jitter) * (1 - 1e-9) <= delay <= full * (1 + 1e-9)
    assert cap is None or delay <= cap / 1000 * (1 + 1e-9)
    assert plain.delay_secs(retry + 1, draw) >= full


def test_the_defaults_are_those_of_the_table() -> None:
    policy = RetryPolicy()
    assert (policy.max_attempts, policy.backoff, policy.initial_interval_ms) == (3, Backoff.EXPONENTIAL, 1000)
    assert (policy.max_interval_ms, policy.jitter) == (None, 0.0)
    assert RetryPolicy(max_attempts=5) == DEFAULT_COMPENSATE_RETRY
    assert sorted(policy.non_retryable) == sorted(DEFAULT_NON_RETRYABLE)
    assert sorted(DEFAULT_NON_RETRYABLE) == [
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "OUT_OF_RANGE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "UNIMPLEMENTED",
    ]
