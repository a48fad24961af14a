"""The HTTP of the server: `/invocations` by hand, because it must be fast; everything else in routes.py, through FastAPI."""

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from alacarte.serving.routes import make_api
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings
from alacarte.serving.state import Parts
from alacarte.serving.workers import REPLACES, told_to_stop

SETTINGS = "ALACARTE_SERVE"  # the environment variable by which a worker process gets its settings
UNREADY = 60  # seconds at most that a worker in the place of another one leaves requests to the others
LARGE = 1_000_000  # bytes of a body that is parsed outside the event loop, so that it does not hold up other requests
PATIENCE = 5  # times max_body that are read and thrown away: who is still sending would not see the refusal

logger = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode


class App:
    """One worker process: its model, its recorder and its routes, as an ASGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.parts = settings, Parts.make(settings)
        self.api = make_api(self.parts, self._lifespan)
        self._reading: dict[asyncio.Task, float] = {}  # requests whose body is on its way -> since when
        self._late: set[asyncio.Task] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            if scope["path"] == "/invocations":
                return await self._invocations(scope, receive, send)
            try:
                receive = _in_hand(await self._body(receive), receive)
            except RequestError as error:
                return await _send(send, error.status, self.parts.refusal(error))
        return await self.api(scope, receive, send)

    async def _invocations(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status, answer = 200, {}
        try:
            answer = await self._predict(scope, receive, started)
        except RequestError as error:
            status, answer = error.status, self.parts.refusal(error)
        except TimeoutError:
            status, answer = 504, {"error_code": "TIMEOUT", "message": f"stopped after {self.settings.timeout} s"}
        except Exception:
            logger.exception("a request failed in the server itself")
            status, answer = 500, {"error_code": "INTERNAL_ERROR", "message": "the server failed; its log says why"}
        await _send(send, status, answer)
        self.parts.metrics.request("/invocations", status, time.perf_counter() - started)

    async def _predict(self, scope: Scope, receive: Receive, started: float) -> dict[str, Any]:
        headers = Headers(scope=scope)
        self.parts.access.check(headers, "predict")
        body = await self._body(receive)
        current = self.parts.holder.current
        if current is None:
            raise RequestError(503, self.parts.holder.reason())
        model, content_type = current.model, headers.get("content-type", "")
        if len(body) > LARGE or model.path_in_use == "pyfunc":
            rows = await asyncio.to_thread(model.parse, body, content_type, self.settings.max_rows)
        else:
            rows = model.parse(body, content_type, self.settings.max_rows)
        answer = await self.parts.batcher.predict(model, rows)
        reply: dict[str, Any] = {"predictions": answer.labels, "model_version": current.version}
        if self.parts.recorder:
            took = time.perf_counter() - started
            ids, audit_ids = self.parts.recorder.add(current.version, model.columns, rows, answer, took)
            reply["prediction_ids"] = ids
            if audit_ids:
                reply["audit_ids"] = audit_ids
        if scope["query_string"] and parse_qs(scope["query_string"]).get(b"probabilities") == [b"true"]:
            reply["probabilities"] = await asyncio.to_thread(model.probabilities, rows)
        self.parts.metrics.rows(rows.n)
        return reply

    async def _body(self, receive: Receive) -> bytes:
        """The body of a request. RequestError 413 for one that is too long, 408 for one that takes too long to come."""
        task = asyncio.current_task()
        assert task
        self._reading[task] = time.monotonic()
        try:
            return await self._read(receive)
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise RequestError(408, f"the body did not come within {self.settings.timeout} s") from None
        finally:
            del self._reading[task]
            self._late.discard(task)

    async def _read(self, receive: Receive) -> bytes:
        message = await receive()
        body = message.get("body", b"")
        if not message.get("more_body"):
            if len(body) > self.settings.max_body:
                raise self.parts.too_long()
            return body
        parts, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the body ended before its time")
            size += len(message.get("body", b""))
            if size <= self.settings.max_body:
                parts.append(message["body"])
            elif size > PATIENCE * self.settings.max_body:
                break
        if size > self.settings.max_body:
            raise self.parts.too_long()
        return b"".join(parts)

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
        self.parts.holder.start()
        if self.parts.recorder:
            self.parts.recorder.start()
        hurry = asyncio.create_task(self._hurry_clients())
        if os.environ.get(REPLACES):
            await self._load_first()
        try:
            yield
        finally:
            hurry.cancel()
            await asyncio.to_thread(self.parts.holder.stop, 1)
            if self.parts.recorder:
                await asyncio.to_thread(self.parts.recorder.stop)

    async def _load_first(self) -> None:
        """Wait for the model, so that requests go to workers that have one; no longer than it may yet come."""
        end = time.monotonic() + UNREADY
        with told_to_stop() as told:
            while not (self.parts.holder.settled or told.is_set() or time.monotonic() > end):
                await asyncio.sleep(0.02)


async def _send(send: Send, status: int, answer: dict[str, Any]) -> None:
    body = encode(answer)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _in_hand(body: bytes, receive: Receive) -> Receive:
    """`receive` for who comes after the body was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def create_app() -> App:
    """What a worker process runs; its settings come from the environment."""
    # One thread for each kind of arithmetic: on small rows two wait for each other, up to a hundred times longer.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for what is loaded later, such as torch
    threadpool_limits(1)
    # Requests that wait to be stored are many young objects: by default the collector walks them all, again and again,
    # for hundreds of milliseconds.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    sys.setswitchinterval(0.001)  # seconds that the thread which stores them may hold up the event loop
    return App(Settings.from_json(os.environ[SETTINGS]))
