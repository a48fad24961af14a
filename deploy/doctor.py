"""List what this machine lacks for the template, and the command that mends it.

    make doctor
    python3 deploy/doctor.py

It needs only Python's own library. Exit code 1: something that `make run` needs is missing.
"""

import base64
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
GIGABYTES = 6  # for .venv, models and artifacts
KEYS = (*(f"SERVE_{name}" for name in ("PREDICT_TOKEN", "FEEDBACK_TOKEN", "ADMIN_TOKEN", "WEBHOOK_SECRET")),
        "MLFLOW_WEBHOOK_KEY")  # fmt: skip
SECRET = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'


class Check(NamedTuple):
    """One line of the report. `fix` is None if all is well."""

    name: str
    state: str
    fix: str | None = None
    needed: bool = False  # by `make run`; other parts are optional


def machine() -> Iterator[Check]:
    """Python, programs, disk and ports."""
    fix = None if sys.version_info >= (3, 11) else "install Python 3.11 or later, then: make doctor PYTHON=python3.11"
    yield Check("Python", sys.version.split()[0], fix, needed=True)
    postgres = ["initdb", *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    for name, names, fix, needed in (
        ("make", ["make"], "apt-get install make", True),
        ("git", ["git"], "apt-get install git", False),
        ("uv", ["uv", str(ROOT / ".venv/bin/uv")], "pip install uv; mlflow run --env-manager uv needs it", False),
        ("PostgreSQL", postgres, "apt-get install postgresql; make stack-local needs it", False),
        ("Chromium", ["chromium"], "apt-get install chromium chromium-driver; the tests of the page need it", False),
    ):
        path = next(filter(None, map(shutil.which, names)), None)
        yield Check(name, path or "missing", None if path else fix, needed)
    runs = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    fix = None if runs else "start or install Docker, or use: make stack-local"
    yield Check("Docker", "runs" if runs else "does not run", fix)
    made = (ROOT / ".venv" / "run.done").exists()
    yield Check(".venv", "installed" if made else "missing", None if made else "make setup")
    free = shutil.disk_usage(ROOT).free / 1e9
    fix = None if free >= GIGABYTES else f"free {GIGABYTES} GB on the disk of {ROOT}"
    yield Check("disk", f"{free:.0f} GB free", fix, needed=True)
    for name, port, option in (("serve", 8080, "serve.port=8081"), ("mlflow server", 5000, "--port 5001")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                yield Check(f"port {port}", f"free for {name}")
            except OSError as error:
                yield Check(f"port {port}", f"{error.strerror}", f"start {name} with {option}")


def tracking() -> Check:
    """The store in MLFLOW_TRACKING_URI."""
    name, uri = "tracking store", os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        folder = ROOT if not uri.startswith("sqlite:///") else Path(uri.removeprefix("sqlite:///")).resolve().parent
        fix = None if os.access(folder, os.W_OK) else f"make {folder} writable, or set MLFLOW_TRACKING_URI"
        return Check(name, uri or f"{ROOT}/mlflow.db", fix, needed=True)
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        login = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Check(name, f"{uri} answers {error.code}", login if error.code == 401 else f"ask who runs {uri}", True)
    except OSError as error:
        return Check(name, f"{uri} does not answer: {error}", "check MLFLOW_TRACKING_URI", needed=True)
    return Check(name, uri)


def address(name: str, variable: str, default: str, port: int, fix: str) -> Check:
    """Whether something listens at the address in an environment variable. The address may contain a password."""
    url = urlsplit(os.environ.get(variable, ""))
    if not url.hostname:
        return Check(name, default)
    place = (url.hostname, url.port or port)
    try:
        socket.create_connection(place, 5).close()
    except OSError as error:
        return Check(name, f"{place[0]}:{place[1]} does not answer: {error}", fix)
    return Check(name, f"{place[0]}:{place[1]} answers")


def main() -> int:
    missing = [name for name in KEYS if not os.environ.get(name)]
    fix = f"only a server that other machines reach needs them; a secret: {SECRET}" if missing else None
    webhook = "set serve.webhook_url to an address of serve that mlflow reaches"
    store = "start PostgreSQL, or correct FEEDBACK_URL"
    checks = [
        *machine(),
        tracking(),
        address("webhook", "SERVE_WEBHOOK_URL", "not used: serve polls the registry", 443, webhook),
        Check("secrets", f"not set: {', '.join(missing)}" if missing else "set", fix),
        address("feedback store", "FEEDBACK_URL", "SQLite in this folder", 5432, store),
    ]
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.fix is None else "missing" if check.needed else "optional"
        print(f"{mark:8} {check.name:{width}}  {check.state}")
        if check.fix:
            print(f"{'':{width + 9}}  fix: {check.fix}")
    return int(any(check.fix and check.needed for check in checks))


if __name__ == "__main__":
    sys.exit(main())
