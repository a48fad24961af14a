"""scikit-learn and torch models as a few numpy calls, used where they give MLflow's own answers. Optional: a server without
this folder answers the same, but slower.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
from mlflow.types import DataType

from alacarte.serving.fastpath import parity, transformers
from alacarte.serving.requests import FastParser
from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows, join

log = logging.getLogger(__name__)

EXAMPLES = 100  # rows of the input example that a fast path is tried on
MANY = 500  # rows of the larger of the two requests that are measured

# From (n, d) float64, or d object arrays (n,), to labels (n,) and probabilities (n, n_classes) or None.
Predict = Callable[[Any], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class FastPath:
    """A way to answer that passed the parity check. Safe to use from several threads.

    `name`: "numpy" or "frame" (a DataFrame or array straight into the estimator). `joint`: several requests may be one
    call. `cost`: measured seconds per call and seconds per row.
    """

    name: str
    parser: FastParser
    predict: Predict
    joint: bool
    cost: tuple[float, float] = (0.0, 0.0)

    def answer(self, requests: Sequence[Rows]) -> list[Answer | None]:
        """One entry per request of the parser's rows; None for a request that MLflow has to answer, or to refuse."""
        if len(requests) == 1 or (requests and self.joint):
            try:
                return _split(requests, *self.predict(join(requests)))
            except Exception:  # MLflow's way decides what becomes of the request, whatever the error is
                if len(requests) == 1:
                    return [None]
        return [answer for rows in requests for answer in self.answer([rows])]


def find_fast_path(
    kind: str,
    implementation: Any,
    schema: InputSchema,
    example: pd.DataFrame | np.ndarray,
    exact: bool,
    reference: Callable[[Rows], Answer | RequestError],
) -> FastPath | None:
    """The first fast path that gives the answers of `reference` on the input example and on rows made from it.

    `kind` is "sklearn" or "torch", `implementation` the estimator or Predictor, `exact` whether labels must be equal
    (classes) or close (numbers). `reference` answers rows of which only the body is set. Takes seconds.
    """
    base = parity.table_of(example[:EXAMPLES], schema)
    cases = [parity.Case(body, reference(rows)) for rows, body in parity.requests_from(base, schema)]
    for name, predict, joint in _candidates(kind, implementation, schema):
        for missing in (True, False):
            path = FastPath(name, FastParser(schema, parity.kinds_in(base), missing), predict, joint)
            if parity.holds(path, cases, exact):
                return replace(path, cost=_measure(path, base))
    return None


def _candidates(kind: str, implementation: Any, schema: InputSchema) -> Iterator[tuple[str, Predict, bool]]:
    try:
        yield "numpy", transformers.compile_model(kind, implementation, schema.names, schema.numeric), True
    except Exception as error:  # a model of another version may lack any attribute
        log.debug("%s has no numpy path: %s: %s", type(implementation).__name__, type(error).__name__, error)
    if kind == "sklearn":  # pandas types a column by all its values, so rows of several requests may not share a frame
        yield "frame", lambda data: _through_frame(implementation, schema, data), schema.numeric


def _through_frame(model: Any, schema: InputSchema, data: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows as MLflow's schema enforcement leaves them, straight into the estimator."""
    if schema.tensor:
        frame = data
    elif set(schema.types) == {"double"}:
        frame = pd.DataFrame(data, columns=schema.names)
    else:
        columns = {}
        for i, (name, kind) in enumerate(zip(schema.names, schema.types, strict=True)):
            values = data[:, i] if schema.numeric else data[i].tolist()
            dtype = None if kind in ("string", "any") else DataType[kind].to_pandas()
            columns[name] = pd.Series(values, dtype=dtype)
        frame = pd.DataFrame(columns)
    return np.asarray(model.predict(frame)), model.predict_proba(frame) if hasattr(model, "predict_proba") else None


def _measure(path: FastPath, base: parity.Table) -> tuple[float, float]:
    def seconds(n: int) -> float:
        rows = path.parser.parse(parity.body_of((base * n)[:n], path.parser.schema), n)
        assert rows
        times = []
        for _ in range(5):
            start = time.perf_counter()
            path.answer([rows])
            times.append(time.perf_counter() - start)
        return min(times)

    one, many = seconds(1), seconds(MANY)
    return one, max(0.0, (many - one) / MANY)


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
