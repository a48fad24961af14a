"""A stand-in for a Databricks workspace: the calls that MLflow makes to one, answered on loopback, and jobs that run.

It was written from MLflow's sources and the public documentation, not from a workspace: what passes here is well formed,
and what a workspace thinks of it is still to be seen. Runs and experiments are those of a real `mlflow server` behind
it; Unity Catalog is that server's registry under other names, and its files are a folder.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from conftest import copy_project, environment, free_port, wait_for
from jobs import Job

UC = "/api/2.0/mlflow/unity-catalog/"
SDK_FILES = f"{UC}registered-models:is-databricks-sdk-models-artifact-repository-enabled"


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error_code": code, "message": message}


class Workspace:
    """The state behind the routes. `faults` counts down how often a call whose path holds a text is answered wrongly."""

    def __init__(self, root: Path, server: str) -> None:
        self.root, self.server = root, server
        self.token, self.job_token = "t" * 36, "j" * 36
        self.expire_after: str | None = None  # a text in a path: once that was called, `token` is worth nothing
        self.expired = False
        self.once_running: Callable[[], object] | None = None  # called when a job is first seen to run
        self.faults: Counter[tuple[str, int]] = Counter()
        self.jobs: dict[int, Job] = {}
        self.calls: list[str] = []
        self.secrets: dict[str, str] = {}
        self.endpoints: dict[str, dict] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Routes,), {"workspace": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def env(self) -> dict[str, str]:
        """What a user of it has set."""
        return {"DATABRICKS_HOST": self.url, "DATABRICKS_TOKEN": self.token, "MLFLOW_TRACKING_URI": "databricks"}

    def expire(self) -> None:
        self.expired = True

    def renew(self, token: str) -> None:
        self.token, self.expired, self.expire_after = token, False, None

    def dbfs(self, path: str) -> Path:
        found = (self.root / "dbfs" / path.removeprefix("/dbfs").lstrip("/")).resolve()
        assert found.is_relative_to(self.root / "dbfs")
        return found

    def close(self) -> None:
        for job in self.jobs.values():
            if job.process and job.process.poll() is None:
                job.cancel()
        self.http.shutdown()
        self.http.server_close()

    # --- what it answers ---------------------------------------------------------------------------------------------

    def answer(
        self, method: str, path: str, query: dict[str, str], body: bytes, token: str
    ) -> tuple[int, bytes | dict]:
        for (text, status), left in list(self.faults.items()):
            if left > 0 and text in path:
                self.faults[text, status] -= 1
                raise Refusal(status, "TEMPORARILY_UNAVAILABLE" if status > 499 else "BAD_REQUEST", f"{text} refused")
        self.calls.append(f"{method} {path}")
        if path == "/.well-known/databricks-config":  # asked by Databricks' own client before it has said who it is
            return 200, {"workspace_id": "1", "cloud": "AWS"}
        if token == self.token and self.expired:
            raise Refusal(403, "PERMISSION_DENIED", "Invalid access token: it has expired")
        if token not in (self.token, self.job_token):
            raise Refusal(401, "UNAUTHENTICATED", "Credential was not sent or was of an unsupported type for this API.")
        self.expired = self.expired or bool(self.expire_after and self.expire_after in path)
        if path.startswith(f"{UC}") and (found := self.unity_catalog(method, path, query, body)):
            return found
        if path.startswith(("/api/2.0/fs/files/Models/", "/api/2.0/fs/directories/Models/")):
            return self.files(method, path, body)
        if path.startswith("/api/2.0/mlflow/") or path.startswith("/api/3.0/mlflow/"):
            return self.tracking(method, path, query, body)
        if path.startswith("/dbfs/") and method == "POST":
            place = self.dbfs(path)
            if not re.fullmatch(r"/dbfs/mlflow-experiments/\d+/projects-code/[0-9a-f]+\.(tar\.gz|py)", path):
                raise Refusal(400, "INVALID_PARAMETER_VALUE", f"No such place: {path}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
            if path.endswith(".tar.gz"):
                with tarfile.open(place) as archive:
                    assert archive.getnames(), "an archive that holds nothing"
            return 200, {}
        data = json.loads(body) if body else dict(query)
        match method, path:
            case "GET", "/api/2.0/dbfs/get-status":
                if not self.dbfs(data["path"]).exists():
                    raise Refusal(
                        404, "RESOURCE_DOES_NOT_EXIST", f"No file or directory exists on path {data['path']}."
                    )
                return 200, {"path": data["path"], "is_dir": False}
            case "POST", "/api/2.0/jobs/runs/submit":
                return 200, {"run_id": self.submit(data)}
            case "GET", "/api/2.0/jobs/runs/get":
                job = self.jobs[int(data["run_id"])]
                if job.state["life_cycle_state"] == "RUNNING" and self.once_running:
                    then, self.once_running = self.once_running, None
                    then()
                page = f"{self.url}/#job/{job.number}/run/1"
                return 200, {"run_id": job.number, "job_id": 7, "run_page_url": page, "state": job.state}
            case "GET", "/api/2.0/secrets/get":
                value = self.secrets[f"{data['scope']}/{data['key']}"]
                return 200, {"key": data["key"], "value": base64.b64encode(value.encode()).decode()}
            case "POST", "/api/2.0/jobs/runs/cancel":
                self.jobs[int(data["run_id"])].cancel()
                return 200, {}
        if path.startswith("/api/2.0/serving-endpoints/"):
            return self.serving(method, path, data)
        raise Refusal(404, "ENDPOINT_NOT_FOUND", f"No API found for '{method} {path}'")

    def submit(self, data: dict) -> int:
        """Start a job, or refuse what a workspace refuses."""
        cluster = data.get("new_cluster")
        if data.get("existing_cluster_id") or not isinstance(cluster, dict) or "new_cluster" in cluster:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "Cluster spec must be one new cluster")
        for field, pattern in (("spark_version", r"\d+\.\d+\.x-.*scala2\.1[23]"), ("node_type_id", r"\w+\.\w+")):
            if not re.fullmatch(pattern, str(cluster.get(field))):
                raise Refusal(400, "INVALID_PARAMETER_VALUE", f"Invalid {field}: {cluster.get(field)}")
        if "num_workers" not in cluster and "autoscale" not in cluster:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "Missing required field: size")
        local = str(cluster.get("spark_conf", {}).get("spark.master", "")).startswith("local")
        if cluster.get("num_workers") == 0 and not local:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "A cluster without workers needs spark.master local[*]")
        if any(
            set(one) != {"pypi"} or not re.fullmatch(r"[\w.-]+==[\w.]+", one["pypi"]["package"])
            for one in data["libraries"]
        ):
            raise Refusal(400, "INVALID_PARAMETER_VALUE", f"Invalid libraries: {data['libraries']}")
        task = data["spark_python_task"]
        if not self.dbfs(task["python_file"].removeprefix("dbfs:")).is_file():
            raise Refusal(400, "INVALID_PARAMETER_VALUE", f"{task['python_file']} does not exist")
        if len(json.dumps(task["parameters"])) > 10_000:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "The parameters have more than 10,000 bytes")
        job = Job(len(self.jobs) + 1, data)
        self.jobs[job.number] = job
        threading.Thread(target=job.run, args=(self,), daemon=True).start()
        return job.number

    def tracking(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes | dict]:
        """The MLflow API, from the server behind; experiments are paths of the workspace there."""
        if path.endswith("/experiments/create"):
            name = json.loads(body)["name"]
            if not re.match(r"/(Shared|Users/[^/]+)/[^/]+", name):
                raise Refusal(400, "INVALID_PARAMETER_VALUE", f"Got an invalid experiment name '{name}'.")
        if "/registered-models/" in path or "/model-versions/" in path:
            raise Refusal(403, "PERMISSION_DENIED", "The workspace registry is disabled: use Unity Catalog")
        return self.forward(method, path, query, body)

    def forward(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes | dict]:
        url = self.server + path + (f"?{urllib.parse.urlencode(query, doseq=True)}" if query else "")
        request = urllib.request.Request(url, data=body or None, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def unity_catalog(
        self, method: str, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes | dict] | None:
        """Registered models and versions; names have three parts, and there are no stages."""
        if path == SDK_FILES:
            return 200, {"is_databricks_sdk_models_artifact_repository_enabled": True}
        data = {**query, **(json.loads(body) if body else {})}
        name = data.get("name")
        if name and len(str(name).split(".")) != 3:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", f"'{name}' is not a valid name: CATALOG.SCHEMA.MODEL")
        rest = path.removeprefix(UC)
        if rest == "model-versions/emit-lineage":
            return 200, {}
        if rest == "model-versions/finalize":
            method, rest = "GET", "model-versions/get"
        if rest == "model-versions/create":
            data = {
                key: data[key] for key in ("name", "source", "run_id", "tags", "description", "model_id") if key in data
            }
        elif rest == "registered-models/create":
            data = {key: data[key] for key in ("name", "tags", "description") if key in data}
        if method == "GET":
            return self.forward(method, f"/api/2.0/mlflow/{rest}", data, b"")
        return self.forward(method, f"/api/2.0/mlflow/{rest}", {}, json.dumps(data).encode())

    def files(self, method: str, path: str, body: bytes) -> tuple[int, bytes | dict]:
        """The Files API on /Models, where the versions of Unity Catalog are."""
        kind, _, inner = path.removeprefix("/api/2.0/fs/").partition("/")
        place = self.root / "uc" / inner
        if method == "PUT" and kind == "files":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
            return 204, b""
        if kind == "directories" and place.is_dir():
            contents = [
                {
                    "path": f"/{inner.rstrip('/')}/{one.name}",
                    "is_directory": one.is_dir(),
                    "file_size": one.stat().st_size,
                }
                for one in sorted(place.iterdir())
            ]
            return 200, {"contents": contents}
        if kind == "files" and place.is_file():
            return 200, place.read_bytes()
        raise Refusal(404, "NOT_FOUND", f"{inner} does not exist")

    def serving(self, method: str, path: str, data: dict) -> tuple[int, bytes | dict]:
        """Serving endpoints: their configuration, which a PUT replaces."""
        name = path.split("/")[4]
        if name not in self.endpoints:
            raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Endpoint {name} does not exist")
        if method == "PUT":
            self.endpoints[name] = {"name": name, "config": data, "state": {"config_update": "NOT_UPDATING"}}
        return 200, self.endpoints[name]


class Routes(BaseHTTPRequestHandler):
    workspace: Workspace
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        parts = urlsplit(self.path)
        query = {key: value[0] if len(value) == 1 else value for key, value in parse_qs(parts.query).items()}
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self.chunks()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            status, answer = self.workspace.answer(self.command, unquote(parts.path), query, body, token)
        except Refusal as refusal:
            status, answer = refusal.status, refusal.body
        except Exception as error:
            status, answer = 500, {"error_code": "INTERNAL_ERROR", "message": repr(error)}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if "/fs/files/" in parts.path else "application/json"
        )
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(content)

    def chunks(self) -> bytes:
        """A body sent in pieces, as of a file whose size the sender does not say."""
        found = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = respond

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stand_in(folder: Path) -> Iterator[Workspace]:
    """A workspace in `folder`, with a real `mlflow server` behind it."""
    port = free_port()
    # By HTTP, as the storage of a cloud is: MLflow deletes what it downloaded once it has registered it, and what is on
    # this disk it does not download.
    place = f"http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts"
    artifacts = ("--artifacts-destination", str(folder / "artifacts"), "--default-artifact-root", place)
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *artifacts]
    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            workspace = Workspace(folder, f"http://127.0.0.1:{port}")
            try:
                yield workspace
            finally:
                workspace.close()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def checkout_at(root: Path) -> Path:
    """A copy of the project as a git checkout: only what git knows goes to a workspace."""
    copy_project(root)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=all")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], cwd=root, check=True)
