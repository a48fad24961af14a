"""Which events of the registry the server believes, and registries without webhooks."""

import json
from pathlib import Path

import pytest
from conftest import tracking
from mlflow.webhooks.delivery import _generate_hmac_signature
from starlette.datastructures import Headers

from alacarte.errors import UserError
from alacarte.serving import webhooks
from alacarte.serving.rows import RequestError
from alacarte.serving.webhooks import create, is_hint

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


def hint(*delivery: object, now: float = NOW) -> bool:
    headers, body = delivery
    return is_hint(Headers(dict(headers)), body, SECRET, now, "m")


def refusal(*delivery: object) -> int:
    """The status of the refusal; fails the test if the event is believed."""
    with pytest.raises(RequestError) as error:
        hint(*delivery)
    assert "\n" not in error.value.message and SECRET not in error.value.message
    return error.value.status


def test_a_genuine_event_counts_once_and_the_memory_for_it_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "REMEMBERED", 3)
    for _ in range(5):
        delivery = signed()
        assert hint(*delivery, now=NOW + 2) and not hint(*delivery) and len(webhooks._seen) <= 3


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
    assert hint(headers, body), "a refused delivery is not remembered"


def test_an_event_that_is_too_old_or_from_the_future_is_refused():
    for at in (NOW - 301, NOW + 301, 0, -1, "", "soon", "1e9", "²", "9" * 5000):
        assert refusal(*signed(at=at)) == 400
    assert hint(*signed(at=NOW - 299)) and hint(*signed(at=NOW + 299))


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
    assert hint(*signed(json.dumps(event))) is relevant


def test_a_registry_that_sends_no_events(tmp_path: Path, server: str):
    address = "http://127.0.0.1:1/events"
    polls = r"only an mlflow server sends events, the registry is sqlite.*serve\.webhook=false"
    with tracking(f"sqlite:///{tmp_path}/mlflow.db"), pytest.raises(UserError, match=polls):
        create("m", address, SECRET)
    by_default = r"serve\.webhook_url=http://127\.0\.0\.1:1/events is refused.*ALLOWED_SCHEMES"
    with tracking(server), pytest.raises(UserError, match=by_default):
        create("m", address, SECRET)
