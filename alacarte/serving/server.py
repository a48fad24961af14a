"""From settings to a process that listens, and its end. A signal may come at any moment of the start."""

import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from errno import EACCES, EADDRINUSE
from functools import partial
from socket import AF_INET, AF_INET6, create_server, socket

import uvicorn

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.serving import probe, webhooks
from alacarte.serving.app import create_app
from alacarte.serving.cache import Cache
from alacarte.serving.connections import RESERVED, Connection
from alacarte.serving.settings import Settings

OTHER_FILES = 500  # open files beside connections: libraries, the store, a model that is loaded
BACKLOG = 2048  # connections that wait to be accepted


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, finish the accepted requests, and end the process with exit code 0.

    UserError if the address cannot be used, or the feedback store or the cache cannot be opened.
    """
    probe.start(settings.trust_code)  # forks before there is a socket, a database or a thread
    if settings.feedback.url:
        Store(settings.feedback.url).close()  # an error of the store ends the server here, in one line
    Cache(settings.cache, settings.registered_model_name)
    _allow_files(settings.max_connections + RESERVED + OTHER_FILES)
    listening = listen(settings)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with webhooks.registered(settings, f"{url}/events") if settings.webhook else nullcontext():
        ready = f"serve: {url} for {settings.registered_model_name}, Ctrl-C stops it"
        _Server(settings).serve_until_stopped(listening, ready)
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may still load a model. The normal end of Python would stop this thread anywhere, which aborts the process
    # in native code, and waits forever if the thread holds a lock.
    os._exit(0)


class _Server(uvicorn.Server):
    """Looks at all connections once a second."""

    def __init__(self, settings: Settings) -> None:
        config = uvicorn.Config(
            partial(create_app, settings), factory=True, host=settings.host, port=settings.port,
            http=Connection, ws="none", access_log=False, log_level="warning", server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=int(settings.timeout) + 5, timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
            limit_concurrency=settings.max_connections, backlog=BACKLOG,
        )  # fmt: skip
        super().__init__(config)
        self._body_seconds = settings.timeout

    def serve_until_stopped(self, listening: socket, ready: str) -> None:
        """Serve. The signals belong to uvicorn before the line `ready` is printed: from then on no signal is lost."""
        # SIGALRM repeats a signal of the start (signals.py). uvicorn calls the handler again at the end, to no effect.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self.handle_exit)
        print(ready, flush=True)
        self.run(sockets=[listening])

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # uvicorn calls this ten times a second
            now = time.monotonic()
            for connection in tuple(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.end_if_too_slow(now, self._body_seconds)
        return await super().on_tick(counter)


def _allow_files(count: int) -> None:
    """Let this process open `count` files, or as many as the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(settings: Settings) -> socket:
    """A socket that takes connections; they wait until the server runs."""
    try:
        family = AF_INET6 if ":" in settings.host else AF_INET
        return create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == EADDRINUSE:
            fix = f"serve.port={settings.port}: {error.strerror}; stop the server that listens there, or serve.port=0 for any"
        elif error.errno == EACCES:
            fix = f"serve.port={settings.port}: {error.strerror}; serve.port=0 takes any free port, or name one above 1023"
        else:
            fix = f"serve.host={settings.host}: {error.strerror}; name an address of this machine, such as serve.host=127.0.0.1"
        raise UserError(fix) from None
