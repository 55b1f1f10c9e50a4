"""Who may use which route of Quart, and the way in for people: a page where a token is pasted.

The token is kept in a cookie that scripts cannot read and other sites cannot make a browser send. Only the pages take
it, and they change nothing; the API takes `Authorization` and nothing else (`door.py`). A route that nobody declared
anything about is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import quart
import trio
from quart import Response
from quart_trio import QuartTrio

from saga.access import Permission, Principal, require, single_authorization
from saga.authentication import Authenticator
from saga.errors import Detail, Invalid, MissingToken, PermissionDenied, RequestError, SagaError, Unavailable
from web.asgi_scope import PRINCIPAL, headers_by_name
from web.errors import headers_of, status_of
from web.other_sites import is_from_another_site

COOKIE = "saga_token"
MAX_COOKIE_CHARS = 3800
"""Browsers drop cookies of more than 4096 bytes, name and attributes included, without a word."""
LONGEST_SECS = 30 * 86400
"""What a token that lasts longer is kept in a browser for."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: with that a browser sends our own forms with `Origin: null`, which is anybody's.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

SIGN_IN: Mapping[str, Permission] = {
    "sign_in_page": Permission.OPEN,
    "sign_in": Permission.OPEN,
    "sign_out": Permission.OPEN,
}
"""The routes of this file."""

_PAGE_PATH = re.compile(r"/(audit|sagas/[0-9A-Za-z-]{1,64})?(\?[!-~]*)?")
"""Where a sign-in may lead: our pages, never another site."""


def add_sign_in(
    app: QuartTrio, authenticator: Authenticator, access: Mapping[str, Permission], pages: Mapping[str, Permission]
) -> None:
    """Guards every route by what `access` says about its endpoint, and adds `/sign-in` and `/sign-out`. The endpoints
    in `pages` answer people; they take the cookie and are refused with a page."""

    _add_guard(app, authenticator, access, pages)
    _add_forms(app, authenticator)


def _add_guard(
    app: QuartTrio, authenticator: Authenticator, access: Mapping[str, Permission], pages: Mapping[str, Permission]
) -> None:
    @app.before_request
    async def guard() -> Response | None:
        endpoint = quart.request.endpoint
        if endpoint is None:
            return None  # there is no such route, which is no secret
        permission = access.get(endpoint)
        if permission is None:
            raise PermissionDenied("nobody may use this route")
        if permission is Permission.OPEN:
            return None
        scope = cast(dict[str, Any], quart.request.scope)
        if endpoint not in pages:
            require(scope[PRINCIPAL], permission)
            return None
        try:
            principal = scope[PRINCIPAL] = await _person(authenticator)
            require(principal, permission)
        except (RequestError, Unavailable) as error:
            return await _sign_in_page(error, quart.request.full_path.removesuffix("?"))
        return None


async def _person(authenticator: Authenticator) -> Principal:
    """Who asks for a page: by the header, which a proxy in front may set, or else by the cookie."""
    authorization = single_authorization(headers_by_name(cast(Any, quart.request.scope)).get("authorization", ()))
    if authorization is None and (token := quart.request.cookies.get(COOKIE)) is not None:
        principal = await authenticator.authenticate(f"Bearer {token}")
        quart.g.signed_in = None if principal.is_unrestricted else principal.subject
        return principal
    return await authenticator.authenticate(authorization)


def _add_forms(app: QuartTrio, authenticator: Authenticator) -> None:
    @app.get("/sign-in")
    async def sign_in_page() -> Response:
        return await _sign_in_page(None, "/")

    @app.post("/sign-in")
    async def sign_in() -> Response:
        form = await quart.request.form
        token, onward = form.get("token", "").strip().removeprefix("Bearer "), form.get("next", "/")
        try:
            _refuse_other_sites()
            if len(token) > MAX_COOKIE_CHARS:
                message = f"the token is longer than the {MAX_COOKIE_CHARS} characters that a browser keeps in a cookie"
                raise Invalid(message, (Detail(field="token", reason="length", message=message),))
            principal = await authenticator.authenticate(f"Bearer {token}")
            require(principal, Permission.READ_SAGAS)
        except SagaError as error:
            return await _sign_in_page(error, onward)
        if not _PAGE_PATH.fullmatch(onward):
            onward = "/"
        answer = Response("", 303, {"Location": onward, **PAGE_HEADERS})
        answer.set_cookie(
            COOKIE,
            token,
            # A session cookie would outlive its token in a browser that restores its windows.
            max_age=int(min(principal.ends_at - trio.current_time(), LONGEST_SECS)),
            httponly=True,
            samesite="Strict",
            # Without TLS here or in front the browser would not send it back at all.
            secure=_is_https(),
        )
        return answer

    @app.post("/sign-out")
    async def sign_out() -> Response:
        try:
            _refuse_other_sites()
        except SagaError as error:
            return await _sign_in_page(error, "/")
        answer = Response("", 303, {"Location": "/sign-in", **PAGE_HEADERS})
        answer.delete_cookie(COOKIE, httponly=True, samesite="Strict", secure=_is_https())
        return answer


def _is_https() -> bool:
    """Whether the browser speaks TLS, to us or, as a proxy says, to it. A false word only costs whoever says it."""
    return "https" in (quart.request.scheme, quart.request.headers.get("X-Forwarded-Proto"))


def _refuse_other_sites() -> None:
    """Nobody is signed in, as somebody else perhaps, by a form on another site."""
    if is_from_another_site(headers_by_name(cast(Any, quart.request.scope))):
        raise PermissionDenied("this form can only be sent from this site")


async def _sign_in_page(error: SagaError | None, onward: str) -> Response:
    """The form; with what was wrong, unless that was no more than that nobody had signed in."""
    status = 200 if error is None else status_of(error)[0]
    text = await quart.render_template(
        "sign_in.html", message=None if isinstance(error, MissingToken) else error, onward=onward
    )
    headers = {} if error is None else headers_of(error)
    return Response(text, status, {"Content-Type": "text/html; charset=utf-8", **headers, **PAGE_HEADERS})
