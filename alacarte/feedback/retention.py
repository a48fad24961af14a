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

from alacarte.feedback.database import Database, feedback, predictions
from alacarte.feedback.records import StoredRequest, as_json

STEP_ROWS, STEP_BYTES = 5_000, 32_000_000  # that one call deletes at most
ROW_BYTES, LABEL_BYTES = 300, 200  # of a prediction beside inputs and outputs, of a label beside its comment

logger = logging.getLogger(__name__)

size_of_request = sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES
size_of_label = sa.func.length(sa.func.coalesce(feedback.c.comment, "")) + LABEL_BYTES
is_unclaimed = (feedback.c.state != "accepted") | feedback.c.used_run_id.is_(None)


def prune(database: Database, name: str, oldest: str, max_bytes: float) -> int:
    """Delete a part of the rows of a registered model with ids below `oldest` or above the size; 0 when none is left."""
    with database.read() as connection:
        n_excess = excess(connection, name, max_bytes)
        requests = _unlabelled(connection, name, oldest, n_excess)
        labels = _expendable(connection, name, n_excess) if n_excess and not requests else {}
    if not requests and not labels:
        return 0
    with database.write(durable=False) as connection:
        ids = sorted({*requests, *labels.values()})
        locked = sa.select(predictions.c.id).where(predictions.c.id.in_(ids)).with_for_update(skip_locked=True)
        ids = list(connection.scalars(locked))
        is_chosen = feedback.c.id.in_(list(labels)) & feedback.c.prediction_id.in_(ids)
        connection.execute(sa.delete(feedback).where(is_chosen, is_unclaimed))
        _drop_unlabelled_rows(connection, ids)
    return len(ids)


def excess(connection: sa.Connection, name: str, limit: float) -> float:
    """Bytes by which the rows of a registered model are above `limit`, 0 below it.

    Free space that deleted rows left in the files does not count: SQLite and PostgreSQL use it for new rows.
    """
    model = predictions.c.registered_model_name
    if connection.dialect.name == "sqlite":
        pragmas = [f"PRAGMA {name_of_pragma}" for name_of_pragma in ("page_count", "freelist_count", "page_size")]
        pages, free, page = (connection.exec_driver_sql(pragma).scalar_one() for pragma in pragmas)
        total = (pages - free) * page
        ends = [sa.select(end(model)).scalar_subquery() for end in (sa.func.min, sa.func.max)]
        if set(connection.execute(sa.select(*ends)).one()) == {name}:  # the usual case, known from the index
            return max(0.0, total - limit)
    else:
        relations = [sa.func.pg_total_relation_size(table.name) for table in (predictions, feedback)]
        total = connection.execute(sa.select(relations[0] + relations[1])).scalar_one()
    if total <= limit:
        return 0.0
    rows = sa.select(sa.func.sum(size_of_request)).where(model == name)
    labels = sa.select(sa.func.sum(size_of_label)).join_from(feedback, predictions).where(model == name)
    return max(0.0, sum(float(connection.execute(query).scalar() or 0) for query in (rows, labels)) - limit)


def _unlabelled(connection: sa.Connection, name: str, oldest: str, n_excess: float) -> list[str]:
    """Ids of requests that have rows without a label. `stored_rows` is set if these are deleted already."""
    has_label = sa.exists().where(feedback.c.prediction_id == predictions.c.id)
    query = sa.select(predictions.c.id, size_of_request).where(
        predictions.c.registered_model_name == name, predictions.c.stored_rows.is_(None),
        (predictions.c.n_rows > 1) | ~has_label,
    )  # fmt: skip
    if not n_excess:
        query = query.where(predictions.c.id < oldest)
    requests, n_bytes = [], 0
    for request, size in connection.execute(query.order_by(predictions.c.id).limit(STEP_ROWS)):
        if n_bytes >= STEP_BYTES or (request >= oldest and n_bytes >= n_excess):
            break
        requests.append(request)
        n_bytes += size
    return requests


def _expendable(connection: sa.Connection, name: str, n_excess: float) -> dict[int, str]:
    """Labels to delete, with their requests: of the annotator whose labels use most space, a tenth of it at most."""
    size = size_of_request / predictions.c.n_stored + size_of_label
    is_candidate = (predictions.c.registered_model_name == name) & is_unclaimed
    total = sa.func.sum(size)
    totals = sa.select(feedback.c.annotator, total).join_from(feedback, predictions).where(is_candidate)
    largest = connection.execute(totals.group_by(feedback.c.annotator).order_by(total.desc()).limit(1)).one_or_none()
    if largest is None:
        return {}
    annotator, most = largest[0], float(largest[1])
    rank = sa.case({"rejected": 0, "used": 1}, value=feedback.c.state, else_=2)
    query = sa.select(feedback.c.id, predictions.c.id, size, rank).join_from(feedback, predictions)
    query = query.where(is_candidate, feedback.c.annotator == annotator).order_by(rank, feedback.c.id).limit(STEP_ROWS)
    labels: dict[int, str] = {}
    n_unused, n_bytes = 0, 0
    for label_id, request, size_of_row, rank_of_label in connection.execute(query):
        if n_bytes >= min(n_excess, most / 10, STEP_BYTES):
            break
        labels[label_id] = request
        n_bytes += size_of_row
        n_unused += rank_of_label == 2
    if n_unused:
        logger.warning(
            "feedback.keep_gb: the store is full: %d new or accepted labels of %s are deleted", n_unused, annotator
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
        request = StoredRequest(stored)
        places = [place for place, row in enumerate(request.rows) if row in labelled[stored.id]]
        inputs, confidence = request.inputs(places), request.confidence()
        values = {
            "stored_rows": json.dumps([request.rows[place] for place in places]),
            "n_stored": len(places),
            "inputs": inputs.tobytes() if stored.format == "f8" else as_json(inputs).encode(),
            "outputs": as_json([request.outputs[place] for place in places]),
            "confidence": stored.confidence and as_json([confidence[place] for place in places]),
        }
        connection.execute(sa.update(predictions).where(predictions.c.id == stored.id).values(values))
