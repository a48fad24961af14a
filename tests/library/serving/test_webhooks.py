"""Webhooks: which events the server believes, and the webhook that it registers, with deliveries of a real `mlflow server`."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import tracking
from mlflow import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature
from registries import Registry, following, point, register, until, webhook_registry
from starlette.datastructures import Headers

from alacarte.errors import UserError
from alacarte.serving import webhooks
from alacarte.serving.rows import RequestError
from alacarte.serving.webhooks import create, delete, is_relevant, verify

SECRET = "s3cret"
NOW = 1_800_000_000
delivery_ids = iter(f"delivery-{i}" for i in range(100_000))


def payload(name: str = "m", alias: str = "champion", **more: object) -> dict:
    data = {"name": name, "alias": alias, "version": "3"}
    return {"entity": "model_version_alias", "action": "created", "timestamp": "2026-01-01", "data": data, **more}


def signed(body: str | None = None, *, delivery: str | None = None, at: int | str = NOW, secret: str = SECRET):
    """A delivery as MLflow signs it: headers, body."""
    body = json.dumps(payload()) if body is None else body
    delivery = next(delivery_ids) if delivery is None else delivery
    signature = _generate_hmac_signature(secret, delivery, str(at), body)
    names = ("X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature")
    return Headers(dict(zip(names, (delivery, str(at), signature), strict=True))), body.encode()


def refusal(headers: dict | Headers, body: bytes) -> int:
    """The status of the refusal; fails the test if the event is believed."""
    with pytest.raises(RequestError) as error:
        verify(Headers(dict(headers)), body, SECRET, NOW)
    assert "\n" not in error.value.message and SECRET not in error.value.message
    return error.value.status


def test_a_genuine_event_counts_once():
    headers, body = signed()
    event = verify(headers, body, SECRET, NOW + 2)
    assert event and event["data"]["version"] == "3" and is_relevant(event, "m")
    assert verify(headers, body, SECRET, NOW + 3) is None


def test_an_event_that_is_not_signed_with_the_secret_is_refused():
    headers, body = signed()
    for name in headers:
        assert refusal({key: value for key, value in headers.items() if key != name}, body) == 401
        assert refusal({**headers, name: ""}, body) == 401
    valid = headers["X-MLflow-Signature"]
    for forged in ("v1,", "v1", valid[3:], f"v2{valid[2:]}", valid[:-1], f"{valid} x", "v1,é", "v1," + "A" * 44):
        assert refusal({**headers, "x-mlflow-signature": forged}, body) == 401
    for forged in (body + b" ", b"", b"\xff\xfe\x00"):
        assert refusal(headers, forged) == 401
    assert refusal({**headers, "x-mlflow-delivery-id": "another"}, body) == 401
    assert refusal({**headers, "x-mlflow-timestamp": str(NOW + 1)}, body) == 401
    assert refusal(*signed(secret="another")) == refusal(*signed(delivery="")) == 401
    assert verify(headers, body, SECRET, NOW) is not None, "a refused delivery is not remembered"


def test_an_event_that_is_too_old_or_from_the_future_is_refused():
    for at in (NOW - 301, NOW + 301, 0, -1, "", "soon", "1e9", "²", "9" * 5000):
        assert refusal(*signed(at=at)) == 400
    for at in (NOW - 299, NOW + 299):
        assert verify(*signed(at=at), SECRET, NOW)


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", "[]", "3", '"text"', "{}", '{"entity": 1, "data": {}}', '{"entity": "x", "data": []}', "[" * 100_000,
     '{"entity": "model_version_alias"}', '{"data": {}}', "\udcff".encode(errors="replace").decode(), "\x00"],
)  # fmt: skip
def test_a_body_that_is_no_event_is_refused(body: str):
    assert refusal(*signed(body)) == 400


@pytest.mark.parametrize(
    ("event", "relevant"),
    [
        (payload(), True),
        (payload(action="deleted"), True),
        (payload(alias="challenger"), True),
        (payload(name="another"), False),
        (payload(alias="staging"), False),
        (payload(entity="registered_model", data={"name": "m"}), False),
        (payload(data={}), False),
        (payload(data={"name": ["m"], "alias": {}}), False),
    ],
)
def test_which_events_concern_a_model(event: dict, relevant: bool):
    verified = verify(*signed(json.dumps(event)), SECRET, NOW)
    assert verified is not None and is_relevant(verified, "m") is relevant


def test_the_memory_for_deliveries_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "REMEMBERED", 3)
    for _ in range(5):
        delivery = signed()
        assert verify(*delivery, SECRET, NOW)
        assert verify(*delivery, SECRET, NOW) is None and len(webhooks._seen) <= 3


def test_a_registry_that_sends_no_events(tmp_path: Path, server: str):
    address = "http://127.0.0.1:1/events"
    polls = r"only an mlflow server sends events, the registry is sqlite.*serve\.webhook=false"
    with tracking(f"sqlite:///{tmp_path}/mlflow.db"), pytest.raises(UserError, match=polls):
        create("m", address, SECRET)
    by_default = r"serve\.webhook_url=http://127\.0\.0\.1:1/events is refused.*ALLOWED_SCHEMES"
    with tracking(server), pytest.raises(UserError, match=by_default):
        create("m", address, SECRET)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with webhook_registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


class Receiver:
    """Stores the headers and the body of each delivery."""

    def __init__(self) -> None:
        self.deliveries: list[tuple[Headers, bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.deliveries.append((Headers(dict(self.headers.items())), body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/events"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver(registry: Registry) -> Iterator[Receiver]:
    made = Receiver()
    yield made
    for webhook in MlflowClient().list_webhooks():
        delete(webhook.webhook_id)  # first: MLflow continues to try an address where nobody listens
    made.stop()


def test_one_webhook_replaces_the_webhooks_of_crashed_servers(receiver: Receiver):
    client = MlflowClient()
    other = client.create_webhook("theirs", "http://127.0.0.1:9/x", ["registered_model.created"]).webhook_id
    for name in ("one", "two"):
        client.create_webhook(name, receiver.url, ["registered_model.created"], secret="old", status="DISABLED")
    webhook_id = create("catalog.schema.a model", receiver.url, SECRET)
    assert {webhook.webhook_id for webhook in client.list_webhooks()} == {other, webhook_id}
    delete(webhook_id)
    delete(webhook_id)
    assert [webhook.webhook_id for webhook in client.list_webhooks()] == [other]


def test_late_and_in_the_wrong_order_the_alias_decides(receiver: Receiver, tmp_path: Path):
    create("order", receiver.url, SECRET)
    for label in (1, 2):
        register("order", label)
    for version in "12":
        point("order", version)
        until(lambda version=version: len(receiver.deliveries) == int(version))
    with following(tmp_path) as follow:
        follower = follow("order", poll_seconds=600)
        until(lambda: follower.current)
        for delivery in (*reversed(receiver.deliveries), *receiver.deliveries):
            event = verify(*delivery, SECRET, time.time())
            if event and is_relevant(event, "order"):
                follower.refresh()
        time.sleep(0.2)
        assert follower.current.version == "2" and follower.status()["swaps"] == 0
        point("order", "1")
        until(lambda: len(receiver.deliveries) == 3)
        assert is_relevant(verify(*receiver.deliveries[-1], SECRET, time.time()), "order")
        follower.refresh()
        until(lambda: follower.current.version == "1", follower.status)
        MlflowClient().delete_registered_model_alias("order", "champion")
        until(lambda: len(receiver.deliveries) == 4)
        assert is_relevant(verify(*receiver.deliveries[-1], SECRET, time.time()), "order")
