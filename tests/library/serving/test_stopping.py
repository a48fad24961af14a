"""A server ends when it is told to, whatever it is doing: in its imports, while it starts, while it loads."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Project, environment
from preloaded import programs
from registries import until
from servers import register_code, register_constant

NAME = "stopped"
BOUND = 45  # seconds in which a server that was told to stop must have ended, on a machine that does much else
SLOW = '''
import time
from pathlib import Path
import mlflow

class Slow(mlflow.pyfunc.PythonModel):
    """Says when its loading begins, and loads once the file `go` is there."""

    def load_context(self, context):
        with Path("loading").open("a") as file:
            file.write("begun\\n")
        while not Path("go").exists():
            time.sleep(0.05)

    def predict(self, context, model_input, params=None):
        return model_input["a"].tolist()

mlflow.models.set_model(Slow())
'''


@pytest.fixture(scope="module")
def prepared(project: Project) -> Project:
    """With a model, and a slow one."""
    register_constant(project, NAME, 1)
    (project.root / "go").touch()
    project.client.set_registered_model_alias("slow", "champion", register_code(project, "slow", SLOW))
    (project.root / "go").unlink()
    (project.root / "loading").unlink(missing_ok=True)
    return project


@pytest.fixture
def silent() -> Iterator[int]:
    """A port of this machine that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


class Started:
    """A server with its output in a file, which a signal does not close."""

    def __init__(self, project: Project, folder: Path, *arguments: str, preloaded: bool = True, **env: str) -> None:
        self._log = folder / "log"
        python = f"{programs()}/python" if preloaded else sys.executable
        whole = (python, "-m", "steps.serve", "serve.port=0", f"serve.cache={folder}/cache", *arguments)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                whole, cwd=project.root, stdout=log, stderr=log, start_new_session=True,
                env=environment(**{"MLFLOW_TRACKING_URI": project.uri, "PYTHONUNBUFFERED": "1", **env}),
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def stops(self, number: int, tell: Callable[[int, int], None] = os.kill) -> int:
        """Its exit code once it was told to stop; fails the test when it does not end."""
        tell(self.process.pid, number)
        try:
            return self.process.wait(BOUND)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"it goes on:\n{self.printed}") from None

    def until(self, so: Callable[[], object]) -> None:
        def so_or_dead() -> object:
            assert self.process.poll() is None, self.printed
            return so()

        until(so_or_dead, lambda: self.printed)


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 0.3), (signal.SIGINT, 1.5)])
def test_in_its_imports(prepared: Project, tmp_path: Path, number: int, seconds: float):
    started = Started(prepared, tmp_path, f"registered_model_name={NAME}", preloaded=False)
    time.sleep(seconds)
    assert started.stops(number) in (-number, 128 + number, 0) and "Traceback" not in started.printed


@pytest.mark.parametrize(("number", "tell"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_once_it_has_said_where_it_listens(prepared: Project, tmp_path: Path, number: int, tell: Callable):
    started = Started(prepared, tmp_path, f"registered_model_name={NAME}", preloaded=False)
    started.until(lambda: "serve: http" in started.printed)
    assert started.stops(number, tell) == 0 and "Traceback" not in started.printed


def test_while_a_model_loads(prepared: Project, tmp_path: Path):
    started = Started(prepared, tmp_path, "registered_model_name=slow", "serve.trust_code=true")
    started.until((prepared.root / "loading").exists)
    assert started.stops(signal.SIGTERM) == 0 and "Traceback" not in started.printed


@pytest.mark.parametrize("line", ["", "serve: http"])
def test_while_the_registry_is_silent(prepared: Project, tmp_path: Path, silent: int, line: str):
    """At first `serve` tries to register its webhook."""
    silence = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{silent}", "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    started = Started(prepared, tmp_path, f"registered_model_name={NAME}", "serve.webhook=true", **silence)
    started.until(lambda: line in started.printed)
    time.sleep(0 if line else 3)
    assert started.stops(signal.SIGTERM) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert "Traceback" not in started.printed


LATE = """
import os, runpy, sys
from alacarte.serving import server
inside = {"__name__": "sqlalchemy.forced", "os": os}
exec(f"def tell(): os.kill(os.getpid(), {sys.argv.pop(1)})", inside)
serve = server._Server.serve_until_stopped
server._Server.serve_until_stopped = lambda *of: (inside["tell"](), serve(*of))
runpy.run_module("steps.serve", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_waited_for_a_query_until_it_listens(prepared: Project, tmp_path: Path, number: int):
    command = [f"{programs()}/python", "-c", LATE, str(int(number)), f"registered_model_name={NAME}", "serve.port=0"]
    env = environment(MLFLOW_TRACKING_URI=prepared.uri)
    more = f"serve.cache={tmp_path}/cache"
    ended = subprocess.run([*command, more], cwd=prepared.root, env=env, capture_output=True, text=True, timeout=BOUND)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
