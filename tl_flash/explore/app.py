"""The page's server: which address does what."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from tl_flash.explore import finding, measuring, writing
from tl_flash.explore.asked import LONGEST_CONCEPT, LONGEST_TEXT, Fields, Refused, Writing
from tl_flash.explore.guard import Guard
from tl_flash.explore.jobs import Busy, Work
from tl_flash.explore.page import page
from tl_flash.explore.session import Session

MOST_FOLLOWERS = 64
"""Connections that follow jobs at a time."""
MOST_CHIPS = 64


def _write(session: Session, fields: Fields) -> Work:
    asked = Writing.of(fields)
    return lambda job: writing.write(session, job, asked)


def _find(session: Session, fields: Fields) -> Work:
    concept, ids = fields.text("concept", LONGEST_CONCEPT), fields.ids("tokens", MOST_CHIPS, session.d_vocab)
    return lambda job: finding.find(session, job, concept, ids)


def _activations(session: Session, fields: Fields) -> Work:
    neuron, text = fields.neuron(), fields.text("text", LONGEST_TEXT)
    return lambda job: measuring.activations(session, job, neuron, text)


def _dose(session: Session, fields: Fields) -> Work:
    neuron, token = fields.neuron(), fields.whole("token", 0, session.d_vocab - 1)
    sign = fields.sign()
    return lambda job: measuring.dose_curve(session, job, neuron, token, sign)


def _window(session: Session, fields: Fields) -> Work:
    neuron, token = fields.neuron(), fields.whole("token", 0, session.d_vocab - 1)
    sign = fields.sign()
    return lambda job: measuring.window(session, job, neuron, token, sign)


def _validate(session: Session, fields: Fields) -> Work:
    neuron, token = fields.neuron(), fields.whole("token", 0, session.d_vocab - 1)
    sign = fields.sign()
    return lambda job: measuring.validation(session, job, neuron, token, sign)


def _unit(session: Session, fields: Fields) -> Work:
    neuron = fields.neuron()
    return lambda job: measuring.unit(session, job, neuron)


def _explain(session: Session, fields: Fields) -> Work:
    before = fields.ids("before", measuring.MOST_POSITIONS, session.d_vocab)
    token = fields.whole("token", 0, session.d_vocab - 1)
    if before is None:
        raise Refused("before: expected the ids of the tokens before it, got nothing")
    return lambda job: measuring.explanation(session, job, before, token)


KINDS: dict[str, Callable[[Session, Fields], Work]] = {
    "write": _write,
    "unit": _unit,
    "find": _find,
    "activations": _activations,
    "dose": _dose,
    "window": _window,
    "validate": _validate,
    "explain": _explain,
}
"""What a job may be asked for, at /api/KIND."""


def app_of(session: Session, *, hosts: frozenset[str] | None, token: str | None = None) -> ASGIApp:
    """The whole application.

    Args:
        session: what it serves.
        hosts: as in `Guard`, and so is token.
        token: what whoever asks has to know.
    """
    text, policy = page(session)
    followers = 0

    async def home(request: Request) -> Response:
        return HTMLResponse(text)

    async def data(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in session.data:
            return _why(f"no data {name!r}", 404)
        return PlainTextResponse(session.data[name])

    async def told(request: Request) -> Response:
        return JSONResponse(
            {
                "model": session.name,
                "chats": session.chats,
                "n_ctx": session.model.cfg.n_ctx,
                "sides": session.sides,
                "decoding": session.decoding,
                "trouble": session.trouble(),
            }
        )

    async def start(request: Request) -> Response:
        kind = request.path_params["kind"]
        if kind not in KINDS:
            return _why(f"no such job {kind!r}; there are {', '.join(KINDS)}", 404)
        try:
            fields = Fields.of(await request.body())
            work = KINDS[kind](session, fields)
            fields.close()
            job = session.jobs.start(kind, work)
        except Refused as refused:
            return _why(f"{refused}", 400)
        except Busy as busy:
            return _why(f"{busy}", 429)
        return JSONResponse({"id": job.id, "ahead": session.jobs.ahead(job)}, 202)

    async def cancel(request: Request) -> Response:
        try:
            job = session.jobs.cancel(request.path_params["id"])
        except KeyError as error:
            return _why(error.args[0], 404)
        return JSONResponse({"id": job.id, "over": job.over}, 202)

    async def events(request: Request) -> Response:
        nonlocal followers
        try:
            job = session.jobs[request.path_params["id"]]
        except KeyError as error:
            return _why(error.args[0], 404)
        last = request.headers.get("last-event-id", "")
        start = int(last) + 1 if last.isdecimal() and len(last) < 10 else 0
        if followers >= MOST_FOLLOWERS:
            return _why(f"{followers} connections follow jobs; close a tab", 503)

        async def lines() -> AsyncIterator[str]:
            nonlocal followers
            followers += 1
            try:
                yield "retry: 500\n\n"
                async for at, event in job.follow(start):
                    yield f"id: {at}\ndata: {json.dumps(event, allow_nan=False)}\n\n"
            finally:
                followers -= 1

        return StreamingResponse(lines(), media_type="text/event-stream")

    routes = [
        Route("/", home),
        Route("/data/{name}", data),
        Route("/api/session", told),
        Route("/api/jobs/{id}/events", events),
        Route("/api/jobs/{id}/cancel", cancel, methods=["POST"]),
        Route("/api/{kind}", start, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), hosts=hosts, token=token, policy=policy)


def _why(why: Any, status: int) -> Response:
    return JSONResponse({"why": why}, status)
