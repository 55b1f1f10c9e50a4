"""Which denied requests are entered in the audit log: enough to see who tries what, too few to fill a disk.

Each principal may leave a burst of entries and then one every half a minute; what is left out is counted, and the next
entry of that principal says how many. Counted apart, so that nobody can drown the attempts of others. Pure.
"""

from __future__ import annotations

from collections import OrderedDict

BURST = 20
"""Entries a principal may leave at once. A guess: a person who tries every button, or the first look at a script."""
REFILL_SECS = 30.0
"""Seconds until one more may be left: 2,880 a day for each principal and worker, about a megabyte."""
PRINCIPALS = 1000
"""Principals counted at a time; one more drops the one that has been denied nothing for longest."""


class _Allowance:
    __slots__ = ("left", "left_out", "since")

    def __init__(self, now: float) -> None:
        self.left = float(BURST)
        self.since = now
        self.left_out = 0


class Denials:
    """Counts the denied requests of each principal."""

    def __init__(self) -> None:
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def admit(self, principal: str, now: float) -> int | None:
        """How many denials of the principal were left out since the last one that was entered, if this one is to be
        entered; None: it is left out. `now`: seconds of any steady clock."""
        allowance = self._allowances.setdefault(principal, _Allowance(now))
        self._allowances.move_to_end(principal)
        if len(self._allowances) > PRINCIPALS:
            self._allowances.popitem(last=False)
        allowance.left = min(float(BURST), allowance.left + (now - allowance.since) / REFILL_SECS)
        allowance.since = now
        if allowance.left < 1.0:
            allowance.left_out += 1
            return None
        allowance.left -= 1.0
        left_out, allowance.left_out = allowance.left_out, 0
        return left_out
