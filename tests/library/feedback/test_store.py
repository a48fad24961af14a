"""The feedback store: the same on SQLite and PostgreSQL, with real files, servers and processes."""

import getpass
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
import sqlalchemy as sa
from conftest import ROOT, environment
from omegaconf import OmegaConf
from postgres import Postgres

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Prediction, Store, StoreError, request_id
from alacarte.feedback import database as tables
from alacarte.serving import prediction_log
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.rows import Answer, InputSchema, Rows
from alacarte.serving.settings import Settings

NAME = "digits"
CLASSES = [0, 1, 2, 3]
COLUMNS = ("a", "b")
OLD = 100.0  # seconds: nobody waits for predictions of that age


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url, timeout=0.3)
    yield made
    made.close()


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


# --- labels and their states ---


def test_a_confirmation_and_a_correction(store: Store):
    first, second = predict(store, [1, 2], audit=[1])
    assert store.get_feedback(NAME, first)["state"] is None
    assert give(store, first, 1) == ("accepted", "confirms the prediction")
    assert give(store, second, 3) == ("accepted", "corrects the prediction")
    found = store.get_feedback(NAME, second)
    assert (found["state"], found["label"], found["prediction"], found["audit"]) == ("accepted", 3, 2, True)
    assert found["model_version"] == "1" and len(found["labels"]) == 1
    labelled = store.accepted(NAME)
    assert labelled.inputs.to_dict("list") == {"a": [0.0, 1.0], "b": [0.5, 0.5]}
    assert labelled.labels.tolist() == [1, 3] and labelled.labels.dtype == "int64"
    about = labelled.about
    assert about["prediction_id"].tolist() == [first, second] and about["prediction"].tolist() == [1, 2]
    assert about["is_correction"].tolist() == about["audit"].tolist() == [False, True]
    assert store.accepted("another").labels.empty
    assert give(store, first, 2, name="another")[0] == "unknown"


def test_each_case_has_its_own_answer_and_nothing_is_lost(store: Store):
    (identifier,) = predict(store, [1])
    answers = {
        "accepted": give(store, identifier, 3),
        "duplicate": give(store, identifier, 3),
        "conflict": give(store, identifier, 2),
        "outside": give(store, identifier, 9),
        "not finite": give(store, identifier, math.inf),
        "unknown": give(store, request_id(1, 1), 3),
        "no id": give(store, "\0'; DROP TABLE feedback", 3),
        "no row": give(store, f"{identifier}.0", 3),
    }
    assert {case: state for case, (state, _) in answers.items()} == {
        "accepted": "accepted", "duplicate": "accepted", "conflict": "new", "outside": "rejected",
        "not finite": "rejected", "unknown": "unknown", "no id": "unknown", "no row": "unknown",
    }  # fmt: skip
    assert len({message for _, message in answers.values()}) == len(answers) - 1, "all but unknown and no id"
    kept = store.get_feedback(NAME, identifier)["labels"]
    assert [(one["label"], one["state"], one["reason"]) for one in kept[:2]] == [
        (3, "new", "conflict"), (2, "new", "conflict"),
    ]  # fmt: skip
    assert [one["state"] for one in kept[2:]] == ["rejected"] * 2 and kept[2]["label"] == 9
    assert "9" not in answers["outside"][1] and "0, 1, 2, 3" in answers["outside"][1]
    assert [one["times"] for one in store.list_feedback(NAME, "new")] == [2, 1]
    assert store.accepted(NAME).labels.empty


@pytest.mark.parametrize(
    ("label", "classes", "predicted", "stored"),
    [
        ("3", CLASSES, 1, 3),
        (3.0, CLASSES, 1, 3),
        (3, ["3", "4"], "4", "3"),
        (1, [0.0, 1.0], 0.0, 1.0),
        ("true", [False, True], False, True),
        ("déjà \ud800 vu", ["déjà \ud800 vu", "x"], "x", "déjà \ud800 vu"),
        (True, CLASSES, 1, None),
        (1, [False, True], True, None),
        ("03", CLASSES, 1, None),
        (" 3", CLASSES, 1, None),
        (3.5, CLASSES, 1, None),
        ("three", CLASSES, 1, None),
        (10**400, CLASSES, 1, None),
        (math.nan, CLASSES, 1, None),
        (2, None, 1.5, 2.0),
        ("2.5", None, 1.5, 2.5),
        ("two", None, 1.5, None),
        ("NaN", None, 1.5, None),
        (10**400, None, 1.5, None),
        (True, None, 1.5, None),
        ("cat", None, "dog", "cat"),
        (1, None, "dog", None),
        (1, None, [1, 2], None),
    ],
)
def test_a_label_in_the_type_of_the_classes(
    tmp_path: Path, label: object, classes: list | None, predicted: object, stored: object
):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    (identifier,) = predict(store, [predicted])
    state, _ = give(store, identifier, label, classes)
    found = store.get_feedback(NAME, identifier)["labels"][0]
    if stored is None:
        assert state == found["state"] == "rejected"
    else:
        assert state == "accepted" and found["label"] == stored and type(found["label"]) is type(stored)


def test_a_class_that_was_none_yet(store: Store):
    (identifier,) = predict(store, [1])
    assert give(store, identifier, 4)[0] == "rejected"
    assert give(store, identifier, 4)[0] == "rejected"
    assert give(store, identifier, 4, [*CLASSES, 4])[0] == "accepted"
    assert len(store.get_feedback(NAME, identifier)["labels"]) == 1


def test_a_label_is_of_the_annotator_with_whom_it_counts(store: Store):
    """Else an annotator could give all labels of a later class first, and the share of one annotator would hold for them."""
    (identifier,) = predict(store, [1])
    store.add_feedback(NAME, [Feedback(identifier, 4, annotator="token:early")], classes=CLASSES)
    for annotator in ("token:alice", "token:late"):
        store.add_feedback(NAME, [Feedback(identifier, 4, annotator=annotator)], classes=[*CLASSES, 4])
    assert store.accepted(NAME).about["annotator"].tolist() == ["token:alice"]


def test_labels_wait_for_an_administrator(store: Store):
    ids = predict(store, [1, 1, 1])
    assert [give(store, one, 2, review="manual")[0] for one in ids] == ["new"] * 3
    waiting = store.list_feedback(NAME, "new", limit=2)
    assert [one["prediction_id"] for one in waiting] == ids[:2]
    assert waiting[1]["inputs"] == {"a": 1.0, "b": 0.5} and waiting[1]["prediction"] == 1 and waiting[1]["label"] == 2
    assert store.review(NAME, ids[0], accept=True)["state"] == "accepted"
    rejected = store.review(NAME, ids[1], accept=False, reason="a blot\0")
    assert (rejected["state"], rejected["labels"][0]["reason"]) == ("rejected", "a blot")
    assert store.review(NAME, f"{ids[0]}9", accept=True) is None and store.review(NAME, "nobody", accept=True) is None
    assert store.accepted(NAME).about["prediction_id"].tolist() == ids[:1]
    assert give(store, ids[1], 2)[0] == "rejected", "decided is decided"
    assert give(store, ids[0], 3)[0] == "new" and store.get_feedback(NAME, ids[0])["label"] == 2


def test_an_administrator_settles_a_conflict(store: Store):
    first, second = predict(store, [1, 1])
    for label in (1, 2, 3):
        give(store, first, label)
        give(store, second, label)
    assert [one["state"] for one in store.review(NAME, first, accept=True, label=2)["labels"]] == [
        "rejected",
        "accepted",
        "rejected",
    ]
    with pytest.raises(UserError, match="3 different labels can be accepted: name the right one by `label`"):
        store.review(NAME, second, accept=True)
    assert {one["state"] for one in store.get_feedback(NAME, second)["labels"]} == {"new"}
    assert store.review(NAME, second, accept=True, label=3)["label"] == 3
    assert store.review(NAME, second, accept=False)["state"] == "rejected", "a decision can be taken back"


def test_what_was_used_stays_used(store: Store):
    (identifier,) = predict(store, [1])
    give(store, identifier, 2)
    with store.database.write(durable=True) as connection:
        connection.execute(sa.update(tables.feedback).values(state="used", used_run_id="r", used_version="2"))
    assert store.accepted(NAME).labels.empty
    assert give(store, identifier, 3)[0] == "new"
    assert [one["state"] for one in store.review(NAME, identifier, accept=True)["labels"]] == ["used", "accepted"]
    with pytest.raises(UserError, match="used by version 2"):
        store.review(NAME, identifier, accept=False, label=2)
    assert store.accepted(NAME).labels.tolist() == [3]


def test_an_answer_has_the_state_that_is_stored_at_the_end(store: Store):
    first, second = predict(store, [1, 1])
    labels = [(first, 2), (second, 3), (first, 2), (first, 3), (second, 3), (second, 9)]
    outcomes = store.add_feedback(NAME, [Feedback(*label) for label in labels], classes=CLASSES)
    assert [outcome.state for outcome in outcomes] == ["new", "accepted", "new", "new", "accepted", "rejected"]
    stored = {(identifier, label["label"]): label for identifier in (first, second)
              for label in store.get_feedback(NAME, identifier)["labels"]}  # fmt: skip
    assert [stored[label]["state"] for label in labels] == [outcome.state for outcome in outcomes]
    assert ["administrator" in outcome.message for outcome in outcomes] == [True, False, False, True, False, False]
    assert [one["times"] for one in store.list_feedback(NAME, "new")] == [2, 1]
    assert [outcome.is_wrong for outcome in outcomes] == [False] * 5 + [True]


# --- predictions ---


def settings(**feedback: object) -> Settings:
    config = {
        group: OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / "default.yaml"))
        for group in ("serve", "feedback")
    }
    return Settings.make(registered_model_name=NAME, feedback={**config["feedback"], **feedback}, **config["serve"])


NUMBERS = InputSchema(["a", "b"], ["double", "double"], False, True)
MIXED = InputSchema(["n", "t"], ["double", "string"], False, True)


def record(recorder: PredictionLog, n: int = 1, version: str = "1") -> tuple[list, list]:
    rows = Rows(n, NUMBERS, numbers=np.arange(2.0 * n).reshape(n, 2))
    return recorder.add(version, NUMBERS.names, rows, Answer([1] * n, [0.5] * n), 0.001)


def test_what_is_recorded_is_read(store: Store):
    recorder = PredictionLog(store, settings(audit_share=0.5))
    since = time.time()
    texts = [np.array(column, dtype=object) for column in ([1.5, None], ["\0é", None])]
    mixed, _ = recorder.add("2", MIXED.names, Rows(2, MIXED, values=texts), Answer(["x", "y"], None), 0.25)
    numbers, audit = record(recorder, 3)
    recorder.flush()
    assert recorder.healthy and recorder.dropped == 0
    give(store, numbers[2], 3)
    window = store.window(NAME, since - 1, time.time() + 1)
    about = window.about.set_index("prediction_id")
    assert about.index.tolist() == mixed + numbers
    assert about["prediction"].tolist() == ["x", "y", 1, 1, 1] and about["model_version"].tolist() == [
        "2",
        "2",
        "1",
        "1",
        "1",
    ]
    assert about["latency_ms"].tolist() == [250.0, 250.0, 1.0, 1.0, 1.0]
    assert about["confidence"].isna().tolist() == [True, True, False, False, False]
    assert about.index[about["audit"]][about["model_version"][about["audit"]] == "1"].tolist() == audit
    assert (
        about["label"].tolist()[4] == 3
        and about["label"].isna().sum() == 4
        and about["label_state"].iloc[4] == "accepted"
    )
    assert set(window.inputs) == {"n", "t", "a", "b"}
    assert window.inputs[["a", "b"]].iloc[2:].to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert window.inputs["t"].iloc[0] == "\0é" and window.inputs["t"].isna().tolist() == [False, True, True, True, True]
    assert len(store.window("another", 0, 2e9).about) == len(store.window(NAME, 0, since).inputs) == 0


def test_redacted_columns_are_nowhere(store: Store):
    recorder = PredictionLog(store, settings(redact=["a", "t"]))
    record(recorder)
    secret = [np.array(["secret"], dtype=object), np.array(["secret"], dtype=object)]
    recorder.add(
        "1",
        ["t", "u"],
        Rows(1, InputSchema(["t", "u"], ["string"] * 2, False, True), values=secret),
        Answer([1], None),
        1,
    )
    recorder.flush()
    inputs = store.window(NAME, 0, 2e9).inputs
    assert inputs["a"].isna().all() and inputs["t"].isna().all()
    assert inputs["b"].tolist()[0] == 1.0 and inputs["u"].tolist()[1] == "secret"
    (identifier,) = store.window(NAME, 0, 2e9).about["prediction_id"].iloc[:1]
    give(store, identifier, 1, review="manual")
    assert store.list_feedback(NAME, "new")[0]["inputs"] == {"a": None, "b": 1.0}


def test_the_audit_draw_is_of_rows_and_the_sample_of_requests(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    recorder = PredictionLog(store, settings(audit_share=0.1, sample=0.5))
    found = [record(recorder, n) for n in (1, 7) * 2000]
    left_out = [ids for ids, _ in found if ids[0] is None]
    assert 1700 < len(left_out) < 2300 and all(not audit for ids, audit in found if ids[0] is None)
    drawn, rows = sum(len(audit) for _, audit in found), sum(len(ids) for ids, _ in found if ids[0])
    assert 0.08 < drawn / rows < 0.12 and all(set(audit) <= set(ids) for ids, audit in found)
    recorder.flush()
    about = store.window(NAME, 0, 2e9).about
    assert len(about) == rows and about["audit"].sum() == drawn
    assert set(about["audit_share"]) == {0.1} and set(about["sample"]) == {0.5}
    assert record(PredictionLog(store, settings(audit_share=0)), 9)[1] == []
    everything = record(PredictionLog(store, settings(audit_share=1)), 9)
    assert everything[0] == everything[1]


def test_a_prediction_in_another_workers_buffer(store: Store):
    writer = PredictionLog(store, settings())
    ids, _ = record(writer, 2)
    writer.start()
    assert give(store, ids[0], 1)[0] == "accepted"
    writer.stop()


def prune(store: Store, days: float, size: float, name: str = NAME) -> int:
    n_deleted = 0
    while step := store.prune(name, days, size):
        n_deleted += step
    return n_deleted


def size_of(store: Store, name: str = NAME) -> float:
    with store.database.read() as connection:
        return store.database.excess(connection, name, 0)


def test_the_oldest_predictions_without_a_label_are_deleted_first(store: Store):
    labelled = [predict(store, [1], age=86400 * days)[0] for days in (20, 10)]
    for identifier in labelled:
        give(store, identifier, 2)
    for days in (20, 10, 1):
        for _ in range(20):
            predict(store, [1] * 1000, age=86400 * days, inputs=[[1.0, 2.0]] * 1000)
    assert prune(store, 30, 1e9) == 0
    assert prune(store, 15, 1e9) == 20 and count(store, tables.predictions) == 42
    limit = size_of(store) / 2
    assert 0 < prune(store, 30, limit) < 40 and size_of(store) <= limit
    about = store.window(NAME, 0, 2e9).about.query("prediction_id not in @labelled")
    ages = (time.time() - about["time"].astype("int64") / 1e9) / 86400
    assert ages.max() < 5 or ages.min() > 0.5, "the oldest went first"
    prune(store, 0, 1e9)
    assert store.window(NAME, 0, 2e9).about["prediction_id"].tolist() == labelled
    assert [store.get_feedback(NAME, one)["label"] for one in labelled] == [2, 2]


@pytest.mark.parametrize("form", ["f8", "json"])
def test_a_request_keeps_its_labelled_rows_under_their_ids(store: Store, form: str):
    rows = [[float(i), i + 0.5] for i in range(20)]
    texts = {"format": form, "inputs": json.dumps([[f"row {i}", "é"] for i in range(20)]).encode()}
    more = texts if form == "json" else {"inputs": rows}
    ids = predict(store, list(range(20)), audit=[3, 17], age=86400 * 20, confidence=[i / 20 for i in range(20)], **more)
    classes = list(range(20))
    for row, label in ((17, 1), (3, 3)):
        give(store, ids[row], label, classes)
    assert prune(store, 10, 1e9) == 1 and prune(store, 10, 1e9) == 0
    expected = {"a": ["row 3", "row 17"], "b": ["é", "é"]} if form == "json" else {"a": [3.0, 17.0], "b": [3.5, 17.5]}
    window = store.window(NAME, 0, 2e9)
    assert window.inputs.to_dict("list") == expected
    about = window.about
    assert about["prediction_id"].tolist() == [ids[3], ids[17]] and about["prediction"].tolist() == [3, 17]
    assert about["confidence"].tolist() == [3 / 20, 17 / 20] and about["audit"].tolist() == [True, True]
    assert about["label"].tolist() == [3, 1]
    labelled = store.accepted(NAME)
    assert labelled.about["prediction_id"].tolist() == [ids[17], ids[3]] and labelled.labels.tolist() == [1, 3]
    assert labelled.inputs["a"].tolist() == expected["a"][::-1] and labelled.about["prediction"].tolist() == [17, 3]
    assert [one["inputs"]["a"] for one in store.list_feedback(NAME, "accepted")] == expected["a"][::-1]
    assert store.get_feedback(NAME, ids[17])["prediction"] == 17 and store.get_feedback(NAME, ids[4]) is None
    assert give(store, ids[4], 4, classes) == ("unknown", "the request is known, but not this row of it")
    assert give(store, ids[17], 5, classes)[0] == "new", "a kept row takes labels, and this one is a conflict"
    assert store.review(NAME, ids[17], accept=True, label=1)["state"] == "accepted"


def flood(store: Store, annotator: str, n: int, n_rows: int, comment: str | None = None) -> list[str]:
    """n requests of n_rows, each with a label for its last row; the ids of these rows."""
    rows = np.random.default_rng(0).normal(size=(n_rows, 2)).tolist()
    ids = [predict(store, [1] * n_rows, inputs=rows)[-1] for _ in range(n)]
    labels = [Feedback(identifier, 2, comment=comment, annotator=annotator) for identifier in ids]
    assert {outcome.state for outcome in store.add_feedback(NAME, labels, classes=CLASSES)} == {"accepted"}
    return ids


def test_large_requests_with_one_label_each_push_nobody_out(store: Store):
    honest = flood(store, "token:alice", 50, 1) + flood(store, "token:bob", 50, 1)
    start = size_of(store)
    limit = start + 500_000
    for _ in range(6):
        flood(store, "token:mallory", 50, 1000)
        assert size_of(store) > limit
        prune(store, 90, limit)
        assert size_of(store) <= limit
    states = store.accepted(NAME).about.set_index("prediction_id")["annotator"]
    assert set(honest) <= set(states.index) and "token:mallory" in set(states)


def test_labels_go_only_when_they_alone_fill_the_store(store: Store, caplog: pytest.LogCaptureFixture):
    comment = os.urandom(1500).hex()  # which PostgreSQL cannot compress
    honest = flood(store, "token:alice", 10, 1, comment)
    rejected, used, fresh = (flood(store, "token:mallory", 40, 1, comment) for _ in range(3))
    for ids, state in ((used, "used"), (rejected, "rejected")):
        change = sa.update(tables.feedback).where(tables.feedback.c.prediction_id.in_(ids)).values(state=state)
        with store.database.write(durable=True) as connection:
            connection.execute(change)
    limit, counts, n_honest = size_of(store), [(40, 40, 40)], 10
    while counts[-1][-1] > 25 and len(counts) < 50:
        limit -= 40_000
        prune(store, 90, limit)
        assert size_of(store) <= limit
        left = set(store.labelled(NAME, "accepted", "used", "rejected").about["prediction_id"])
        counts.append(tuple(len(left.intersection(ids)) for ids in (rejected, used, fresh)))
        n_honest = len(left.intersection(honest))
    assert all(n_used == 40 for n_rejected, n_used, _ in counts if n_rejected)
    assert all(n_fresh == 40 for _, n_used, n_fresh in counts if n_used)
    assert counts[-1][-1] <= 25 and n_honest == 10
    assert "feedback.keep_gb" in caplog.text and "token:mallory" in caplog.text and "alice" not in caplog.text


def test_a_claimed_label_is_not_deleted(store: Store):
    claimed, other = flood(store, "token:alice", 2, 1)
    with store.database.write(durable=True) as connection:
        change = sa.update(tables.feedback).where(tables.feedback.c.prediction_id == claimed)
        connection.execute(change.values(used_run_id="run"))
    prune(store, 90, 0)
    assert store.get_feedback(NAME, claimed)["state"] == "accepted" and store.get_feedback(NAME, other) is None


# --- two models in one store ---


def test_two_models_share_a_store_and_see_nothing_of_each_other(store: Store):
    (ours,) = predict(store, [1])
    (theirs,) = predict(store, [1], registered_model_name="other")
    assert give(store, ours, 2, review="manual")[0] == give(store, theirs, 3, name="other", review="manual")[0] == "new"
    for name, identifier, label in ((NAME, theirs, 2), ("other", ours, 3)):
        assert store.get_feedback(name, identifier) is None
        assert give(store, identifier, 2, name=name)[0] == "unknown"
        assert (
            store.review(name, identifier, accept=True) is None and store.review(name, identifier, accept=False) is None
        )
        assert [one["label"] for one in store.list_feedback(name, "new")] == [label]
        assert store.labelled(name, "new").labels.tolist() == [label]
        assert len(store.window(name, 0, 2e9).about) == 1
    assert store.get_feedback(NAME, ours)["state"] == store.get_feedback("other", theirs)["state"] == "new"
    for _ in range(300):
        predict(store, [1] * 100, registered_model_name="other", inputs=[[1.0, 2.0]] * 100)
    limit = 300_000
    assert prune(store, 90, limit) == 0, "the other model fills the store, not this one"
    assert prune(store, 90, limit, name="other") > 0 and size_of(store, "other") <= limit
    prune(store, 0, 0)
    assert store.get_feedback(NAME, ours) is None and store.get_feedback("other", theirs)["state"] == "new"


# --- locked, full, gone ---


@contextmanager
def locked(store: Store, server: Postgres | None) -> Iterator[None]:
    if server:
        with store.database.engine.connect() as connection:
            connection.execute(sa.text("LOCK TABLE predictions IN ACCESS EXCLUSIVE MODE"))
            yield
        return
    other = sqlite3.connect(store.database._path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.execute("ROLLBACK")
    other.close()


@contextmanager
def full(store: Store) -> Iterator[None]:
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
    path = store.database._path
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
    ("url", "trouble"),
    [("sqlite", locked), ("sqlite", gone), ("postgresql", locked), ("postgresql", gone)],
    indirect=["url"],
)
def test_in_trouble(store: Store, trouble: Callable, request: pytest.FixtureRequest):
    is_server = request.node.callspec.params["url"] == "postgresql"
    endure(store, trouble(store, request.getfixturevalue("postgres") if is_server else None))


def test_full(tmp_path: Path):
    """Of SQLite alone: PostgreSQL has no limit that a test can set."""
    store = Store(f"sqlite:///{tmp_path}/feedback.db", timeout=0.3)
    endure(store, full(store))


def endure(store: Store, trouble: AbstractContextManager) -> None:
    """Nothing is half-written, predictions wait, and all of it is there afterwards."""
    before = predict(store, [1] * 50)
    recorder = PredictionLog(store, settings())
    recorder.start()
    comment = "c" * 2000
    items = [Feedback(one, 2, "somebody", comment) for one in before]
    with trouble:
        waiting = [record(recorder)[0][0] for _ in range(2100)]
        with pytest.raises(StoreError) as error:
            store.add_feedback(NAME, items, classes=CLASSES)
        assert "\n" not in str(error.value)
        with pytest.raises(StoreError):
            recorder.flush()
        assert not recorder.healthy
        waiting += record(recorder)[0]
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(StoreError):
            recorder.flush()
            break
    assert recorder.healthy and recorder.dropped == 0
    assert count(store, tables.feedback) == 0
    assert {outcome.state for outcome in store.add_feedback(NAME, items, classes=CLASSES)} == {"accepted"}
    assert sorted(store.window(NAME, time.time() - 60, time.time() + 1).about["prediction_id"]) == sorted(waiting)
    recorder.stop()


def test_a_locked_database_is_named_while_predictions_wait(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/feedback.db", timeout=0.1)
    recorder = PredictionLog(store, settings())
    record(recorder)
    with locked(store, None):
        with pytest.raises(StoreError, match="database is locked"):
            recorder.flush()
        with recorder._lock, pytest.raises(StoreError, match="predictions wait to be stored: database is locked"):
            recorder.flush(0.01)  # another thread is trying


def test_a_running_server_keeps_the_store_below_its_size(store: Store):
    recorder = PredictionLog(store, settings(keep_gb=0.002))
    kept = record(recorder)[0][0]
    recorder.flush()
    give(store, kept, 3)
    recorder.start()
    for _ in range(300):
        record(recorder, 1000)
    recorder.flush(60)
    end = time.monotonic() + 60
    while size_of(store) > 2e6 and time.monotonic() < end:
        record(recorder)
        time.sleep(0.1)
    recorder.stop()
    assert size_of(store) <= 2e6 and 0 < count(store, tables.predictions) < 300 and recorder.dropped == 0
    assert store.get_feedback(NAME, kept)["label"] == 3


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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_only_the_owner_reads_a_new_file(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        store = Store(f"sqlite:///{tmp_path}/feedback.db")
        predict(store, [1])
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {"feedback.db", "feedback.db-wal", "feedback.db-shm"}
    assert set(modes.values()) == {0o600 & ~umask}


def test_the_mode_of_a_file_that_is_there_stays(tmp_path: Path):
    path = tmp_path / "feedback.db"
    path.touch(0o640)
    path.chmod(0o640)
    predict(Store(f"sqlite:///{path}"), [1])
    assert path.stat().st_mode & 0o777 == 0o640


def test_room_for_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    monkeypatch.setattr(prediction_log, "ROOM", 100_000)
    monkeypatch.setattr(prediction_log, "BATCH_BYTES", 10_000)
    recorder = PredictionLog(store, settings())
    ids = [record(recorder, 100)[0] for _ in range(100)]
    assert 50 < recorder.dropped < 100
    recorder.flush()
    kept = store.window(NAME, 0, 2e9).about["prediction_id"].tolist()
    assert kept == [one for request in ids[recorder.dropped :] for one in request], "the oldest went"


def test_a_request_that_cannot_be_stored_is_alone_in_that(store: Store):
    recorder = PredictionLog(store, settings())
    first = record(recorder)[0]
    record(recorder, version={})  # type: ignore[arg-type]  # for the database
    recorder.add("1", NUMBERS.names, Rows(2, NUMBERS, numbers=np.zeros((1, 2))), Answer([1], None), 0.1)
    second = record(recorder)[0]
    recorder.flush()
    assert recorder.dropped == 2
    assert store.window(NAME, 0, 2e9).about["prediction_id"].tolist() == first + second


# --- processes ---


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    folders = [str(ROOT), str(ROOT / "tests" / "library"), str(Path(__file__).parent)]
    start = f"import sys; sys.path[:0] = {folders!r}\n"
    command = [sys.executable, "-c", start + code, *arguments]
    return subprocess.Popen(
        command, env=environment(PYTHONUNBUFFERED="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


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
    assert count(store, tables.predictions) == 60 * rounds + 1 and count(store, tables.feedback) == 60 * rounds + 3
    assert count(store, tables.schema_version) == count(store, tables.input_schemas) == 1
    given = store.get_feedback(NAME, request_id(1, 1))["labels"]
    assert sorted(one["label"] for one in given) == [1, 2, 3] and {one["reason"] for one in given} == {"conflict"}
    store.close()


KILLED = """
from test_store import *
store = Store(sys.argv[1])
recorder = PredictionLog(store, settings())
recorder.start()
while True:
    ids, _ = record(recorder, 2)
    print(json.dumps(["predicted", time.time(), ids]))
    recorder.flush()
    if store.add_feedback(NAME, [Feedback(ids[0], 3)], classes=CLASSES)[0].state == "accepted":
        print(json.dumps(["acknowledged", time.time(), ids[0]]))
    for _ in range(50):
        print(json.dumps(["predicted", time.time(), record(recorder)[0]]))
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
    acknowledged = {one for kind, _, one in events if kind == "acknowledged"}
    predicted = {one for kind, at, ids in events if kind == "predicted" and at < killed - 1 for one in ids}
    assert acknowledged and predicted
    store = Store(url)
    assert acknowledged <= set(store.accepted(NAME).about["prediction_id"])
    assert predicted <= set(store.window(NAME, 0, 2e9).about["prediction_id"])
    store.close()


READ = """
import time
from pathlib import Path
import numpy as np
from alacarte.feedback import Prediction, Store, request_id
store = Store(sys.argv[1])
rows = np.random.default_rng(0).normal(size=(int(sys.argv[2]), 30))
columns = tuple(f"column {i}" for i in range(30))
start = time.perf_counter()
for at in range(0, len(rows), 5000):
    store.write_predictions([
        Prediction(request_id(10**9 + i, 0), 1.0, "digits", "1", 1, columns, "f8", rows[i].tobytes(), [i % 10], [0.5], 1.0,
                   None, 0.05, 1.0)
        for i in range(at, at + 5000)
    ])
wrote = time.perf_counter() - start
start = time.perf_counter()
window = store.window("digits", 0, 10)
read = time.perf_counter() - start
assert (window.inputs.to_numpy() == rows).all() and len(window.about) == len(rows)
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024  # of this program alone
print(f"written in {wrote:.2f} s, read in {read:.2f} s, peak {peak:.0f} MB", file=sys.stderr)
assert peak < 500
"""


def test_a_window_of_100_000_predictions_fits_into_memory(url: str):
    assert child(READ, url, "100000").wait(60) == 0


@pytest.mark.parametrize("label", ["nonsense", True, 4.5, float("nan"), float("inf"), "1e999", "", "NaN"])
def test_an_administrator_cannot_accept_what_is_no_label(store: Store, label: object):
    identifier = predict(store, [1])[0]
    assert give(store, identifier, label)[0] == "rejected"
    for accept in (True, False, True):  # also not once they have looked at it
        if accept:
            with pytest.raises(UserError, match="cannot be accepted: the label"):
                store.review(NAME, identifier, True)
        else:
            assert store.review(NAME, identifier, False)["state"] == "rejected"
        assert store.get_feedback(NAME, identifier)["state"] == "rejected" and store.accepted(NAME).labels.empty


@pytest.mark.parametrize("label", [3, 0.5, True, float("nan"), " "])
def test_an_administrator_cannot_accept_what_is_no_text_where_classes_are(store: Store, label: object):
    identifier = predict(store, ["low"])[0]
    assert give(store, identifier, label, ["high", "low"])[0] == "rejected"
    with pytest.raises(UserError, match="cannot be accepted: the label"):
        store.review(NAME, identifier, True)
    assert store.accepted(NAME).labels.empty


@pytest.mark.parametrize(
    ("predicted", "classes", "given", "label"),
    [(1, CLASSES, 9, 9), (1, CLASSES, "9", 9), (1, CLASSES, 9.0, 9), ("low", ["high", "low"], "mid", "mid"),
     (1.0, [1.0, 2.0], 9, 9.0)],
)  # fmt: skip
def test_an_administrator_lets_a_new_class_in(store: Store, predicted, classes, given, label):
    identifier = predict(store, [predicted])[0]
    state, message = give(store, identifier, given, classes)
    assert state == "rejected" and message.startswith("the label is not one of the classes")
    assert store.review(NAME, identifier, False)["state"] == "rejected"
    decided = store.review(NAME, identifier, True, "a new kind")
    assert (decided["state"], decided["label"], type(decided["label"])) == ("accepted", label, type(label))
    assert decided["labels"][0]["reason"] == "a new kind"
    found = store.accepted(NAME)
    assert found.labels.tolist() == [label] and found.about["is_correction"].tolist() == [True]
    assert give(store, identifier, given, classes) == (
        "accepted",
        "this label was given before and is accepted: counted",
    )


def test_a_new_class_is_accepted_by_its_name_where_there_are_other_labels(store: Store):
    identifier = predict(store, [1])[0]
    assert give(store, identifier, 2)[0] == "accepted" and give(store, identifier, 9)[0] == "rejected"
    assert store.review(NAME, identifier, True)["label"] == 2, "what was checked comes first"
    decided = store.review(NAME, identifier, True, label=9)
    assert decided["label"] == 9 and [one["state"] for one in decided["labels"]] == ["rejected", "accepted"]
    assert store.accepted(NAME).labels.tolist() == [9]


# --- URLs ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("feedback.db", "not the URL"),
        ("mysql://me:secret@host/db", "SQLite and PostgreSQL are supported"),
        ("nothing+special://me:secret@host/db", "SQLite and PostgreSQL are supported"),
        ("databricks://0123456789abcdef/main.default", "postgresql"),
        ("databricks:main.default", "postgresql"),
        ("sqlite://", "a store is a file"),
        ("sqlite:///:memory:", "a store is a file"),
        ("sqlite:////no/such/folder/feedback.db", "name a file"),
        ("sqlite:////tmp", "name a file|unable to open"),
        ("sqlite:///{folder}/text.db", "not a database"),
        ("sqlite:///{folder}/later.db", "version 99"),
    ],
)
def test_a_url_that_cannot_be_opened(tmp_path: Path, given: str, said: str):
    (tmp_path / "text.db").write_text("no database " * 100)
    later = Store(f"sqlite:///{tmp_path}/later.db")
    with later.database.write(durable=True) as connection:
        connection.execute(sa.update(tables.schema_version).values(version=99))
    with pytest.raises(UserError, match=said) as error:
        Store(given.format(folder=tmp_path))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_the_database_of_mlflow_is_left_alone(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(url).search_experiments()
    with pytest.raises(UserError, match="MLflow's own") as error:
        Store(url)
    assert "\n" not in str(error.value)
    assert not sa.inspect(sa.create_engine(url)).has_table("predictions")


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


# --- annotators ---


def test_an_annotator_is_stored_with_each_label(store: Store):
    first, second = predict(store, [1, 2])
    store.add_feedback(NAME, [Feedback(first, 2, source="me", annotator="token:alice")], classes=CLASSES)
    give(store, second, 3)
    here = ["token:alice", f"local:{getpass.getuser()}"]
    assert store.accepted(NAME).about["annotator"].tolist() == here
    assert [one["annotator"] for one in store.list_feedback(NAME, "accepted")] == here
