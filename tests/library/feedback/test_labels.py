"""Labels and their states: the same on SQLite and PostgreSQL."""

import getpass
import math

import pytest
import sqlalchemy as sa
from stores import CLASSES, NAME, give, predict

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Store, request_id
from alacarte.feedback.database import feedback
from alacarte.feedback.labels import check_label

on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # rules without SQL of their own


def test_a_confirmation_and_a_correction(store: Store):
    first, second = predict(store, [1, 2], audit=[1])
    assert store.get_feedback(NAME, first)["state"] is None
    assert give(store, first, 1) == ("accepted", "confirms the prediction")
    assert give(store, second, 3) == ("accepted", "corrects the prediction")
    stored = store.get_feedback(NAME, second)
    assert (stored["state"], stored["label"], stored["prediction"], stored["audit"]) == ("accepted", 3, 2, True)
    assert stored["model_version"] == "1" and len(stored["labels"]) == 1
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
    cases = [
        (identifier, 3, "accepted"), (identifier, 3, "accepted"), (identifier, 2, "new"), (identifier, 9, "rejected"),
        (identifier, math.inf, "rejected"), (request_id(1, 1), 3, "unknown"), ("\0'; DROP TABLE feedback", 3, "unknown"),
        (f"{identifier}.0", 3, "unknown"),
    ]  # fmt: skip
    answers = [give(store, prediction, label) for prediction, label, _ in cases]
    assert [state for state, _ in answers] == [state for *_, state in cases]
    assert len({message for _, message in answers}) == len(answers) - 1, "all but an unknown id and no id"
    kept = store.get_feedback(NAME, identifier)["labels"]
    assert [(label["label"], label["state"]) for label in kept[:3]] == [(3, "new"), (2, "new"), (9, "rejected")]
    assert [label["reason"] for label in kept[:2]] == ["conflict"] * 2
    assert "9" not in answers[3][1] and "0, 1, 2, 3" in answers[3][1]
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
def test_a_label_in_the_type_of_the_classes(label: object, classes: list | None, predicted: object, stored: object):
    checked, problem = check_label(label, classes, predicted)
    assert (problem is None) == (stored is not None)
    assert problem or (checked == stored and type(checked) is type(stored))


@on_sqlite
def test_a_label_is_of_the_annotator_with_whom_it_counts(store: Store):
    """Otherwise an annotator could give all labels of a later class first, and all of them would count as his or hers."""
    (identifier,) = predict(store, [1])
    for annotator, classes, state in (
        ("token:early", CLASSES, "rejected"), ("token:early", CLASSES, "rejected"),
        ("token:alice", [*CLASSES, 4], "accepted"), ("token:late", [*CLASSES, 4], "accepted"),
    ):  # fmt: skip
        (outcome,) = store.add_feedback(NAME, [Feedback(identifier, 4, annotator=annotator)], classes=classes)
        assert outcome.state == state
    assert store.accepted(NAME).about["annotator"].tolist() == ["token:alice"]
    assert len(store.get_feedback(NAME, identifier)["labels"]) == 1


@on_sqlite
def test_an_annotator_is_stored_with_each_label(store: Store):
    first, second = predict(store, [1, 2])
    store.add_feedback(NAME, [Feedback(first, 2, source="me", annotator="token:alice")], classes=CLASSES)
    give(store, second, 3)
    here = ["token:alice", f"local:{getpass.getuser()}"]
    assert store.accepted(NAME).about["annotator"].tolist() == here
    assert [each["annotator"] for each in store.list_feedback(NAME, "accepted")] == here


def test_labels_wait_for_an_administrator(store: Store):
    ids = predict(store, [1, 1, 1])
    assert [give(store, each, 2, review="manual")[0] for each in ids] == ["new"] * 3
    waiting = store.list_feedback(NAME, "new", limit=2)
    assert [each["prediction_id"] for each in waiting] == ids[:2]
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
    states = [label["state"] for label in store.review(NAME, first, accept=True, label=2)["labels"]]
    assert states == ["rejected", "accepted", "rejected"]
    with pytest.raises(UserError, match="3 different labels can be accepted: name the right one by `label`"):
        store.review(NAME, second, accept=True)
    assert {each["state"] for each in store.get_feedback(NAME, second)["labels"]} == {"new"}
    assert store.review(NAME, second, accept=True, label=3)["label"] == 3
    assert store.review(NAME, second, accept=False)["state"] == "rejected", "a decision can be taken back"


@on_sqlite
def test_what_was_used_stays_used(store: Store):
    (identifier,) = predict(store, [1])
    give(store, identifier, 2)
    with store.database.write(durable=True) as connection:
        connection.execute(sa.update(feedback).values(state="used", used_run_id="r", used_version="2"))
    assert store.accepted(NAME).labels.empty
    assert give(store, identifier, 3)[0] == "new"
    assert [each["state"] for each in store.review(NAME, identifier, accept=True)["labels"]] == ["used", "accepted"]
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
    assert [outcome.is_wrong for outcome in outcomes] == [False] * 5 + [True]


@on_sqlite
def test_an_administrator_cannot_accept_a_label_of_another_type(store: Store):
    cases = [(1, CLASSES, label) for label in ("nonsense", True, 4.5, math.nan, math.inf, "1e999", "", "NaN")]
    cases += [("low", ["high", "low"], label) for label in (3, 0.5, True, math.nan, " ")]
    for predicted, classes, label in cases:
        (identifier,) = predict(store, [predicted])
        assert give(store, identifier, label, classes)[0] == "rejected"
        for _ in range(2):  # also after an administrator has rejected it
            with pytest.raises(UserError, match="cannot be accepted: the label"):
                store.review(NAME, identifier, True)
            assert store.review(NAME, identifier, False)["state"] == "rejected"
    assert store.accepted(NAME).labels.empty


@on_sqlite
@pytest.mark.parametrize(
    ("predicted", "classes", "sent", "label"),
    [(1, CLASSES, 9, 9), (1, CLASSES, "9", 9), (1, CLASSES, 9.0, 9), ("low", ["high", "low"], "mid", "mid"),
     (1.0, [1.0, 2.0], 9, 9.0)],
)  # fmt: skip
def test_an_administrator_lets_a_new_class_in(store: Store, predicted, classes, sent, label):
    identifier = predict(store, [predicted])[0]
    state, message = give(store, identifier, sent, classes)
    assert state == "rejected" and message.startswith("the label is not one of the classes")
    assert store.review(NAME, identifier, False)["state"] == "rejected"
    decided = store.review(NAME, identifier, True, "a new kind")
    assert (decided["state"], decided["label"], type(decided["label"])) == ("accepted", label, type(label))
    assert decided["labels"][0]["reason"] == "a new kind"
    accepted = store.accepted(NAME)
    assert accepted.labels.tolist() == [label] and accepted.about["is_correction"].tolist() == [True]
    assert give(store, identifier, sent, [*classes, label]) == (
        "accepted", "this label was given before and is accepted",
    )  # fmt: skip


@on_sqlite
def test_a_new_class_is_accepted_by_its_name_where_there_are_other_labels(store: Store):
    identifier = predict(store, [1])[0]
    assert give(store, identifier, 2)[0] == "accepted" and give(store, identifier, 9)[0] == "rejected"
    assert store.review(NAME, identifier, True)["label"] == 2, "what was checked comes first"
    decided = store.review(NAME, identifier, True, label=9)
    assert decided["label"] == 9 and [each["state"] for each in decided["labels"]] == ["rejected", "accepted"]
    assert store.accepted(NAME).labels.tolist() == [9]
