"""The feedback store: the server writes it; people, trainings and monitoring read it.

A request is one row of `predictions`, with any number of input rows. A label is one row of `feedback`, in one of four states:
new (waits for an administrator), accepted, rejected, used (by a training). Every method takes the name of the registered model
first, and reads and changes nothing of another model.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from alacarte.errors import UserError
from alacarte.feedback import queries, records, retention
from alacarte.feedback.database import Database, feedback, input_schemas, predictions
from alacarte.feedback.labels import check_label, decide, dumps, same
from alacarte.feedback.records import Feedback, Outcome, Prediction, StoredRequest

LISTED = ("prediction_id", "model_version", "state", "reason", "source", "annotator", "comment", "audit")
ARRIVAL_SECONDS = 1.5  # from the answer of another server to its row in this database


class Store:
    """A feedback store at a URL of SQLite or PostgreSQL; the tables are created if there are none.

    Safe to use from several threads and processes. UserError if the URL cannot be opened. Every method raises
    StoreError, and has changed nothing, when the database is locked for more than `timeout` seconds, full or gone.
    """

    def __init__(self, url: str, timeout: float = 3.0) -> None:
        self.database = Database(url, timeout)

    def close(self) -> None:
        self.database.close()

    # --- predictions ---

    def write_predictions(self, requests: Sequence[Prediction]) -> None:
        """Store all of them or none; a prediction that is stored already stays as it is, so that a try may be repeated."""
        schemas = {request.columns: "" for request in requests}
        for columns in schemas:
            schemas[columns] = hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]
        rows = [
            (*request[:5], schemas[request.columns], request.format, request.inputs, records.as_json(request.outputs),
             records.as_json(request.confidence) if request.confidence else None, request.latency_ms,
             records.as_json(request.audit) if request.audit else None, request.audit_share, request.sample)
            for request in requests
        ]  # fmt: skip
        with self.database.write(durable=False) as connection:
            schema_rows = [(key, json.dumps(columns)) for columns, key in schemas.items()]
            self.database.append(input_schemas, schema_rows, connection)
            self.database.append(predictions, rows, connection)

    def prune(self, name: str, max_age_days: float, max_bytes: float) -> int:
        """Delete a part of the model's rows that are too old or above the size; how many deletions. See retention.py.

        Call again until it is 0. One call deletes a part at most, so that writers wait only for a moment.
        """
        oldest = records.request_id(max(0, int((time.time() - max_age_days * 86400) * 1e9)), 0)
        return retention.prune(self.database, name, oldest, max_bytes)

    # --- labels ---

    def add_feedback(
        self, name: str, items: Sequence[Feedback], *, classes: Sequence | None, review: str = "auto"
    ) -> list[Outcome]:
        """Check and store labels in one transaction that is on disk before this returns; one outcome each, in order.

        `classes` are those of the model; None for a regression. With review="manual" every label waits as `new`. A label
        that is none of the classes is stored as `rejected`. Another label than an earlier one waits as `new`, and so does
        the earlier one unless an administrator accepted or a training used it. An outcome has the state that is stored at
        the end: a later item of the same call may have changed it.
        """
        assert review in ("auto", "manual"), review
        requests = sorted({request for item in items if (request := records.parse(item.prediction_id)[0])})
        self._await(name, requests)
        with self.database.write(durable=True) as connection:
            locked = connection.execute(_requests(name, requests, locks=True))
            stored = {row.id: StoredRequest(row) for row in locked}
            added = [self._add(connection, item, stored, classes, review) for item in items]
            ids = [label_id for label_id, _, _ in added if label_id]
            label_of = {row.id: row for row in connection.execute(sa.select(feedback).where(feedback.c.id.in_(ids)))}
        outcomes = []
        for item, (label_id, is_repeated, is_wrong) in zip(items, added, strict=True):
            if label_id:
                label = label_of[label_id]
                outcomes.append(Outcome(item.prediction_id, label.state, _message(label, is_repeated), is_wrong))
            else:
                is_request = records.parse(item.prediction_id)[0] in stored
                message = "the request is known, but has no such row" if is_request else "no such prediction is stored"
                outcomes.append(Outcome(item.prediction_id, "unknown", message))
        return outcomes

    def _add(
        self, connection: sa.Connection, item: Feedback, stored: dict[str, StoredRequest], classes: Sequence | None, review: str
    ) -> tuple[int | None, bool, bool]:  # fmt: skip
        """The id of the label, None if its row is not stored; whether it was given before; whether it is no class."""
        request_id, row = records.parse(item.prediction_id)
        request = stored.get(request_id)
        index = request.index(row) if request else None
        if request is None or index is None:
            return None, False, False
        predicted = request.outputs[index]
        label, problem = check_label(item.label, classes, predicted)
        text = dumps(label)
        is_here = feedback.c.prediction_id == item.prediction_id
        earlier = connection.execute(sa.select(feedback).where(is_here).order_by(feedback.c.id)).all()
        again = next((known for known in earlier if known.label == text), None)
        if again and (again.state != "rejected" or again.reviewed or problem):
            return again.id, True, bool(problem)
        if problem:
            state, reason = "rejected", problem
        elif any(known.state != "rejected" and known.label != text for known in earlier):
            state, reason = "new", "conflict"
        else:
            state, reason = "accepted" if review == "auto" else "new", None
        annotator = records.clean(item.annotator) or records.local_annotator()
        values = {"state": state, "reason": reason, "annotator": annotator}
        if again:  # it was no class then; the label belongs to the annotator who gives it now
            label_id = again.id
            connection.execute(_update(label_id, **values))
        else:
            copied = ("registered_model_name", "model_version", "input_schema", "format")
            label_row = sa.insert(feedback).values(
                **{key: getattr(request.stored, key) for key in copied},
                prediction_id=item.prediction_id, inputs=request.encode_row(index), prediction=records.as_json(predicted),
                audit=index in request.audit, label=text, is_correction=not same(label, predicted),
                source=records.clean(item.source), comment=records.clean(item.comment), time=time.time(), **values,
            )  # fmt: skip
            label_id = connection.execute(label_row.returning(feedback.c.id)).scalar_one()
        if reason == "conflict":
            is_doubted = (feedback.c.state == "accepted") & feedback.c.reviewed.is_(None) & (feedback.c.label != text)
            connection.execute(sa.update(feedback).where(is_here & is_doubted).values(state="new", reason="conflict"))
        return label_id, False, bool(problem)

    def review(
        self, name: str, prediction_id: str, accept: bool, reason: str | None = None, label: Any = None
    ) -> dict[str, Any] | None:
        """Decide about labels of one prediction; the result is that of `get_feedback`, None if there is no such label.

        `label` names the label; this is necessary to accept one of several. Without it all waiting labels are rejected, and
        if none waits, all that are not used. Accepting one rejects the others. A used label stays used. A label that was
        rejected because it is none of the classes can be accepted, as the first of a new class, if it has their type.
        UserError with the reason if no label can be accepted or rejected.
        """
        with self.database.write(durable=True) as connection:
            # Locked, so that a label that is added now waits.
            connection.execute(_requests(name, [records.parse(prediction_id)[0]], locks=True))
            labels = connection.execute(_labels(name, prediction_id).with_for_update()).all()
            chosen = [known for known in labels if label is None or known.label == dumps(label)]
            if not chosen:
                return None
            changes, obstacle = decide(labels, chosen, accept)
            if obstacle:
                raise UserError(obstacle)
            for label_id, change in changes.items():
                why = "another label was accepted" if accept and change["state"] == "rejected" else reason
                connection.execute(_update(label_id, **change, reason=records.clean(why), reviewed=time.time()))
            return self._get(connection, name, prediction_id)

    def get_feedback(self, name: str, prediction_id: str) -> dict[str, Any] | None:
        """One prediction with all its `labels`, and `state` and `label` of the label that counts, None if there is none.

        None if neither the prediction nor a label of it is stored.
        """
        request, _ = records.parse(prediction_id)
        self._await(name, [request] if request else [])
        with self.database.read() as connection:
            return self._get(connection, name, prediction_id)

    def _get(self, connection: sa.Connection, name: str, prediction_id: str) -> dict[str, Any] | None:
        labels = connection.execute(_labels(name, prediction_id)).all()
        facts: Any
        request_id, row = records.parse(prediction_id)
        if labels:
            facts = labels[0]
            prediction, audit = json.loads(facts.prediction), facts.audit
        else:
            facts = connection.execute(_requests(name, [request_id])).one_or_none()
            index = StoredRequest(facts).index(row) if facts else None
            if index is None:
                return None
            prediction, audit = StoredRequest(facts).outputs[index], index in StoredRequest(facts).audit
        order = ("rejected", "new", "used", "accepted")
        counts = max(labels, key=lambda label: (order.index(label.state), label.id), default=None)
        return {
            "prediction_id": prediction_id,
            "time": records.iso(records.request_time(request_id)),
            "model_version": facts.model_version,
            "prediction": prediction,
            "audit": audit,
            "state": counts.state if counts else None,
            "label": json.loads(counts.label) if counts else None,
            "labels": [
                {"label": json.loads(label.label), "state": label.state, "reason": label.reason, "time": records.iso(label.time)}
                for label in labels
            ],
        }  # fmt: skip

    def list_feedback(self, name: str, state: str, limit: int = 100) -> list[dict[str, Any]]:
        """Labels in a state, the oldest first, with inputs, prediction, annotator and reason for an administrator."""
        query = sa.select(feedback, input_schemas.c.columns).join(
            input_schemas, input_schemas.c.id == feedback.c.input_schema
        )
        query = query.where(feedback.c.registered_model_name == name, feedback.c.state == state)
        with self.database.read() as connection:
            labels = connection.execute(query.order_by(feedback.c.id).limit(limit)).all()
        listed = []
        for label in labels:
            values = records.decode_inputs(label.format, label.inputs, 1)[0]
            if label.format == "f8":
                values = [None if math.isnan(value) else value for value in values.tolist()]
            listed.append({
                **{key: getattr(label, key) for key in LISTED},
                "time": records.iso(label.time),
                "inputs": dict(zip(json.loads(label.columns), values, strict=True)),
                "prediction": json.loads(label.prediction),
                "label": json.loads(label.label),
            })  # fmt: skip
        return listed

    def _await(self, name: str, requests: Sequence[str]) -> None:
        """Wait for requests that are so young that another server may still hold them in its buffer."""
        now = time.time()
        missing = {request for request in requests if abs(now - records.request_time(request)) < ARRIVAL_SECONDS}
        while missing:
            is_missing = predictions.c.id.in_(missing) & (predictions.c.registered_model_name == name)
            with self.database.read() as connection:
                missing -= set(connection.scalars(sa.select(predictions.c.id).where(is_missing)))
            if time.time() - now > ARRIVAL_SECONDS:
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

    def window(self, name: str, since: float, until: float, max_rows: float = math.inf) -> queries.Window:
        """The predictions from `since` to before `until` (Unix seconds), in order of time.

        Of more than `max_rows` rows the newest are read, in whole requests.
        """
        first, after = records.request_id(int(since * 1e9), 0), records.request_id(int(until * 1e9), 0)
        with self.database.read() as connection:
            return queries.window(connection, name, first, after, max_rows)


def _requests(name: str, requests: Sequence[str], *, locks: bool = False) -> sa.Select:
    """Locked, two labels for one prediction wait for each other; SQLite has one writer anyway."""
    is_request = predictions.c.id.in_(requests) & (predictions.c.registered_model_name == name)
    query = sa.select(predictions).where(is_request).order_by(predictions.c.id)
    return query.with_for_update() if locks else query


def _labels(name: str, prediction_id: str) -> sa.Select:
    is_label = (feedback.c.prediction_id == prediction_id) & (feedback.c.registered_model_name == name)
    return sa.select(feedback).where(is_label).order_by(feedback.c.id)


def _message(label: sa.Row, is_repeated: bool) -> str:
    if is_repeated:
        return f"this label was given before and is {label.state}"
    if label.state == "accepted":
        return "corrects the prediction" if label.is_correction else "confirms the prediction"
    if label.reason == "conflict":
        return "differs from another label of this row: an administrator decides"
    return label.reason or "waits for an administrator"


def _update(identifier: int, **values: Any) -> sa.Update:
    return sa.update(feedback).where(feedback.c.id == identifier).values(values)
