"""Predictions continue while the database of feedback is locked, full or deleted, and no label is stored in part.

At full size: FULL_SIZE=1 make test-all ARGS=tests/library/serving/test_store_trouble.py
"""

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import Project
from registries import until
from servers import KeptAlive, Served, figure, load, register_constant, size
from servers import serving_alone as serving

NAME = "troubled"


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Served]:
    register_constant(project, NAME, 1)
    with serving(project, f"registered_model_name={NAME}", "feedback.url=sqlite:///troubled.db") as served:
        served.wait()
        yield served


def predict(connection: KeptAlive | Served, n: int) -> list[str]:
    """The ids of n predictions."""
    rows = {"dataframe_split": {"columns": ["a", "b"], "data": [[float(i), 1.0] for i in range(n)]}}
    answer = connection.ask("/invocations", rows)
    assert answer.status == 200 and answer.body["predictions"] == [1] * n, answer
    return answer.body["prediction_ids"]


@contextmanager
def locked(file: Path, served: Served) -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def full(file: Path, served: Served) -> Iterator[None]:
    """No file of the server grows beyond one page, which SQLite meets like a disk without room."""
    before = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def gone(file: Path, served: Served) -> Iterator[None]:
    file.rename(file.with_suffix(".away"))
    yield
    file.with_suffix(".away").rename(file)


@pytest.mark.parametrize("trouble", [locked, full, gone])
def test_the_database_is_in_trouble(project: Project, server: Served, trouble):
    file = project.root / "troubled.db"
    acknowledged = refused = 0

    def say(ids: list[str]) -> int:
        nonlocal acknowledged, refused
        answer = server.ask("/feedback", [{"prediction_id": id, "label": 1} for id in ids])
        assert answer.status in (200, 503), answer
        if answer.status == 503:
            assert "\n" not in answer.body["message"] and answer.body["message"].startswith("nothing was stored")
            refused += 1
        else:
            assert {result["state"] for result in answer.body["results"]} == {"accepted"}
            acknowledged += len(ids)
        return answer.status

    def labels() -> int:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as database:
            return database.execute("SELECT count(*) FROM feedback").fetchone()[0]

    assert say(predict(server, 3)) == 200
    there = labels()
    with load(server, lambda connection, number: bool(predict(connection, 1 + number % 3)), size(4, 32)) as failures:
        with trouble(file, server):
            kept = [predict(server, 3) for _ in range(size(3, 30))]
            assert {say(ids) for ids in kept} == {503}
        until(lambda: say(kept[0]) == 200)
        assert {say(ids) for ids in kept[1:]} <= {200}
    assert failures == [] and labels() == there + acknowledged - 3
    until(lambda: server.ask("/status").body["store_healthy"])
    assert server.ask("/status").body["dropped"] == 0
    figure(
        f"database {trouble.__name__}: predictions go on, {refused} times labels were refused with 503, none half-written"
    )
