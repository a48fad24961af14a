"""Deletion of old rows, so that the rows of a model stay below an age and a size. The order is:

1. Predictions, the oldest first: above the age, then above the size. A label keeps a copy of its row.
2. Above the size, when no prediction is left: labels, from the annotator whose labels use most space, so that nobody can
   push out the labels of others. Of these first the rejected labels, then the used ones, then new and accepted ones, in
   each group the oldest first.

A label that a running training has claimed is never deleted.
"""

import logging

import sqlalchemy as sa

from alacarte.feedback.database import Database, feedback, predictions

STEP_ROWS, STEP_BYTES = 5_000, 32_000_000  # that one call deletes at most
ROW_BYTES, LABEL_BYTES = 300, 400  # of a prediction beside inputs and outputs, of a label beside inputs and comment

logger = logging.getLogger(__name__)

size_of_request = sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES
size_of_label = (
    sa.func.length(feedback.c.inputs) + sa.func.length(sa.func.coalesce(feedback.c.comment, "")) + LABEL_BYTES
)
is_unclaimed = (feedback.c.state != "accepted") | feedback.c.used_run_id.is_(None)


def prune(database: Database, name: str, oldest: str, max_bytes: float) -> int:
    """Delete a part of the rows of a registered model with ids below `oldest` or above the size; 0 when none is left."""
    with database.read() as connection:
        n_excess = excess(connection, name, max_bytes)
        requests = _old_requests(connection, name, oldest, n_excess)
        labels = _expendable(connection, name, n_excess) if n_excess and not requests else []
    query = sa.select(predictions.c.id).where(predictions.c.id.in_(requests))
    if labels:
        query = sa.select(feedback.c.id).where(feedback.c.id.in_(labels), is_unclaimed)
    elif not requests:
        return 0
    with database.write(durable=False) as connection:
        ids = connection.scalars(query.with_for_update(skip_locked=True)).all()
        table = feedback if labels else predictions
        connection.execute(sa.delete(table).where(table.c.id.in_(ids)))
    return len(ids)


def excess(connection: sa.Connection, name: str, limit: float) -> float:
    """Bytes by which the rows of a registered model are above `limit`, 0 below it.

    Free space that deleted rows left in the files does not count: SQLite and PostgreSQL use it for new rows.
    """
    models = [table.c.registered_model_name for table in (predictions, feedback)]
    if connection.dialect.name == "sqlite":
        pragmas = [f"PRAGMA {name_of_pragma}" for name_of_pragma in ("page_count", "freelist_count", "page_size")]
        pages, free, page = (connection.exec_driver_sql(pragma).scalar_one() for pragma in pragmas)
        total = (pages - free) * page
        ends = [sa.select(end(model)).scalar_subquery() for model in models for end in (sa.func.min, sa.func.max)]
        if set(connection.execute(sa.select(*ends)).one()) <= {name, None}:  # the usual case, known from the index
            return max(0.0, total - limit)
    else:
        relations = [sa.func.pg_total_relation_size(table.name) for table in (predictions, feedback)]
        total = connection.execute(sa.select(relations[0] + relations[1])).scalar_one()
    if total <= limit:
        return 0.0
    sums = [sa.select(sa.func.sum(size)).where(model == name)
            for size, model in zip((size_of_request, size_of_label), models, strict=True)]  # fmt: skip
    return max(0.0, sum(float(connection.scalar(query) or 0) for query in sums) - limit)


def _old_requests(connection: sa.Connection, name: str, oldest: str, n_excess: float) -> list[str]:
    query = sa.select(predictions.c.id, size_of_request).where(predictions.c.registered_model_name == name)
    if not n_excess:
        query = query.where(predictions.c.id < oldest)
    requests, n_bytes = [], 0
    for request, size in connection.execute(query.order_by(predictions.c.id).limit(STEP_ROWS)):
        if n_bytes >= STEP_BYTES or (request >= oldest and n_bytes >= n_excess):
            break
        requests.append(request)
        n_bytes += size
    return requests


def _expendable(connection: sa.Connection, name: str, n_excess: float) -> list[int]:
    """Labels to delete: of the annotator whose labels use most space, a tenth of it at most."""
    is_candidate = (feedback.c.registered_model_name == name) & is_unclaimed
    total = sa.func.sum(size_of_label)
    totals = sa.select(feedback.c.annotator, total).where(is_candidate).group_by(feedback.c.annotator)
    largest = connection.execute(totals.order_by(total.desc()).limit(1)).one_or_none()
    if largest is None:
        return []
    annotator, most = largest[0], float(largest[1])
    rank = sa.case({"rejected": 0, "used": 1}, value=feedback.c.state, else_=2)
    query = sa.select(feedback.c.id, size_of_label, rank).where(is_candidate, feedback.c.annotator == annotator)
    labels: list[int] = []
    n_unused, n_bytes = 0, 0
    for label_id, size, rank_of_label in connection.execute(query.order_by(rank, feedback.c.id).limit(STEP_ROWS)):
        if n_bytes >= min(n_excess, most / 10, STEP_BYTES):
            break
        labels.append(label_id)
        n_bytes += size
        n_unused += rank_of_label == 2
    if n_unused:
        logger.warning(
            "feedback.keep_gb: the store is full: %d new or accepted labels of %s are deleted", n_unused, annotator
        )
    return labels
