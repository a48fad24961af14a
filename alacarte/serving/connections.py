"""One connection of a client, with limits on its size and time; uvicorn's protocol for httptools has none on a head."""

import time
from array import array
from asyncio import Transport
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

HEAD = (
    65_536  # bytes of the request line and the headers together; also of trailers, and of the lines between two chunks
)
HEADERS = 256  # headers of one request
PIECE = 16_384  # bytes that the parser gets at a time: it joins an unfinished header anew with each piece
PIPELINED = 100  # requests of one connection that wait for the answer to an earlier one
DISCARDED = (
    50_000_000  # bytes that are thrown away after a refusal, because a client reads it only after it has sent all
)
RESERVED = 64  # connections beyond max_connections; they can ask for HEALTH only
RESERVED_SECONDS = 2  # that such a connection may take to send its request
HEALTH = ("/livez", "/readyz", "/health", "/ping")


class Connection(HttpToolsProtocol):
    """Answers 431 or 414 to a head above HEAD bytes, 501 to a transfer coding other than chunked, 503 when all are in use.

    A head must come within `timeout_keep_alive` seconds. The application limits the time and the size of a body.
    uvicorn's `limit_concurrency` is the number of connections that may ask for every route.
    """

    url = b""
    _ending = False  # a refusal was written or waits for earlier answers; nothing is parsed any more
    _refusal: tuple[int, str] | None = None  # why a callback stopped the parser
    _answer = b""
    _answered: RequestResponseCycle | None = None  # the request that the application answers, or has answered last
    _reserved = False  # beyond max_connections
    _in_body = False  # from the end of a head to the end of its request
    _event = False  # whether the parser has ended a head or found a part of a body in the present piece
    _unparsed = 0  # bytes since the last such piece
    _discarded = 0
    _head_until: float | None = None
    _unsent, _sent_at = 0, 0.0  # bytes that the client had not read at the last look; when it last read some

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.limit_concurrency is not None
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._head_seconds = self.timeout_keep_alive

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._sent_at = time.monotonic()
        if len(self.connections) > self._max_connections:
            self._reserved, self.app = True, self._health_only
            self._head_seconds = min(RESERVED_SECONDS, self.timeout_keep_alive)
            if len(self.connections) > self._max_connections + RESERVED:
                self.transport.write(_answer(503, "too many connections"))
                self.transport.close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell_application()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            if self.transport.is_closing():
                break
            if self._ending:
                self._discard(len(data) - start)
                break
            self._parse(data if len(data) <= PIECE else data[start : start + PIECE])

    def _parse(self, piece: bytes) -> None:
        self._event = False
        super().data_received(piece)
        if self._event:
            self._unparsed = 0
        else:
            self._unparsed += len(piece)
            if self._unparsed > HEAD:
                self._refuse(*self._too_long())
        if self._head_until is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def _too_long(self) -> tuple[int, str]:
        if self._in_body:
            return 431, f"trailers and the lines between chunks may have {HEAD} bytes"
        if len(self.url) > HEAD / 2:
            return 414, f"the request line and the headers may have {HEAD} bytes; the URL is too long"
        return 431, f"the request line and the headers may have {HEAD} bytes"

    # --- what the parser calls ---

    def on_headers_complete(self) -> None:
        self._event, self._head_until, self._discarded = True, None, 0
        self._refusal = self._fault()
        if self._refusal:
            raise ValueError  # stops the parser, which then calls send_400_response
        super().on_headers_complete()
        self._in_body = True
        self.headers = []  # trailers end up here, and not among the headers that the application sees
        self.cycle.keep_alive &= not self._reserved
        if not self.cycle.keep_alive:
            self.cycle.transport = _Closing(self)  # type: ignore[assignment]

    def _fault(self) -> tuple[int, str] | None:
        """The status and the message for a head that is refused."""
        # Fewer than two pieces are not in this sum: the piece in which the head began and the piece in which it ends.
        if self._unparsed > HEAD - 2 * PIECE and self._head_size() > HEAD:
            return self._too_long()
        if len(self.headers) > HEADERS:
            return 431, f"a request may have {HEADERS} headers"
        if len(self.pipeline) >= PIPELINED:
            return 429, f"{PIPELINED} requests of this connection wait for their answers"
        codings, hosts = [], 0
        for name, value in self.headers:
            if name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"host":
                hosts += 1
        if codings and codings != [b"chunked"]:
            return 501, "the only transfer coding is chunked"
        if hosts > 1 or (codings and self.parser.get_http_version() != "1.1"):
            return 400, "the head of the request contradicts itself"
        return None

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_body(self, body: bytes) -> None:
        self._event = True
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._event, self._in_body = True, False
        super().on_message_complete()

    # --- refusals ---

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._refusal or (400, "this is no HTTP request")))

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close, after the answers to earlier requests of this connection."""
        if self._ending:
            return
        self._ending, self._answer = True, _answer(status, message)
        waiting = self.cycle is not None and not self.cycle.response_complete
        if self._in_body:  # then the newest request is the one that is refused
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
        """Close at once where the whole request was read."""
        if self._in_body:
            self._close_when_read()
        else:
            self.transport.close()

    def _close_when_read(self) -> None:
        """Close once the client has closed, or after its time: data that arrive at a closed socket would reset the
        connection, and the client would lose the answer."""
        self._ending = True
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._await_head()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > DISCARDED:
            self._abort()

    def _abort(self) -> None:
        """Close without waiting for the client to read the rest."""
        self._tell_application()
        self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _tell_application(self) -> None:
        """End the request that is being answered; uvicorn tells only the newest request, which may still wait."""
        if self._answered and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    async def _health_only(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application for connections beyond the limit."""
        if scope["path"] in HEALTH:
            await self.config.loaded_app(scope, receive, send)
            return
        body = _body(503, "too many connections")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # --- time ---

    def _await_head(self) -> None:
        self._head_until = time.monotonic() + self._head_seconds

    def end_if_stuck(self, now: float) -> None:
        """Close a connection whose head is overdue, or whose client does not read. `now`: seconds of time.monotonic.

        A timer for each connection would cost time in each request, so the server looks at all of them every second.
        """
        size = self._unread()
        if size == 0 or size < self._unsent:
            self._sent_at = now
        self._unsent = size
        if now - self._sent_at > self.timeout_keep_alive:
            self._abort()
        elif size == 0 and self._head_until is not None and now > self._head_until:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """A client that is still reading is not idle."""
        if self._unread():
            self._await_head()
        else:
            super().timeout_keep_alive_handler()

    def _unread(self) -> int:
        """Bytes that wait here or in the system for the client. The system takes more only when much of its part is read."""
        count = array("i", [0])
        with suppress(OSError):  # closed meanwhile
            ioctl(self.transport.get_extra_info("socket").fileno(), TIOCOUTQ, count)
        return self.transport.get_write_buffer_size() + count[0]


class _Closing:
    """The transport of a request whose connection ends with its answer; the client may still be sending the body."""

    def __init__(self, connection: Connection) -> None:
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing
        self.close = connection.close_after_answer


def _body(status: int, message: str) -> bytes:
    return msgspec.json.encode({"error_code": "BAD_REQUEST" if status < 500 else "UNAVAILABLE", "message": message})


def _answer(status: int, message: str) -> bytes:
    body = _body(status, message)
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body
