"""`make doctor` names what is missing and how to mend it, with nothing installed but Python."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment, free_port

DOCTOR = [sys.executable, "-S", str(ROOT / "deploy" / "doctor.py")]  # -S: without the packages of this environment


def report(code: int, **env: str) -> dict[str, str]:
    """The lines of the report: name of the check -> mark, state and fix."""
    ended = subprocess.run(DOCTOR, env=environment(**env), capture_output=True, text=True, timeout=120)
    assert ended.returncode == code and not ended.stderr, ended.stdout + ended.stderr
    checks: dict[str, str] = {}
    for line in ended.stdout.splitlines():
        if not line.strip().startswith("fix:"):
            name = line[9:].split("  ")[0].strip()
            checks[name] = line
        else:
            checks[name] += line
    return checks


def test_missing_programs_are_named(tmp_path: Path):
    checks = report(1, PATH=str(tmp_path))
    assert checks["make"].startswith("missing") and "fix: apt-get install make" in checks["make"]
    assert checks["git"].startswith("optional")


def test_addresses_that_do_not_answer():
    port = free_port()
    server = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    store = {"FEEDBACK_URL": f"postgresql+psycopg://user:geheim@127.0.0.1:{port}/feedback"}
    checks = report(1, **server, **store, SERVE_WEBHOOK_URL=f"http://127.0.0.1:{port}/events")
    assert checks["tracking store"].startswith("missing") and "check MLFLOW_TRACKING_URI" in checks["tracking store"]
    assert "does not answer" in checks["feedback store"] and "geheim" not in str(checks)
    assert "serve.webhook_url" in checks["webhook"]


def test_a_port_in_use_is_named_and_a_server_with_an_account_answers(server: str):
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # if another server has the port, the report must name it as well
            taken.bind(("127.0.0.1", 8080))
        taken.listen()
        checks = report(0, MLFLOW_TRACKING_URI=server)
    assert "fix: start serve with serve.port=8081" in checks["port 8080"] and checks["tracking store"].startswith("ok")
    assert checks["Python"].startswith("ok") and checks["make"].startswith("ok") and checks["disk"].startswith("ok")
