"""What a page of another site can have a browser ask for, and how we tell."""

from __future__ import annotations

from collections.abc import Mapping


def is_from_another_site(headers: Mapping[str, list[str]]) -> bool:
    """Whether a page of another site had a browser send this. Every browser of today tells: over TLS and to loopback
    what it is to this site, and else the origin of the page, where a proxy may have another name for us."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return any(value not in ("same-origin", "none") for value in site)
    ours = {*headers.get("host", ()), *headers.get("x-forwarded-host", ())}
    return origin is not None and any(value.partition("://")[2] not in ours for value in origin)
