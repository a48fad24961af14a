"""A store, a server, an experiment or a lock that cannot be used is one line at once, and the fix in that line works."""

import datetime
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlflow
import people
import pytest
from conftest import ROOT, Project, environment, free_port, tracking
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from preloaded import programs

from alacarte import locks, stores
from alacarte.errors import UserError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the caller's; settings of a test end with it; nothing waits and tries again."""
    for variable in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(variable)
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "PGCONNECT_TIMEOUT"):
        monkeypatch.setenv(variable, "5")
    waits = SimpleNamespace(sleep=lambda seconds: pytest.fail("MLflow waits and tries again"))
    monkeypatch.setattr("mlflow.store.db.utils.time", waits)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)


def refusal(uri: str) -> str:
    """The one line for a store that cannot be opened."""
    with tracking(uri):
        return people.refusal(stores.open_stores)


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts small servers that always give one answer, and stops them at the end."""
    started: list[ThreadingHTTPServer] = []

    def start(status: int, body: str, kind: str = "text/html", certificate: Path | None = None) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        started.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (
            401,
            "Who?",
            "HTTP 401 Who?: log in with export MLFLOW_TRACKING_USERNAME=NAME MLFLOW_TRACKING_PASSWORD=PASSWORD",
        ),
        (403, "Invalid Host header", "HTTP 403 Invalid Host header: log in with another"),
        (404, "<html><h1>nginx</h1></html>", "HTTP 404 Not Found: correct the address"),
        (503, "no upstream", "HTTP 503 no upstream: read the log of the server"),
        (200, "<html>log in</html>", "HTTP 200 OK: correct the address"),
    ],
)
def test_an_answer_that_is_not_one_of_mlflow_is_one_line(serve, status: int, body: str, line: str):
    uri = serve(status, body)
    message = refusal(uri.replace("//", "//me:s3cret@"))
    assert message.startswith(f"MLFLOW_TRACKING_URI={uri} ") and line in message and "s3cret" not in message


def test_an_untrusted_certificate_is_one_line_and_its_fix_works(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key, file = ec.generate_private_key(ec.SECP256R1()), tmp_path / "server.pem"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(1), [])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    uri = serve(200, "{}", "application/json", file)
    assert "is not trusted: export MLFLOW_TRACKING_SERVER_CERT_PATH=FILE" in refusal(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(file))
    with tracking(uri):
        stores.open_stores()


def test_a_registry_of_its_own_is_checked_too(serve, tmp_path: Path):
    uri = serve(404, "")
    try:
        mlflow.set_registry_uri(uri)
        assert refusal(f"sqlite:///{tmp_path}/runs.db").startswith(f"MLFLOW_REGISTRY_URI={uri} is no MLflow server")
    finally:
        mlflow.set_registry_uri("")


# --- databases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://127.0.0.1:{port}", "does not answer: start the server, or unset MLFLOW_TRACKING_URI"),
        ("sqlite:////sys/x.db", "cannot be opened"),
        ("sqlite:///{folder}/file/x.db", "File exists"),
        ("sqlite:///{folder}/file", "cannot be opened: file is not a database"),
        ("sqlite:///{folder}", "cannot be opened: unable to open database file"),
        ("postgresql+psycopg://me@127.0.0.1:{port}/runs", "cannot be opened: connection failed"),
        ("mysql+pymysql://127.0.0.1/runs", "needs a package: pip install pymysql"),
        ("file:///{folder}", "is no store that MLflow knows"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line_at_once(tmp_path: Path, uri: str, line: str):
    (tmp_path / "file").write_text("no database " * 100)
    message = refusal(uri.format(folder=tmp_path, port=free_port()))
    assert message.startswith("MLFLOW_TRACKING_URI") and line in message


def test_a_store_that_breaks_later_is_one_line(tmp_path: Path):
    with tracking(f"sqlite:///{tmp_path}/runs.db"):
        stores.open_stores()
        (tmp_path / "runs.db").write_text("overwritten " * 10_000)
        with pytest.raises(Exception) as failed:
            mlflow.search_experiments()
    line = stores.explain_failure(failed.value)
    assert line and line.startswith("the tracking store does not work: ") and "\n" not in line
    assert stores.explain_failure(KeyError("a mistake of the program")) is None
    with pytest.raises(OSError) as full:
        Path("/dev/full").write_text("x")
    assert "No space left on device" in str(stores.explain_failure(full.value))


def test_four_processes_create_one_store_and_one_experiment(tmp_path: Path):
    program = "from alacarte import stores; stores.open_stores(); stores.use_experiment('new')"
    env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/runs.db")
    command = [f"{programs()}/python", "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, "\n".join(errors)
    with tracking(env["MLFLOW_TRACKING_URI"]):
        assert {experiment.name for experiment in mlflow.search_experiments()} == {"Default", "new"}


@pytest.mark.parametrize("source", ["key", "variable", "default"])
def test_a_deleted_experiment_is_one_line_with_the_command_that_restores_it(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    with tracking(uri):
        experiment_id = "0" if source == "default" else mlflow.create_experiment("mine")
        mlflow.delete_experiment(experiment_id)
        if source == "variable":
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
        name = "mine" if source == "key" else None
        command = re.search(r"is deleted: (.+), or choose", people.refusal(stores.use_experiment, name))
        assert command and command[1].endswith(f" experiments restore --experiment-id {experiment_id}")
        if source == "key":
            subprocess.run(["bash", "-c", command[1]], env=environment(MLFLOW_TRACKING_URI=uri), check=True)
            stores.use_experiment(name)


def test_a_relative_store_of_mlflow_run_is_found_from_another_folder(project: Project, tmp_path: Path):
    arguments = ("-e", "train", "--env-manager", "local", "-P", "model=sklearn_sgd", "-P", "data.stop=300")
    here = Project(tmp_path, "sqlite:///runs.db", preloaded=False)  # the step looks at the processes above it
    here.run("mlflow", "run", str(project.root), *arguments)
    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db").search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.tags["step"] == "train" and run.outputs.model_outputs
    assert not (project.root / "runs.db").exists()
    ended = project.step("train", code=2, MLFLOW_TRACKING_URI="sqlite:///runs.db", MLFLOW_RUN_ID=run.info.run_id)
    assert 'export MLFLOW_TRACKING_URI="sqlite:///$PWD/runs.db"' in ended.stderr
    assert not (project.root / "runs.db").exists()


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act for another account")
def test_two_accounts_have_locks_of_their_own(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    shared = Path(tempfile.mkdtemp())  # not in pytest's folder, which other accounts cannot read
    request.addfinalizer(lambda: shutil.rmtree(shared))
    shared.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    with locks.lock("a name") as lock:
        program = f"import os, tempfile; tempfile.tempdir = {str(shared)!r}\n"
        program += "from alacarte import locks; os.setuid(12345)\nwith locks.lock('a name'): print('locked')"
        other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert (other.stdout, other.stderr) == ("locked\n", "")
    os.chown(Path(lock.lock_file).parent, 12345, 12345)
    with pytest.raises(UserError, match="export TMPDIR=FOLDER of your own"):
        locks.lock("a name")
