"""One line when the store goes away, one now and then while it is, one when it is back; not one a saga and try.

Whoever tries the store again and again by itself (runs, claims, the lease) tells here how each try ended, under a name
for what was tried. These lines are for people; each single failure is a line at `debug` where it happened.
"""

from __future__ import annotations

import logging
from collections import Counter

import trio

from saga.log_fields import about_no_one

log = logging.getLogger("saga.store")

REMIND_SECS = 30.0
"""How often it is said that the store is still away."""
QUIET_SECS = 2.0
"""How long nothing may have failed before the store is said to be back. Above the pause between two claims, so that a
store that fails now and then is one outage and not a hundred."""
FORGOTTEN_SECS = 10.0
"""How long a kind of try that failed keeps the outage open without another one: a saga that was given up meanwhile is
never tried again. Twice the longest pause between tries."""


class StoreOutage:
    """The outage of one process's store, if there is one now."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._answered_at: float | None = None
        self._told_at = 0.0
        self._failed_at = 0.0
        self._failing: dict[str, float] = {}
        self._failures: Counter[str] = Counter()

    def failed(self, tried: str, reason: object) -> None:
        """A try of this kind (`moves`, `claims`) has failed."""
        now = trio.current_time()
        self._failed_at = self._failing[tried] = now
        self._answered_at = None
        self._failures[tried] += 1
        if self._began_at is None:
            self._began_at = self._told_at = now
            with about_no_one():
                log.warning("store_unavailable tried=%s error=%s", tried, reason)
        elif now >= self._told_at + REMIND_SECS:
            self._told_at = now
            lasted = now - self._began_at
            with about_no_one():
                log.warning("store_still_unavailable secs=%.1f failed=%s error=%s", lasted, self._counts(), reason)

    def answered(self, tried: str) -> None:
        """A try of this kind went well. Nothing to do, as a rule, and then at no cost worth naming."""
        if self._began_at is None:
            return
        now = trio.current_time()
        if self._answered_at is None:
            self._answered_at = now
        self._failing.pop(tried, None)
        still = any(now < failed_at + FORGOTTEN_SECS for failed_at in self._failing.values())
        if still or now < self._failed_at + QUIET_SECS:
            return
        with about_no_one():
            log.info("store_back secs=%.1f failed=%s", self._answered_at - self._began_at, self._counts())
        self._began_at = None
        self._failing.clear()
        self._failures.clear()

    def _counts(self) -> str:
        return ",".join(f"{tried}:{count}" for tried, count in sorted(self._failures.items()))
