"""The place of one worker among several on the same ports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """The place of this process among several workers on the same ports. `ready` is called when it serves; in
    `metrics_folder` they tell each other what they count."""

    number: int
    ready: Callable[[], None]
    metrics_folder: Path
