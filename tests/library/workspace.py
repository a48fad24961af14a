"""A stand-in for a Databricks workspace: the calls that MLflow makes to one, answered on loopback, and jobs that run.

It was written from MLflow's sources and the public documentation, not from a workspace: what passes here is well formed,
and what a workspace thinks of it is still to be seen. Runs and experiments are those of a real `mlflow server` behind
it; Unity Catalog is that server's registry under other names, and its files are a folder.
"""

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import uvicorn
from conftest import copy_project, free_port, mlflow_server
from jobs import Job
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

UC = "/api/2.0/mlflow/unity-catalog/"
SDK_FILES = "registered-models:is-databricks-sdk-models-artifact-repository-enabled"
KEPT = {  # of a call to Unity Catalog, the fields that the registry of a server knows
    "registered-models/create": ("name", "tags", "description"),
    "model-versions/create": ("name", "source", "run_id", "tags", "description", "model_id"),
}


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "INVALID_PARAMETER_VALUE") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error_code": code, "message": message}


class Workspace:
    """The state behind the routes."""

    def __init__(self, root: Path, server: str) -> None:
        self.root, self.server = root, server
        self.token, self.job_token = "t" * 36, "j" * 36
        self.expire_after: str | None = None  # a text in a path: once that was called, `token` is worth nothing
        self.expired = False
        self.once_running: Callable[[], object] | None = None  # called when a job is first seen to run
        self.refuse_once: str | None = None  # a text in a path: the next such call is refused
        self.jobs: dict[int, Job] = {}
        self.calls: list[str] = []
        self.secrets: dict[str, str] = {}
        self.endpoints: dict[str, dict] = {}
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        app = Starlette(routes=[Route("/{path:path}", self.respond, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])])
        self.http = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.http.run, daemon=True)
        self.thread.start()
        while not self.http.started:
            time.sleep(0.01)

    def env(self) -> dict[str, str]:
        """What a user of it has set."""
        return {"DATABRICKS_HOST": self.url, "DATABRICKS_TOKEN": self.token, "MLFLOW_TRACKING_URI": "databricks"}

    def renew(self, token: str) -> None:
        self.token, self.expired, self.expire_after = token, False, None

    def dbfs(self, path: str) -> Path:
        return self.root / "dbfs" / path.removeprefix("dbfs:").removeprefix("/dbfs").lstrip("/")

    def close(self) -> None:
        for job in self.jobs.values():
            if job.process and job.process.poll() is None:
                job.cancel()
        self.http.should_exit = True
        self.thread.join(30)

    # --- what it answers ---------------------------------------------------------------------------------------------

    async def respond(self, request: Request) -> Response:
        body = await request.body()
        try:
            answer = await run_in_threadpool(self.answer, request, request.scope["path"], body)
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    def answer(self, request: Request, path: str, body: bytes) -> Response | dict:
        if self.refuse_once and self.refuse_once in path:
            text, self.refuse_once = self.refuse_once, None
            raise Refusal(400, f"{text} refused", "BAD_REQUEST")
        self.calls.append(f"{request.method} {path}")
        if path == "/.well-known/databricks-config":  # asked by Databricks' own client before it has said who it is
            return {"workspace_id": "1", "cloud": "AWS"}
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == self.token and self.expired:
            raise Refusal(403, "Invalid access token: it has expired", "PERMISSION_DENIED")
        if token not in (self.token, self.job_token):
            raise Refusal(401, "Credential was not sent or was of an unsupported type for this API.", "UNAUTHENTICATED")
        self.expired = self.expired or bool(self.expire_after and self.expire_after in path)
        if path.startswith(("/api/2.0/fs/files/Models/", "/api/2.0/fs/directories/Models/")):
            return self.files(request.method, path, body)
        if path.startswith("/dbfs/"):
            if not re.fullmatch(r"/dbfs/mlflow-experiments/\d+/projects-code/[0-9a-f]+\.(tar\.gz|py)", path):
                raise Refusal(400, f"No such place: {path}")
            self.dbfs(path).parent.mkdir(parents=True, exist_ok=True)
            self.dbfs(path).write_bytes(body)
            return {}
        data = {**request.query_params, **(json.loads(body) if body else {})}
        if path.startswith(UC):
            return self.unity_catalog(request.method, path.removeprefix(UC), data)
        if path.startswith(("/api/2.0/mlflow/", "/api/3.0/mlflow/")):
            return self.tracking(request, path, body, data)
        return self.platform(request.method, path, data)

    def platform(self, method: str, path: str, data: dict) -> dict:
        """Jobs, DBFS, secrets and serving endpoints."""
        match method, path.removeprefix("/api/2.0/").split("/"):
            case "GET", ["dbfs", "get-status"]:
                if self.dbfs(data["path"]).exists():
                    return {"path": data["path"], "is_dir": False}
            case "POST", ["jobs", "runs", "submit"]:
                return {"run_id": self.submit(data)}
            case "GET", ["jobs", "runs", "get"]:
                job = self.jobs[int(data["run_id"])]
                if job.state["life_cycle_state"] == "RUNNING" and self.once_running:
                    then, self.once_running = self.once_running, None
                    then()
                return {"run_id": job.number, "run_page_url": f"{self.url}/#job/{job.number}", "state": job.state}
            case "POST", ["jobs", "runs", "cancel"]:
                self.jobs[int(data["run_id"])].cancel()
                return {}
            case "GET", ["secrets", "get"]:
                value = self.secrets[f"{data['scope']}/{data['key']}"]
                return {"key": data["key"], "value": base64.b64encode(value.encode()).decode()}
            case _, ["serving-endpoints", name, *_] if name in self.endpoints:
                if method == "PUT":
                    self.endpoints[name] = {"name": name, "config": data}
                return self.endpoints[name]
        raise Refusal(404, f"Nothing is at {method} {path}", "RESOURCE_DOES_NOT_EXIST")

    def submit(self, data: dict) -> int:
        """Start a job, or refuse what a workspace refuses."""
        cluster, task = data["new_cluster"], data["spark_python_task"]
        for field, pattern in (("spark_version", r"\d+\.\d+\.x-.*scala2\.1[23]"), ("node_type_id", r"\w+\.\w+")):
            if not re.fullmatch(pattern, str(cluster.get(field))):
                raise Refusal(400, f"Invalid {field}: {cluster.get(field)}")
        local = str(cluster.get("spark_conf", {}).get("spark.master", "")).startswith("local")
        if cluster.get("num_workers") == 0 and not local:
            raise Refusal(400, "A cluster without workers needs spark.master local[*]")
        packages = [library["pypi"]["package"] for library in data["libraries"]]
        if not all(re.fullmatch(r"[\w.-]+==[\w.]+", package) for package in packages):
            raise Refusal(400, f"Invalid libraries: {packages}")
        if not self.dbfs(task["python_file"]).is_file() or len(json.dumps(task["parameters"])) > 10_000:
            raise Refusal(400, f"{task['python_file']} does not exist, or its parameters have more than 10,000 bytes")
        job = Job(len(self.jobs) + 1, data)
        self.jobs[job.number] = job
        threading.Thread(target=job.run, args=(self,), daemon=True).start()
        return job.number

    def tracking(self, request: Request, path: str, body: bytes, data: dict) -> Response:
        """The MLflow API, from the server behind; experiments are paths of the workspace there."""
        if path.endswith("/experiments/create") and not re.match(r"/(Shared|Users/[^/]+)/[^/]+", data["name"]):
            raise Refusal(400, f"Got an invalid experiment name '{data['name']}'.")
        if "/registered-models/" in path or "/model-versions/" in path:
            raise Refusal(403, "The workspace registry is disabled: use Unity Catalog", "PERMISSION_DENIED")
        return self.forward(request.method, f"{path}?{request.url.query}", body)

    def unity_catalog(self, method: str, call: str, data: dict) -> Response | dict:
        """Registered models and versions; names have three parts, and there are no stages."""
        if call == SDK_FILES:
            return {"is_databricks_sdk_models_artifact_repository_enabled": True}
        if "name" in data and len(data["name"].split(".")) != 3:
            raise Refusal(400, f"'{data['name']}' is not a valid name: CATALOG.SCHEMA.MODEL")
        if call == "model-versions/emit-lineage":
            return {}
        if call == "model-versions/finalize":
            method, call = "GET", "model-versions/get"
        data = {key: value for key, value in data.items() if key in KEPT.get(call, data)}
        if method == "GET":
            query = requests.Request("GET", "http://x", params=data).prepare().path_url.partition("?")[2]
            return self.forward(method, f"/api/2.0/mlflow/{call}?{query}", b"")
        return self.forward(method, f"/api/2.0/mlflow/{call}", json.dumps(data).encode())

    def forward(self, method: str, path: str, body: bytes) -> Response:
        headers = {"Content-Type": "application/json"}
        answer = requests.request(method, self.server + path, data=body, headers=headers, timeout=60)
        return Response(answer.content, answer.status_code, media_type="application/json")

    def files(self, method: str, path: str, body: bytes) -> Response | dict:
        """The Files API on /Models, where the versions of Unity Catalog are."""
        kind, _, inner = path.removeprefix("/api/2.0/fs/").partition("/")
        place = self.root / "uc" / inner
        if method == "PUT" and kind == "files":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
            return Response(status_code=204)
        if kind == "directories" and place.is_dir():
            files = [
                {"path": f"/{inner.rstrip('/')}/{each.name}", "name": each.name, "is_directory": each.is_dir(),
                 "file_size": each.stat().st_size} for each in sorted(place.iterdir())
            ]  # fmt: skip
            return {"contents": files}
        if kind == "files" and place.is_file():
            return Response(place.read_bytes(), media_type="application/octet-stream")
        raise Refusal(404, f"{inner} does not exist", "NOT_FOUND")


@contextmanager
def stand_in(folder: Path) -> Iterator[Workspace]:
    """A workspace in `folder`, with a real `mlflow server` behind it."""
    port = free_port()
    # By HTTP, as the storage of a cloud is: MLflow deletes what it downloaded once it has registered it, and what is on
    # this disk it does not download.
    place = f"http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts"
    destination = ("--artifacts-destination", str(folder / "artifacts"))
    with mlflow_server(folder, *destination, port=port, artifacts=place) as server:
        workspace = Workspace(folder, server)
        try:
            yield workspace
        finally:
            workspace.close()


def checkout_at(root: Path) -> Path:
    """A copy of the project as a git checkout: only what git knows goes to a workspace."""
    copy_project(root)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=all")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], cwd=root, check=True)
