"""Start `steps.serve` for a test, talk to it over HTTP, and stop it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from conftest import Project, environment, free_port, tracking, wait_for
from mlflow.models import infer_signature
from preloaded import programs
from registries import point, register
from sklearn.dummy import DummyClassifier


@dataclass
class Answered:
    status: int
    body: Any


def readable(text: str) -> Any:
    """What JSON says, or the text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class KeptAlive(AbstractContextManager):
    """One connection that is used for request after request. Any failure of it raises."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._connection.connect()
        self._connection.auto_open = 0  # a connection that the server closed is a failure, not a reason for another one

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, path: str, body: object = None, method: str = "POST", **headers: str) -> Answered:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        self._connection.request(method, path, data, sent)
        answer = self._connection.getresponse()
        return Answered(answer.status, readable(answer.read().decode()))


@dataclass
class Served:
    """A running server: its address, its process and what it printed."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def ask(self, path: str, body: object = None, method: str | None = None, **headers: str) -> Answered:
        """One request; `body` goes as JSON unless it is bytes. The answer is JSON where it can be read as such."""
        with KeptAlive(self.url) as connection:
            return connection.ask(path, body, method or ("GET" if body is None else "POST"), **headers)

    def wait(self, path: str = "/readyz", seconds: float = 60, error: str = "", **keys: object) -> Any:
        """Ask until the answer is 200, has these keys and `error` in its last_error; fail the test when that does not come."""
        end, answer = time.monotonic() + seconds, None
        while time.monotonic() < end:
            assert self.process.poll() is None, "".join(self.lines)
            answer = self.ask(path)
            matches = answer.status == 200 and all(answer.body.get(key) == value for key, value in keys.items())
            if matches and (not error or error in (answer.body["last_error"] or "")):
                return answer.body
            time.sleep(0.05)
        raise AssertionError(f"{path} answers {answer}, not {keys}\n{''.join(self.lines)}")

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serving(
    project: Project, *arguments: str, command: tuple[str, ...] = (), preloaded: bool = True, **env: str
) -> Iterator[Served]:
    """`python -m steps.serve` on a free port, or `command` in its place, in a copy of the project.

    With `preloaded`, `process` only waits for the server: it passes signals on, but its memory and files are its own.
    """
    python = f"{programs()}/python" if preloaded else sys.executable
    process = subprocess.Popen(
        command or (python, "-m", "steps.serve", "serve.port=0", "serve.poll_seconds=0.2", *arguments),
        cwd=project.root, env=environment(MLFLOW_TRACKING_URI=project.uri, PYTHONUNBUFFERED="1", **env),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    served = Served("", process)
    assert process.stdout
    for line in process.stdout:
        served.lines.append(line)
        if line.startswith("serve: http://"):
            served.url = line.split()[1]
            break
    rest = threading.Thread(target=lambda: served.lines.extend(process.stdout or []), daemon=True)
    rest.start()
    try:
        assert served.url, "".join(served.lines)
        yield served
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


serving_alone = partial(serving, preloaded=False)  # for tests that look at the process of the server


@contextmanager
def served_by_mlflow(model_uri: str, folder: Path, store: str = "") -> Iterator[Served]:
    """`mlflow models serve` with the registry in `store`, in a folder that should contain nothing of this project."""
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local", "--port", str(port)]
    env = environment(**({"MLFLOW_TRACKING_URI": store} if store else {}))
    env["PATH"] = f"{programs()}{os.pathsep}{env['PATH']}"
    with (folder / f"serve-{port}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, 180)
        yield Served(f"http://127.0.0.1:{port}", process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


X = pd.DataFrame({"a": [0.0, 1.0, 2.0, 3.0], "b": [1.0, 0.0, 1.0, 0.0]})
ROWS = {"dataframe_split": {"columns": ["a", "b"], "data": [[1.0, 2.0], [3.0, 4.0]]}}


def register_constant(project: Project, name: str, label: int, champion: bool = True, X: pd.DataFrame = X) -> str:
    """Register a model that always answers `label`, so that an answer tells which version gave it; its number."""
    with tracking(project.uri):
        version = register(
            name, rows=X, model=DummyClassifier(strategy="constant", constant=label).fit(X, [0, 1, 2, 3])
        )
        if champion:
            point(name, version)
    return version


def register_code(project: Project, name: str, code: str) -> str:
    """Register a model of columns a and b that runs this code; its number. It is logged in the folder of the project."""
    (project.root / f"{name}.py").write_text(code)
    example = pd.DataFrame({"a": [0.0, 0.0], "b": [0.0, 0.0]})
    with tracking(project.uri), pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        info = mlflow.pyfunc.log_model(
            name="model", python_model=str(project.root / f"{name}.py"), signature=infer_signature(example, [0.0, 0.0]),
            input_example=example, pip_requirements=[], registered_model_name=name,
        )  # fmt: skip
    return str(info.registered_model_version)


# --- trials of survival: small in the tests; FULL_SIZE=1 or benchmarks/survival.py for the full size ---


def size(small: int, full: int) -> int:
    return full if os.environ.get("FULL_SIZE") == "1" else small


def figure(text: str) -> None:
    """A line for who runs benchmarks/survival.py; pytest hides it."""
    print(f"figure: {text}", flush=True)


@contextmanager
def load(served: Served, work: Callable[[KeptAlive, int], None], connections: int = 32) -> Iterator[list[str]]:
    """Do `work(connection, number)` again and again on each of many connections; the list gets what it raises."""
    failures: list[str] = []
    stop = threading.Event()

    def go_on(number: int) -> None:
        try:
            connection = KeptAlive(served.url)
            while not stop.is_set():
                work(connection, number)
        except Exception as error:
            if not stop.is_set():
                failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=go_on, args=(number,), daemon=True) for number in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
