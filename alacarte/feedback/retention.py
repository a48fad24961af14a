"""Deletion of old rows, so that the rows of a model stay below an age and a size. The order is:

1. Rows without a label, the oldest first: above the age, then above the size. A request with labels keeps its labelled rows.
2. Above the size, when no row without a label is left: labels with their rows, from the annotator whose labels use most space,
   so that nobody can push out the labels of others. Of these first the rejected labels, then the used ones, then new and
   accepted ones, in each group the oldest first.

A label that a running training has claimed is never deleted.
"""

import json
import logging

import sqlalchemy as sa

from alacarte.feedback.database import ROW_BYTES, Database, feedback, predictions
from alacarte.feedback.records import as_json

STEP_ROWS, STEP_BYTES = 5_000, 32_000_000  # that one call deletes at most
LABEL_BYTES = 200  # of a label, beside its comment

logger = logging.getLogger(__name__)


def prune(database: Database, name: str, oldest: str, max_bytes: float) -> int:
    """Delete a part of the rows of a registered model with ids below `oldest` or above the size; 0 when none is left."""
    with database.read() as connection:
        excess = database.excess(connection, name, max_bytes)
        requests = _unlabelled(connection, name, oldest, excess)
        labels = _expendable(connection, name, excess) if excess and not requests else {}
    if not requests and not labels:
        return 0
    with database.write(durable=False) as connection:
        ids = sorted({*requests, *labels.values()})
        locked = sa.select(predictions.c.id).where(predictions.c.id.in_(ids)).with_for_update(skip_locked=True)
        ids = list(connection.scalars(locked))
        connection.execute(
            sa.delete(feedback).where(
                feedback.c.id.in_(list(labels)), feedback.c.prediction_id.in_(ids), _is_unclaimed()
            )
        )
        _drop_unlabelled_rows(connection, ids)
    return len(ids)


def _unlabelled(connection: sa.Connection, name: str, oldest: str, excess: float) -> list[str]:
    """Ids of requests that have rows without a label. `stored_rows` is set where these are gone already."""
    size = sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES
    has_label = sa.exists().where(feedback.c.prediction_id == predictions.c.id)
    query = sa.select(predictions.c.id, size).where(
        predictions.c.registered_model_name == name, predictions.c.stored_rows.is_(None),
        (predictions.c.n_rows > 1) | ~has_label,
    )  # fmt: skip
    if not excess:
        query = query.where(predictions.c.id < oldest)
    requests, n_bytes = [], 0
    for request, size_of_request in connection.execute(query.order_by(predictions.c.id).limit(STEP_ROWS)).tuples():
        if n_bytes >= STEP_BYTES or (request >= oldest and n_bytes >= excess):
            break
        requests.append(request)
        n_bytes += size_of_request
    return requests


def _expendable(connection: sa.Connection, name: str, excess: float) -> dict[int, str]:
    """Labels to delete, with their requests: of the annotator whose labels take most room, at most down to the next one."""
    size = (
        (sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES)
        / predictions.c.n_stored
        + sa.func.length(sa.func.coalesce(feedback.c.comment, ""))
        + LABEL_BYTES
    )
    mine = (predictions.c.registered_model_name == name) & _is_unclaimed()
    totals = sa.select(feedback.c.annotator, sa.func.sum(size)).join_from(feedback, predictions).where(mine)
    totals = totals.group_by(feedback.c.annotator).order_by(sa.func.sum(size).desc()).limit(2)
    largest = [(annotator, float(n_bytes)) for annotator, n_bytes in connection.execute(totals)]
    if not largest:
        return {}
    annotator, most = largest[0]
    ahead = max(most - largest[1][1] if len(largest) > 1 else most, most / 10)  # a tenth: else equals take many calls
    rank = sa.case({"rejected": 0, "used": 1}, value=feedback.c.state, else_=2)
    query = sa.select(feedback.c.id, predictions.c.id, size, rank).join_from(feedback, predictions)
    query = query.where(mine, feedback.c.annotator == annotator).order_by(rank, feedback.c.id).limit(STEP_ROWS)
    labels: dict[int, str] = {}
    waiting, n_bytes = 0, 0
    for identifier, request, size_of_label, rank_of_label in connection.execute(query).tuples():
        if n_bytes >= min(excess, ahead, STEP_BYTES):
            break
        labels[identifier] = request
        n_bytes += size_of_label
        waiting += rank_of_label == 2
    if waiting:
        logger.warning(
            "feedback.keep_gb: the store is full: %d new or accepted labels of %s are deleted", waiting, annotator
        )
    return labels


def _drop_unlabelled_rows(connection: sa.Connection, requests: list[str]) -> None:
    """Keep the labelled rows of these requests, under their numbers; delete a request that has none."""
    labelled: dict[str, set[int]] = {}
    query = sa.select(feedback.c.prediction_id, feedback.c.row).where(feedback.c.prediction_id.in_(requests))
    for request, row in connection.execute(query):
        labelled.setdefault(request, set()).add(row)
    empty = [request for request in requests if request not in labelled]
    connection.execute(sa.delete(predictions).where(predictions.c.id.in_(empty)))
    query = sa.select(predictions).where(predictions.c.id.in_(list(labelled)))
    for stored in connection.execute(query).all():
        rows = json.loads(stored.stored_rows) if stored.stored_rows else range(stored.n_rows)
        kept = [position for position, row in enumerate(rows) if row in labelled[stored.id]]
        values = {"stored_rows": json.dumps([rows[position] for position in kept]), "n_stored": len(kept)}
        if len(kept) < len(rows):
            values["outputs"] = as_json(_take(stored.outputs, kept))
            values["confidence"] = stored.confidence and as_json(_take(stored.confidence, kept))
            if stored.format == "f8":
                width = len(stored.inputs) // len(rows)
                values["inputs"] = b"".join(stored.inputs[i * width : (i + 1) * width] for i in kept)
            else:
                values["inputs"] = as_json(_take(stored.inputs, kept)).encode()
        connection.execute(sa.update(predictions).where(predictions.c.id == stored.id).values(values))


def _take(text: str | bytes, positions: list[int]) -> list:
    values = json.loads(text)  # which also reads NaN and half of a surrogate pair
    return [values[position] for position in positions]


def _is_unclaimed() -> sa.ColumnElement[bool]:
    return (feedback.c.state != "accepted") | feedback.c.used_run_id.is_(None)
