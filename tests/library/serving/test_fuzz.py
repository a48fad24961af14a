"""Requests that nobody should send: each is refused in one line that repeats nothing of it, and none breaks the server."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pandas as pd
import pytest
import schemathesis
from bodies import SECRET, bad
from conftest import ROOT, Project
from hypothesis import HealthCheck, given
from servers import Answered, KeptAlive, Served, figure, readable, register_constant, serving, size

NAME = "fuzzed"
MARK = "zqxjkv"  # stands in what is sent, so must not stand in what is answered
TABLE = pd.DataFrame(
    {
        "amount": [0.5, 1.5, None, 2.5],
        "count": [1, 2, 3, 4],
        "word": ["a", "b", None, "c"],
        "flag": [True, False, True, False],
        "day": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]),
    }
)
COLUMNS = list(TABLE.columns)
ROW = [1.5, 2, "a", True, "2026-01-01T00:00:00"]
FRAME = {"columns": COLUMNS, "data": [ROW, ROW]}
RECORDS = [dict(zip(COLUMNS, ROW, strict=True))] * 2


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Served]:
    register_constant(project, NAME, 1, X=TABLE)
    with serving(
        project, f"registered_model_name={NAME}", "serve.feedback_per_minute=1000000000", "serve.max_body=2_000_000",
        SERVE_WEBHOOK_SECRET="the secret",
    ) as served:  # fmt: skip
        served.wait()
        assert served.ask("/invocations", {"dataframe_split": FRAME}).status == 200
        yield served
        assert served.ask("/invocations", {"dataframe_split": FRAME}).status == 200
        assert not [line for line in served.lines if "Traceback" in line], "".join(served.lines)
        assert served.ask("/status").body["dropped"] == 0, "what was answered is stored"
        assert served.stop() == 0


def refused(answer: Answered, sent: object = "", mark: str = MARK) -> bool:
    """Whether an answer is a refusal; the test fails when that is not one line about the request that does not repeat it."""
    assert answer.status < 500, (answer, sent)
    if answer.status < 400:
        return False
    message = answer.body.get("message") or answer.body["error"] if isinstance(answer.body, dict) else answer.body
    assert message and "\n" not in message and len(message) < 1000 and "Traceback" not in message, (answer, sent)
    assert mark not in json.dumps(answer.body), (answer, sent)
    return True


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/invocations", json.dumps({"dataframe_records": RECORDS, "params": {MARK: 1}}).encode(), None),
        ("/invocations", json.dumps({"dataframe_split": {"columns": COLUMNS, "data": [ROW] * 10_001}}).encode(), 413),
        ("/invocations?probabilities=zqxjkv&probabilities=true", b"{}", 400),
        ("/invocations?%80=%80", b"{}", 400),
        ("/feedback", b"[" + b"1," * 400_000 + b"1]", 422),
        ("/feedback", b"\xff", 422),
        ("/feedback", b'{"prediction_id": "' + b"x" * 101 + b'", "label": 1}', 422),
        ("/feedback", b'{"prediction_id": "x", "label": NaN}', None),
        ("/feedback", b'{"prediction_id": "x", "label": 1' + b"0" * 400 + b"}", None),
        ("/feedback", b'{"prediction_id": "x", "label": "' + b"x" * 1001 + b'"}', 422),
        ("/feedback", b'{"prediction_id": "\\ud800", "label": 1}', 422),
        ("/feedback", b'{"prediction_id": "x\\u0000", "label": "\\u0000"}', None),
        ("/feedback", b'{"prediction_id": "x", "label": 1, "comment": "\\ud800"}', 422),
        ("/feedback/x/review", b'{"accept": "zqxjkv"}', 422),
        ("/feedback/..%2f..%2fetc%2fpasswd/review", b'{"accept": true}', 404),
        ("/events", b"\xff" * 1000, 401),
    ],
)  # fmt: skip
def test_by_hand(server: Served, path: str, body: bytes, status: int | None):
    answer = server.ask(path, body)
    assert refused(answer, (path, body[:200])) or status is None
    assert status in (None, answer.status), answer


@pytest.mark.parametrize(
    "path",
    ["/feedback?state=zqxjkv", "/feedback?limit=0", "/feedback?limit=zqxjkv", f"/feedback?limit={'9' * 5000}",
     "/feedback?limit=-1", "/feedback/%00", "/feedback/%ff", "/feedback/zqxjkv", "/feedback/1.99999999999999999999",
     "/feedback/000000000000000000000000.-1", "/feedback/" + "x" * 5000, "/%2e%2e/%2e%2e/etc/passwd",
     "/static-offline-docs/..%2f..%2fapp.py"],
)  # fmt: skip
def test_by_hand_without_a_body(server: Served, path: str):
    assert refused(server.ask(path), path), path


@pytest.mark.parametrize(
    "headers",
    [
        *[
            {"Content_Type": value}
            for value in ("zqxjkv", "", "application/json; charset=zqxjkv", "application/json;" * 500)
        ],
        {"Content_Type": "multipart/form-data; boundary=zqxjkv"},
        *[{"Host": value} for value in ("zqxjkv", "[zqxjkv", "127.0.0.1:zqxjkv@evil", "localhost.zqxjkv")],
    ],
)
def test_headers(server: Served, headers: dict[str, str]):
    answer = server.ask("/invocations", {"dataframe_split": FRAME}, **headers)
    assert refused(answer, headers) or "@" in headers.get("Host", ""), (answer, headers)
    for path in ("/feedback", "/feedback/x/review", "/events"):
        assert refused(server.ask(path, b"[]", **headers), headers), (path, headers)


def test_a_parquet_body_is_refused_unread(server: Served):
    """Its schema nests 20,000 groups: pyarrow would overflow the stack of the process."""
    root, group, leaf = b"\x48\x01r\x15\x02\x00", b"\x35\x00\x18\x01a\x15\x02\x00", b"\x15\x02\x25\x00\x18\x01a\x00"
    schema = b"\x15\x02\x19\xfc\xa2\x9c\x01" + root + group * 20_000 + leaf + b"\x16\x00\x19\x0c\x00"
    body = b"PAR1" + schema + len(schema).to_bytes(4, "little") + b"PAR1"
    answer = server.ask("/invocations", body, Content_Type="application/vnd.apache.parquet")
    assert (answer.status, answer.body["message"]) == (415, "Content-Type must be application/json or text/csv")


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n", b"zqxjkv\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: zqxjkv\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET * HTTP/1.1\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"CONNECT zqxjkv:1 HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http(server: Served, sent: bytes):
    """Answered with a refusal, or hung up on, or not yet at its end; the next one is served."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=0.5) as connection:
        try:
            connection.sendall(sent)
            answer = connection.recv(100_000)
        except OSError:
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5") and MARK.encode() not in answer
    assert server.ask("/livez").status == 200


def test_bodies_that_nobody_should_send(server: Served):
    """test_model.py compares the same bodies with MLflow's answers. Here they also reach the store."""
    rows, connection = pd.DataFrame([ROW, ROW], columns=COLUMNS), KeptAlive(server.url)
    answers = [
        refused(connection.ask("/invocations", body, Content_Type=kind), name, SECRET) for name, kind, body in bad(rows)
    ]
    figure(
        f"{len(answers)} malformed requests by hand: {sum(answers)} refused with 4xx, the others answered, none with 5xx"
    )
    assert sum(answers) > len(answers) / 2


def strings(value: Any) -> Iterator[str]:
    """The texts in a generated request that are long enough not to stand in an answer by chance."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            if key != "prediction_id":  # which the results of /feedback name
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str) and len(value) > 5:
        yield value


def test_what_schemathesis_makes_of_the_description(server: Served):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # Hypothesis sends texts from the modules that this process has imported, so a refusal may contain them by itself.
    own = json.dumps(schema.raw_schema) + "".join(path.read_text() for path in (ROOT / "alacarte").rglob("*.py"))
    asked, refusals = 0, 0
    for operation in schema.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @hypothesis.settings(
                max_examples=size(3, 250), deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                nonlocal asked, refusals
                answer = case.call()
                asked += 1
                if refused(Answered(answer.status_code, readable(answer.text)), case):
                    refusals += 1
                    sent = strings([case.body, case.path_parameters, case.query])
                    assert not [text for text in sent if text in answer.text and text not in own], (case, answer.text)

            try:
                ask()
            except (hypothesis.errors.Unsatisfiable, schemathesis.errors.SchemathesisError):
                assert mode is schemathesis.GenerationMode.NEGATIVE  # nothing can be wrong where nothing is taken
    figure(f"schemathesis: {asked} requests from /openapi.json, {refusals} refused with 4xx, none with 5xx")
    assert refusals > 0
