"""What stands before the page's server: who may ask, from where, and how much.

A page on the web can make its visitor's browser send requests to this machine. It is kept out by the Host (a name of
its own that it lets resolve to this machine is not one of ours: DNS rebinding) and by Origin and Sec-Fetch-Site, which
browsers send with what another site's page asks for.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

import anyio
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 1 << 18
DRAINED = 1 << 27
"""Bytes of a refused body that are read and thrown away, so that its sender sees the answer."""
SLOWEST = 20.0
"""Seconds that a body may take."""
COOKIE = "tl_flash_token"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application in front of another.

    Args:
        app: what it guards.
        hosts: names, with ports, that the server goes by; None for any.
        token: what whoever asks has to know; None for nothing.
        policy: the content security policy of every answer.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None, token: str | None, policy: str) -> None:
        self._app, self._hosts, self._token = app, hosts, token
        self._headers = {**HEADERS, "Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        headers = _headers(scope)
        refused = self._refusal(scope, headers)
        too_long = _declared(headers) > LARGEST_BODY
        body = await _read(receive, keep=refused is None and not too_long)
        if refused is None and body is None:
            refused = _refuse(413, f"a request holds at most {LARGEST_BODY} bytes, and arrives within {SLOWEST:.0f} s")
        if refused is None and scope["method"] == "POST" and _kind(headers) != "application/json":
            refused = _refuse(415, "expected a body of application/json")
        if refused is not None:
            await refused(scope, receive, answer)
        else:
            await self._app(scope, _again(body or b"", receive), answer)

    def _refusal(self, scope: Scope, headers: Mapping[str, list[str]]) -> Response | None:
        hosts = headers.get("host", [])
        if len(hosts) != 1 or self._hosts is not None and hosts[0].lower() not in self._hosts:
            return _refuse(421, "this server does not go by that Host; open the address that it printed")
        origins = headers.get("origin", [])
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return _refuse(403, "Origin: another site's page asks, and is not answered")
        sites = headers.get("sec-fetch-site", [])
        opens = scope["method"] == "GET" and scope["path"] == "/"
        if not opens and any(site not in ("same-origin", "none") for site in sites):
            return _refuse(403, "Sec-Fetch-Site: another site's page asks, and is not answered")
        return None if self._token is None else self._token_refusal(scope, headers, self._token)

    def _token_refusal(self, scope: Scope, headers: Mapping[str, list[str]], token: str) -> Response | None:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", []) if scope["path"] == "/" else []
        if any(_same(one, token) for one in asked):
            home = RedirectResponse("/", status_code=303)
            home.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return home
        known = [_cookie(one) for one in headers.get("cookie", [])]
        known += [one.removeprefix("Bearer ") for one in headers.get("authorization", [])]
        if any(_same(one, token) for one in known):
            return None
        return _refuse(401, "this server wants its token: open the address that it printed, with ?token=")


def _refuse(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status)


def _headers(scope: Scope) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


def _declared(headers: Mapping[str, list[str]]) -> int:
    (length, *_) = headers.get("content-length", ["0"])
    return int(length) if length.isdigit() else 0


def _kind(headers: Mapping[str, list[str]]) -> str:
    (kind, *_) = headers.get("content-type", [""])
    return kind.partition(";")[0].strip().lower()


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


async def _read(receive: Receive, *, keep: bool) -> bytes | None:
    """The body; None where it is too large, too slow, or not wanted, and then as much as that is thrown away."""
    parts: list[bytes] = []
    size = 0
    with anyio.move_on_after(SLOWEST):
        while size <= DRAINED:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            keep = keep and size <= LARGEST_BODY
            parts = [*parts, part] if keep else []
            if not message.get("more_body", False):
                return b"".join(parts) if keep else None
    return None


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read to an application that wants to."""
    sent = False

    async def given() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
