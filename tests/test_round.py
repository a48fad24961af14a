"""One small round of the loop through all entry points, with a real store, a real registry and a real server."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "round"
DEFAULTS = ["metrics=default", "gate.metric=null"]  # and digits, whatever the defaults in conf/ are
SMALL = [
    "data=digits",
    "features=tabular",
    "model=sklearn_sgd",
    "data.stop=900",
    *DEFAULTS,
    f"registered_model_name={NAME}",
]


class Round:
    """Runs entry points against a tracking store, a feedback store and a cache in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.client = mlflow.MlflowClient(self.uri)
        self.client.create_experiment(NAME, artifact_location=str(folder / "artifacts"))
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SERVE_"))}
        self.env = {**clean, "MLFLOW_TRACKING_URI": self.uri, "MLFLOW_EXPERIMENT_NAME": NAME}
        self.feedback = f"feedback.url=sqlite:///{folder}/feedback.db"

    def command(self, step: str, *arguments: str) -> list[str]:
        try:
            from preloaded import programs  # of tests/library: `python` without the imports
        except ImportError:  # the library is a package
            return [sys.executable, "-m", f"steps.{step}", *arguments]
        return [f"{programs()}/python", "-m", f"steps.{step}", *arguments]

    def step(self, step: str, *arguments: str, code: int = 0) -> str:
        """Run a step and return its standard output; fail the test if it ends with another exit code."""
        command = self.command(step, *arguments)
        ended = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=900)
        assert ended.returncode == code, f"{step} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def version(self, alias: str) -> str:
        return str(self.client.get_model_version_by_alias(NAME, alias).version)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Round:
    made = Round(tmp_path_factory.mktemp("round"))
    made.step("pipeline", *SMALL)
    return made


@pytest.fixture(scope="module")
def address(loop: Round) -> Iterator[str]:
    """The address of a server that follows the registry and asks for a label of every row."""
    cache = f"serve.cache={loop.folder}/cache"
    arguments = [f"registered_model_name={NAME}", "serve.port=0", "serve.poll_seconds=0.2", cache, loop.feedback]
    command = loop.command("serve", *arguments, "feedback.audit_share=1")
    log = (loop.folder / "serve.log").open("w+")
    server = subprocess.Popen(command, cwd=ROOT, env={**loop.env, "PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log)
    try:
        yield wait_for(lambda: address_in(loop.folder / "serve.log", server))
    finally:
        server.terminate()
        server.wait(30)


def address_in(log: Path, server: subprocess.Popen) -> str | None:
    text = log.read_text()
    assert server.poll() is None, text
    lines = [line.split()[1] for line in text.splitlines() if line.startswith("serve: http")]
    return lines[0] if lines else None


def wait_for(look: Any, seconds: float = 60) -> Any:
    """The first true result of `look`."""
    end = time.monotonic() + seconds
    while not (result := look()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return result


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def serves(url: str, version: str) -> bool:
    return ask(f"{url}/status")["model_version"] == version


def test_the_first_model_is_the_champion(loop: Round):
    assert loop.version("champion") == "1"


def test_score_answers_a_table(loop: Round):
    import pandas as pd

    from project.data import load_digits

    table, output = loop.folder / "rows.csv", loop.folder / "answers.csv"
    load_digits(start=900, stop=920).drop(columns="digit").to_csv(table, index=False)
    loop.step("score", f"registered_model_name={NAME}", f"input={table}", f"output={output}")
    answers = pd.read_csv(output)
    assert len(answers) == 20 and set(answers["model_version"]) == {1}


def test_a_served_model_learns_from_labels_and_its_successor_is_served(loop: Round, address: str):
    from project.data import load_digits

    wait_for(lambda: serves(address, "1"))
    rows = load_digits(start=900, rotate=15)
    body = {"dataframe_split": rows.drop(columns="digit").to_dict("split", index=False)}
    answer = ask(f"{address}/invocations", body)
    labels = [
        {"prediction_id": prediction_id, "label": digit}
        for prediction_id, digit in zip(answer["prediction_ids"], rows["digit"].tolist(), strict=True)
    ]
    ask(f"{address}/feedback", labels[:500])  # serve.feedback_per_minute is 600

    shared = [f"registered_model_name={NAME}", loop.feedback]
    loop.step("monitor", *shared, "monitor.labels=100", code=3)
    assert "run_id=" in loop.step("retrain", *shared, *DEFAULTS)
    assert loop.version("challenger") == "2"

    loop.step("promote", f"registered_model_name={NAME}", "version=2", "force=true")
    wait_for(lambda: serves(address, "2"))
