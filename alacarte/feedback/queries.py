"""Rows of the store as DataFrames for trainings and monitoring, read in chunks, so that little memory is needed."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import sqlalchemy as sa

from alacarte.feedback.database import feedback, input_schemas, predictions
from alacarte.feedback.records import prediction_id

CHUNK = 5_000  # predictions
GIVEN = (
    "source", "annotator", "state", "used_run_id", "used_version", "is_correction", "audit", "audit_share", "sample",
)  # fmt: skip
ABOUT_LABEL = ["label", "label_state", "is_correction"]

decode = msgspec.json.Decoder().decode


@dataclass(frozen=True)
class Labelled:
    """n labels with what they belong to; the three share their index.

    `about`: feedback_id, prediction_id, time (of the label, UTC), source, annotator, state, used_run_id, used_version,
    is_correction, audit, audit_share, sample, prediction, model_version.
    """

    inputs: pd.DataFrame  # (n, d) as the model's signature names them; redacted columns are missing values
    labels: pd.Series  # (n,)
    about: pd.DataFrame  # (n, 14)


@dataclass(frozen=True)
class Window:
    """n predicted rows; the two share their index.

    `about`: prediction_id, time (UTC), model_version, prediction, confidence, latency_ms (of the request), audit,
    audit_share, sample; label, label_state and is_correction of what people say, missing where nobody did.
    """

    inputs: pd.DataFrame  # (n, d); where models of one name had different columns, all of them
    about: pd.DataFrame  # (n, 12)


def inputs_of_row(prediction: Mapping[Any, Any], place: int) -> dict[str, Any]:
    """Column -> value of one stored row, None where it is missing. `prediction` has format, inputs and columns."""
    columns = json.loads(prediction["columns"])
    if prediction["format"] == "f8":
        values = _numbers([prediction["inputs"]], len(columns))[place]
        return {name: None if np.isnan(value) else float(value) for name, value in zip(columns, values, strict=True)}
    return dict(zip(columns, decode(prediction["inputs"])[place], strict=True))


def labelled(connection: sa.Connection, name: str, states: Sequence[str]) -> Labelled:
    """See Store.labelled."""
    fields = [
        feedback.c.id.label("feedback_id"), feedback.c.prediction_id.label("request"), feedback.c.row, feedback.c.time,
        feedback.c.source, feedback.c.annotator, feedback.c.state, feedback.c.used_run_id, feedback.c.used_version,
        feedback.c.is_correction, feedback.c.audit, feedback.c.label, predictions.c.audit_share, predictions.c.sample,
        predictions.c.model_version, predictions.c.n_rows, predictions.c.input_schema,
    ]  # fmt: skip
    query = sa.select(*fields).join_from(feedback, predictions).order_by(feedback.c.id)
    mine = (predictions.c.registered_model_name == name) & feedback.c.state.in_(states)
    labels = connection.execute(query.where(mine)).all()
    rows_of = defaultdict(list)  # request -> [(position among the labels, row)]
    for position, label in enumerate(labels):
        rows_of[label.request].append((position, label.row))
    columns_of = _columns_of(connection, {label.input_schema for label in labels})
    table, predicted, requests = _Table(), [None] * len(labels), list(rows_of)
    for start in range(0, len(requests), CHUNK // 10):
        chunk = sa.select(predictions).where(predictions.c.id.in_(requests[start : start + CHUNK // 10]))
        for stored in connection.execute(chunk):
            positions, rows = zip(*rows_of[stored.id], strict=True)
            if stored.stored_rows:
                place_of = {row: place for place, row in enumerate(decode(stored.stored_rows))}
                rows = tuple(place_of[row] for row in rows)
            names, answers = columns_of[stored.input_schema], decode(stored.outputs)
            table.add(names, stored.format, positions, _take(stored.format, stored.inputs, len(names), rows))
            for position, row in zip(positions, rows, strict=True):
                predicted[position] = answers[row]
    about = pd.DataFrame(
        {
            "feedback_id": [label.feedback_id for label in labels],
            "prediction_id": [prediction_id(label.request, label.row, label.n_rows) for label in labels],
            "time": pd.to_datetime([label.time for label in labels], unit="s", utc=True),
            **{key: [getattr(label, key) for label in labels] for key in GIVEN},
            "prediction": pd.Series(predicted, dtype=None if labels else object),
            "model_version": [label.model_version for label in labels],
        }
    )
    values = pd.Series([json.loads(label.label) for label in labels], name="label", dtype=None if labels else object)
    return Labelled(table.frame(), values, about)


def window(connection: sa.Connection, name: str, since: str, until: str) -> Window:
    """See Store.window; `since` and `until` are ids."""
    inside = (predictions.c.registered_model_name == name) & (predictions.c.id >= since) & (predictions.c.id < until)
    keys = sa.select(predictions.c.input_schema).where(inside).distinct()
    columns_of = _columns_of(connection, set(connection.scalars(keys)))
    fields = (
        "id", "n_rows", "time", "model_version", "latency_ms", "audit_share", "sample", "input_schema", "format", "inputs",
        "outputs", "confidence", "audit", "n_stored", "stored_rows",
    )  # fmt: skip
    query = sa.select(*[predictions.c[field] for field in fields]).where(inside).order_by(predictions.c.id)
    streamed = connection.execution_options(yield_per=CHUNK).execute(query)
    table, abouts, start = _Table(), [], 0
    for chunk in streamed.partitions():
        columns = dict(zip(fields, zip(*chunk, strict=True), strict=True))
        counts = np.array(columns["n_stored"])
        ends = np.cumsum(counts)
        for (schema, form), which in _groups(columns["input_schema"], columns["format"]):
            positions = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in which]) + start
            blobs = [columns["inputs"][i] for i in which]
            table.add(columns_of[schema], form, positions, _rows(form, blobs, len(columns_of[schema])))
        abouts.append(_about(columns, counts))
        start += int(counts.sum())
    about = (
        pd.concat(abouts, ignore_index=True) if abouts else _about({field: () for field in fields}, np.array([], int))
    )
    return Window(table.frame(), about.merge(_labels(connection, inside), "left", "prediction_id"))


def _about(columns: Mapping[str, Sequence], counts: np.ndarray) -> pd.DataFrame:
    """One row a predicted row, from lists of n requests."""
    ids: list[str] = []
    audit: list[bool] = []
    for request, n_rows, stored, drawn in zip(
        columns["id"], columns["n_rows"], columns["stored_rows"], columns["audit"], strict=True
    ):
        rows = decode(stored) if stored else range(n_rows)
        ids += [prediction_id(request, row, n_rows) for row in rows]
        drawn_rows = set(decode(drawn)) if drawn else ()
        audit += [row in drawn_rows for row in rows]
    confidence = [
        [None] * n if text is None else decode(text) for text, n in zip(columns["confidence"], counts, strict=True)
    ]
    predicted = list(chain.from_iterable(decode(f"[{','.join(columns['outputs'])}]")))
    return pd.DataFrame(
        {
            "prediction_id": pd.Series(ids, dtype="str"),
            "time": pd.to_datetime(np.repeat(np.array(columns["time"], float), counts), unit="s", utc=True),
            "model_version": pd.Series(np.repeat(np.array(columns["model_version"], object), counts), dtype="str"),
            "prediction": pd.Series(predicted, dtype=None if predicted else object),
            "confidence": np.array(list(chain.from_iterable(confidence)), float),
            "latency_ms": np.repeat(np.array(columns["latency_ms"], float), counts),
            "audit": np.array(audit, bool),
            "audit_share": np.repeat(np.array(columns["audit_share"], float), counts),
            "sample": np.repeat(np.array(columns["sample"], float), counts),
        }
    )


def _labels(connection: sa.Connection, inside: sa.ColumnElement[bool]) -> pd.DataFrame:
    """One label for each row that has one which is not rejected: rather accepted than used than new."""
    order = {"new": 0, "used": 1, "accepted": 2}
    fields = (
        predictions.c.id,
        predictions.c.n_rows,
        feedback.c.row,
        feedback.c.label,
        feedback.c.state,
        feedback.c.is_correction,
    )
    query = sa.select(*fields).join_from(feedback, predictions).where(inside, feedback.c.state.in_(order))
    found = sorted(connection.execute(query.order_by(feedback.c.id)).all(), key=lambda one: order[one.state])
    best = {(one.id if one.n_rows == 1 else f"{one.id}.{one.row}"): one for one in found}
    values = [(key, json.loads(one.label), one.state, one.is_correction) for key, one in best.items()]
    frame = pd.DataFrame(values, columns=["prediction_id", *ABOUT_LABEL])
    return frame.astype({"prediction_id": "str", **dict.fromkeys(ABOUT_LABEL, object)})


class _Table:
    """Rows of one table that come in pieces, with the positions where they belong."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[tuple[str, ...], str], list[tuple[Any, Any]]] = defaultdict(list)

    def add(self, columns: tuple[str, ...], form: str, positions: Any, rows: Any) -> None:
        self._pieces[columns, form].append((positions, rows))

    def frame(self) -> pd.DataFrame:
        frames = []
        for (columns, form), pieces in self._pieces.items():
            index = np.concatenate([positions for positions, _ in pieces])
            if form == "f8":
                rows: Any = np.concatenate([rows for _, rows in pieces])
            else:
                rows = list(chain.from_iterable(rows for _, rows in pieces))
            pieces.clear()
            frames.append(pd.DataFrame(rows, index=index, columns=list(columns)))
        if not frames:
            return pd.DataFrame()
        whole = frames[0] if len(frames) == 1 else pd.concat(frames)
        return whole.sort_index().reset_index(drop=True)


def _columns_of(connection: sa.Connection, keys: set[str]) -> dict[str, tuple[str, ...]]:
    found = connection.execute(
        sa.select(input_schemas.c.id, input_schemas.c.columns).where(input_schemas.c.id.in_(keys))
    )
    return {key: tuple(json.loads(columns)) for key, columns in found}


def _groups(*keys: Sequence) -> Iterator[tuple[tuple, list[int]]]:
    found = defaultdict(list)
    for i, key in enumerate(zip(*keys, strict=True)):
        found[key].append(i)
    yield from found.items()


def _rows(form: str, blobs: Sequence[bytes], width: int) -> Any:
    return _numbers(blobs, width) if form == "f8" else list(chain.from_iterable(map(decode, blobs)))


def _take(form: str, blob: bytes, width: int, rows: Sequence[int]) -> Any:
    whole = _rows(form, [blob], width)
    return whole[list(rows)] if form == "f8" else [whole[row] for row in rows]


def _numbers(blobs: Sequence[bytes], width: int) -> np.ndarray:
    return np.frombuffer(b"".join(blobs), "<f8").reshape(-1, width)
