"""From settings to listening processes: one, or several that share a socket and each follow the registry."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socket import AF_INET, AF_INET6, create_server, socket

import uvicorn

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.serving import webhooks
from alacarte.serving.app import SETTINGS
from alacarte.serving.cache import Cache
from alacarte.serving.connections import Connection
from alacarte.serving.metrics import SHARED
from alacarte.serving.probe import warm_process
from alacarte.serving.settings import Settings
from alacarte.serving.workers import Workers, told_to_stop

# For the webhook's calls, which the server waits for: it is a convenience, so a registry that is silent is left alone.
SHORT_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, finish the requests in flight, and end the process, with exit code 0.

    UserError when the address cannot be taken, or what is stored cannot be. SystemExit 1 when a worker fails to start.
    """
    with told_to_stop() as told, warm_process():  # which is forked before there is a socket, a database or a thread
        _run(settings, told)
    sys.stdout.flush()
    sys.stderr.flush()
    # A model may still be on its way in a thread. Python's own end would stop that thread wherever it is, which in native
    # code aborts the process, and with a lock in its hands hangs it.
    os._exit(0)


def _run(settings: Settings, told: threading.Event) -> None:
    if settings.feedback.url:
        Store(settings.feedback.url).close()  # what is wrong with it ends here, in one line, and not in every worker
    Cache(settings.cache, settings.registered_model_name)
    os.environ[SETTINGS] = settings.to_json()
    config = uvicorn.Config(
        "alacarte.serving.app:create_app", factory=True, host=settings.host, port=settings.port, workers=settings.workers,
        http=Connection, ws="none", access_log=False, log_level="warning", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(settings.timeout) + 5, timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
        limit_concurrency=settings.max_connections + 1, backlog=2048,  # from which on it refuses
    )  # fmt: skip
    listening = _listen(settings)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    webhook = _register(settings, f"http://{host}:{port}/events") if settings.webhook else None
    try:
        ready = f"serve: http://{host}:{port} for {settings.registered_model_name}, Ctrl-C stops it"
        _serve(config, listening, ready, told)
    finally:
        if webhook:
            _remove(webhook)


def _listen(settings: Settings) -> socket:
    """Who comes from now on waits for the first worker."""
    try:
        family = AF_INET6 if ":" in settings.host else AF_INET
        return create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"serve.host={settings.host} serve.port={settings.port}: {error.strerror}; stop what listens there, or "
            "serve.port=0 for any free one"
        ) from None


def _serve(config: uvicorn.Config, listening: socket, ready: str, told: threading.Event) -> None:
    """Serve until told to stop. The signals are uvicorn's before the line `ready` is printed: from then on none is lost."""
    if config.workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[SHARED] = folder
            workers = Workers(config, [listening])
            print(ready, flush=True)
            if not told.is_set():
                workers.run()
            if workers.failed:
                raise SystemExit(1)
        return
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn calls these again after it has drained, to no effect
        signal.signal(number, server.handle_exit)
    print(ready, flush=True)
    if not told.is_set():
        server.run(sockets=[listening])


@contextmanager
def _short_patience() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in SHORT_PATIENCE}
    os.environ.update(SHORT_PATIENCE)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _register(settings: Settings, default_url: str) -> str | None:
    """The id of the webhook; None, with a warning, where the registry is down: the poll follows it all the same."""
    assert settings.webhook_secret
    url = settings.webhook_url or default_url
    try:
        with _short_patience():
            return webhooks.ensure_webhook(settings.registered_model_name, url, settings.webhook_secret)
    except UserError:
        raise
    except Exception as error:
        print(f"serve: no webhook, the poll follows the registry: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def _remove(webhook: str) -> None:
    try:
        with _short_patience():
            webhooks.remove_webhook(webhook)
    except Exception as error:
        logger.warning("the webhook %s stays registered: %s", webhook, str(error).splitlines()[0])
