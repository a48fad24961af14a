"""What the server writes: predictions, and labels with their states. What trainings read is in queries.py.

A request is one row of `predictions`, however many rows it has. A label is one row of `feedback`, in one of four states:
new (waits for an administrator), accepted, rejected, used (a training took it). Labels are never overwritten or deleted.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import sqlalchemy as sa

from alacarte.feedback import queries
from alacarte.feedback.database import Database, feedback, layouts, predictions
from alacarte.feedback.labels import NO_CLASS, check_label, dumps, new_class, same
from alacarte.feedback.records import (
    Feedback,
    Outcome,
    Prediction,
    clean,
    iso,
    local_annotator,
    parse,
    prediction_id,
    request_id,
)

STEP_ROWS, STEP_BYTES = 5_000, 32_000_000  # that one call of prune deletes at most
ARRIVES_IN = 1.5  # seconds from a prediction's answer to its row here, when other servers write too
ROW_BYTES = 300  # of a prediction, beside inputs and outputs

encode = msgspec.json.Encoder().encode


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
        """Store all of them or none; one that is there already stays as it is, so that a try may be repeated."""
        names = {record.columns: "" for record in records}
        for columns in names:
            names[columns] = hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]
        values = [
            (*one[:5], names[one.columns], one.format, one.inputs, as_json(one.outputs),
             as_json(one.confidence) if one.confidence else None, one.latency_ms,
             as_json(one.audit) if one.audit else None, one.audit_share, one.sample)
            for one in records
        ]  # fmt: skip
        self.database.append([(name, json.dumps(columns)) for columns, name in names.items()], values)

    def prune(self, name: str, max_age_days: float, max_bytes: float) -> int:
        """Delete the oldest predictions of model `name` without feedback, by age and then by the size of the store; how many.

        Call again until it is 0. One call deletes a part at most, so that writers wait only for a moment.
        """
        oldest = request_id(max(0, int((time.time() - max_age_days * 86400) * 1e9)), 0)
        free = ~sa.exists().where(feedback.c.prediction_id == predictions.c.id)
        free &= predictions.c.registered_model_name == name
        size = sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES
        query = sa.select(predictions.c.id, size).where(free).order_by(predictions.c.id).limit(STEP_ROWS)
        with self.database.read() as connection:
            excess = self.database.excess(connection, max_bytes)
            candidates = connection.execute(query if excess else query.where(predictions.c.id < oldest)).tuples().all()
        ids, taken = [], 0
        for identifier, bytes_of_it in candidates:
            if taken >= STEP_BYTES or (identifier >= oldest and taken >= excess):
                break
            ids.append(identifier)
            taken += bytes_of_it
        if not ids:
            return 0
        with self.database.write(durable=False) as connection:
            locked = sa.select(predictions.c.id).where(predictions.c.id.in_(ids)).with_for_update(skip_locked=True)
            ids = list(connection.scalars(locked))
            return connection.execute(sa.delete(predictions).where(predictions.c.id.in_(ids), free)).rowcount

    # --- labels ---

    def add_feedback(
        self, items: Sequence[Feedback], *, classes: Sequence | None, review: str = "auto", name: str | None = None
    ) -> list[Outcome]:
        """Check and store labels in one transaction that is on disk before this returns; one outcome each, in order.

        `classes` are those of the registered model `name` (None: of any); None for a regression. With review="manual"
        every label waits as `new`. A label that is none of the classes is kept as `rejected`. The same label again is
        counted. Another label than one given before waits as `new`, and so does the earlier one unless an administrator
        accepted or a training used it.
        """
        assert review in ("auto", "manual"), review
        wanted = sorted({request for item in items if (request := parse(item.prediction_id)[0])})
        self._await(wanted)
        columns = predictions.c.id, predictions.c.n_rows, predictions.c.outputs, predictions.c.audit
        query = sa.select(*columns).where(predictions.c.id.in_(wanted)).order_by(predictions.c.id)
        if name is not None:
            query = query.where(predictions.c.registered_model_name == name)
        with self.database.write(durable=True) as connection:
            found = {  # locked, so that two labels for one prediction take turns; SQLite has one writer anyway
                row.id: (row.n_rows, json.loads(row.outputs), json.loads(row.audit or "[]"))
                for row in connection.execute(query.with_for_update())
            }
            return [self._add(connection, item, found, classes, review) for item in items]

    def _add(
        self, connection: sa.Connection, item: Feedback, found: dict, classes: Sequence | None, review: str
    ) -> Outcome:
        def outcome(state: str, message: str) -> Outcome:
            return Outcome(item.prediction_id, state, message)

        request, row = parse(item.prediction_id)
        if request not in found:
            return outcome("unknown", "no such prediction is stored")
        n_rows, outputs, audit = found[request]
        if not (row is None if n_rows == 1 else row is not None and row < n_rows):
            return outcome("unknown", "the request is known, but not this row of it")
        index = row or 0
        label, wrong = check_label(item.label, classes, outputs[index])
        text = dumps(label)
        here = (feedback.c.prediction_id == request) & (feedback.c.row == index)
        earlier = connection.execute(sa.select(feedback).where(here).order_by(feedback.c.id)).all()
        others = [one for one in earlier if one.state != "rejected" and one.label != text]
        again = next((one for one in earlier if one.label == text or (wrong and one.given == text)), None)
        if again and (again.state != "rejected" or again.reviewed or wrong):
            change: dict[str, Any] = {"times": again.times + 1}
            connection.execute(sa.update(feedback).where(feedback.c.id == again.id).values(change))
            return outcome(again.state, f"this label was given before and is {again.state}: counted")
        if wrong:
            state, reason, message = "rejected", wrong, wrong
        elif others:
            state, reason, message = "new", "conflict", "differs from a label given before: an administrator decides"
        elif review == "manual":
            state, reason, message = "new", None, "waits for an administrator"
        else:
            state, reason = "accepted", None
            message = "confirms the prediction" if same(label, outputs[index]) else "corrects the prediction"
        if again:  # it was no class then
            change = {"times": again.times + 1, "state": state, "reason": reason}
            connection.execute(sa.update(feedback).where(feedback.c.id == again.id).values(change))
        else:
            connection.execute(
                sa.insert(feedback).values(
                    prediction_id=request, row=index, label=text, source=clean(item.source),
                    comment=clean(item.comment), annotator=clean(item.annotator) or local_annotator(),
                    given=None if dumps(item.label) == text else dumps(item.label), time=time.time(), state=state,
                    reason=reason, is_correction=not same(label, outputs[index]), audit=index in audit,
                )
            )  # fmt: skip
        if reason == "conflict":
            doubted = here & (feedback.c.state == "accepted") & feedback.c.reviewed.is_(None)
            connection.execute(
                sa.update(feedback).where(doubted, feedback.c.label != text).values(state="new", reason="conflict")
            )
        return outcome(state, message)

    def review(
        self, prediction_id: str, accept: bool, reason: str | None = None, label: Any = None
    ) -> dict[str, Any] | None:
        """Decide about labels of one prediction; what `get_feedback` then says, None where it has no such label.

        `label` says which; without it the newest is accepted, or all that wait are rejected, and where none waits, those
        not used. Accepting one rejects the others. What was used stays used. A label that was rejected for being none of
        the classes can be accepted, as the first of a new class, where it is of their type; other rejected ones cannot.
        """
        request, row = parse(prediction_id)
        with self.database.write(durable=True) as connection:
            query = sa.select(predictions.c.outputs).where(predictions.c.id == request).with_for_update()
            outputs = connection.scalar(query)
            query = sa.select(feedback).where(feedback.c.prediction_id == request, feedback.c.row == (row or 0))
            given = list(connection.execute(query.order_by(feedback.c.id)).all())
            chosen = [one for one in given if label is None or dumps(label) in (one.label, one.given)]
            if not chosen or self._get(connection, prediction_id) is None:
                return None
            assert outputs is not None
            changes = _decide(given, chosen, accept, json.loads(outputs)[row or 0])
            for identifier, change in changes.items():
                why = "another label was accepted" if accept and change["state"] == "rejected" else reason
                values = {**change, "reason": clean(why), "reviewed": time.time()}
                connection.execute(sa.update(feedback).where(feedback.c.id == identifier).values(values))
            return self._get(connection, prediction_id)

    def get_feedback(self, prediction_id: str) -> dict[str, Any] | None:
        """One prediction with `state` and `label` of what counts (both None before any label) and all `labels` given.

        None where it is not stored.
        """
        request, _ = parse(prediction_id)
        self._await([request] if request else [])
        with self.database.read() as connection:
            return self._get(connection, prediction_id)

    def _get(self, connection: sa.Connection, prediction_id: str) -> dict[str, Any] | None:
        request, row = parse(prediction_id)
        found = connection.execute(sa.select(predictions).where(predictions.c.id == request)).one_or_none()
        if found is None or not (row is None if found.n_rows == 1 else row is not None and row < found.n_rows):
            return None
        index = row or 0
        query = sa.select(feedback).where(feedback.c.prediction_id == request, feedback.c.row == index)
        given = connection.execute(query.order_by(feedback.c.id)).all()
        order = ("rejected", "new", "used", "accepted")
        counts = max(given, key=lambda one: (order.index(one.state), one.id), default=None)
        return {
            "prediction_id": prediction_id,
            "time": iso(found.time),
            "model_version": found.model_version,
            "prediction": json.loads(found.outputs)[index],
            "audit": index in json.loads(found.audit or "[]"),
            "state": counts.state if counts else None,
            "label": json.loads(counts.label) if counts else None,
            "labels": [
                {"label": json.loads(one.label), "state": one.state, "reason": one.reason, "time": iso(one.time)}
                for one in given
            ],
        }

    def list_feedback(self, state: str, limit: int = 100) -> list[dict[str, Any]]:
        """Labels in a state, oldest first, with what an administrator needs to decide: inputs, prediction, who, why."""
        query = (
            sa.select(feedback, predictions, layouts.c.columns)
            .join_from(feedback, predictions, feedback.c.prediction_id == predictions.c.id)
            .join(layouts, layouts.c.id == predictions.c.layout)
            .where(feedback.c.state == state)
            .order_by(feedback.c.id)
            .limit(limit)
        )
        with self.database.read() as connection:
            found = connection.execute(query).mappings().all()
        return [
            {
                "prediction_id": prediction_id(one[predictions.c.id], one[feedback.c.row], one["n_rows"]),
                "time": iso(one[feedback.c.time]),
                "model_version": one["model_version"],
                "inputs": queries.inputs_of_row(one, one[feedback.c.row]),
                "prediction": json.loads(one["outputs"])[one[feedback.c.row]],
                "label": json.loads(one["label"]),
                **{
                    key: one[feedback.c[key]]
                    for key in ("state", "reason", "source", "annotator", "comment", "times", "audit")
                },
            }
            for one in found
        ]

    def _await(self, requests: Sequence[str]) -> None:
        """Wait for those requests that are so young that another worker may still hold them in its buffer."""
        now, delay = time.time(), ARRIVES_IN
        missing = {one for one in requests if abs(now - int(one[:16], 16) / 1e9) < delay}
        while missing:
            with self.database.read() as connection:
                query = sa.select(predictions.c.id).where(predictions.c.id.in_(missing))
                missing -= set(connection.scalars(query))
            if time.time() - now > delay:
                return
            if missing:
                time.sleep(0.05)

    # --- for trainings and monitoring ---

    def accepted(self, name: str) -> queries.Labelled:
        """The accepted labels of a registered model that no training used yet, in the order in which they came."""
        return self.labelled(name, "accepted")

    def labelled(self, name: str, *states: str) -> queries.Labelled:
        """The labels of a registered model in these states, in the order in which they came."""
        with self.database.read() as connection:
            return queries.labelled(connection, name, states)

    def window(self, name: str, since: float, until: float) -> queries.Window:
        """The predictions of a registered model from `since` to before `until` (Unix seconds), in order of time."""
        first, after = request_id(int(since * 1e9), 0), request_id(int(until * 1e9), 0)
        with self.database.read() as connection:
            return queries.window(connection, name, first, after)


def _decide(given: Sequence, chosen: Sequence, accept: bool, predicted: Any) -> dict[int, dict[str, Any]]:
    """What a review changes: id -> values. `given`: all rows of one prediction; `chosen`: those that are meant."""
    waiting = [one for one in chosen if one.state == "new"]
    unused = [one for one in chosen if one.state != "used"]
    checked = [one for one in unused if one.state != "rejected" or one.reviewed]
    if not accept:
        return {one.id: {"state": "rejected"} for one in waiting or checked}
    unknown = [one for one in unused if one not in checked and (one.reason or "").startswith(NO_CLASS)]
    new = {
        one.id: label for one in unknown for label, wrong in [new_class(json.loads(one.label), predicted)] if not wrong
    }
    candidates = waiting or checked or [one for one in unknown if one.id in new]
    if not candidates:
        return {}
    best = candidates[-1]
    changes: dict[int, dict[str, Any]] = {
        one.id: {"state": "rejected"} for one in given if one.state in ("new", "accepted")
    }
    changes[best.id] = {"state": "accepted"}
    if best.id in new and dumps(new[best.id]) != best.label:  # "12" where classes are numbers
        changes[best.id] |= {"label": dumps(new[best.id]), "given": best.label}
    return changes


def as_json(value: Any) -> str:
    with suppress(UnicodeEncodeError, TypeError):
        return encode(value).decode()
    return json.dumps(value, default=str)
