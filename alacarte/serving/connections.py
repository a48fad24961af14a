"""One connection of a client, with limits on size and time; uvicorn's protocol for httptools has no limit on a head."""

import time
from array import array
from asyncio import Transport
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any

import msgspec
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from alacarte.serving.rows import RequestError

HEAD = 65_536  # bytes of the request line and the headers; also of trailers, and of the lines between two chunks
HEADERS = 256  # headers of one request
PIECE = 16_384  # bytes that the parser gets at a time: it joins an unfinished header anew with each piece
PIPELINED = 100  # requests of one connection that wait for the answer to an earlier request
RESERVED = 64  # connections beyond max_connections; they can use only the routes of HEALTH
RESERVED_SECONDS = 2  # that such a connection may take to send its request
HEALTH = ("/livez", "/readyz", "/health", "/ping")

TOO_LONG = RequestError(431, f"the request line and the headers may have {HEAD} bytes")
URL_TOO_LONG = RequestError(414, f"{TOO_LONG.message}; the URL is too long")
TRAILERS_TOO_LONG = RequestError(431, f"trailers and the lines between chunks may have {HEAD} bytes")
TOO_MANY_CONNECTIONS = RequestError(503, "too many connections")


class Connection(HttpToolsProtocol):
    """Refuses a head that is too long or contradictory, and ends a connection that is too slow.

    A head must come within `timeout_keep_alive` seconds. The application limits the size of a body. uvicorn's
    `limit_concurrency` is the number of connections that may use every route.
    """

    url = b""
    _ending = False  # a refusal was written or waits for earlier answers; nothing is parsed any more
    _fault: RequestError | None = None  # the reason why a callback stopped the parser
    _answer = b""
    _answered: RequestResponseCycle | None = None  # the request that the application answers, or has answered last
    _reserved = False  # beyond max_connections
    _in_body = False  # from the end of a head to the end of its request
    _progress = False  # whether the parser has ended a head or read a part of a body in the present piece
    _unparsed = 0  # bytes since the last piece with progress
    _head_until: float | None = None
    _body_until: float | None = None
    _unread_size, _read_at = 0, 0.0  # bytes that the client had not read at the last look; when it last read some

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.limit_concurrency is not None
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._head_seconds = self.timeout_keep_alive

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at = time.monotonic()
        if len(self.connections) > self._max_connections:
            self._reserved, self.app = True, self._health_only
            self._head_seconds = min(RESERVED_SECONDS, self.timeout_keep_alive)
            if len(self.connections) > self._max_connections + RESERVED:
                self.transport.write(_http_answer(TOO_MANY_CONNECTIONS))
                self.transport.close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnect_application()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            if self._ending or self.transport.is_closing():
                break
            self._parse(data if len(data) <= PIECE else data[start : start + PIECE])

    def _parse(self, piece: bytes) -> None:
        self._progress = False
        super().data_received(piece)
        if self._progress:
            self._unparsed = 0
        else:
            self._unparsed += len(piece)
            if self._unparsed > HEAD:
                self._refuse(self._too_long())
        if self._head_until is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def _too_long(self) -> RequestError:
        if self._in_body:
            return TRAILERS_TOO_LONG
        return URL_TOO_LONG if len(self.url) > HEAD / 2 else TOO_LONG

    # --- callbacks of the parser ---

    def on_headers_complete(self) -> None:
        self._progress, self._head_until, self._body_until = True, None, None
        self._fault = self._find_fault()
        if self._fault:
            raise ValueError  # stops the parser, which then calls send_400_response
        super().on_headers_complete()
        self._in_body = True
        self.headers = []  # for the trailers, so that the application does not see them among the headers
        self.cycle.keep_alive &= not self._reserved
        if not self.cycle.keep_alive:
            self.cycle.transport = _ClosingTransport(self)  # type: ignore[assignment]

    def _find_fault(self) -> RequestError | None:
        """The refusal of a head, if it has a fault."""
        # `_unparsed` lacks two pieces: the piece in which the head begins and the piece in which it ends.
        if self._unparsed > HEAD - 2 * PIECE:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > HEAD:
                return self._too_long()
        if len(self.headers) > HEADERS:
            return RequestError(431, f"a request may have {HEADERS} headers")
        if len(self.pipeline) >= PIPELINED:
            return RequestError(429, f"{PIPELINED} requests of this connection wait for their answers")
        codings, hosts = [], 0
        for name, value in self.headers:
            if name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"host":
                hosts += 1
        if codings and codings != [b"chunked"]:
            return RequestError(501, "the only transfer coding is chunked")
        if hosts > 1 or (codings and self.parser.get_http_version() != "1.1"):
            return RequestError(400, "the head of the request contradicts itself")
        return None

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress, self._in_body = True, False
        super().on_message_complete()

    # --- refusals ---

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or RequestError(400, "this is no HTTP request"))

    def _refuse(self, error: RequestError) -> None:
        """Answer and close, after the answers to earlier requests of this connection."""
        if self._ending:
            return
        self._ending, self._answer = True, _http_answer(error)
        waiting = self.cycle is not None and not self.cycle.response_complete
        if self._in_body:  # then the newest request is the request that is refused
            waiting = bool(self.pipeline)
            if waiting:
                self.pipeline.popleft()
            elif self.cycle.response_started:
                self._answer = b""
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not waiting:
            self._end()

    def on_response_complete(self) -> None:
        last = not self.pipeline
        super().on_response_complete()
        if self._answer and last and not self.transport.is_closing():
            self._end()

    def _end(self) -> None:
        answer, self._answer = self._answer, b""
        self.transport.write(answer)
        self._close_when_read()

    def close_after_answer(self) -> None:
        """Close at once if the whole request was read."""
        if self._in_body:
            self._close_when_read()
        else:
            self.transport.close()

    def _close_when_read(self) -> None:
        """Close once the client has closed, or after `timeout_keep_alive` seconds.

        Data that arrive at a closed socket would reset the connection, and the client would lose the answer.
        """
        self._ending = True
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._await_head()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _disconnect_application(self) -> None:
        """End the request that is being answered: uvloop raises for a write to a lost connection.

        uvicorn ends only the newest request, which may still wait.
        """
        if self._answered and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    async def _health_only(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application for connections beyond the limit."""
        if scope["path"] in HEALTH:
            await self.config.loaded_app(scope, receive, send)
        else:
            await JSONResponse(TOO_MANY_CONNECTIONS.body(), 503)(scope, receive, send)

    # --- time ---

    def _await_head(self) -> None:
        self._head_until = time.monotonic() + self._head_seconds

    def end_if_too_slow(self, now: float, body_seconds: float) -> None:
        """Refuse a body that takes longer than `body_seconds`. Close if a head is too late or the client reads nothing.

        `now`: seconds of time.monotonic. Timers for each connection would cost time in each request, so the server calls
        this for every connection once a second.
        """
        size = self._unread()
        if size == 0 or size < self._unread_size:
            self._read_at = now
        self._unread_size = size
        if now - self._read_at > self.timeout_keep_alive:
            self._disconnect_application()
            self.transport.abort()
        elif size == 0 and self._head_until is not None and now > self._head_until:
            self.transport.close()
        elif not self._in_body or self.pipeline or self.cycle.response_complete or self._ending:
            self._body_until = None
        elif self._body_until is None:
            self._body_until = now + body_seconds
        elif now > self._body_until:
            self._refuse(RequestError(408, f"the body did not arrive within {body_seconds:g} s"))

    def timeout_keep_alive_handler(self) -> None:
        """A client that is still reading is not idle."""
        if self._unread():
            self._await_head()
        else:
            super().timeout_keep_alive_handler()

    def _unread(self) -> int:
        """Bytes that wait here or in the system for the client. The system takes more only when much of its part is read."""
        count = array("i", [0])
        with suppress(OSError, ValueError):  # the socket is closed already
            ioctl(self.transport.get_extra_info("socket").fileno(), TIOCOUTQ, count)
        return self.transport.get_write_buffer_size() + count[0]


class _ClosingTransport:
    """The transport of a request whose connection ends with its answer; the client may still be sending the body."""

    def __init__(self, connection: Connection) -> None:
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing
        self.close = connection.close_after_answer


def _http_answer(error: RequestError) -> bytes:
    body = msgspec.json.encode(error.body())
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[error.status] + head + body
