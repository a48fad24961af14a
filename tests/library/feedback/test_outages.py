"""A store that is locked, full, gone, replaced or killed, and URLs that cannot be opened."""

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres import Postgres
from stores import CLASSES, NAME, child, count, give, predict, record, settings

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Store, StoreError, request_id
from alacarte.feedback.database import feedback, input_schemas, predictions, schema_version
from alacarte.serving.prediction_log import PredictionLog


@contextmanager
def locked(store: Store, server: Postgres | None) -> Iterator[None]:
    if server:
        with store.database.engine.connect() as connection:
            connection.execute(sa.text("LOCK TABLE predictions IN ACCESS EXCLUSIVE MODE"))
            yield
        return
    other = sqlite3.connect(store.database.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.execute("ROLLBACK")
    other.close()


@contextmanager
def full(store: Store, _: None) -> Iterator[None]:
    with store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    sa.event.listen(store.database.engine, "connect", limit)
    store.close()
    yield
    sa.event.remove(store.database.engine, "connect", limit)
    store.close()


@contextmanager
def gone(store: Store, server: Postgres | None) -> Iterator[None]:
    """The server is stopped, the file and what belongs to it are elsewhere."""
    if server:
        server.stop()
        yield
        server.start()
        return
    path = store.database.path
    files = [file for file in path.parent.iterdir() if file.name.startswith(path.name)]
    away = path.parent / "away"
    away.mkdir()
    for file in files:
        file.rename(away / file.name)
    yield
    assert not path.exists(), "a store that vanished is not made anew"
    for file in files:
        (away / file.name).rename(file)


@pytest.mark.parametrize(
    ("url", "trouble"),  # PostgreSQL has no size that a test can limit
    [("sqlite", locked), ("sqlite", gone), ("sqlite", full), ("postgresql", locked), ("postgresql", gone)],
    indirect=["url"],
)
def test_in_trouble(store: Store, trouble: Callable, request: pytest.FixtureRequest):
    """Nothing is half-written, predictions wait, and all of it is there afterwards."""
    is_server = request.node.callspec.params["url"] == "postgresql"
    trouble = trouble(store, request.getfixturevalue("postgres") if is_server else None)
    before = predict(store, [1] * 50)
    log = PredictionLog(store, settings())
    log.start()
    comment = "c" * 2000
    items = [Feedback(each, 2, "somebody", comment) for each in before]
    with trouble:
        waiting = [record(log)[0][0] for _ in range(2100)]
        with pytest.raises(StoreError) as error:
            store.add_feedback(NAME, items, classes=CLASSES)
        assert "\n" not in str(error.value)
        with pytest.raises(StoreError):
            log.flush()
        assert not log.healthy
        waiting += record(log)[0]
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(StoreError):
            log.flush()
            break
    assert log.healthy and log.dropped == 0
    assert count(store, feedback) == 0
    assert {outcome.state for outcome in store.add_feedback(NAME, items, classes=CLASSES)} == {"accepted"}
    assert sorted(store.window(NAME, time.time() - 60, time.time() + 1).about["prediction_id"]) == sorted(waiting)
    log.stop()


def test_a_locked_database_is_named_while_predictions_wait(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/feedback.db", timeout=0.1)
    log = PredictionLog(store, settings())
    record(log)
    with log._lock, pytest.raises(StoreError, match=r"an earlier write is not finished after 0\.2 s"):
        log.flush()  # another thread is slow, and the database works
    with locked(store, None):
        with pytest.raises(StoreError, match="database is locked"):
            log.flush()
        with log._lock, pytest.raises(StoreError, match="predictions wait to be stored: database is locked"):
            log.flush()  # another thread is trying


def test_a_file_that_was_replaced(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    (identifier,) = predict(store, [1])
    store.close()
    shutil.copy(tmp_path / "feedback.db", tmp_path / "copy.db")
    store.get_feedback(NAME, identifier)
    (tmp_path / "copy.db").rename(tmp_path / "feedback.db")
    with pytest.raises(StoreError, match="replaced"):
        give(store, identifier, 2)
    assert give(store, identifier, 2)[0] == "accepted"
    assert Store(f"sqlite:///{tmp_path}/feedback.db").get_feedback(NAME, identifier)["state"] == "accepted"


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_only_the_owner_reads_a_new_file(tmp_path: Path, umask: int):
    old = tmp_path / "old.db"
    old.touch(0o640)
    old.chmod(0o640)
    before = os.umask(umask)
    try:
        for path in (tmp_path / "new.db", old):
            predict(Store(f"sqlite:///{path}"), [1])
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {name: mode for name, mode in modes.items() if name.startswith("new")} == dict.fromkeys(
        ("new.db", "new.db-wal", "new.db-shm"), 0o600 & ~umask
    )
    assert modes["old.db"] == 0o640, "the mode of a file that is there stays"


TOGETHER = """
import time
from alacarte.feedback import Feedback, Prediction, Store, request_id
url, me, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("ready"), sys.stdin.readline()
store = Store(url, timeout=20)
one = Prediction(request_id(1, 1), 0.0, "digits", "1", 1, ("a",), "f8", bytes(8), [0], None, 1.0, None, 0.0, 1.0)
store.write_predictions([one])
store.add_feedback("digits", [Feedback(one.id, me)], classes=[0, 1, 2, 3])
for i in range(rounds):
    several = [one._replace(id=request_id(i * 100 + j, me + 10)) for j in range(20)]
    store.write_predictions(several)
    outcomes = store.add_feedback("digits", [Feedback(each.id, 1) for each in several], classes=[0, 1])
    assert {outcome.state for outcome in outcomes} == {"accepted"}
"""


def test_processes_make_the_tables_and_write_at_once(url: str):
    rounds = 20
    processes = [child(TOGETHER, url, str(label), str(rounds)) for label in (1, 2, 3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    store = Store(url)
    assert count(store, predictions) == 60 * rounds + 1 and count(store, feedback) == 60 * rounds + 3
    assert count(store, schema_version) == count(store, input_schemas) == 1
    labels = store.get_feedback(NAME, request_id(1, 1))["labels"]
    assert sorted(each["label"] for each in labels) == [1, 2, 3] and {each["reason"] for each in labels} == {"conflict"}
    store.close()


KILLED = """
import json, time
from stores import *
store = Store(sys.argv[1])
log = PredictionLog(store, settings())
log.start()
while True:
    ids, _ = record(log, 2)
    print(json.dumps(["predicted", time.time(), ids]))
    log.flush()
    if store.add_feedback(NAME, [Feedback(ids[0], 3)], classes=CLASSES)[0].state == "accepted":
        print(json.dumps(["acknowledged", time.time(), ids[0]]))
    for _ in range(50):
        print(json.dumps(["predicted", time.time(), record(log)[0]]))
"""


def test_a_kill_loses_no_feedback_and_the_last_second_at_most(url: str):
    process = child(KILLED, url)
    assert process.stdout
    lines = [process.stdout.readline()]
    end = time.monotonic() + 1.8
    while time.monotonic() < end:
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    killed = time.time()
    lines += process.stdout.read().splitlines(keepends=True)
    process.wait()
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    acknowledged = {each for kind, _, each in events if kind == "acknowledged"}
    predicted = {each for kind, at, ids in events if kind == "predicted" and at < killed - 1 for each in ids}
    assert acknowledged and predicted
    store = Store(url)
    assert acknowledged <= set(store.accepted(NAME).about["prediction_id"])
    assert predicted <= set(store.window(NAME, 0, 2e9).about["prediction_id"])
    store.close()


def test_a_url_that_cannot_be_opened(tmp_path: Path, empty_store: Path):
    (tmp_path / "text.db").write_text("no database " * 100)
    later = Store(f"sqlite:///{tmp_path}/later.db")
    with later.database.write(durable=True) as connection:
        connection.execute(sa.update(schema_version).values(version=99))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    for url, words in (
        ("feedback.db", "not the URL"),
        ("mysql://me:secret@host/db", "SQLite and PostgreSQL are supported"),
        ("databricks:main.default", "postgresql"),
        ("sqlite:///:memory:", "a store is a file"),
        ("sqlite:////no/such/folder/feedback.db", "name a file"),
        ("sqlite:////tmp", "name a file|unable to open"),
        (f"sqlite:///{tmp_path}/text.db", "not a database"),
        (f"sqlite:///{tmp_path}/later.db", "version 99"),
        (f"sqlite:///{tmp_path}/mlflow.db", "MLflow's own"),
    ):
        with pytest.raises(UserError, match=words) as error:
            Store(url)
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert not sa.inspect(sa.create_engine(f"sqlite:///{tmp_path}/mlflow.db")).has_table("predictions")


def test_a_server_that_refuses_and_one_that_is_down(postgres: Postgres, caplog: pytest.LogCaptureFixture):
    url = postgres.create()
    with pytest.raises(UserError, match="does not exist"):
        Store(url.replace("test", "other"))
    postgres.stop()
    store = Store(url.replace("postgres@", "postgres:secret@", 1))
    assert "tried again" in caplog.text and "secret" not in caplog.text
    with pytest.raises(StoreError):
        store.get_feedback(NAME, request_id(1, 1))
    postgres.start()
    assert give(store, predict(store, [1])[0], 1)[0] == "accepted"
    store.close()
