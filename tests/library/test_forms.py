"""The other ways in: a fresh clone with `make run`, a git URL, an environment made by uv."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Project, command_output, environment, free_port
from registries import until

SMALL = ("-P", "model=sklearn_sgd")


@pytest.fixture
def url(repository: Path) -> Iterator[str]:
    """The repository behind git's own server on loopback."""
    port = free_port()
    command = [
        "git",
        "daemon",
        "--listen=127.0.0.1",
        f"--port={port}",
        "--export-all",
        f"--base-path={repository.parent}",
    ]
    with subprocess.Popen(command) as process, socket.socket() as client:
        until(lambda: client.connect_ex(("127.0.0.1", port)) == 0)
        yield f"git://127.0.0.1:{port}/project"
        process.terminate()


def test_a_fresh_clone_runs(repository: Path, tmp_path: Path):
    command_output(tmp_path, "git", "clone", "--quiet", str(repository), "clone")
    own = str(Path(sys.executable).parent)  # the environment of the tests, which a fresh machine does not have
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != own)
    arguments = 'ARGS=-P model=sklearn_sgd -P description="make run"'
    output = command_output(tmp_path / "clone", "make", "run", arguments, PATH=path)
    assert "PROMOTE" in output and "champion  version 1" in output and ".venv/bin/mlflow ui" in output
    assert command_output(tmp_path / "clone", "git", "status", "--porcelain") == "", "a run leaves untracked files"


def test_a_git_url_runs_without_a_checkout(url: str, tmp_path: Path):
    project = Project(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    project.run("mlflow", "run", url, "-v", "main", "-e", "train", "--env-manager", "local", *SMALL)
    (run,) = project.client.search_runs(["0"])
    assert run.data.tags["git_dirty"] == "false" and "mlflow.source.git.commit" in run.data.tags


def test_uv_makes_the_environment(repository: Path, tmp_path: Path):
    links = environment().get("PIP_FIND_LINKS", "")  # a folder of wheels that pip looks in; uv has its own name for it
    env = {"MLFLOW_ENV_ROOT": str(tmp_path), **({"UV_FIND_LINKS": links} if links else {})}
    project = Project(repository, f"sqlite:///{tmp_path}/mlflow.db")
    ended = project.run("mlflow", "run", ".", "-e", "train", "--env-manager", "uv", *SMALL, **env)
    assert "run_id=" in ended.stdout
