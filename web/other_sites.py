"""What a page of another site can have a browser ask for, and how we tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

LOOPBACK = re.compile(
    r"((?:[a-z0-9-]+\.)*localhost\.?|127(?:\.[0-9]{1,3}){3}|\[::1\])?(?::[0-9]*)?", re.ASCII | re.IGNORECASE
)
"""A `Host` that no name server decides where to: a browser takes these names to its own machine. Or none at all, which
no browser sends."""


def is_from_another_site(headers: Mapping[str, list[str]]) -> bool:
    """Whether a page of another site had a browser send this. Every browser of today tells: over TLS and to loopback
    what it is to this site, and else the origin of the page, where a proxy may have another name for us."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return any(value not in ("same-origin", "none") for value in site)
    ours = {*headers.get("host", ()), *headers.get("x-forwarded-host", ())}
    return origin is not None and any(value.partition("://")[2] not in ours for value in origin)


def is_to_loopback(headers: Mapping[str, list[str]]) -> bool:
    """Whether it is the loopback by name that is asked. A page of another site whose name was made to lead here (DNS
    rebinding) is one of ours to its browser, which shows it our answers; but the browser sends that name."""
    return all(LOOPBACK.fullmatch(host) for host in headers.get("host", ()))
