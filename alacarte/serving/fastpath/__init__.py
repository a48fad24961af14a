"""A model without MLflow's checks and copies, used only if it gives MLflow's own answers. Optional: a server without this
folder gives the same answers, but more slowly.
"""

import logging
import math
import timeit
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
from mlflow.types import DataType

from alacarte.serving.fastpath import parity, transformers
from alacarte.serving.requests import FastParser
from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows

logger = logging.getLogger(__name__)

EXAMPLES = 100  # rows of the input example that a fast path is tried on
MANY = 500  # rows of the larger of the two requests that are measured

# From (n, d) float64, or d object arrays (n,), to labels (n,) and probabilities (n, n_classes) or None.
Predict = Callable[[Any], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class FastPath:
    """A way to answer that passed the parity check. Safe to use from several threads.

    `name` is "numpy" or "frame". `joint`: one call may answer several requests. `cost` is measured: seconds per call and row.
    """

    name: str
    parser: FastParser
    predict: Predict
    joint: bool
    cost: tuple[float, float] = (0.0, 0.0)

    def answer(self, requests: Sequence[Rows]) -> list[Answer | None]:
        """One entry per request of the parser's rows; None for a request that MLflow has to answer or to refuse."""
        answers: dict[int, Answer | None] = {}
        groups: dict[Hashable, list[int]] = {}
        for i, rows in enumerate(requests):
            shared = None if self.name == "numpy" else _column_types(rows)
            groups.setdefault(shared if self.joint else i, []).append(i)
        for group in groups.values():
            answers |= zip(group, self._answer_group([requests[i] for i in group]), strict=True)
        return [answers[i] for i in range(len(requests))]

    def _answer_group(self, requests: Sequence[Rows]) -> Sequence[Answer | None]:
        try:
            return _split(requests, *self.predict(_join(requests)))
        except Exception:  # MLflow's own path decides about the request, whatever the error is
            if len(requests) == 1:
                return [None]
        return [self._answer_group([rows])[0] for rows in requests]


def find_fast_path(
    implementation: Any,
    predict_frame: Predict,
    schema: InputSchema,
    example: pd.DataFrame | np.ndarray,
    reference: Callable[[Rows], Answer | RequestError],
) -> FastPath | None:
    """The first fast path that gives the answers of `reference` on the input example and on rows made from it.

    `predict_frame` asks the model `implementation` for labels and probabilities. `reference` answers rows of which only the
    body is set. Takes seconds.
    """
    base = parity.table_of(example[:EXAMPLES], schema)
    cases = [(rows.body, reference(rows)) for rows in parity.requests_from(base, schema)]
    for name, predict, joint in _candidates(implementation, predict_frame, schema):
        for missing in (True, False):
            path = FastPath(name, FastParser(schema, parity.kinds_in(base), missing), predict, joint)
            if parity.holds(path, cases):
                return replace(path, cost=_measure(path, base))
    return None


def _candidates(
    implementation: Any, predict_frame: Predict, schema: InputSchema
) -> Iterator[tuple[str, Predict, bool]]:
    try:
        yield "numpy", transformers.compile_model(implementation, schema.names, schema.numeric), True
    except Exception as error:  # a model of another version may lack any attribute
        logger.debug("%s has no numpy path: %s: %s", type(implementation).__name__, type(error).__name__, error)
    for joint in (True, False):  # a model may let the rows of one call influence each other
        yield "frame", lambda data: _through_frame(predict_frame, schema, data), joint


def _column_types(rows: Rows) -> Hashable:
    """pandas infers the type of a column from the types of its values, so only requests with equal types share a frame."""
    inferred = zip(rows.schema.types, rows.values or (), strict=False)
    return tuple(frozenset(map(type, values)) for kind, values in inferred if kind in ("string", "any"))


def _through_frame(predict_frame: Predict, schema: InputSchema, data: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Predict the rows as MLflow's schema enforcement leaves them."""
    if schema.tensor:
        table = data
    elif set(schema.types) == {"double"}:
        table = pd.DataFrame(data, columns=schema.names)
    else:
        columns = {}
        for i, (name, kind) in enumerate(zip(schema.names, schema.types, strict=True)):
            values = data[:, i] if schema.numeric else data[i].tolist()
            dtype = None if kind in ("string", "any") else DataType[kind].to_pandas()
            columns[name] = pd.Series(values, dtype=dtype)
        table = pd.DataFrame(columns)
    labels, probabilities = predict_frame(table)
    return np.asarray(labels), probabilities


def _measure(path: FastPath, base: parity.Table) -> tuple[float, float]:
    def seconds(n: int) -> float:
        rows = path.parser.parse(parity.body_of((base * n)[:n], path.parser.schema), n)
        assert rows
        return min(timeit.repeat(lambda: path.answer([rows]), number=1, repeat=5))

    call, calls = seconds(1), seconds(MANY)
    return call, max(0.0, (calls - call) / MANY)


def _join(requests: Sequence[Rows]) -> Any:
    """The rows of one or more requests as one `numbers`, or one `values`."""
    first = requests[0]
    if len(requests) == 1:
        return first.numbers if first.values is None else first.values
    if first.values is None:
        return np.concatenate([rows.numbers for rows in requests])
    return [np.concatenate(columns) for columns in zip(*(rows.values or [] for rows in requests), strict=True)]


def _split(requests: Sequence[Rows], labels: np.ndarray, proba: np.ndarray | None) -> list[Answer | None]:
    """The answers of one call, request by request. ValueError where a row has no answer, or none that is finite."""
    ends = list(accumulate(rows.n for rows in requests))
    finite = labels.dtype.kind != "f" or math.isfinite(labels.sum())
    if labels.shape != (ends[-1],) or not finite or not (proba is None or math.isfinite(proba.sum())):
        raise ValueError("no answer per row, or none that is finite")
    plain, best = labels.tolist(), None if proba is None else proba.max(axis=1).tolist()
    return [
        Answer(plain[end - rows.n : end], None if best is None else best[end - rows.n : end])
        for rows, end in zip(requests, ends, strict=True)
    ]
