"""A server goes on when the registry points to a version that crashes, loops or needs too much memory."""

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
from conftest import Project, copy_project
from forging import CODE, code_of
from mlflow import MlflowClient
from registries import until
from servers import ROWS as REQUEST
from servers import Served, register_code, register_constant
from servers import serving_alone as serving

NAME = "probed"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy in which a trial takes 5 seconds and 300 MB at most, and versions 1 good, 2 crash, 3 loop, 4 memory, 5 good."""
    root = copy_project(tmp_path_factory.mktemp("project"))
    file = root / "alacarte/formats/probe.py"
    text = file.read_text().replace("\nSECONDS = 60\n", "\nSECONDS = 5\n")
    file.write_text(text.replace("\nMEGABYTES = 2048\n", "\nMEGABYTES = 300\n"))
    assert file.read_text() != text
    made = Project(root, f"sqlite:///{root}/mlflow.db")
    register_constant(made, NAME, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHILE_LOGGED", "1")
        for deed in CODE.values():
            register_code(made, NAME, code_of(deed))
    register_constant(made, NAME, 3, champion=False)
    return made


REASONS = {
    "2": "version 2 is refused: the process that tried it ended with SIGSEGV",
    "3": "version 3 is refused: the process that tried it did not answer within 6 s",
    "4": "version 4 is refused: the process that tried it needed more than 301 MB",
}


def served_by(project: Project, cache: str, **env: str):
    return serving(project, f"registered_model_name={NAME}", "serve.trust_code=true", f"serve.cache={cache}", **env)


def point(project: Project, version: str, alias: str = "champion") -> None:
    MlflowClient(project.uri).set_registered_model_alias(NAME, alias, version)


def answers(served: Served) -> int:
    answered = served.ask("/invocations", REQUEST)
    assert answered.status == 200, answered
    return answered.body["predictions"][0]


@pytest.fixture
def gone() -> Iterator[Callable[[Served], None]]:
    """Remembers the processes of a server; at the end, when it was stopped, each of them must end."""
    seen: list[psutil.Process] = []
    yield lambda served: seen.extend(psutil.Process(served.process.pid).children(recursive=True))
    assert seen
    until(
        lambda: not [process for process in seen if process.is_running() and process.status() != "zombie"], lambda: seen
    )


def test_a_challenger_and_a_champion_that_crash_loop_and_devour(project: Project, gone):
    point(project, "1")
    point(project, "2", "challenger")
    with served_by(project, ".first") as served:  # a start with a challenger that crashes
        gone(served)
        served.wait("/status", model_version="1", error=f"{REASONS['2']} (it is the challenger)")
        for failures, (version, reason) in enumerate(REASONS.items(), 1):
            point(project, version)
            served.wait("/status", model_version="1", failures=failures, error=reason)
            assert answers(served) == 1
            point(project, "1")
        point(project, "5")
        served.wait("/status", model_version="5", failures=len(REASONS))
        assert answers(served) == 3
        assert served.stop() == 0
    point(project, "2")
    with served_by(project, ".first") as served:  # the version that served last serves again
        served.wait("/status", model_version="5", error=REASONS["2"])
        assert answers(served) == 3


def test_a_start_with_a_champion_that_crashes(project: Project, gone):
    point(project, "2", "challenger")
    point(project, "2")
    with served_by(project, ".empty") as served:
        reason = f"{REASONS['2']}; no other version has served"
        until(lambda: reason in str(served.ask("/readyz").body), lambda: served.ask("/readyz"))
        assert served.ask("/readyz").status == 503
        gone(served)
        assert served.ask("/livez").status == 200 and served.stop(signal.SIGINT) == 0


def test_trials_hold_neither_socket_nor_database_and_end_with_a_server_that_is_killed(project: Project, gone):
    point(project, "3", "challenger")
    point(project, "1")
    with served_by(project, ".killed") as served:
        served.wait("/status", model_version="1")
        answers(served)
        server = psutil.Process(served.process.pid)
        until(lambda: len(server.children(recursive=True)) > 2)  # the child that loops is one of them
        for process in server.children(recursive=True):
            assert not [file for file in process.open_files() if ".db" in file.path]
            assert not [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert [c for c in server.net_connections("inet") if c.status == "LISTEN"]
        gone(served)
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(30)
