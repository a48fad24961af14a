"""Predictions and labels in a store, made directly, for the tests of the feedback store."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from conftest import ROOT, environment
from omegaconf import OmegaConf

from alacarte.feedback import Feedback, Prediction, Store, request_id, retention
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.rows import Answer, InputSchema, Rows
from alacarte.serving.settings import Settings

NAME = "digits"
CLASSES = [0, 1, 2, 3]
COLUMNS = ("a", "b")
OLD = 100.0  # seconds: no label waits for predictions of that age
NUMBERS = InputSchema(["a", "b"], ["double", "double"], False, True)


def predict(
    store: Store, outputs: list, age: float = OLD, inputs: list | bytes | None = None, **more: object
) -> list[str]:
    """Store one request; the ids of its rows."""
    now, n = time.time_ns() - int(age * 1e9), len(outputs)
    request = request_id(now, now % 2**40)
    rows = inputs if inputs is not None else [[float(i), 0.5] for i in range(n)]
    blob = rows if isinstance(rows, bytes) else np.array(rows, "<f8").tobytes()
    made = Prediction(
        request, now / 1e9, NAME, "1", n, COLUMNS, "f8", blob, outputs, [0.75] * n, 1.5, None, 0.05, 1.0
    )  # fmt: skip
    store.write_predictions([made._replace(**more)])
    return [request] if n == 1 else [f"{request}.{row}" for row in range(n)]


def give(
    store: Store, identifier: str, label: object, classes: list | None = CLASSES, name: str = NAME, **more: str
) -> tuple[str, str]:
    (outcome,) = store.add_feedback(name, [Feedback(identifier, label)], classes=classes, **more)
    assert outcome.prediction_id == identifier
    return outcome.state, outcome.message


def count(store: Store, table: sa.Table) -> int:
    with store.database.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def settings(**feedback: object) -> Settings:
    config = {
        group: OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / "default.yaml"))
        for group in ("serve", "feedback")
    }
    return Settings.make(registered_model_name=NAME, feedback={**config["feedback"], **feedback}, **config["serve"])


def record(log: PredictionLog, n: int = 1, version: str = "1") -> tuple[list, list]:
    rows = Rows(n, NUMBERS, numbers=np.arange(2.0 * n).reshape(n, 2))
    return log.add(version, rows, Answer([1] * n, [0.5] * n), 0.001)


def size_of(store: Store, name: str = NAME) -> float:
    with store.database.read() as connection:
        return retention.excess(connection, name, 0)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    folders = [str(ROOT), str(ROOT / "tests" / "library"), str(Path(__file__).parent)]
    start = f"import sys; sys.path[:0] = {folders!r}\n"
    command = [sys.executable, "-c", start + code, *arguments]
    return subprocess.Popen(
        command, env=environment(PYTHONUNBUFFERED="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
