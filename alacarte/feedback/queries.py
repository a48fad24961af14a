"""Rows of the store as DataFrames, for retraining and monitoring."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from alacarte.feedback.database import feedback, input_schemas, predictions
from alacarte.feedback.records import StoredRequest, decode_inputs, prediction_id

CHUNK = 500  # requests that are in memory at the same time
LABEL_COLUMNS = [feedback.c.id.label("feedback_id"), *(feedback.c[name] for name in (
    "prediction_id", "time", "source", "annotator", "state", "used_run_id", "used_version", "is_correction", "audit",
    "model_version", "prediction", "label", "input_schema", "format", "inputs"))]  # fmt: skip
WINDOW_COLUMNS = ["prediction_id", "time", "model_version", "prediction", "confidence", "latency_ms", "audit",
                  "input_schema", "label", "is_correction"]  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """n labels with what they belong to; the three share their index.

    `about`: feedback_id, prediction_id, time (of the label, UTC), source, annotator, state, used_run_id, used_version,
    is_correction, audit, model_version, prediction.
    """

    inputs: pd.DataFrame  # (n, d) as the model's signature names them; without redacted columns
    labels: pd.Series  # (n,)
    about: pd.DataFrame  # (n, 12)


@dataclass(frozen=True)
class Window:
    """n predicted rows; the two share their index.

    `about`: prediction_id, time (UTC), model_version, prediction, confidence, latency_ms (of the request), audit,
    input_schema; label and is_correction, which are missing in a row without a label.
    """

    inputs: pd.DataFrame  # (n, d); all columns, if models of one name had different columns
    about: pd.DataFrame  # (n, 10)
    columns_of: Mapping[str, list[str]]  # input_schema -> the columns that were stored, without redacted ones


def labelled(connection: sa.Connection, name: str, states: Sequence[str]) -> Labelled:
    """See Store.labelled."""
    is_chosen = (feedback.c.registered_model_name == name) & feedback.c.state.in_(states)
    result = connection.execute(sa.select(*LABEL_COLUMNS).where(is_chosen).order_by(feedback.c.id))
    about = pd.DataFrame(result.all(), columns=list(result.keys()))
    inputs = _Inputs(connection)
    rows = zip(*(about.pop(name) for name in ("input_schema", "format", "inputs")), strict=True)
    for position, (schema, encoding, row) in enumerate(rows):
        inputs.add(schema, encoding, decode_inputs(encoding, row, 1), [position])
    labels = _column([json.loads(label) for label in about.pop("label")]).rename("label")
    about["prediction"] = _column([json.loads(prediction) for prediction in about["prediction"]])
    about["time"] = pd.to_datetime(about["time"], unit="s", utc=True)
    return Labelled(inputs.table(), labels, about)


def window(connection: sa.Connection, name: str, since: str, until: str, max_rows: float) -> Window:
    """See Store.window; `since` and `until` are ids."""
    is_inside = (predictions.c.registered_model_name == name) & (predictions.c.id >= since) & (predictions.c.id < until)
    label_of = _labels(connection, name, since, until)
    inputs = _Inputs(connection)
    rows: list[tuple] = []
    query = sa.select(predictions).where(is_inside).order_by(predictions.c.id.desc())
    with connection.execute(query, execution_options={"yield_per": CHUNK}) as result:
        for stored in result:
            if len(rows) >= max_rows:
                break
            request, n = StoredRequest(stored), stored.n_rows
            confidence = json.loads(stored.confidence) if stored.confidence else [None] * n
            # The newest request comes first.
            inputs.add(stored.input_schema, stored.format, request.inputs, range(-len(rows) - n, -len(rows)))
            for row in reversed(range(n)):
                identifier = prediction_id(stored.id, row, n)
                rows.append((
                    identifier, stored.time, stored.model_version, request.outputs[row], confidence[row],
                    stored.latency_ms, row in request.audit, stored.input_schema,
                    *label_of.get(identifier, (None, None)),
                ))  # fmt: skip
    columns = zip(*reversed(rows), strict=True) if rows else [()] * len(WINDOW_COLUMNS)
    about = pd.DataFrame({key: _column(values) for key, values in zip(WINDOW_COLUMNS, columns, strict=True)})
    about["time"] = pd.to_datetime(about["time"], unit="s", utc=True)
    about = about.astype({"confidence": float, "audit": bool, "label": object, "is_correction": object})
    return Window(inputs.table(), about, inputs.columns_of())


def _labels(connection: sa.Connection, name: str, since: str, until: str) -> dict[str, tuple[Any, bool]]:
    """Prediction id -> label and is_correction. Of several labels, accepted comes before used, used before new."""
    order = {"new": 0, "used": 1, "accepted": 2}
    query = sa.select(feedback.c.prediction_id, feedback.c.label, feedback.c.is_correction).where(
        feedback.c.registered_model_name == name, feedback.c.state.in_(order),
        feedback.c.prediction_id >= since, feedback.c.prediction_id < until,
    )  # fmt: skip
    rows = connection.execute(query.order_by(sa.case(order, value=feedback.c.state), feedback.c.id))
    return {row.prediction_id: (json.loads(row.label), row.is_correction) for row in rows}


class _Inputs:
    """A table of inputs, collected piece by piece. Requests of different models may have different columns."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._pieces: dict[tuple[str, str], list[tuple[Any, Sequence[int]]]] = defaultdict(list)

    def add(self, schema: str, encoding: str, rows: Any, positions: Sequence[int]) -> None:
        """Add decoded rows at these positions of the table."""
        self._pieces[schema, encoding].append((rows, positions))

    def columns_of(self) -> dict[str, list[str]]:
        keys = {schema for schema, _ in self._pieces}
        query = sa.select(input_schemas.c.id, input_schemas.c.columns).where(input_schemas.c.id.in_(keys))
        return {key: json.loads(columns) for key, columns in self._connection.execute(query)}

    def table(self) -> pd.DataFrame:
        columns_of, frames = self.columns_of(), []
        for (schema, encoding), pieces in self._pieces.items():
            values, positions = zip(*pieces, strict=True)
            rows = np.concatenate(values) if encoding == "f8" else list(chain.from_iterable(values))
            index = list(chain.from_iterable(positions))
            frames.append(pd.DataFrame(rows, index=index, columns=columns_of[schema]))
        return pd.concat(frames).sort_index().reset_index(drop=True) if frames else pd.DataFrame()


def _column(values: Sequence) -> pd.Series:
    """Values of any type: pandas infers the type, also text."""
    return pd.Series(list(values), dtype=None if len(values) else object)
