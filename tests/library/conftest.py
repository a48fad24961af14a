"""Tests run the real thing in a copy of the project: real `mlflow run`, real stores, real processes."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from preloaded import programs

if TYPE_CHECKING:
    from postgres import Postgres
    from there import There

    from alacarte.feedback import Store

ROOT = Path(__file__).resolve().parents[2]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine the threads of small models wait for each other
FOLDERS = ("alacarte", "conf", "databricks", "examples", "project", "steps")


# The files whose tests take minutes, or need a browser or a workspace: `make test-all` runs them, `make test` does not. The
# longest come first, so that at the end no process waits for another one.
NIGHTLY = (
    "test_docs", "test_forms", "test_frameworks_served", "test_package", "test_stack", "test_retrain", "test_workflows",
    "test_survival", "test_jobs", "test_demo", "test_submit", "test_template", "test_stopping", "test_page", "test_monitor",
    "test_notebook", "test_poisoning", "test_fuzz",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in NIGHTLY:
            item.add_marker("nightly")
    items.sort(key=lambda item: NIGHTLY.index(item.path.stem) if item.path.stem in NIGHTLY else len(NIGHTLY))


@pytest.fixture(autouse=True)
def no_experiment_of_another_test() -> Iterator[None]:
    """`mlflow.set_experiment` in this process holds for the whole process, and other test files run here too."""
    yield
    if os.environ.pop("MLFLOW_EXPERIMENT_ID", None) and "mlflow" in sys.modules:
        sys.modules["mlflow"].tracking.fluent._active_experiment_id = None


def environment(**more: str) -> dict[str, str]:
    """This environment without what would tie a test to a run or a server of the caller's."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    # Without job execution, a server starts eight processes less.
    mlflow = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**clean, "PATH": path, "PYTHONWARNINGS": "ignore", **mlflow, **more}


@dataclass
class Project:
    """A copy of the project in a folder of its own, with the embedded store in it or a server behind it."""

    root: Path
    uri: str
    preloaded: bool = True  # steps and `mlflow run` are forked from a process with the packages loaded

    def run(self, *command: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command there; fail the test when it ends otherwise than with `code` (None: any)."""
        env = environment(**{"MLFLOW_TRACKING_URI": self.uri, **env})
        if self.preloaded:
            env["PATH"] = f"{programs()}{os.pathsep}{env['PATH']}"
        result = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=600)
        if code is not None and result.returncode != code:
            pytest.fail(
                f"{' '.join(command)}: exit code {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}"
            )
        return result

    def step(self, name: str, *arguments: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-m", f"steps.{name}", *arguments, code=code, **env)

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, text: str = "") -> list:
        """All runs of the default experiment, newest first."""
        return self.client.search_runs(["0"], filter_string=text, order_by=["attributes.start_time DESC"])

    def newest(self, step: str):
        """The newest run of a step."""
        return self.runs(f"tags.step = '{step}'")[0]


def copy_project(to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder)
    for name in ("MLproject", "python_env.yaml", "requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, to / name)
    # The importance of the columns takes a third of the time of an evaluation.
    for name in ("main", "evaluate", "retrain"):
        file = to / "conf" / f"{name}.yaml"
        file.write_text(file.read_text().replace("explain: true", "explain: false"))
    return to


@cache
def empty_database() -> Path:
    """A database with MLflow's tables. To make them takes seconds."""
    from mlflow import MlflowClient

    file = Path(tempfile.mkdtemp(prefix="store")) / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def empty_store() -> Path:
    return empty_database()


def new_store(folder: Path, artifacts: str) -> str:
    """An empty store in the file mlflow.db of a folder; its address."""
    shutil.copy(empty_database(), folder / "mlflow.db")
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", [f"{artifacts}/0"])
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="session")
def new_project() -> Callable[[Path], Project]:
    """Makes a copy of the project in a folder, with an empty store in it."""
    return lambda root: Project(copy_project(root), new_store(root, f"{root}/mlruns"))


@pytest.fixture(scope="session")
def trained(new_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with one trained model, which each test makes the champion of a name of its own."""
    project = new_project(tmp_path_factory.mktemp("trained"))
    project.step("train", "model=sklearn_sgd")
    return project


@pytest.fixture(scope="module")
def project(new_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    return new_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, uncommitted edits and all, as a repository with one commit and the tag of this version."""
    import alacarte

    root = tmp_path_factory.mktemp("git") / "project"
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in command_output(ROOT, *listed).split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    command_output(root, "git", "init", "-qb", "main")
    commit(root, "template")
    command_output(root, "git", "tag", f"v{alacarte.__version__}")
    return root


@pytest.fixture(scope="session")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the library from the repository, and the packages of the environment that runs the tests."""
    root = tmp_path_factory.mktemp("installed")
    command_output(root, sys.executable, "-m", "venv", "--without-pip", str(root))
    (packages,) = root.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(root / "bin" / "python"), "install", "--quiet"]
    command_output(root, *pip, "--no-deps", "--no-build-isolation", f"git+file://{repository}")
    return root


def command_output(folder: Path, *command: str, code: int = 0, **env: str) -> str:
    """What a command prints; fail the test if it ends otherwise than with `code`."""
    ended = subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=900)
    assert ended.returncode == code, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def commit(folder: Path, message: str) -> None:
    command_output(folder, "git", "add", "--all")
    command_output(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", message)


@contextlib.contextmanager
def mlflow_server(
    folder: Path, *arguments: str, port: int | None = None, artifacts: str = "mlflow-artifacts:", **env: str
) -> Iterator[str]:
    """A real `mlflow server` with its data in a folder, which may have them from an earlier one."""
    port = port or free_port()
    if not (folder / "mlflow.db").exists():
        new_store(folder, artifacts)
    roots = ("--default-artifact-root", f"{artifacts}/")
    command = [f"{programs()}/mlflow", "server", "--port", str(port), "--workers", "1", *roots, *arguments]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**env), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator["Postgres"]:
    from postgres import postgres_server

    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator["There"]:
    from there import There
    from workspace import checkout_at, stand_in

    folder = tmp_path_factory.mktemp("there")
    root = checkout_at(folder / "project")
    with stand_in(folder) as workspace:
        yield There(root, workspace, workspace.server)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """`feedback.url` of a new store, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/feedback.db"
    return request.getfixturevalue("postgres").create()


@pytest.fixture
def store(url: str) -> Iterator["Store"]:
    """An empty feedback store of each kind."""
    from alacarte.feedback import Store

    opened = Store(url, timeout=0.3)
    yield opened
    opened.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    """Wait until a server that this test started answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


@contextlib.contextmanager
def tracking(uri: str) -> Iterator[None]:
    """MLflow's address within this process, and afterwards what it was: other test files run here too."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # which MLflow sets whenever its address is set
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]
