"""From settings to listening processes: one, or several that share a socket and each follow the registry."""

import logging
import os
import sys
import tempfile
from socket import AF_INET, AF_INET6, create_server

import uvicorn
from uvicorn.supervisors import Multiprocess

from mlops.errors import UserError
from mlops.feedback import Store
from mlops.serving import events
from mlops.serving.app import SETTINGS
from mlops.serving.metrics import SHARED
from mlops.serving.settings import Settings

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in flight. UserError when the address cannot be taken."""
    if settings.feedback.url:
        Store(settings.feedback.url).close()  # a wrong URL ends here, in one line, and not in every worker
    os.environ[SETTINGS] = settings.to_json()
    config = uvicorn.Config(
        "mlops.serving.app:create_app", factory=True, host=settings.host, port=settings.port, workers=settings.workers,
        ws="none", access_log=False, log_level="warning", server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=int(settings.timeout) + 5, backlog=2048,
    )  # fmt: skip
    try:  # who comes from now on waits for the first worker
        family = AF_INET6 if ":" in settings.host else AF_INET
        socket = create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"serve.host={settings.host} serve.port={settings.port}: {error.strerror}; stop what listens there, or "
            "serve.port=0 for any free one"
        ) from None
    host, port = socket.getsockname()[:2]
    webhook = _register(settings, f"http://{host}:{port}/events") if settings.webhook else None
    print(f"serve: http://{host}:{port} for {settings.registered_model_name}, Ctrl-C stops it", flush=True)
    try:
        if settings.workers > 1:
            with tempfile.TemporaryDirectory() as folder:
                os.environ[SHARED] = folder
                Multiprocess(config, sockets=[socket]).run()
        else:
            uvicorn.Server(config).run(sockets=[socket])
    except (KeyboardInterrupt, SystemExit) as stop:  # uvicorn raises the signal anew after it has drained
        if isinstance(stop, SystemExit) and stop.code not in (None, 0, 130, 143):
            raise
    finally:
        if webhook:
            _remove(webhook)
        socket.close()


def _register(settings: Settings, default_url: str) -> str | None:
    """The id of the webhook; None, with a warning, where the registry is down: the poll follows it all the same."""
    assert settings.webhook_secret
    try:
        return events.ensure_webhook(
            settings.registered_model_name, settings.webhook_url or default_url, settings.webhook_secret
        )
    except UserError:
        raise
    except Exception as error:
        print(f"serve: no webhook, the poll follows the registry: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def _remove(webhook: str) -> None:
    try:
        events.remove_webhook(webhook)
    except Exception as error:
        logger.warning("the webhook %s stays registered: %s", webhook, str(error).splitlines()[0])
