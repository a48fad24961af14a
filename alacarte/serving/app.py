"""The HTTP of the server: `/invocations` without a framework, because it must be fast; routes.py answers everything else.

The path of a request to `/invocations` is `App.predict`: read the body, parse it to rows, predict in a batch, store.
"""

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from alacarte.serving.follower import LoadedModel
from alacarte.serving.inference_protocol import make_router
from alacarte.serving.limits import LARGE_BODY
from alacarte.serving.routes import make_api
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings
from alacarte.serving.state import AppState
from alacarte.serving.tracing import trace_requests

# A page may send a second policy of its own; browsers then enforce both.
PROTECTION = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", b"frame-ancestors 'none'")]

logger = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode


class App:
    """The server as an ASGI application: one model, one log of predictions, and the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.state = settings, AppState(settings)
        self.api = make_api(self.state, self._lifespan)
        self.api.include_router(make_router(self.state, self.predict))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.api(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] == "/invocations":
            await self._invocations(scope, receive, send)
        else:
            if scope["method"] == "HEAD":  # uvicorn leaves out the body of the answer
                scope = {**scope, "method": "GET"}
            await self.api(scope, receive, _protected(send))

    async def _invocations(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers, body = Headers(scope=scope), b""
        status, answer = 200, {}
        try:
            self.state.access.check(headers, scope["client"], "predict")
            body = await self.state.bodies.read(headers, receive, self.settings.max_body)
            query = scope["query_string"].decode("latin-1")
            probabilities = bool(query) and parse_qs(query).get("probabilities") == ["true"]
            content_type = headers.get("content-type", "")
            answer = await self.predict(self.state.current_model(), body, content_type, probabilities, started)
        except RequestError as error:
            status, answer = error.status, self.state.refusal(error)
        except Exception:
            logger.exception("a request failed in the server itself")
            status, answer = 500, {"error_code": "INTERNAL_ERROR", "message": "the server failed; its log says why"}
        finally:
            self.state.bodies.release(body)
        await _send(send, status, answer)
        self.state.metrics.count_request("/invocations", status, time.perf_counter() - started)

    async def predict(
        self, current: LoadedModel, body: bytes, content_type: str, probabilities: bool, started: float
    ) -> dict[str, Any]:
        """The answer of one version to a body that `/invocations` accepts. `started`: the time.perf_counter of the request.

        Raises RequestError for a body or rows that are refused, and for a prediction that takes too long.
        """
        state, settings, model = self.state, self.settings, current.model
        if len(body) > LARGE_BODY or model.path_in_use == "pyfunc":
            rows = await asyncio.to_thread(model.parse, body, content_type, settings.max_rows)
        else:
            rows = model.parse(body, content_type, settings.max_rows)
        try:
            answer = await state.batcher.predict(model, rows)
        except TimeoutError:
            raise RequestError(504, f"stopped after {settings.timeout} s") from None
        reply: dict[str, Any] = {"predictions": answer.labels, "model_version": current.version}
        if state.prediction_log:
            seconds = time.perf_counter() - started
            ids, audit_ids = state.prediction_log.add(current.version, rows, answer, seconds)
            reply["prediction_ids"] = ids
            if audit_ids:
                reply["audit_ids"] = audit_ids
        if probabilities:
            reply["probabilities"] = await asyncio.to_thread(model.probabilities, rows)
        state.metrics.rows(current.version).inc(rows.n)
        return reply

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        self.state.follower.start()
        if self.state.prediction_log:
            self.state.prediction_log.start()
        yield
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


def create_app(settings: Settings) -> ASGIApp:
    """Make the application, and set up this process for it."""
    # One thread for each kind of arithmetic: on small rows two threads wait for each other, up to a hundred times longer.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for libraries that are imported later, such as torch
    threadpool_limits(1)
    # Predictions that wait to be stored are many young objects. By default the garbage collector visits all of them
    # again and again, which takes hundreds of milliseconds.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    sys.setswitchinterval(0.001)  # seconds that another thread may hold up the event loop
    return trace_requests(App(settings))
