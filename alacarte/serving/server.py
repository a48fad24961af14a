"""From settings to a process that listens, and its end. `told_to_stop` receives a signal at any moment of the start."""

import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EADDRINUSE
from functools import partial
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Any

import uvicorn

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.serving import webhooks
from alacarte.serving.app import create_app
from alacarte.serving.cache import Cache
from alacarte.serving.connections import RESERVED, Connection
from alacarte.serving.probe import warm_processes
from alacarte.serving.settings import Settings

# For the webhook's calls, which the server waits for: it is a convenience, so a registry that is silent is left alone.
SHORT_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

OTHER_FILES = 500  # open files beside connections: libraries, the store, a model on its way

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, finish the requests in flight, and end the process, with exit code 0.

    UserError when the address cannot be taken, or the feedback store or the cache cannot be opened.
    """
    with told_to_stop() as told, warm_processes():  # forked before there is a socket, a database or a thread
        _run(settings, told)
    sys.stdout.flush()
    sys.stderr.flush()
    # A model may still be on its way in a thread. Python's own end would stop that thread wherever it is, which in native
    # code aborts the process, and with a lock in its hands hangs it.
    os._exit(0)


def _run(settings: Settings, told: threading.Event) -> None:
    if settings.feedback.url:
        Store(settings.feedback.url).close()  # an error of the store ends the server here, in one line
    Cache(settings.cache, settings.registered_model_name)
    config = uvicorn.Config(
        partial(create_app, settings), factory=True, host=settings.host, port=settings.port,
        http=Connection, ws="none", access_log=False, log_level="warning", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(settings.timeout) + 5, timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
        limit_concurrency=settings.max_connections, backlog=2048,
    )  # fmt: skip
    _allow_files(settings.max_connections + RESERVED + OTHER_FILES)
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


def _allow_files(count: int) -> None:
    """Let this process open so many files; as many as the machine allows where these are fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(settings: Settings) -> socket:
    """A socket that takes connections; they wait until the server runs."""
    try:
        family = AF_INET6 if ":" in settings.host else AF_INET
        return create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == EADDRINUSE:
            fix = f"serve.port={settings.port}: {error.strerror}; stop the server that listens there, or serve.port=0 for any"
        elif error.errno == EACCES:
            fix = f"serve.port={settings.port}: {error.strerror}; serve.port=0 takes any free port, or name one above 1023"
        else:
            fix = f"serve.host={settings.host}: {error.strerror}; name an address of this machine, such as serve.host=127.0.0.1"
        raise UserError(fix) from None


class _Server(uvicorn.Server):
    """Looks at all connections once a second."""

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # uvicorn calls this ten times a second
            now = time.monotonic()
            for connection in tuple(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.end_if_stuck(now)
        return await super().on_tick(counter)


def _serve(config: uvicorn.Config, listening: socket, ready: str, told: threading.Event) -> None:
    """Serve until told to stop. The signals are uvicorn's before the line `ready` is printed: from then on none is lost."""
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn calls these again after it has drained, to no effect
        signal.signal(number, server.handle_exit)
    print(ready, flush=True)
    if not told.is_set():
        server.run(sockets=[listening])


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM or Ctrl-C, beside the effect that these have already, which may be lost.

    uvicorn hears them only once its start is over. An exception that they raise is lost where Python runs a callback of
    its own, such as the callback of a weak reference.
    """
    told = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def tell(number: int, frame: Any) -> None:
        told.set()
        if callable(before[number]):
            before[number](number, frame)

    for number in before:
        signal.signal(number, tell)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
