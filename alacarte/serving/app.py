"""The HTTP of the server: `/invocations` by hand, because it must be fast; everything else in routes.py, through FastAPI."""

import asyncio
import contextlib
import gc
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from alacarte.serving.auth import rate_key
from alacarte.serving.routes import make_api
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings
from alacarte.serving.state import AppState

LARGE = 1_000_000  # bytes of a body that is parsed outside the event loop, so that it does not hold up other requests
ROOM = (
    256_000_000  # bytes of all bodies that are read or answered at a time; beyond it only a body up to LARGE is taken
)

# A page may send a second policy of its own; browsers then enforce both.
PROTECTION = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", b"frame-ancestors 'none'")]


class Body(NamedTuple):
    """The body of a POST route: the token that it needs, if any, and its largest size in bytes."""

    path: re.Pattern[str]
    kind: str | None
    limit: int


BODIES = (
    Body(re.compile("/feedback"), "feedback", 1_000_000),  # 1,000 labels with a source and a comment each
    Body(re.compile("/feedback/[^/]+/review"), "admin", 100_000),
    Body(re.compile("/events"), None, 100_000),  # its signature is over the body
)

logger = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode


class App:
    """The server as an ASGI application: one model, one log of predictions, and the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.state = settings, AppState.make(settings)
        self.api = make_api(self.state, self._lifespan)
        self._reading: dict[asyncio.Task, float] = {}  # requests whose body is on its way -> since when
        self._late: set[asyncio.Task] = set()
        self._sizes: dict[asyncio.Task, int] = {}  # requests with a body -> bytes of it that are here
        self._held = 0  # the sum of these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.api(scope, receive, send)
        task = asyncio.current_task()
        assert task
        try:
            await self._answer(scope, receive, send)
        finally:
            self._held -= self._sizes.pop(task, 0)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST" and scope["path"] == "/invocations":
            return await self._invocations(scope, receive, send)
        try:
            receive = await self._admit(scope, receive)
        except RequestError as error:
            return await _send(send, error.status, self.state.refusal(error))
        return await self.api(scope, receive, _protected(send))

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Check the token and the rate of a POST before its body is read. The body of any other request is not read.

        The connection throws away a body that nobody has read. Raises RequestError.
        """
        body = next((body for body in BODIES if scope["method"] == "POST" and body.path.fullmatch(scope["path"])), None)
        if body is None:
            return receive
        headers = Headers(scope=scope)
        if body.kind:
            caller = self.state.access.check(headers, body.kind)
            if body.kind == "feedback":
                self.state.label_rate.check(rate_key(caller, scope["client"]))
        limit = min(body.limit, self.settings.max_body)
        return _in_hand(await self._body(headers, receive, limit), receive)

    async def _invocations(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status, answer = 200, {}
        try:
            answer = await self._predict(scope, receive, started)
        except RequestError as error:
            status, answer = error.status, self.state.refusal(error)
        except TimeoutError:
            status, answer = 504, {"error_code": "TIMEOUT", "message": f"stopped after {self.settings.timeout} s"}
        except Exception:
            logger.exception("a request failed in the server itself")
            status, answer = 500, {"error_code": "INTERNAL_ERROR", "message": "the server failed; its log says why"}
        await _send(send, status, answer)
        self.state.metrics.request("/invocations", status, time.perf_counter() - started)

    async def _predict(self, scope: Scope, receive: Receive, started: float) -> dict[str, Any]:
        headers = Headers(scope=scope)
        self.state.access.check(headers, "predict")
        body = await self._body(headers, receive, self.settings.max_body)
        current = self.state.follower.current
        if current is None:
            raise RequestError(503, self.state.follower.reason())
        model, content_type = current.model, headers.get("content-type", "")
        if len(body) > LARGE or model.path_in_use == "pyfunc":
            rows = await asyncio.to_thread(model.parse, body, content_type, self.settings.max_rows)
        else:
            rows = model.parse(body, content_type, self.settings.max_rows)
        answer = await self.state.batcher.predict(model, rows)
        reply: dict[str, Any] = {"predictions": answer.labels, "model_version": current.version}
        if self.state.prediction_log:
            took = time.perf_counter() - started
            ids, audit_ids = self.state.prediction_log.add(current.version, model.columns, rows, answer, took)
            reply["prediction_ids"] = ids
            if audit_ids:
                reply["audit_ids"] = audit_ids
        if scope["query_string"] and parse_qs(scope["query_string"]).get(b"probabilities") == [b"true"]:
            reply["probabilities"] = await asyncio.to_thread(model.probabilities, rows)
        self.state.metrics.rows(rows.n)
        return reply

    async def _body(self, headers: Headers, receive: Receive, limit: int) -> bytes:
        """The body of a request. RequestError 413 for more than `limit` bytes, 408 for a body that takes too long to come.

        503 for a large body while the bodies of all requests together take ROOM bytes.
        """
        length = headers.get("content-length", "0")
        if len(length) > 15 or int(length) > limit:
            raise RequestError(413, f"a body may have {limit} bytes; send less at a time")
        task = asyncio.current_task()
        assert task
        self._reading[task] = time.monotonic()
        try:
            return await self._read(receive, limit, task)
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise RequestError(408, f"the body did not come within {self.settings.timeout} s") from None
        finally:
            del self._reading[task]
            self._late.discard(task)

    async def _read(self, receive: Receive, limit: int, task: asyncio.Task) -> bytes:
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the body ended before its time")
            piece, more = message["body"], message["more_body"]
            size += len(piece)
            if size > limit:
                raise RequestError(413, f"a body may have {limit} bytes; send less at a time")
            self._sizes[task], self._held = size, self._held + len(piece)
            if size > LARGE and self._held > max(ROOM, 2 * self.settings.max_body):
                raise RequestError(503, f"too many large bodies at once; try again, or send at most {LARGE} bytes")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _hurry_clients(self) -> None:
        """Stop reading what takes longer than `timeout`. One look over all: a timer each would cost 5 us a request."""
        while True:
            await asyncio.sleep(min(1, self.settings.timeout / 4))
            now = time.monotonic()
            for task, since in self._reading.items():
                if now - since > self.settings.timeout and task not in self._late:
                    self._late.add(task)
                    task.cancel()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        self.state.follower.start()
        if self.state.prediction_log:
            self.state.prediction_log.start()
        hurry = asyncio.create_task(self._hurry_clients())
        try:
            yield
        finally:
            hurry.cancel()
            await asyncio.to_thread(self.state.follower.stop, 1)
            if self.state.prediction_log:
                await asyncio.to_thread(self.state.prediction_log.stop)


async def _send(send: Send, status: int, answer: dict[str, Any]) -> None:
    body = encode(answer)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _protected(send: Send) -> Send:
    """Let no browser show an answer inside another page, or guess its type."""

    async def send_protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *PROTECTION]
        await send(message)

    return send_protected


def _in_hand(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read before."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def create_app(settings: Settings) -> App:
    """Make the application, and set up this process for it."""
    # One thread for each kind of arithmetic: on small rows two threads wait for each other, up to a hundred times longer.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for what is loaded later, such as torch
    threadpool_limits(1)
    # Requests that wait to be stored are many young objects: by default the collector walks them all, again and again,
    # for hundreds of milliseconds.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    sys.setswitchinterval(0.001)  # seconds that the thread which stores them may hold up the event loop
    return App(settings)
