"""Hostile clients against a real server: each is refused or hung up on, and others are served meanwhile."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Project
from registries import until
from servers import ROWS, KeptAlive, Served, register_constant, serving

from alacarte.serving.connections import HEAD, HEADERS, PIECE, PIPELINED, RESERVED

NAME = "hostile"
CONNECTIONS = 40
IDLE = 3  # seconds
TOKENS = {"SERVE_PREDICT_TOKEN": "p", "SERVE_FEEDBACK_TOKEN": "alice:a,bob:b", "SERVE_ADMIN_TOKEN": "admin"}
TOO_MUCH = HEAD + 2 * PIECE + 1  # bytes without an end, to which an answer must come
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer p\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Served]:
    """Started where a process may open few files, as is usual."""
    register_constant(project, NAME, 1)
    settings = f"registered_model_name={NAME} serve.port=0 serve.poll_seconds=0.2 serve.max_connections={CONNECTIONS}"
    settings += f" serve.idle_seconds={IDLE} serve.feedback_per_minute=5"
    command = ("bash", "-c", f"ulimit -Sn 128; exec {sys.executable} -m steps.serve {settings}")
    with serving(project, command=command, SERVE_WEBHOOK_SECRET="the secret", **TOKENS) as served:
        served.wait()
        yield served
        assert served.ask("/invocations", ROWS, Authorization="Bearer p").status == 200
        assert not [line for line in served.lines if "Traceback" in line], "".join(served.lines)
        assert served.stop() == 0


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def exchange(served: Served, *pieces: bytes) -> bytes:
    """All that the server answers until it hangs up."""
    answer = b""
    with connect(served) as connection:
        for piece in pieces:
            connection.sendall(piece)
        while received := connection.recv(1_000_000):
            answer += received
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


@pytest.mark.parametrize(
    ("status", "pieces"),
    [
        (431, [GET, b"X-Endless: ", b"x" * TOO_MUCH]),
        (431, [GET, b"x" * TOO_MUCH]),
        (431, [GET, *[b"X-Endless: x\r\n"] * (TOO_MUCH // 14 + 1)]),
        (431, [GET, b"X-Long: ", b"x" * HEAD, b"\r\n\r\n"]),
        (431, [GET, *[b"X-Many: x\r\n"] * HEADERS, b"\r\n"]),
        (414, [b"GET /", b"x" * TOO_MUCH]),
        (414, [b"GET /livez?", b"x" * HEAD, b" HTTP/1.1\r\nHost: localhost\r\n\r\n"]),
        (431, [b"\r\n" * TOO_MUCH]),
        (431, [CHUNKED, b"2\r\n{}\r\n0\r\n", b"X-Endless: ", b"x" * TOO_MUCH]),
        (431, [CHUNKED, b"2\r\n{}\r\n0\r\n", *[b"X-Endless: x\r\n"] * (TOO_MUCH // 14 + 1)]),
        (431, [CHUNKED, b"2;", b"x" * TOO_MUCH]),
        (431, [CHUNKED, b"0" * TOO_MUCH]),
    ],
    ids=["header", "name", "headers", "long", "many", "url", "query", "lines", "trailer", "trailers", "extension", "chunk"],
)  # fmt: skip
def test_heads_and_trailers_have_a_limit(server: Served, status: int, pieces: list[bytes]):
    assert statuses(exchange(server, *pieces)) == [status]
    assert statuses(exchange(server, GET + b"\r\n", *pieces)) == [200, status], "as a second request on a connection"


def test_a_large_head_below_the_limit_is_taken(server: Served):
    head = GET + b"X-Long: " + b"x" * (HEAD - 1000) + b"\r\n"
    assert statuses(exchange(server, head + b"\r\n" + head, b"Connection: close\r\n\r\n")) == [200, 200]


@pytest.mark.parametrize(
    ("status", "head", "body"),
    [
        (501, b"Transfer-Encoding: gzip", b""),
        (501, b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked, identity", b"0\r\n\r\n"),
        (501, b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"0\r\n\r\n"),
        (400, b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        (400, b"Content-Length: 5\r\nContent-Length: 5", b"0\r\n\r\n"),
        (400, b"Content-Length: 5, 5", b"0\r\n\r\n"),
        (400, b"Content-Length: 1000000000000000000000000000000", b"0\r\n\r\n"),
        (400, b"Content-Length: +5", b"0\r\n\r\n"),
        (400, b"Content-Length : 5", b"0\r\n\r\n"),
        (400, b"Content-Length: 5\nX: x", b"0\r\n\r\n"),
        (400, b"X: x\r\n Content-Length: 5", b"0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked", b"2\n{}\n0\n\n"),
        (400, b"Transfer-Encoding: chunked", b"0x2\r\n{}\r\n0\r\n\r\n"),
        (400, b"Host: localhost", b""),
    ],
)
def test_no_second_request_hides_in_a_body(server: Served, status: int, head: bytes, body: bytes):
    hidden = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert statuses(exchange(server, POST + head + b"\r\n\r\n" + body + hidden)) == [status]


def test_http_1_0_has_no_chunks(server: Served):
    assert statuses(exchange(server, CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n")) == [400]


def test_a_refusal_does_not_overtake_earlier_answers(server: Served):
    body = b'{"dataframe_split": {"columns": ["a", "b"], "data": [%s]}}' % b",".join([b"[1,2]"] * 10_000)
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for wrong, status in (
        (b"no HTTP\r\n\r\n", 400),
        (CHUNKED + b"zz\r\n", 400),
        (GET + b"Transfer-Encoding: x\r\n\r\n", 501),
    ):
        answer = exchange(server, request, GET + b"\r\n", wrong)
        assert statuses(answer) == [200, 200, status] and answer.count(b"prediction_ids") == 1


def test_few_requests_of_a_connection_wait(server: Served):
    answers = statuses(exchange(server, (GET + b"\r\n") * 500))
    assert answers == [200] * (PIPELINED + 1) + [429]


# --- clients that do not read, and too many of them ---


def large_requests(count: int) -> bytes:
    body = b'{"dataframe_split": {"columns": ["a", "b"], "data": [%s]}}' % b",".join([b"[1,2]"] * 10_000)
    head = POST.replace(b"invocations", b"invocations?probabilities=true")
    return (head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * count


def small_window(served: Served, size: int = 4096) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    connection.settimeout(60)
    host, port = served.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    return connection


def send(connection: socket.socket, sent: bytes) -> threading.Thread:
    def work() -> None:
        with suppress(OSError):
            connection.sendall(sent)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def held(served: Served, connections: list[socket.socket] | None = None) -> int:
    """How many connections the server holds: of these, or all."""
    ports = None if connections is None else {connection.getsockname()[1] for connection in connections}
    server_port, count = int(served.url.rpartition(":")[2]), 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(address.partition(":")[2], 16) for address in fields[1:3])
        if local == server_port and remote and fields[9] != "0":  # 0: no process has it any more
            count += ports is None or remote in ports
    return count


def test_a_client_that_never_reads_is_hung_up_on(server: Served):
    hungry = [small_window(server) for _ in range(3)]
    senders = [send(connection, large_requests(30)) for connection in hungry]
    until(lambda: held(server, hungry) == 3)
    until(lambda: server.ask("/livez").status == 200 and held(server, hungry) == 0)
    for sender in senders:
        sender.join(60)
        assert not sender.is_alive()
    for connection in hungry:
        connection.close()


def test_a_slow_reader_gets_all(server: Served):
    piece, pause = 32_768, 0.05
    with small_window(server, piece) as connection:
        last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sender = send(connection, large_requests(6) + last)
        answer = bytearray()
        while received := connection.recv(piece):
            answer += received
            time.sleep(pause)
        sender.join(60)
    assert len(answer) / piece * pause > 2 * IDLE, "a client that did not read would have been hung up on"
    assert statuses(bytes(answer)) == [200] * 7


def test_health_is_answered_when_all_connections_are_in_use(server: Served):
    until(lambda: held(server) == 0)
    idle = [connect(server) for _ in range(CONNECTIONS)]
    until(lambda: server.ask("/invocations", ROWS, Authorization="Bearer p").status == 503)
    for path in ("/livez", "/readyz", "/health", "/ping"):
        assert server.ask(path).status == 200, path
    assert server.ask("/status", Authorization="Bearer p").status == 503
    assert statuses(exchange(server, GET + b"\r\n", GET + b"\r\n")) == [200], "one answer on a reserved connection"
    more = [connect(server) for _ in range(RESERVED + 20)]
    ends = [connection.recv(1000) for connection in more]
    assert statuses(b"".join(ends)).count(503) >= 20
    until(lambda: server.ask("/livez").status == 200)
    assert {connection.recv(1) for connection in idle} == {b""}
    assert server.ask("/invocations", ROWS, Authorization="Bearer p").status == 200


# --- the token first, then the size, then the body ---


@pytest.mark.parametrize(
    ("status", "line", "token", "length"),
    [
        (401, b"POST /invocations", b"", 100),
        (401, b"POST /invocations", b"a", 9_000_000),
        (413, b"POST /invocations", b"p", 10_000_001),
        (401, b"POST /feedback", b"", 100),
        (401, b"POST /feedback", b"p", 9_000_000),
        (413, b"POST /feedback", b"a", 1_000_001),
        (401, b"POST /feedback/x/review", b"a", 100),
        (413, b"POST /feedback/x/review", b"admin", 100_001),
        (413, b"POST /events", b"", 100_001),
        (404, b"POST /nothing", b"admin", 9_000_000),
        (405, b"POST /status", b"admin", 9_000_000),
        (405, b"PUT /feedback", b"a", 9_000_000),
        (404, b"DELETE /nothing", b"", 9_000_000),
    ],
)
def test_an_answer_comes_before_the_body(server: Served, status: int, line: bytes, token: bytes, length: int):
    authorization = b"Authorization: Bearer %s\r\n" % token if token else b""
    head = b"%s HTTP/1.1\r\nHost: localhost\r\n%sContent-Type: application/json\r\n" % (line, authorization)
    for body in (b"Content-Length: %d\r\n\r\n" % length, b"Transfer-Encoding: chunked\r\n\r\n"):
        if status == 413 and b"chunked" in body:
            continue
        with connect(server) as connection:
            connection.sendall(head + body)
            assert statuses(connection.recv(10_000)) == [status]


def test_chunks_are_counted(server: Served):
    head = b"POST /feedback HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\n"
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(head + (b"186a0\r\n" + b" " * 100_000 + b"\r\n") * 11)
        assert statuses(connection.recv(10_000)) == [413]


def test_a_connection_goes_on_after_a_body_that_was_not_read(server: Served):
    connection = KeptAlive(server.url)
    for path, status in (("/feedback", 401), ("/nothing", 404), ("/invocations", 401)):
        assert connection.ask(path, b" " * 3_000_000).status == status
    assert connection.ask("/invocations", ROWS, Authorization="Bearer p").status == 200


def test_bodies_that_nobody_reads_have_an_end(server: Served):
    with connect(server) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000000000\r\n\r\n")
        assert statuses(connection.recv(10_000)) == [404]
        with pytest.raises(OSError):  # a reset or a broken pipe
            while True:
                connection.sendall(b" " * 1_000_000)


def peak(served: Served) -> int:
    """The largest resident memory that the server ever had, in MB."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match
    return int(match[1]) // 1000


@pytest.mark.parametrize("body", [b"[" + b"{}," * 2_999_000 + b"{}]", b"[" * 9_000_000])
def test_a_large_body_of_labels_costs_little_memory(server: Served, body: bytes):
    before = peak(server)
    assert server.ask("/feedback", body, Authorization="Bearer a").status == 413
    end = body.rfind(b",", 0, 999_000)
    whole = body[:end] + b"]" if end > 0 else body[:999_000]
    assert server.ask("/feedback", whole, Authorization="Bearer a").status in (400, 422)
    assert peak(server) - before < 100


def test_the_rate_comes_before_the_body(server: Served):
    labels = [{"prediction_id": "0", "label": 1}] * 5
    assert server.ask("/feedback", labels, Authorization="Bearer b").status == 200
    with connect(server) as connection:
        head = b"POST /feedback HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer b\r\n"
        connection.sendall(head + b"Content-Length: 900000\r\n\r\n")
        assert statuses(connection.recv(10_000)) == [429]


# --- small ones ---


@pytest.mark.parametrize(
    ("status", "sent"),
    [(200, "Bearer p"), (200, "bearer p"), (200, "BEARER  p"), (401, "p"), (401, "Basic p"), (401, "Bearer"), (401, "Bearerp"),
     (401, "Bearer p p"), (401, "Bearer Bearer p")],
)  # fmt: skip
def test_a_token_needs_its_scheme(server: Served, status: int, sent: str):
    assert server.ask("/invocations", ROWS, Authorization=sent).status == status


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/livez", "/nothing"])
def test_no_page_can_frame_an_answer(server: Served, path: str):
    answer = exchange(server, b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"frame-ancestors 'none'" in head and b"x-content-type-options: nosniff" in head


def test_the_names_of_parameters_are_not_logged(server: Served):
    answer = server.ask("/invocations", {**ROWS, "params": {"zqxjkv": 1}}, Authorization="Bearer p")
    assert answer.status == 200 and "zqxjkv" not in str(answer.body) and "zqxjkv" not in "".join(server.lines)
