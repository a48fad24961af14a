"""The registry's webhooks: check whether a delivery is genuine and about our model, and register our own webhook.

Deliveries can be lost, late, repeated and out of order. So an event is only a hint to read the alias again, and nothing else in
it is used. MLflow has no function that verifies its signatures (mlflow/webhooks/delivery.py creates them).
"""

import base64
import hashlib
import hmac
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook
from mlflow.exceptions import MlflowException

from alacarte.errors import UserError
from alacarte.registry import CHALLENGER, CHAMPION
from alacarte.serving.follower import shorten_mlflow_timeouts

MAX_AGE = 300  # seconds, either way, since two clocks may differ; MLflow repeats a delivery with its first timestamp
REMEMBERED = 10_000  # delivery ids; of those forgotten, a replay only reads the alias once more

EVENTS: list[Literal["model_version_alias.created", "model_version_alias.deleted"]] = [
    "model_version_alias.created",
    "model_version_alias.deleted",
]

_seen: OrderedDict[str, None] = OrderedDict()
_seen_lock = threading.Lock()


class EventError(Exception):
    """A delivery that is refused, with the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def verify(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> dict[str, Any] | None:
    """The payload of a delivery that is signed with `secret`; None for one that came before. `now`: seconds since 1970.

    Each process remembers for itself, so that a replay to another worker reads the alias once more and does nothing else.
    Raises EventError 401 without the right signature; 400 for one too old, from the future, or whose body is no event.
    """
    lower = {key.lower(): value for key, value in headers.items()}
    delivery, timestamp, signature = (
        lower.get(f"x-mlflow-{part}", "") for part in ("delivery-id", "timestamp", "signature")
    )
    signed = f"{delivery}.{timestamp}.".encode(errors="replace") + body
    right = b"v1," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256))
    if not delivery or not hmac.compare_digest(signature.encode(errors="replace"), right):
        raise EventError(401, "the event is not signed with this server's webhook secret")
    if not re.fullmatch("[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > MAX_AGE:
        raise EventError(400, f"the event is not from the last {MAX_AGE} s")
    try:
        payload = json.loads(body)
        well_formed = isinstance(payload["entity"], str) and isinstance(payload["data"], dict)
    except (ValueError, TypeError, KeyError, RecursionError):
        well_formed = False
    if not well_formed:
        raise EventError(400, "the body is no event of MLflow's registry")
    with _seen_lock:
        if delivery in _seen:
            return None
        _seen[delivery] = None
        if len(_seen) > REMEMBERED:
            _seen.popitem(last=False)
    return payload


def relevant(payload: Mapping[str, Any], name: str) -> bool:
    """Whether an event says that an alias which the server follows was set or deleted on the model `name`."""
    data = payload["data"]
    return (
        payload["entity"] == "model_version_alias"
        and data.get("name") == name
        and data.get("alias") in (CHAMPION, CHALLENGER)
    )


def ensure_webhook(name: str, url: str, secret: str) -> str:
    """The id of the one webhook that tells `url` of aliases, made, or taken over from a server that crashed.

    `name` is the registered model. Raises UserError where the registry has no webhooks or refuses the address, and
    MlflowException where it does not answer.
    """
    uri = mlflow.get_registry_uri()
    if urlsplit(uri).scheme not in ("http", "https"):
        raise UserError(
            f"serve.webhook=true: only an mlflow server sends events, the registry is {urlsplit(uri).scheme or uri}; "
            f"set MLFLOW_TRACKING_URI=http://..., or serve.webhook=false, which polls"
        )
    shorten_mlflow_timeouts()
    client, title = MlflowClient(), f"alacarte-{re.sub('[^A-Za-z0-9]+', '-', name)[:50]}".strip("-")
    try:
        ours = [webhook for webhook in _webhooks(client) if webhook.url == url]
        for double in ours[:-1]:  # newest first: the oldest stays
            remove_webhook(double.webhook_id)
        if not ours:
            return client.create_webhook(title, url, list(EVENTS), secret=secret).webhook_id
        kept = ours[-1].webhook_id
        client.update_webhook(kept, name=title, url=url, events=list(EVENTS), secret=secret, status="ACTIVE")
        return kept
    except MlflowException as error:
        message = str(error).splitlines()[0]
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UserError(
                f"serve.webhook_url={url} is refused: {message} For a server on this machine start mlflow with "
                "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"
            ) from None
        if error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
            raise UserError(f"serve.webhook=true: this registry has no webhooks: {message}") from None
        raise


def remove_webhook(webhook_id: str) -> None:
    """Delete a webhook; one that is gone already is fine."""
    try:
        MlflowClient().delete_webhook(webhook_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _webhooks(client: MlflowClient) -> list[Webhook]:
    page = client.list_webhooks()
    found = list(page)
    while page.token:
        page = client.list_webhooks(page_token=page.token)
        found += page
    return found
