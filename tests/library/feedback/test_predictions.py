"""Predictions of a server on their way into the store and out of it: the same on SQLite and PostgreSQL."""

import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from stores import NAME, child, count, give, record, settings, size_of

from alacarte.feedback import Store
from alacarte.feedback.database import predictions
from alacarte.serving import prediction_log
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.rows import Answer, InputSchema, Rows

MIXED = InputSchema(["n", "t"], ["double", "string"], False, True)


def test_what_is_recorded_is_read(store: Store):
    log = PredictionLog(store, settings(audit_share=0.5))
    since = time.time()
    texts = [np.array(column, dtype=object) for column in ([1.5, None], ["\0é", None])]
    mixed, _ = log.add("2", Rows(2, MIXED, values=texts), Answer(["x", "y"], None), 0.25)
    numbers, audit = record(log, 3)
    log.flush()
    assert log.healthy and log.dropped == 0
    give(store, numbers[2], 3)
    window = store.window(NAME, since - 1, time.time() + 1)
    about = window.about.set_index("prediction_id")
    assert about.index.tolist() == mixed + numbers
    assert about["prediction"].tolist() == ["x", "y", 1, 1, 1]
    assert about["model_version"].tolist() == ["2", "2", "1", "1", "1"]
    assert about["latency_ms"].tolist() == [250.0, 250.0, 1.0, 1.0, 1.0]
    assert about["confidence"].isna().tolist() == [True, True, False, False, False]
    assert about.index[about["audit"]][about["model_version"][about["audit"]] == "1"].tolist() == audit
    assert about["label"].iloc[4] == 3 and about["label"].isna().sum() == 4
    assert set(window.inputs) == {"n", "t", "a", "b"}
    assert window.inputs[["a", "b"]].iloc[2:].to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert window.inputs["t"].iloc[0] == "\0é" and window.inputs["t"].isna().tolist() == [False, True, True, True, True]
    newest = store.window(NAME, since - 1, time.time() + 1, max_rows=2)  # whole requests
    assert newest.about["prediction_id"].tolist() == numbers
    assert newest.inputs.to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert len(store.window("another", 0, 2e9).about) == len(store.window(NAME, 0, since).inputs) == 0


def test_redacted_columns_are_nowhere(store: Store):
    log = PredictionLog(store, settings(redact=["a", "t"]))
    record(log)
    secret = [np.array(["secret"], dtype=object), np.array(["secret"], dtype=object)]
    texts = InputSchema(["t", "u"], ["string"] * 2, False, True)
    log.add("1", Rows(1, texts, values=secret), Answer([1], None), 1)
    log.flush()
    window = store.window(NAME, 0, 2e9)
    inputs = window.inputs
    assert [window.columns_of[schema] for schema in window.about["input_schema"]] == [["b"], ["u"]]
    assert sorted(inputs) == ["b", "u"]
    assert inputs["b"].tolist()[0] == 1.0 and inputs["u"].tolist()[1] == "secret"
    (identifier,) = store.window(NAME, 0, 2e9).about["prediction_id"].iloc[:1]
    give(store, identifier, 1, review="manual")
    assert store.list_feedback(NAME, "new")[0]["inputs"] == {"b": 1.0}


def test_the_audit_draw_is_of_rows_and_the_sample_of_requests(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    log = PredictionLog(store, settings(audit_share=0.1, sample=0.5))
    records = [record(log, n) for n in (1, 7) * 2000]
    left_out = [ids for ids, _ in records if ids[0] is None]
    assert 1700 < len(left_out) < 2300 and all(not audit for ids, audit in records if ids[0] is None)
    drawn, rows = sum(len(audit) for _, audit in records), sum(len(ids) for ids, _ in records if ids[0])
    assert 0.08 < drawn / rows < 0.12 and all(set(audit) <= set(ids) for ids, audit in records)
    log.flush()
    about = store.window(NAME, 0, 2e9).about
    assert len(about) == rows and about["audit"].sum() == drawn
    with store.database.read() as connection:
        shares = connection.execute(sa.select(predictions.c.audit_share, predictions.c.sample).distinct()).all()
    assert shares == [(0.1, 0.5)]
    assert record(PredictionLog(store, settings(audit_share=0)), 9)[1] == []
    everything = record(PredictionLog(store, settings(audit_share=1)), 9)
    assert everything[0] == everything[1]


def test_a_prediction_in_another_workers_buffer(store: Store):
    writer = PredictionLog(store, settings())
    ids, _ = record(writer, 2)
    writer.start()
    assert give(store, ids[0], 1)[0] == "accepted"
    writer.stop()


def test_a_running_server_keeps_the_store_below_its_size(store: Store):
    log = PredictionLog(store, settings(keep_gb=0.002))
    kept = record(log)[0][0]
    log.flush()
    give(store, kept, 3)
    log.start()
    for _ in range(300):
        record(log, 1000)
    log.flush()
    end = time.monotonic() + 60
    while size_of(store) > 2e6 and time.monotonic() < end:
        record(log)
        time.sleep(0.1)
    log.stop()
    assert size_of(store) <= 2e6 and 0 < count(store, predictions) < 300 and log.dropped == 0
    assert store.get_feedback(NAME, kept)["label"] == 3


def test_room_for_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    monkeypatch.setattr(prediction_log, "MAX_BYTES", 100_000)
    monkeypatch.setattr(prediction_log, "BATCH_BYTES", 10_000)
    log = PredictionLog(store, settings())
    ids = [record(log, 100)[0] for _ in range(100)]
    assert 50 < log.dropped < 100
    log.flush()
    kept = store.window(NAME, 0, 2e9).about["prediction_id"].tolist()
    assert kept == [each for request in ids[log.dropped :] for each in request], "the oldest went"


def test_a_request_that_cannot_be_stored_is_alone_in_that(store: Store):
    log = PredictionLog(store, settings())
    first = record(log)[0]
    record(log, version={})  # type: ignore[arg-type]  # for the database
    second = record(log)[0]
    log.flush()
    assert log.dropped == 1
    assert store.window(NAME, 0, 2e9).about["prediction_id"].tolist() == first + second


READ = """
from pathlib import Path
import numpy as np
from alacarte.feedback import Prediction, Store, request_id
store = Store(sys.argv[1])
rows = np.random.default_rng(0).normal(size=(int(sys.argv[2]), 30))
columns = tuple(f"column {i}" for i in range(30))
for at in range(0, len(rows), 5000):
    store.write_predictions([
        Prediction(request_id(10**9 + i, 0), 1.0, "digits", "1", 1, columns, "f8", rows[i].tobytes(), [i % 10], [0.5], 1.0,
                   None, 0.05, 1.0)
        for i in range(at, at + 5000)
    ])
window = store.window("digits", 0, 10)
assert (window.inputs.to_numpy() == rows).all() and len(window.about) == len(rows)
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024  # of this program alone
assert peak < 500, peak
"""


@pytest.mark.parametrize(
    "url", ["postgresql"], indirect=True
)  # whose client would hold all rows without a server's cursor
def test_a_window_of_100_000_predictions_fits_into_memory(url: str):
    assert child(READ, url, "100000").wait(60) == 0
