"""The registry's webhooks: check whether a delivery is genuine and about our model, and register our own webhook.

Deliveries can be lost, late, repeated and out of order. So an event is only a hint to read the alias again, and nothing else in
it is used. MLflow has no function that verifies its signatures (mlflow/webhooks/delivery.py creates them).
"""

import base64
import hashlib
import hmac
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import mlflow
import msgspec
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from alacarte.errors import UserError, first_line
from alacarte.registry import CHALLENGER, CHAMPION
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings

MAX_AGE = 300  # seconds, in both directions, because two clocks may differ; MLflow repeats a delivery with its first timestamp
REMEMBERED = 10_000  # ids of deliveries; a repetition of a forgotten delivery only reads the alias once more
EVENTS: list[Literal["model_version_alias.created", "model_version_alias.deleted"]] = [
    "model_version_alias.created",
    "model_version_alias.deleted",
]
# The server waits for these calls when it starts and ends, so they give up soon if the registry is silent.
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

_seen: set[str] = set()
logger = logging.getLogger(__name__)


class _Event(msgspec.Struct):
    entity: str
    data: dict[str, Any]


def is_hint(headers: Mapping[str, str], body: bytes, secret: str, now: float, name: str) -> bool:
    """Whether a delivery says that an alias which the server follows was set or deleted on the model `name`.

    False for a repetition. `now`: seconds since 1970. Raises RequestError 401 if it is not signed with `secret`; 400 if it is
    too old, from the future, or no event.
    """
    delivery, timestamp, signature = (
        headers.get(f"x-mlflow-{part}", "") for part in ("delivery-id", "timestamp", "signature")
    )
    signed = f"{delivery}.{timestamp}.".encode(errors="replace") + body
    expected = b"v1," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256))
    if not delivery or not hmac.compare_digest(signature.encode(errors="replace"), expected):
        raise RequestError(401, "the event is not signed with this server's webhook secret")
    if not re.fullmatch("[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > MAX_AGE:
        raise RequestError(400, f"the event is not from the last {MAX_AGE} s")
    try:
        event = msgspec.json.decode(body, type=_Event)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(400, "the body is no event of MLflow's registry") from None
    if delivery in _seen:
        return False
    if len(_seen) >= REMEMBERED:
        _seen.clear()
    _seen.add(delivery)
    is_ours = event.entity == "model_version_alias" and event.data.get("name") == name
    return is_ours and event.data.get("alias") in (CHAMPION, CHALLENGER)


@contextmanager
def registered(settings: Settings, url: str) -> Iterator[None]:
    """A webhook that sends events to `url` or serve.webhook_url. It is deleted at the end.

    If the registry does not answer, there is no webhook, only a warning: the poll follows the registry anyway. UserError if
    the registry has no webhooks or refuses the address.
    """
    webhook_id = None
    try:
        assert settings.webhook_secret
        webhook_id = create(settings.registered_model_name, settings.webhook_url or url, settings.webhook_secret)
    except MlflowException as error:
        print(f"serve: no webhook, the poll follows the registry: {first_line(error)}", file=sys.stderr)
    try:
        yield
    finally:
        try:
            if webhook_id:
                with _short_timeouts():
                    MlflowClient().delete_webhook(webhook_id)
        except MlflowException as error:
            logger.warning("the webhook %s stays registered: %s", webhook_id, first_line(error))


@contextmanager
def _short_timeouts() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in SHORT_TIMEOUTS}
    os.environ.update(SHORT_TIMEOUTS)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@_short_timeouts()
def create(name: str, url: str, secret: str) -> str:
    """The id of a new webhook that tells `url` about the aliases of the model `name`. Replaces older webhooks for `url`.

    Raises UserError if the registry has no webhooks or refuses the address, MlflowException if it does not answer.
    """
    scheme = urlsplit(mlflow.get_registry_uri()).scheme
    if scheme not in ("http", "https"):
        raise UserError(
            f"serve.webhook=true: only an mlflow server sends events, the registry is {scheme or 'a folder'}; "
            "set MLFLOW_TRACKING_URI=http://..., or serve.webhook=false, which polls"
        )
    client = MlflowClient()
    try:
        page = client.list_webhooks()
        older = list(page)
        while page.token:
            page = client.list_webhooks(page_token=page.token)
            older += page
        for webhook in older:  # left by a server that crashed
            if webhook.url == url:
                client.delete_webhook(webhook.webhook_id)
        title = f"alacarte-{re.sub('[^A-Za-z0-9]+', '-', name)[:50]}".strip("-")
        return client.create_webhook(title, url, list(EVENTS), secret=secret).webhook_id
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UserError(
                f"serve.webhook_url={url} is refused: {first_line(error)} For a server on this machine start mlflow with "
                "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"
            ) from None
        if error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
            raise UserError(f"serve.webhook=true: this registry has no webhooks: {first_line(error)}") from None
        raise
