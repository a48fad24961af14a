"""The feedback store: the server writes it; people, trainings and monitoring read it.

A request is one row of `predictions`, with any number of input rows. A label is one row of `feedback`, in one of four states:
new (waits for an administrator), accepted, rejected, used (by a training). Every method takes the name of the registered model
first, and reads and changes nothing of another model.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from alacarte.errors import UserError
from alacarte.feedback import queries, retention
from alacarte.feedback.database import Database, feedback, input_schemas, predictions
from alacarte.feedback.labels import check_label, decide, dumps, same
from alacarte.feedback.records import (
    Feedback,
    Outcome,
    Prediction,
    Rows,
    as_json,
    clean,
    iso,
    local_annotator,
    parse,
    prediction_id,
    request_id,
)  # fmt: skip

COUNTED = "this label was given before and is {}: counted"
CONFLICT = "differs from another label of this request: an administrator decides"
ARRIVES_IN = 1.5  # seconds from a prediction's answer to its row here, when other servers write too


class Store:
    """A feedback store at a URL of SQLite or PostgreSQL; the tables are made where there are none.

    Safe to use from several threads and processes. UserError where the URL cannot be opened. Every method raises
    StoreError, and has changed nothing, when the database is locked for more than `timeout` seconds, full or gone.
    """

    def __init__(self, url: str, timeout: float = 3.0) -> None:
        self.database = Database(url, timeout)

    def close(self) -> None:
        self.database.close()

    # --- predictions ---

    def write_predictions(self, records: Sequence[Prediction]) -> None:
        """Store all of them or none; a prediction that is stored already stays as it is, so that a try may be repeated."""
        schemas = {record.columns: "" for record in records}
        for columns in schemas:
            schemas[columns] = hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]
        rows = [
            (*record[:5], schemas[record.columns], record.format, record.inputs, as_json(record.outputs),
             as_json(record.confidence) if record.confidence else None, record.latency_ms,
             as_json(record.audit) if record.audit else None, record.audit_share, record.sample, record.n_rows, None)
            for record in records
        ]  # fmt: skip
        self.database.append([(key, json.dumps(columns)) for columns, key in schemas.items()], rows)

    def prune(self, name: str, max_age_days: float, max_bytes: float) -> int:
        """Delete a part of the model's rows that are too old or above the size; how many deletions. See retention.py.

        Call again until it is 0. One call deletes a part at most, so that writers wait only for a moment.
        """
        oldest = request_id(max(0, int((time.time() - max_age_days * 86400) * 1e9)), 0)
        return retention.prune(self.database, name, oldest, max_bytes)

    # --- labels ---

    def add_feedback(
        self, name: str, items: Sequence[Feedback], *, classes: Sequence | None, review: str = "auto"
    ) -> list[Outcome]:
        """Check and store labels in one transaction that is on disk before this returns; one outcome each, in order.

        `classes` are those of the model; None for a regression. With review="manual" every label waits as `new`. A label
        that is none of the classes is kept as `rejected`. The same label again is counted. Another label than an earlier
        one waits as `new`, and so does the earlier one unless an administrator accepted or a training used it. An outcome
        has the state that is stored at the end: a later item of the same call may have changed it.
        """
        assert review in ("auto", "manual"), review
        requests = sorted({request for item in items if (request := parse(item.prediction_id)[0])})
        self._await(name, requests)
        query = sa.select(predictions).where(
            predictions.c.id.in_(requests), predictions.c.registered_model_name == name
        )
        with self.database.write(durable=True) as connection:
            # Locked, so that two labels for one prediction wait for each other; SQLite has one writer anyway.
            locked = connection.execute(query.order_by(predictions.c.id).with_for_update())
            stored = {row.id: Rows.of(row) for row in locked}
            added = [self._add(connection, item, stored, classes, review) for item in items]
            ids = [identifier for identifier, _ in added if identifier]
            query = sa.select(feedback.c.id, feedback.c.state).where(feedback.c.id.in_(ids))
            states = {row.id: row.state for row in connection.execute(query)}
        outcomes = []
        for identifier, outcome in added:
            if identifier and states[identifier] != outcome.state:
                is_counted, state = outcome.message == COUNTED.format(outcome.state), states[identifier]
                outcome = outcome._replace(state=state, message=COUNTED.format(state) if is_counted else CONFLICT)
            outcomes.append(outcome)
        return outcomes

    def _add(
        self, connection: sa.Connection, item: Feedback, stored: dict[str, Rows], classes: Sequence | None, review: str
    ) -> tuple[int | None, Outcome]:
        """The id of the label, None where nothing was stored, and its outcome so far."""

        def outcome(state: str, message: str) -> Outcome:
            return Outcome(item.prediction_id, state, message, bool(wrong))

        wrong: str | None = None
        request, row = parse(item.prediction_id)
        if request not in stored:
            return None, outcome("unknown", "no such prediction is stored")
        rows = stored[request]
        if (place := rows.place(row)) is None:
            return None, outcome("unknown", "the request is known, but not this row of it")
        index, predicted = row or 0, rows.outputs[place]
        label, wrong = check_label(item.label, classes, predicted)
        text = dumps(label)
        here = (feedback.c.prediction_id == request) & (feedback.c.row == index)
        earlier = connection.execute(sa.select(feedback).where(here).order_by(feedback.c.id)).all()
        others = [known for known in earlier if known.state != "rejected" and known.label != text]
        again = next((known for known in earlier if known.label == text or (wrong and known.given == text)), None)
        if again and (again.state != "rejected" or again.reviewed or wrong):
            connection.execute(_update(again.id, times=again.times + 1))
            return again.id, outcome(again.state, COUNTED.format(again.state))
        if wrong:
            state, reason, message = "rejected", wrong, wrong
        elif others:
            state, reason, message = "new", "conflict", "differs from a label given before: an administrator decides"
        elif review == "manual":
            state, reason, message = "new", None, "waits for an administrator"
        else:
            state, reason = "accepted", None
            message = "confirms the prediction" if same(label, predicted) else "corrects the prediction"
        annotator = clean(item.annotator) or local_annotator()
        if again:  # it was no class then; the label is of the annotator who gives it now
            values = {"times": again.times + 1, "state": state, "reason": reason, "annotator": annotator}
            connection.execute(_update(again.id, **values))
            identifier = again.id
        else:
            label_row = sa.insert(feedback).values(
                prediction_id=request, row=index, label=text, source=clean(item.source), comment=clean(item.comment),
                annotator=annotator, given=None if dumps(item.label) == text else dumps(item.label), time=time.time(),
                state=state, reason=reason, is_correction=not same(label, predicted), audit=index in rows.audit,
            )  # fmt: skip
            identifier = connection.execute(label_row.returning(feedback.c.id)).scalar_one()
        if reason == "conflict":
            doubted = (
                here & (feedback.c.state == "accepted") & feedback.c.reviewed.is_(None) & (feedback.c.label != text)
            )
            connection.execute(sa.update(feedback).where(doubted).values(state="new", reason="conflict"))
        return identifier, outcome(state, message)

    def review(
        self, name: str, prediction_id: str, accept: bool, reason: str | None = None, label: Any = None
    ) -> dict[str, Any] | None:
        """Decide about labels of one prediction; what `get_feedback` then says, None where it has no such label.

        `label` says which; it is needed to accept one of several. Without it all that wait are rejected, and where none
        waits, all that are not used. Accepting one rejects the others. A used label stays used. A label that was
        rejected for being none of the classes can be accepted, as the first of a new class, where it is of their type.
        UserError with the reason where no label can be accepted or rejected.
        """
        request, row = parse(prediction_id)
        with self.database.write(durable=True) as connection:
            query = sa.select(predictions).where(_is(name, request)).with_for_update()
            prediction = connection.execute(query).one_or_none()
            place = Rows.of(prediction).place(row) if prediction else None
            query = sa.select(feedback).where(feedback.c.prediction_id == request, feedback.c.row == (row or 0))
            labels = list(connection.execute(query.order_by(feedback.c.id)).all())
            chosen = [known for known in labels if label is None or dumps(label) in (known.label, known.given)]
            if prediction is None or place is None or not chosen:
                return None
            changes, obstacle = decide(labels, chosen, accept, Rows.of(prediction).outputs[place])
            if obstacle:
                raise UserError(obstacle)
            for identifier, change in changes.items():
                why = "another label was accepted" if accept and change["state"] == "rejected" else reason
                connection.execute(_update(identifier, **change, reason=clean(why), reviewed=time.time()))
            return self._get(connection, name, prediction_id)

    def get_feedback(self, name: str, prediction_id: str) -> dict[str, Any] | None:
        """One prediction with `state` and `label` of what counts (both None before any label) and all `labels` given.

        None where it is not stored.
        """
        request, _ = parse(prediction_id)
        self._await(name, [request] if request else [])
        with self.database.read() as connection:
            return self._get(connection, name, prediction_id)

    def _get(self, connection: sa.Connection, name: str, prediction_id: str) -> dict[str, Any] | None:
        request, row = parse(prediction_id)
        stored = connection.execute(sa.select(predictions).where(_is(name, request))).one_or_none()
        if stored is None or (place := (rows := Rows.of(stored)).place(row)) is None:
            return None
        query = sa.select(feedback).where(feedback.c.prediction_id == request, feedback.c.row == (row or 0))
        labels = connection.execute(query.order_by(feedback.c.id)).all()
        order = ("rejected", "new", "used", "accepted")
        counts = max(labels, key=lambda known: (order.index(known.state), known.id), default=None)
        return {
            "prediction_id": prediction_id,
            "time": iso(stored.time),
            "model_version": stored.model_version,
            "prediction": rows.outputs[place],
            "audit": (row or 0) in rows.audit,
            "state": counts.state if counts else None,
            "label": json.loads(counts.label) if counts else None,
            "labels": [
                {
                    "label": json.loads(known.label),
                    "state": known.state,
                    "reason": known.reason,
                    "time": iso(known.time),
                }
                for known in labels
            ],
        }

    def list_feedback(self, name: str, state: str, limit: int = 100) -> list[dict[str, Any]]:
        """Labels in a state, oldest first, with what an administrator needs to decide: inputs, prediction, who, why."""
        query = (
            sa.select(feedback, predictions, input_schemas.c.columns)
            .join_from(feedback, predictions, feedback.c.prediction_id == predictions.c.id)
            .join(input_schemas, input_schemas.c.id == predictions.c.input_schema)
            .where(predictions.c.registered_model_name == name, feedback.c.state == state)
            .order_by(feedback.c.id)
            .limit(limit)
        )
        with self.database.read() as connection:
            rows = connection.execute(query).mappings().all()
        listed = []
        for row in rows:
            index, request, n_rows = row[feedback.c.row], row[predictions.c.id], row["n_rows"]
            stored = Rows(n_rows, row["stored_rows"], row["outputs"])
            place = stored.place_of[index]  # a labelled row stays stored
            listed.append({
                "prediction_id": prediction_id(request, index, n_rows),
                "time": iso(row[feedback.c.time]),
                "model_version": row["model_version"],
                "inputs": queries.inputs_of_row(row, place),
                "prediction": stored.outputs[place],
                "label": json.loads(row["label"]),
                **{
                    key: row[feedback.c[key]]
                    for key in ("state", "reason", "source", "annotator", "comment", "times", "audit")
                },
            })  # fmt: skip
        return listed

    def _await(self, name: str, requests: Sequence[str]) -> None:
        """Wait for requests that are so young that another server may still hold them in its buffer."""
        now = time.time()
        missing = {request for request in requests if abs(now - int(request[:16], 16) / 1e9) < ARRIVES_IN}
        while missing:
            query = sa.select(predictions.c.id).where(
                predictions.c.id.in_(missing), predictions.c.registered_model_name == name
            )
            with self.database.read() as connection:
                missing -= set(connection.scalars(query))
            if time.time() - now > ARRIVES_IN:
                return
            if missing:
                time.sleep(0.05)

    # --- for trainings and monitoring ---

    def accepted(self, name: str) -> queries.Labelled:
        """The accepted labels that no training used yet, in the order in which they came."""
        return self.labelled(name, "accepted")

    def labelled(self, name: str, *states: str) -> queries.Labelled:
        """The labels in these states, in the order in which they came."""
        with self.database.read() as connection:
            return queries.labelled(connection, name, states)

    def window(self, name: str, since: float, until: float) -> queries.Window:
        """The predictions from `since` to before `until` (Unix seconds), in order of time."""
        first, after = request_id(int(since * 1e9), 0), request_id(int(until * 1e9), 0)
        with self.database.read() as connection:
            return queries.window(connection, name, first, after)


def _is(name: str, request: str) -> sa.ColumnElement[bool]:
    return (predictions.c.id == request) & (predictions.c.registered_model_name == name)


def _update(identifier: int, **values: Any) -> sa.Update:
    return sa.update(feedback).where(feedback.c.id == identifier).values(values)
