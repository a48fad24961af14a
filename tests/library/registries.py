"""A registry of a test's own, which may be stopped, and small models in it, for the tests of what follows a registry."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from conftest import free_port, mlflow_server, tracking
from cryptography.fernet import Fernet
from hydra import compose, initialize_config_dir
from learning import CONF
from mlflow import MlflowClient
from mlflow.models import infer_signature
from omegaconf import OmegaConf
from sklearn.dummy import DummyClassifier

from alacarte.serving.follower import ModelFollower
from alacarte.serving.model import ServedModel
from alacarte.serving.settings import Settings

X = pd.DataFrame({"a": [0.0, 1.0, 2.0], "b": [1.0, 0.0, 1.0]})


class Registry:
    """A real `mlflow server` on a free port, which keeps its port and its data when it is stopped and started again."""

    def __init__(self, folder: Path, **env: str) -> None:
        self._folder, self._port, self._env, self._running = folder, free_port(), env, ExitStack()
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._running.enter_context(mlflow_server(self._folder, port=self._port, **self._env))

    def stop(self) -> None:
        self._running.close()


def settings(name: str, cache: Path, **serve: Any) -> Settings:
    """conf/serve with another model, cache and whatever else is given; it polls often unless it is told otherwise."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_container(compose("serve"))
    plain = {**config["serve"], "cache": str(cache), "poll_seconds": 0.1, **serve}
    return Settings.make(registered_model_name=name, feedback=config["feedback"], **plain)


def register(name: str, label: object = 1, rows: pd.DataFrame = X, model: Any = None, **logged: Any) -> str:
    """Register a model that always answers `label`, or another one; its version."""
    model = model or DummyClassifier(strategy="constant", constant=label).fit(rows, [label] * len(rows))
    settings = {"signature": infer_signature(rows, model.predict(rows)), "serialization_format": "skops", **logged}
    info = mlflow.sklearn.log_model(
        model, name="model", input_example=rows, pip_requirements=[], registered_model_name=name, **settings
    )
    return str(info.registered_model_version)


def point(name: str, version: str, alias: str = "champion") -> None:
    MlflowClient().set_registered_model_alias(name, alias, version)


def until(happened: Callable[[], object], say: Callable[[], object] = lambda: "") -> None:
    """Wait until something is so; fail the test when it does not come."""
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, f"it does not come: {say()}"
        time.sleep(0.005)


@contextmanager
def local_registry(folder: Path) -> Iterator[None]:
    """A registry in SQLite as MLflow's address."""
    with tracking(f"sqlite:///{folder}/mlflow.db"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow puts the artifacts beside the database
        mlflow.search_experiments()
        yield


@contextmanager
def own_registry(folder: Path, **env: str) -> Iterator[Registry]:
    """A registry of the test's own, started, as MLflow's address."""
    made = Registry(folder, **env)
    try:
        made.start()
        with tracking(made.uri):
            yield made
    finally:
        made.stop()


def webhook_registry(folder: Path) -> AbstractContextManager[Registry]:
    """A registry that sends webhooks to this machine, and knows of a new webhook at once."""
    return own_registry(
        folder,
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https", MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=Fernet.generate_key().decode(), MLFLOW_WEBHOOK_CACHE_TTL="0",
    )  # fmt: skip


def load(folder: Path) -> ServedModel:
    return ServedModel.load(folder, trust_code=False)


@contextmanager
def following(cache: Path) -> Iterator[Callable[..., ModelFollower]]:
    """Starts holders with one cache, and stops them at the end."""
    started: list[ModelFollower] = []

    def start(name: str, load: Callable = load, **serve: Any) -> ModelFollower:
        made = ModelFollower(settings(name, cache, **serve), load)
        started.append(made)
        made.start()
        return made

    try:
        yield start
    finally:
        for holder in started:
            holder.stop()


def serves(holder: ModelFollower, version: str) -> None:
    """Wait for a version."""
    until(lambda: holder.current and holder.current.version == version, holder.status)


def answers(holder: ModelFollower) -> object:
    """The label that a holder's model gives, as a request gets it."""
    model = holder.current.model
    body = json.dumps({"dataframe_split": {"columns": ["a", "b"], "data": [[5.0, 5.0]]}}).encode()
    [answer] = model.predict([model.parse(body, "application/json", 10)])
    return answer.labels[0]


def refuses(holder: ModelFollower, version: str, kept: str) -> str:
    """Wait until a version is refused, see that the one before goes on serving; the reason, which must be one line."""
    until(lambda: f"version {version} is refused" in (holder.status()["last_error"] or ""), holder.status)
    assert holder.current.version == kept and holder.status()["failures"] >= 1 and answers(holder) == int(kept)
    reason = holder.status()["last_error"]
    assert "\n" not in reason and "Traceback" not in reason
    return reason
