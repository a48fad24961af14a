"""What is special about a feedback store in Delta tables: its lock, its links, its warehouse. The rest is in test_feedback."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from statements import WAREHOUSE, Statements, ask
from test_feedback import NAME, give, predict
from workspace import Workspace

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Store, StoreError, delta
from alacarte.feedback import warehouse as client

pytestmark = pytest.mark.parametrize("url", ["databricks"], indirect=True)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    yield Store(url)


@pytest.fixture
def statements(warehouse: Workspace) -> Iterator[Statements]:
    assert warehouse.statements
    yield warehouse.statements
    warehouse.statements.slow = 0


def table(url: str, name: str) -> str:
    return f"{url.rpartition('/')[2]}.{name}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("databricks://{id}", "write databricks://WAREHOUSE_ID/CATALOG.SCHEMA"),
        ("databricks://{id}/default", "write databricks://WAREHOUSE_ID/CATALOG.SCHEMA"),
        ("databricks:main.default", "feedback.url is not the URL of a warehouse"),
        ("databricks:///main.default", "write databricks://WAREHOUSE_ID/CATALOG.SCHEMA"),
        ("databricks://token:secret@host/main.default", "the login is Databricks' own"),
        ("databricks://other/main.default", "other is not a valid endpoint id"),
        ("databricks://{id}/none.default", "Catalog 'none' was not found"),
        ("databricks://{id}/main.none", "`main`.`none` cannot be found"),
    ],
)
def test_a_url_that_leads_nowhere_ends_in_one_line(url: str, given: str, said: str):
    with pytest.raises(UserError, match=said) as error:
        Store(given.format(id=WAREHOUSE))
    assert "\n" not in str(error.value) and "secret" not in str(error.value) and "feedback.url" in str(error.value)


def test_whoever_has_no_login_is_told_how(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATABRICKS_TOKEN", "wrong")
    with pytest.raises(UserError, match="Credential was not sent"):
        Store(url)
    monkeypatch.delenv("DATABRICKS_TOKEN")
    with pytest.raises(UserError, match="log in with DATABRICKS_HOST and DATABRICKS_TOKEN"):
        Store(url)


def test_tables_of_another_version_are_left_alone(url: str, store: Store, statements: Statements):
    ask(statements.spark, f"UPDATE {table(url, 'schema_version')} SET version = 99 WHERE version < 99", {})
    with pytest.raises(UserError, match="of version 99, this code knows 2"):
        Store(url)


def test_a_workspace_that_is_away_is_waited_for(url: str, warehouse: Workspace, caplog: pytest.LogCaptureFixture):
    warehouse.gone = True
    try:
        store = Store(url)
    finally:
        warehouse.gone = False
    assert "tried again with each use" in caplog.text
    assert give(store, predict(store, [1])[0], 2)[0] == "accepted"


def test_a_warehouse_that_stands_still_is_started(store: Store, statements: Statements):
    statements.stop()
    statements.starts_in = 1.5
    assert give(store, predict(store, [1])[0], 2)[0] == "accepted"


def test_a_statement_that_does_not_end_is_given_up(store: Store, statements: Statements, monkeypatch):
    identifier = predict(store, [1])[0]
    monkeypatch.setattr(client, "WAIT", 5)
    monkeypatch.setattr(client, "STATEMENT", 5.5)
    statements.slow = 8
    with pytest.raises(StoreError, match=r"did not answer in 5\.5 seconds"):
        store.get_feedback(identifier)
    statements.slow = 0
    assert store.get_feedback(identifier)["state"] is None


def test_a_transaction_that_takes_too_long_for_its_lock_sends_nothing(
    store: Store, statements: Statements, monkeypatch
):
    identifier = predict(store, [1])[0]
    monkeypatch.setattr(delta, "HURRY", 0)
    with pytest.raises(StoreError, match="nothing was changed"):
        give(store, identifier, 2)
    monkeypatch.undo()
    assert store.get_feedback(identifier)["labels"] == []


def test_writers_wait_for_the_lock_of_another_one_until_it_is_free_or_expires(store: Store, url: str, monkeypatch):
    identifier = predict(store, [1])[0]
    other = Store(url).database
    assert isinstance(other, delta.DeltaDatabase)
    monkeypatch.setattr(delta, "PATIENCE", 0.5)
    with other._locked():
        with pytest.raises(StoreError, match="another process is writing"):
            give(store, identifier, 2)
        predict(store, [1])  # predictions wait for nobody
        assert store.get_feedback(identifier)["labels"] == []
    assert give(store, identifier, 2)[0] == "accepted"
    monkeypatch.setattr(delta, "PATIENCE", 10)
    monkeypatch.setattr(delta, "LOCKED", 2)
    held = other._locked()
    held.__enter__()  # by a process that dies now
    began = time.monotonic()
    assert give(store, identifier, 3)[1].startswith("differs")
    assert time.monotonic() - began > 1


def test_two_that_append_at_the_same_moment_both_do(url: str, statements: Statements):
    stores = [Store(url) for _ in range(4)]
    threads = [threading.Thread(target=lambda one=one: [predict(one, [1]) for _ in range(5)]) for one in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].window(NAME, 0, 2e9).about) == 20


def test_names_and_texts_are_values_and_no_sql(store: Store, url: str):
    name = 'o\'hara`s \\ "model" :lock; -- é 🙂'
    text = "a'b\\c\"d\n:rows\t`x` {} 🙂"
    identifier = predict(store, ["low"], registered_model_name=name)[0]
    (outcome,) = store.add_feedback([Feedback(identifier, "high", text, text)], classes=["high", "low"], name=name)
    assert outcome.state == "accepted"
    labelled = store.accepted(name)
    assert labelled.about["source"].tolist() == [text] and labelled.labels.tolist() == ["high"]
    assert store.accepted(NAME).labels.empty and len(store.window(name, 0, 2e9).about) == 1
    assert store.list_feedback("accepted")[0]["comment"] == text
    assert store.prune(name, 0, 0) == 0 and store.prune("o'hara", 0, 0) == 0


def test_numbers_come_back_as_they_were(store: Store):
    rows = np.array([[0.1 + 0.2, -0.0], [5e-324, 1.7976931348623157e308], [float("nan"), float("inf")]])
    predict(store, [0.1 + 0.2, 1.5, -1e-300], inputs=rows.tolist(), latency_ms=1 / 3)
    window = store.window(NAME, 0, 2e9)
    assert window.inputs.to_numpy().tobytes() == rows.tobytes()
    assert window.about["latency_ms"].tolist() == [1 / 3] * 3
    assert window.about["prediction"].tolist() == [0.1 + 0.2, 1.5, -1e-300]


def test_what_no_statement_takes_is_refused_and_what_many_take_is_sent_in_several(store: Store, monkeypatch):
    monkeypatch.setattr(delta, "BYTES", 20_000)
    with pytest.raises(ValueError, match="larger than a statement"):
        predict(store, [1] * 2_000)
    several = predict(store, [1] * 500) + predict(store, [2] * 500)
    assert store.window(NAME, 0, 2e9).about["prediction_id"].tolist() == several


def test_others_see_plain_tables(store: Store, url: str, statements: Statements):
    identifier = predict(store, [1])[0]
    give(store, identifier, 2)
    query = (
        f"SELECT f.label, p.outputs, p.model_version FROM {table(url, 'feedback')} f "
        f"JOIN {table(url, 'predictions')} p ON p.id = f.prediction_id WHERE f.state = 'accepted'"
    )
    assert ask(statements.spark, query, {}).to_pylist() == [{"label": "2", "outputs": "[1]", "model_version": "1"}]
