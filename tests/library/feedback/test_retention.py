"""Old rows are deleted in the promised order: the same on SQLite and PostgreSQL."""

import json
import os
import time

import numpy as np
import pytest
import sqlalchemy as sa
from stores import CLASSES, NAME, count, give, predict, size_of

from alacarte.feedback import Feedback, Store
from alacarte.feedback.database import feedback, predictions


def prune(store: Store, days: float, size: float, name: str = NAME) -> int:
    n_deleted = 0
    while step := store.prune(name, days, size):
        n_deleted += step
    return n_deleted


def flood(store: Store, annotator: str, n: int, n_rows: int, comment: str | None = None) -> list[str]:
    """n requests of n_rows, each with a label for its last row; the ids of these rows."""
    rows = np.random.default_rng(0).normal(size=(n_rows, 2)).tolist()
    ids = [predict(store, [1] * n_rows, inputs=rows)[-1] for _ in range(n)]
    labels = [Feedback(identifier, 2, comment=comment, annotator=annotator) for identifier in ids]
    assert {outcome.state for outcome in store.add_feedback(NAME, labels, classes=CLASSES)} == {"accepted"}
    return ids


def test_the_oldest_predictions_are_deleted_first_and_labels_stay(store: Store):
    labelled = [predict(store, [1], age=86400 * days)[0] for days in (20, 10)]
    for identifier in labelled:
        give(store, identifier, 2)
    for days in (20, 10, 1):
        for _ in range(20):
            predict(store, [1] * 1000, age=86400 * days, inputs=[[1.0, 2.0]] * 1000)
    assert prune(store, 30, 1e9) == 0
    assert prune(store, 15, 1e9) == 21 and count(store, predictions) == 41
    limit = size_of(store) / 2
    assert 0 < prune(store, 30, limit) < 40 and size_of(store) <= limit
    ages = (time.time() - store.window(NAME, 0, 2e9).about["time"].astype("int64") / 1e9) / 86400
    assert ages.max() < 5, "the oldest went first"
    prune(store, 0, 1e9)
    assert store.window(NAME, 0, 2e9).about.empty
    assert [store.get_feedback(NAME, identifier)["label"] for identifier in labelled] == [2, 2]


@pytest.mark.parametrize("form", ["f8", "json"])
def test_a_label_keeps_a_copy_of_its_row(store: Store, form: str):
    texts = {"format": form, "inputs": json.dumps([[f"row {i}", "é"] for i in range(20)]).encode()}
    more = texts if form == "json" else {"inputs": [[float(i), i + 0.5] for i in range(20)]}
    classes = list(range(20))
    ids = predict(store, classes, audit=[3], age=86400 * 20, **more)
    for row, label in ((17, 1), (17, 2), (3, 3)):
        give(store, ids[row], label, classes)
    assert prune(store, 10, 1e9) == 1 and prune(store, 10, 1e9) == 0
    values = {3: ["row 3", "é"], 17: ["row 17", "é"]} if form == "json" else {3: [3.0, 3.5], 17: [17.0, 17.5]}
    assert store.review(NAME, ids[17], accept=True, label=1)["prediction"] == 17
    labelled = store.accepted(NAME)
    assert labelled.about["prediction_id"].tolist() == [ids[17], ids[3]] and labelled.labels.tolist() == [1, 3]
    assert labelled.inputs.to_numpy().tolist() == [values[17], values[3]]
    assert labelled.about["prediction"].tolist() == [17, 3] and labelled.about["audit"].tolist() == [False, True]
    assert [list(listed["inputs"].values()) for listed in store.list_feedback(NAME, "accepted")] == [
        values[17],
        values[3],
    ]
    assert store.get_feedback(NAME, ids[4]) is None and give(store, ids[17], 5, classes)[0] == "unknown"


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
        with store.database.write(durable=True) as connection:
            connection.execute(sa.update(feedback).where(feedback.c.prediction_id.in_(ids)).values(state=state))
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
        connection.execute(sa.update(feedback).where(feedback.c.prediction_id == claimed).values(used_run_id="run"))
    prune(store, 90, 0)
    assert store.get_feedback(NAME, claimed)["state"] == "accepted" and store.get_feedback(NAME, other) is None


def test_two_models_share_a_store_and_see_nothing_of_each_other(store: Store):
    (ours,) = predict(store, [1])
    (theirs,) = predict(store, [1], registered_model_name="other")
    assert give(store, ours, 2, review="manual")[0] == give(store, theirs, 3, name="other", review="manual")[0] == "new"
    for name, identifier, label in ((NAME, theirs, 2), ("other", ours, 3)):
        assert store.get_feedback(name, identifier) is None
        assert give(store, identifier, 2, name=name)[0] == "unknown"
        assert store.review(name, identifier, accept=True) is store.review(name, identifier, accept=False) is None
        assert [each["label"] for each in store.list_feedback(name, "new")] == [label]
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
