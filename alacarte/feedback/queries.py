"""Rows of the store as DataFrames, for retraining and monitoring."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from alacarte.feedback.database import feedback, input_schemas, predictions
from alacarte.feedback.records import StoredRequest, prediction_id

CHUNK = 500  # requests that are in memory at the same time
LABEL_COLUMNS = [feedback.c[name] for name in ("source", "annotator", "state", "used_run_id", "used_version",
                                               "is_correction", "audit")]  # fmt: skip
REQUEST_COLUMNS = [predictions.c[name] for name in ("audit_share", "sample", "model_version")]
WINDOW_COLUMNS = ["prediction_id", "time", "model_version", "prediction", "confidence", "latency_ms", "audit",
                  "audit_share", "sample", "input_schema", "label", "label_state", "is_correction"]  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """n labels with what they belong to; the three share their index.

    `about`: feedback_id, prediction_id, time (of the label, UTC), source, annotator, state, used_run_id, used_version,
    is_correction, audit, audit_share, sample, model_version, prediction.
    """

    inputs: pd.DataFrame  # (n, d) as the model's signature names them; without redacted columns
    labels: pd.Series  # (n,)
    about: pd.DataFrame  # (n, 14)


@dataclass(frozen=True)
class Window:
    """n predicted rows; the two share their index.

    `about`: prediction_id, time (UTC), model_version, prediction, confidence, latency_ms (of the request), audit,
    audit_share, sample, input_schema; label, label_state and is_correction, which are missing in a row without a label.
    """

    inputs: pd.DataFrame  # (n, d); all columns, if models of one name had different columns
    about: pd.DataFrame  # (n, 13)
    columns_of: Mapping[str, list[str]]  # input_schema -> the columns that were stored, without redacted ones


def labelled(connection: sa.Connection, name: str, states: Sequence[str]) -> Labelled:
    """See Store.labelled."""
    query = sa.select(
        feedback.c.id.label("feedback_id"), feedback.c.prediction_id.label("request"), feedback.c.row, predictions.c.n_rows,
        feedback.c.time, feedback.c.label, *LABEL_COLUMNS, *REQUEST_COLUMNS,
    ).join_from(feedback, predictions)  # fmt: skip
    is_chosen = (predictions.c.registered_model_name == name) & feedback.c.state.in_(states)
    result = connection.execute(query.where(is_chosen).order_by(feedback.c.id))
    about = pd.DataFrame(result.all(), columns=list(result.keys()))
    positions = defaultdict(list)  # of the labels of each request
    for position, request in enumerate(about["request"]):
        positions[request].append(position)
    inputs, predicted, requests = _Inputs(connection), [None] * len(about), list(positions)
    for start in range(0, len(requests), CHUNK):
        chunk = predictions.c.id.in_(requests[start : start + CHUNK])
        for stored in connection.execute(sa.select(predictions).where(chunk)):
            request = StoredRequest(stored)
            places = [request.place_of[row] for row in about["row"].iloc[positions[stored.id]]]
            inputs.add(request, places, positions[stored.id])
            for position, place in zip(positions[stored.id], places, strict=True):
                predicted[position] = request.outputs[place]
    labels = _column([json.loads(label) for label in about.pop("label")]).rename("label")
    ids = map(prediction_id, about.pop("request"), about.pop("row"), about.pop("n_rows"))
    about.insert(1, "prediction_id", list(ids))
    about["time"] = pd.to_datetime(about["time"], unit="s", utc=True)
    return Labelled(inputs.table(), labels, about.assign(prediction=_column(predicted)))


def window(connection: sa.Connection, name: str, since: str, until: str, max_rows: float) -> Window:
    """See Store.window; `since` and `until` are ids."""
    is_inside = (predictions.c.registered_model_name == name) & (predictions.c.id >= since) & (predictions.c.id < until)
    label_of = _labels(connection, is_inside)
    inputs = _Inputs(connection)
    rows: list[tuple] = []
    query = sa.select(predictions).where(is_inside).order_by(predictions.c.id.desc())
    with connection.execute(query, execution_options={"yield_per": CHUNK}) as result:
        for stored in result:
            if len(rows) >= max_rows:
                break
            request = StoredRequest(stored)
            n, confidence = len(request.rows), request.confidence()
            inputs.add(request, range(n), range(-len(rows) - n, -len(rows)))  # the newest request comes first
            for place, row in reversed(list(enumerate(request.rows))):
                identifier = prediction_id(stored.id, row, stored.n_rows)
                rows.append((
                    identifier, stored.time, stored.model_version, request.outputs[place], confidence[place],
                    stored.latency_ms, row in request.audit, stored.audit_share, stored.sample, stored.input_schema,
                    *label_of.get(identifier, (None, None, None)),
                ))  # fmt: skip
    columns = zip(*reversed(rows), strict=True) if rows else [()] * len(WINDOW_COLUMNS)
    about = pd.DataFrame({key: _column(values) for key, values in zip(WINDOW_COLUMNS, columns, strict=True)})
    about["time"] = pd.to_datetime(about["time"], unit="s", utc=True)
    about = about.astype({"confidence": float, "audit": bool, "label": object, "is_correction": object})
    return Window(inputs.table(), about, inputs.columns_of())


def _labels(connection: sa.Connection, is_inside: sa.ColumnElement[bool]) -> dict[str, tuple[Any, str, bool]]:
    """Prediction id -> label, state and is_correction. Of several labels, accepted comes before used, used before new."""
    order = {"new": 0, "used": 1, "accepted": 2}
    rank = sa.case(order, value=feedback.c.state)
    query = sa.select(feedback, predictions.c.n_rows).join_from(feedback, predictions)
    query = query.where(is_inside, feedback.c.state.in_(order)).order_by(rank, feedback.c.id)
    return {
        prediction_id(label.prediction_id, label.row, label.n_rows):
            (json.loads(label.label), label.state, label.is_correction)
        for label in connection.execute(query)
    }  # fmt: skip


class _Inputs:
    """A table of inputs, collected request by request. Requests of different models may have different columns."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._pieces: dict[tuple[str, str], list[tuple[Any, Sequence[int]]]] = defaultdict(list)

    def add(self, request: StoredRequest, places: Sequence[int], positions: Sequence[int]) -> None:
        """Add the rows at these places of the request, at these positions of the table."""
        key = request.stored.input_schema, request.stored.format
        self._pieces[key].append((request.inputs(places), positions))

    def columns_of(self) -> dict[str, list[str]]:
        keys = {schema for schema, _ in self._pieces}
        query = sa.select(input_schemas.c.id, input_schemas.c.columns).where(input_schemas.c.id.in_(keys))
        return {key: json.loads(columns) for key, columns in self._connection.execute(query)}

    def table(self) -> pd.DataFrame:
        columns_of, frames = self.columns_of(), []
        for (schema, _), pieces in self._pieces.items():
            rows = np.concatenate if isinstance(pieces[0][0], np.ndarray) else _chain
            index = np.concatenate([positions for _, positions in pieces])
            frames.append(pd.DataFrame(rows([values for values, _ in pieces]), index=index, columns=columns_of[schema]))
        return pd.concat(frames).sort_index().reset_index(drop=True) if frames else pd.DataFrame()


def _chain(lists: Sequence[list]) -> list:
    return [row for rows in lists for row in rows]


def _column(values: Sequence) -> pd.Series:
    """Values of any type: pandas infers the type, also text."""
    return pd.Series(list(values), dtype=None if len(values) else object)
