"""The way in for people: a token pasted once, kept in a cookie that the pages take and the API does not."""

from __future__ import annotations

import time
from http.cookies import Morsel, SimpleCookie

import httpx

from server.tokens import LEEWAY_SECS
from tests.support.bad_tokens import DENIED, bad_tokens
from tests.support.issuer import Issuer, token, token_of
from tests.web.conftest import Site, guarded_site
from web.sign_in import COOKIE, LONGEST_SECS, MAX_COOKIE_CHARS


def cookie_of(answer: httpx.Response) -> Morsel[str]:
    (header,) = answer.headers.get_list("Set-Cookie")
    return SimpleCookie(header)[COOKIE]


async def sign_in(site: Site, pasted: str, **more: str) -> httpx.Response:
    return await site.client.post("/sign-in", data={"token": pasted, **more})


async def test_a_reader_without_a_token_is_shown_the_way_in_and_led_back_to_the_page(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in ("/", "/audit", "/sagas/some-id"):
            assert (await sign_in(site, token_of("sys_auditor"), next=path)).headers["Location"] == path
        site.client.cookies.clear()
        asked = await site.client.get("/sagas/some-id?x=1")
        assert asked.status_code == 401
        # With `no-referrer` the origin that a browser says of the form would be `null`.
        assert asked.headers["Referrer-Policy"] == "same-origin"
        assert asked.headers["WWW-Authenticate"] == 'Bearer realm="saga"'
        assert 'name="next" value="/sagas/some-id?x=1"' in asked.text
        answer = await sign_in(site, token_of("sys_auditor"), next="/?status=FAILED")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/?status=FAILED")
        page = await site.client.get("/")
        assert page.status_code == 200
        assert "Sign out" in page.text
        assert "alice" in page.text


async def test_the_cookie_is_out_of_reach_and_lasts_as_long_as_its_token(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        pasted = token_of("sys_auditor", exp=time.time() + 600)
        kept = cookie_of(await sign_in(site, f"  Bearer {pasted}\n"))
        assert kept.value == pasted
        assert kept["httponly"]
        assert not kept["secure"]
        assert (kept["samesite"], kept["path"]) == ("Strict", "/")
        assert 500 < int(kept["max-age"]) <= 600 + LEEWAY_SECS
        lasting = cookie_of(await sign_in(site, token_of("sys_auditor", exp=time.time() + 10 * LONGEST_SECS)))
        assert int(lasting["max-age"]) == LONGEST_SECS
        behind_a_proxy = await site.client.post(
            "/sign-in", data={"token": pasted}, headers={"X-Forwarded-Proto": "https"}
        )
        assert cookie_of(behind_a_proxy)["secure"]


async def test_a_token_that_is_no_good_is_not_kept(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for pasted, status, told in (
            ("", 401, "the token is malformed"),
            ("garbage", 401, "the token is malformed"),
            ("<script>", 401, "the token is malformed"),
            (token(exp=1), 401, "the token has expired"),
            (token_of(), 403, "none of the roles in the token may read sagas"),
            ("x" * (MAX_COOKIE_CHARS + 1), 400, "longer than the 3800 characters"),
        ):
            answer = await sign_in(site, pasted)
            assert answer.status_code == status
            assert told in answer.text
            assert "Set-Cookie" not in answer.headers
            assert "<script>" not in answer.text


async def test_a_cookie_that_is_no_good_shows_the_way_in_again(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for kept, status in ((token(exp=1), 401), ("garbage", 401), (token_of(), 403)):
            page = await site.client.get("/", headers={"Cookie": f"{COOKIE}={kept}"})
            assert page.status_code == status
            assert 'action="/sign-in"' in page.text


async def test_every_bad_token_is_refused_at_every_page(idp: Issuer) -> None:
    served = {}
    async with guarded_site(idp) as site:
        for name, (authorization, expected) in bad_tokens().items():
            values = [authorization] if isinstance(authorization, str) else authorization or []
            for path in ("/", "/sagas/00000000-0000-4000-8000-000000000000", "/audit"):
                page = await site.client.get(path, headers=[("Authorization", value) for value in values])
                if page.status_code != (403 if expected == DENIED else 401):
                    served[f"{path}: {name}"] = page.status_code
    assert served == {}


async def test_the_cookie_opens_nothing_but_the_pages(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        await sign_in(site, token_of("sys_admin"))
        assert (await site.client.get("/")).status_code == 200
        for method, path in (("GET", "/api/v1/sagas"), ("POST", "/api/v1/sagas"), ("GET", "/api/v1/audit")):
            answer = await site.client.request(method, path)
            assert answer.json()["error"]["code"] == "SYS_AUTH_MISSING_TOKEN"


async def test_a_proxy_may_sign_its_readers_in_by_the_header(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        page = await site.client.get("/", headers={"Authorization": f"Bearer {token_of('sys_auditor')}"})
        assert page.status_code == 200
        assert "Sign out" not in page.text
        # What the proxy says counts, not what is left in the browser.
        await sign_in(site, token_of("sys_auditor"))
        assert (await site.client.get("/", headers={"Authorization": "Bearer garbage"})).status_code == 401


async def test_signing_out_removes_the_cookie(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        await sign_in(site, token_of("sys_auditor"))
        answer = await site.client.post("/sign-out")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/sign-in")
        assert cookie_of(answer)["max-age"] == "0"
        assert (await site.client.get("/")).status_code == 401
        assert (await site.client.get("/sign-out")).status_code == 405


async def test_no_other_site_signs_anybody_in_or_out(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in ("/sign-in", "/sign-out"):
            for where in ("cross-site", "same-site"):
                answer = await site.client.post(
                    path, data={"token": token_of("sys_auditor")}, headers={"Sec-Fetch-Site": where}
                )
                assert answer.status_code == 403
                assert "Set-Cookie" not in answer.headers
            # Over cleartext a browser tells no more than the origin.
            for origin in ("http://evil.example", "null", "http://[", f"http://127.0.0.1:{site.port}.evil.example"):
                answer = await site.client.post(
                    path, data={"token": token_of("sys_auditor")}, headers={"Origin": origin}
                )
                assert (answer.status_code, "Set-Cookie" in answer.headers) == (403, False), origin
        for told in (
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"},
            {"Origin": f"http://127.0.0.1:{site.port}"},
            {"Origin": "http://sagas.example", "X-Forwarded-Host": "sagas.example"},
        ):
            answer = await site.client.post("/sign-in", data={"token": token_of("sys_auditor")}, headers=told)
            assert answer.status_code == 303, told


async def test_a_sign_in_leads_to_our_pages_only(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for onward in (
            "https://evil.example/",
            "//evil.example/",
            "/\\evil.example/",
            "/sagas/../../evil",
            "/sagas/x\r\nSet-Cookie: a=b",
            "javascript:alert(1)",
            "/api/v1/sagas",
            "",
        ):
            answer = await sign_in(site, token_of("sys_auditor"), next=onward)
            assert (answer.status_code, answer.headers["Location"]) == (303, "/"), onward


async def test_without_access_control_the_pages_are_open_and_know_no_sign_out(site: Site) -> None:
    page = await site.client.get("/", headers={"Cookie": f"{COOKIE}=garbage"})
    assert page.status_code == 200
    assert "Sign out" not in page.text
