"""The endpoint on loopback: every session has a path and a key of its own, and each wire is spoken in its own words.

A reply is drawn whole, entered into the tree, and then written, in pieces where a stream was asked for. A client that sends a
request again because its connection broke gets the reply that was drawn; one that goes away for good has its request aborted.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from hone.rollout.agents.calling import MODEL
from hone.rollout.endpoint import anthropic_wire, openai_wire
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.json_text import read_json
from hone.rollout.endpoint.openai_wire import Form, Reply
from hone.rollout.endpoint.rendering import Renderer
from hone.rollout.endpoint.session import Asked, Session

_LARGEST_BODY = 256 * 2**20
# A client library that lost its connection comes back within 8 s, by its own doubling pauses.
_GRACE_S = 10.0
_KEEPALIVE_S = 10.0
_IDLE_S = 7 * 24 * 3600.0
# Agents that are started together connect together; one that finds no room waits for a second, or is refused.
_BACKLOG = 4096
# Requests refused at once, before anything is drawn, are answered with their true status even where a stream was asked for.
_BEFORE_STREAM_S = 1.0


@dataclass(kw_only=True)
class _Call:
    """A request being answered, or answered: `waiting` clients want to know."""

    task: "asyncio.Task[Reply]"
    waiting: int = 0


@dataclass(kw_only=True)
class Open:
    """A session at the server: where its agent finds it, and what it has asked, by digest and `Idempotency-Key`."""

    session: Session
    base_url: str
    key: str
    name: str
    calls: dict[tuple[str, str | None], _Call] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Wire:
    read: Callable[[Mapping[str, Any]], tuple[Asked, Form]]
    whole: Callable[[Reply, Form, Renderer], dict[str, Any]]
    pieces: Callable[[Reply, Form, Renderer], Iterator[dict[str, Any]]]
    error: Callable[[Refused], dict[str, Any]]
    prefix: str
    named_events: bool = False


CHAT = _Wire(
    read=openai_wire.read_chat,
    whole=openai_wire.chat_body,
    pieces=openai_wire.chat_chunks,
    error=openai_wire.error_body,
    prefix="chatcmpl-",
)
COMPLETIONS = _Wire(
    read=openai_wire.read_completion,
    whole=openai_wire.completion_body,
    pieces=openai_wire.completion_chunks,
    error=openai_wire.error_body,
    prefix="cmpl-",
)
MESSAGES = _Wire(
    read=anthropic_wire.read,
    whole=lambda reply, form, _: anthropic_wire.message_body(reply, form),
    pieces=lambda reply, form, _: anthropic_wire.events(reply, form),
    error=anthropic_wire.error_body,
    prefix="msg_",
    named_events=True,
)


class Server:
    """The sessions that are open, and of those that were the keys only: a run has millions. `serving` starts one."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._sessions: dict[str, Open] = {}
        self._closed: dict[str, str] = {}
        self._address = ""

    def open(self, session: Session) -> Open:
        """Give a session its path and its key."""
        name = secrets.token_hex(16)
        key = f"hone-{secrets.token_urlsafe(24)}"
        opened = Open(session=session, base_url=f"{self._address}/s/{name}/v1", key=key, name=name)
        self._sessions[name] = opened
        return opened

    async def close(self, opened: Open) -> None:
        """Answer no more of it: what is in flight is aborted, what comes later is told that the session is closed."""
        self._closed[opened.name] = opened.key
        self._sessions.pop(opened.name, None)
        tasks = [call.task for call in opened.calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        opened.calls.clear()

    def routes(self) -> list[web.RouteDef]:
        """Every path; Anthropic's library appends /v1 to a base URL by itself, so that both spellings of it are served."""
        routes: list[web.RouteDef] = []
        for base in ("/s/{session}/v1", "/s/{session}/v1/v1"):
            for path, wire in (("/chat/completions", CHAT), ("/completions", COMPLETIONS), ("/messages", MESSAGES)):
                routes.append(web.post(base + path, self._handler(wire, self._answer)))
            routes.append(web.post(f"{base}/messages/count_tokens", self._handler(MESSAGES, self._count)))
            routes.append(web.get(f"{base}/models", self._handler(CHAT, self._models)))
            routes.append(web.get(base + "/models/{model}", self._handler(CHAT, self._models)))
        return [*routes, web.route("*", "/{path:.*}", self._handler(CHAT, self._nowhere))]

    def _handler(
        self, wire: _Wire, answer: Callable[[_Wire, web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await answer(wire, request)
            except Refused as error:
                # Deterministic: the client libraries would otherwise ask again for nothing.
                return web.json_response(wire.error(error), status=error.status, headers={"x-should-retry": "false"})

        return handle

    async def _answer(self, wire: _Wire, request: web.Request) -> web.StreamResponse:
        opened, body, digest = await self._asked(request)
        asked, form = wire.read(body)

        async def draw() -> Reply:
            nodes = await opened.session.answer(asked)
            return Reply(name=wire.prefix + digest[:8] + f"{nodes[0].index:08x}", created=int(time.time()), nodes=nodes)

        key = request.headers.get("Idempotency-Key")
        again = request.headers.get("x-stainless-retry-count", "0") != "0" or key is not None
        async with self._shared(opened, (digest, key), draw, again=again) as task:
            if form.stream:
                response, reply = await self._streamed(request, wire, form, task)
            else:
                reply = await asyncio.shield(task)
                text = json.dumps(wire.whole(reply, form, self._renderer))
                response = web.Response(text=text, content_type="application/json")
                await response.prepare(request)
                await response.write_eof()
        for node in () if reply is None else reply.nodes:
            opened.session.tree.deliver(node)
        return response

    @asynccontextmanager
    async def _shared(
        self, opened: Open, which: tuple[str, str | None], draw: Callable[[], Any], *, again: bool
    ) -> AsyncIterator["asyncio.Task[Reply]"]:
        """The task that answers this body: a new one, unless a client asks again for what it has not read."""
        call = opened.calls.get(which)
        failed = call is not None and call.task.done() and (call.task.cancelled() or call.task.exception() is not None)
        orphaned = call is not None and not call.waiting and not call.task.done()
        if call is None or failed or not (again or orphaned):
            call = opened.calls[which] = _Call(task=asyncio.ensure_future(draw()))
        call.waiting += 1
        try:
            yield call.task
        finally:
            call.waiting -= 1
            if not call.task.done():
                asyncio.get_running_loop().call_later(_GRACE_S, _abort_if_unwanted, call)

    async def _streamed(
        self, request: web.Request, wire: _Wire, form: Form, task: "asyncio.Task[Reply]"
    ) -> tuple[web.StreamResponse, Reply | None]:
        """The reply as server-sent events, with comments to keep the line open until it is there; None where there was an error."""
        await asyncio.wait([task], timeout=_BEFORE_STREAM_S)
        if task.done():
            task.result()  # refused: with its status
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        while not task.done():
            await response.write(b": keepalive\n\n")
            await asyncio.wait([task], timeout=_KEEPALIVE_S)
        try:
            reply = task.result()
        except Refused as error:
            await response.write(_event(wire.error(error), name="error" if wire.named_events else None))
            await response.write_eof()
            return response, None
        for piece in wire.pieces(reply, form, self._renderer):
            await response.write(_event(piece, name=piece["type"] if wire.named_events else None))
        if not wire.named_events:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response, reply

    async def _count(self, wire: _Wire, request: web.Request) -> web.StreamResponse:
        opened, body, _ = await self._asked(request)
        asked, _ = anthropic_wire.read(body, counting=True)
        return web.json_response({"input_tokens": len(opened.session.placed(asked).prompt)})

    async def _models(self, wire: _Wire, request: web.Request) -> web.StreamResponse:
        self._session(request)
        name = request.match_info.get("model")
        models = [{"id": name or MODEL, "object": "model", "created": 0, "owned_by": "hone"}]
        return web.json_response(models[0] if name else {"object": "list", "data": models})

    async def _nowhere(self, wire: _Wire, request: web.Request) -> web.StreamResponse:
        raise Refused(
            f"{request.method} {request.path} is not served; POST v1/chat/completions, v1/completions or v1/messages under the base URL",
            status=404,
            code="not_found",
        )

    def _session(self, request: web.Request) -> Open:
        """The open session a request belongs to. Raises Refused; a wrong key is told no more than a wrong path."""
        name = request.match_info["session"]
        opened = self._sessions.get(name)
        key = self._closed.get(name) if opened is None else opened.key
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip() or request.headers.get("x-api-key", "")
        if key is None or not hmac.compare_digest(given.encode(errors="replace"), key.encode()):
            raise Refused("no session has this path and key", status=401, code="invalid_api_key")
        if opened is None:
            raise Refused("the session is closed: its episode has ended", status=410, code="session_closed")
        return opened

    async def _asked(self, request: web.Request) -> tuple[Open, Mapping[str, Any], str]:
        """(the session, the body, a digest of path and body)."""
        self._session(request)
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise Refused(
                f"the body has more than {_LARGEST_BODY / 2**20:g} MiB; send fewer images, or smaller ones",
                status=413,
                code="request_too_large",
            ) from error
        opened = self._session(request)  # it may have been closed while the body came
        try:
            body = read_json(raw)
        except ValueError as error:
            raise Refused(f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object")
        return opened, body, hashlib.blake2b(request.path.encode() + b"\n" + raw, digest_size=16).hexdigest()


@asynccontextmanager
async def serving(renderer: Renderer) -> AsyncIterator[Server]:
    """A server on a free port of this machine's loopback, for as long as the block lasts."""
    server = Server(renderer)
    application = web.Application(client_max_size=_LARGEST_BODY)
    application.add_routes(server.routes())
    # A client's going away cancels its handler, which then wants its call no more. No limit on how long a reply may take, and none
    # that matters on how long an agent may be busy with other things between two calls.
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=1.0, keepalive_timeout=_IDLE_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=_BACKLOG)
        await site.start()
        host, port = runner.addresses[0][:2]
        server._address = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()


def _event(body: Mapping[str, Any], *, name: str | None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body)}\n\n".encode()


def _abort_if_unwanted(call: _Call) -> None:
    if not call.waiting:
        call.task.cancel()
