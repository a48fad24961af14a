"""The other ways in: a fresh clone with `make run`, a git URL, an environment made by uv."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, environment


def run(folder: Path, *command: str, **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, uncommitted edits and all, as the one commit of a repository."""
    folder = tmp_path_factory.mktemp("git") / "project"
    files = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "--quiet", "--message=all")
    return folder


@pytest.fixture
def url(repository: Path) -> Iterator[str]:
    """The repository behind git's own server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "git",
        "daemon",
        "--listen=127.0.0.1",
        f"--port={port}",
        "--export-all",
        f"--base-path={repository.parent}",
    ]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"git://127.0.0.1:{port}/project"
    finally:
        process.terminate()
        process.wait(30)


def test_a_fresh_clone_runs(repository: Path, tmp_path: Path):
    run(tmp_path, "git", "clone", "--quiet", str(repository), "clone")
    output = run(
        tmp_path / "clone", "make", "run", 'ARGS=-P model=sklearn_sgd -P description="make run"', PATH=system_path()
    )
    assert "PROMOTE" in output and "champion: version 1" in output and ".venv/bin/mlflow ui" in output
    assert run(tmp_path / "clone", "git", "status", "--porcelain") == "", "a run leaves untracked files"


def test_a_git_url_runs_without_a_checkout(url: str, tmp_path: Path):
    run(
        tmp_path, "mlflow", "run", url, "-v", "main", "-e", "train", "--env-manager", "local", "-P", "model=sklearn_sgd"
    )
    tags = run(tmp_path, "python", "-c", "import mlflow; print(mlflow.search_runs(output_format='list')[0].data.tags)")
    assert "'git_dirty': 'false'" in tags and "mlflow.source.git.commit" in tags


def test_uv_makes_the_environment(repository: Path, tmp_path: Path):
    links = environment().get("PIP_FIND_LINKS", "")  # a folder of wheels that pip looks in; uv has its own name for it
    env = {"MLFLOW_ENV_ROOT": str(tmp_path), **({"UV_FIND_LINKS": links} if links else {})}
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command = ("mlflow", "run", ".", "-e", "train", "--env-manager", "uv", "-P", "model=sklearn_sgd")
    assert "run_id=" in run(repository, *command, MLFLOW_TRACKING_URI=store, **env)


def system_path() -> str:
    """PATH without the environment that runs the tests, as on a fresh machine."""
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != own)
