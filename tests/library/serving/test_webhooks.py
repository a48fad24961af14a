"""Webhooks: what is believed, and the one that the server registers, with real deliveries of a real `mlflow server`."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import tracking
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature
from registries import Registry, following, own_registry, point, register, until
from starlette.datastructures import Headers

from alacarte.errors import UserError
from alacarte.serving import webhooks
from alacarte.serving.webhooks import EventError, ensure_webhook, relevant, remove_webhook, verify

SECRET = "s3cret"
NOW = 1_800_000_000
ids = iter(f"delivery-{i}" for i in range(100_000))


def payload(name: str = "m", alias: str = "champion", **more: object) -> dict:
    data = {"name": name, "alias": alias, "version": "3"}
    return {"entity": "model_version_alias", "action": "created", "timestamp": "2026-01-01", "data": data, **more}


def signed(body: str | None = None, *, delivery: str | None = None, at: int | str = NOW, secret: str = SECRET):
    """A delivery as MLflow signs it: headers, body."""
    body = json.dumps(payload()) if body is None else body
    delivery = next(ids) if delivery is None else delivery
    signature = _generate_hmac_signature(secret, delivery, str(at), body)
    names = ("X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature")
    return dict(zip(names, (delivery, str(at), signature), strict=True)), body.encode()


def refused(headers: dict, body: bytes, now: float = NOW) -> tuple[int, str]:
    with pytest.raises(EventError) as caught:
        verify(Headers(headers), body, SECRET, now)
    assert "\n" not in caught.value.message and SECRET not in caught.value.message
    return caught.value.status, caught.value.message


def test_a_genuine_event_counts_once():
    headers, body = signed()
    found = verify(Headers(headers), body, SECRET, NOW + 2)
    assert found and found["data"]["version"] == "3" and relevant(found, "m")
    assert verify(Headers(headers), body, SECRET, NOW + 3) is None
    assert verify({key.upper(): value for key, value in headers.items()}, body, SECRET, NOW) is None


def test_what_is_not_signed_with_the_secret():
    headers, body = signed()
    for name in headers:
        assert refused({key: value for key, value in headers.items() if key != name}, body)[0] == 401
        assert refused({**headers, name: ""}, body)[0] == 401
    signature = headers["X-MLflow-Signature"]
    for forged in (
        "v1,",
        "v1",
        signature[3:],
        f"v2{signature[2:]}",
        signature[:-1],
        f"{signature} x",
        "v1,é",
        "v1," + "A" * 44,
    ):
        assert refused({**headers, "X-MLflow-Signature": forged}, body)[0] == 401
    assert refused(headers, body + b" ")[0] == refused(headers, b"")[0] == 401
    assert refused({**headers, "X-MLflow-Delivery-Id": "another"}, body)[0] == 401
    assert refused({**headers, "X-MLflow-Timestamp": str(NOW + 1)}, body)[0] == 401
    assert refused(*signed(secret="another"))[0] == 401
    assert refused(*signed(delivery=""))[0] == 401
    assert verify(headers, body, SECRET, NOW) is not None, "what was refused is not remembered"


def test_what_is_old_or_from_the_future():
    for at in (NOW - 301, NOW + 301, 0, -1, "", "soon", "1e9", "²", "9" * 5000):
        assert refused(*signed(at=at))[0] == 400
    for at in (NOW - 299, NOW + 299):
        assert verify(*signed(at=at), SECRET, NOW)


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", "[]", "3", '"text"', "{}", '{"entity": 1, "data": {}}', '{"entity": "x", "data": []}', "[" * 100_000,
     '{"entity": "model_version_alias"}', '{"data": {}}', "\udcff".encode(errors="replace").decode(), "\x00"],
)  # fmt: skip
def test_a_body_that_is_no_event(body: str):
    assert refused(*signed(body))[0] == 400


def test_bytes_that_are_no_text():
    headers, _ = signed()
    assert refused(headers, b"\xff\xfe\x00")[0] == 401


@pytest.mark.parametrize(
    ("event", "ours"),
    [
        (payload(), True),
        (payload(action="deleted"), True),
        (payload(alias="challenger"), True),
        (payload(name="another"), False),
        (payload(name=""), False),
        (payload(alias="staging"), False),
        (payload(entity="model_version"), False),
        (payload(entity="registered_model", data={"name": "m"}), False),
        (payload(data={}), False),
        (payload(data={"name": ["m"], "alias": {}}), False),
    ],
)
def test_which_events_concern_a_model(event: dict, ours: bool):
    found = verify(*signed(json.dumps(event)), SECRET, NOW)
    assert found is not None and relevant(found, "m") is ours


def test_only_so_many_deliveries_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "REMEMBERED", 3)
    monkeypatch.setattr(webhooks, "_seen", OrderedDict())
    deliveries = [signed() for _ in range(5)]
    assert all(verify(*delivery, SECRET, NOW) for delivery in deliveries)
    assert len(webhooks._seen) == 3 and [verify(*delivery, SECRET, NOW) for delivery in deliveries[2:]] == [None] * 3


def test_a_registry_that_sends_no_events(tmp_path: Path, server: str):
    address = "http://127.0.0.1:1/events"
    polls = r"only an mlflow server sends events, the registry is sqlite.*serve\.webhook=false"
    with tracking(f"sqlite:///{tmp_path}/mlflow.db"), pytest.raises(UserError, match=polls):
        ensure_webhook("m", address, SECRET)
    by_default = r"serve\.webhook_url=http://127\.0\.0\.1:1/events is refused.*ALLOWED_SCHEMES"
    with tracking(server), pytest.raises(UserError, match=by_default):
        ensure_webhook("m", address, SECRET)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that may send to this machine, and knows of a new webhook at once."""
    with own_registry(
        tmp_path_factory.mktemp("registry"),
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https", MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=Fernet.generate_key().decode(), MLFLOW_WEBHOOK_CACHE_TTL="0",
    ) as made:  # fmt: skip
        yield made


class Receiver:
    """Takes deliveries as they come: `got` holds headers and body of each."""

    def __init__(self) -> None:
        self.got: list[tuple[Headers, bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((Headers(dict(self.headers.items())), body))
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
        remove_webhook(webhook.webhook_id)  # first: MLflow goes on trying an address where nobody is
    made.stop()


def addresses() -> list[str]:
    return sorted(webhook.url for webhook in MlflowClient().list_webhooks())


def test_one_webhook_however_often_it_is_asked_for(receiver: Receiver):
    elsewhere = MlflowClient().create_webhook("theirs", "http://127.0.0.1:9/x", ["registered_model.created"]).webhook_id
    made = ensure_webhook("catalog.schema.a model", receiver.url, SECRET)
    assert ensure_webhook("catalog.schema.a model", receiver.url, SECRET) == made
    assert addresses() == sorted(["http://127.0.0.1:9/x", receiver.url])
    remove_webhook(made)
    remove_webhook(made)
    assert addresses() == ["http://127.0.0.1:9/x"]
    remove_webhook(elsewhere)


def test_what_a_crashed_server_left_is_taken_over(receiver: Receiver):
    client = MlflowClient()
    left = [
        client.create_webhook(
            name, receiver.url, ["registered_model.created"], secret="old", status="DISABLED"
        ).webhook_id
        for name in ("one", "two")
    ]
    kept = ensure_webhook("m", receiver.url, SECRET)
    assert kept in left and addresses() == [receiver.url]
    register("m")
    point("m", "1")
    until(lambda: receiver.got)
    found = verify(*receiver.got[0], SECRET, time.time())
    assert found and relevant(found, "m") and not relevant(found, "another")
    assert client.test_webhook(kept).success
    example = verify(*receiver.got[-1], SECRET, time.time())
    assert example and not relevant(example, "m")


def test_late_and_in_the_wrong_order_the_alias_decides(receiver: Receiver, tmp_path: Path):
    ensure_webhook("order", receiver.url, SECRET)
    for label in (1, 2):
        register("order", label)
    for version in "12":
        point("order", version)
        until(lambda version=version: len(receiver.got) == int(version))
    with following(tmp_path) as follow:
        holder = follow("order", poll_seconds=600)
        until(lambda: holder.current)
        for delivery in (*reversed(receiver.got), *receiver.got):
            found = verify(*delivery, SECRET, time.time())
            if found and relevant(found, "order"):
                holder.refresh()
        time.sleep(0.2)
        assert holder.current.version == "2" and holder.status()["swaps"] == 0
        point("order", "1")
        until(lambda: len(receiver.got) == 3)
        assert relevant(verify(*receiver.got[-1], SECRET, time.time()), "order")
        holder.refresh()
        until(lambda: holder.current.version == "1", holder.status)
        MlflowClient().delete_registered_model_alias("order", "champion")
        until(lambda: len(receiver.got) == 4)
        assert relevant(verify(*receiver.got[-1], SECRET, time.time()), "order")
