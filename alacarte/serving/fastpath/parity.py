"""The parity check: does a fast path answer as MLflow does, on the input example and on rows made from it?

Every row is sent as the body of a request, so that the check covers the parser too.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows, as_frame, to_python

if TYPE_CHECKING:
    from alacarte.serving.fastpath import FastPath

TOLERANCE = 1e-5  # relative, of numbers and confidences; labels must be equal

ALONE = 20  # columns for which a row with one missing value is a request of its own: each costs MLflow's time

Table = list[list[Any]]


@dataclass
class Case:
    """A request, and MLflow's answer to it or refusal of it."""

    body: bytes
    expected: Answer | RequestError


def table_of(example: Any, schema: InputSchema) -> Table:
    """The rows of an input example as JSON has them, columns as in the signature."""
    frame = as_frame(example, schema)
    columns = [[_json(value) for value in to_python(frame.iloc[:, i])] for i in range(frame.shape[1])]
    return [list(row) for row in zip(*columns, strict=True)]


def kinds_in(table: Table) -> list[frozenset[type]]:
    """The types of JSON value in each column; a whole number stands for any number."""
    kinds = []
    for column in zip(*table, strict=True):
        types = {type(value) for value in column if value is not None}
        kinds.append(frozenset(types | {int, float} if types & {int, float} else types))
    return kinds


def body_of(table: Table, schema: InputSchema) -> bytes:
    """A table as the body of a request."""
    content = {"inputs": table} if schema.tensor else {"dataframe_split": {"columns": schema.names, "data": table}}
    return json.dumps(content).encode()


def requests_from(base: Table, schema: InputSchema) -> Iterator[tuple[Rows, bytes]]:
    """The cases, as rows that only MLflow's parser reads, and as bodies."""
    for table in _tables(base):
        body = body_of(table, schema)
        yield Rows(len(table), schema, values=[], body=body), body


def _tables(base: Table, seed: int = 0) -> Iterator[Table]:
    """The example, its rows one by one, shuffled columns, changed numbers, unknown texts, other days, missing values."""
    rng, width = np.random.default_rng(seed), len(base[0])

    def every(change: Callable[[Any], Any], rows: Table) -> Table:
        return [[value if value is None else change(value) for value in row] for row in rows]

    def shuffled(n: int) -> Table:
        columns = [[column[i] for i in rng.integers(0, len(base), n)] for column in zip(*base, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def at(places: Sequence[int], change: Callable[[Any], Any]) -> Table:
        return [[change(value) if j in places else value for j, value in enumerate(row)] for row in base[:2]]

    def move(value: Any) -> Any:
        scale = rng.choice([0.01, 0.3, 1, 10])
        return _change(value, lambda number: number * (1 + scale * rng.normal()) + scale * rng.normal())

    def with_rows_alone(table: Table) -> Iterator[Table]:
        yield table
        yield from ([row] for row in table[:5])

    yield from with_rows_alone(base)
    yield shuffled(50)
    for factor in (0.0, -1.0, 0.5, 1e3, 1e6, -1e9, 1e-6):
        yield every(partial(_change, change=partial(operator.mul, factor)), base[:5])
    yield from with_rows_alone(every(move, shuffled(300)))
    texts = [i for i in range(width) if any(isinstance(row[i], str) for row in base[:2])]
    for text in ("never seen \u00e9\U0001f600", "", "1", "nan", "x" * 300):
        for i in texts:
            yield from with_rows_alone(at([i], lambda value: text if isinstance(value, str) else value))  # noqa: B023
    yield every(lambda value: not value if isinstance(value, bool) else value, shuffled(20))
    yield every(_other_day, shuffled(20))
    yield from with_rows_alone(every(lambda value: None if rng.random() < 0.2 else value, shuffled(60)))
    one_missing = [[None if j == i else value for j, value in enumerate(base[0])] for i in range(width)]
    yield one_missing
    yield from ([row] for row in one_missing[:ALONE])
    all_missing = [None] * width
    yield from ([all_missing], [all_missing] * 3, [base[0], all_missing])


def holds(path: FastPath, cases: list[Case], exact: bool) -> bool:
    """Whether `path` answers every case that its parser takes as MLflow does, one by one and all in one call.

    A path that leaves a case to MLflow does not disagree; but it must answer the first case.
    """
    taken: list[tuple[Rows, Case]] = []
    for case in cases:
        rows = path.parser.parse(case.body, max_rows=10**9)
        answer = path.answer([rows])[0] if rows else None
        if answer is None or rows is None:
            if case is cases[0]:
                return False
        elif not _agree(answer, case.expected, exact):
            return False
        else:
            taken.append((rows, case))
    answers = path.answer([rows for rows, _ in taken])
    pairs = zip(answers, taken, strict=True)
    return all(answer is None or _agree(answer, case.expected, exact) for answer, (_, case) in pairs)


def _agree(answer: Answer, expected: Answer | RequestError, exact: bool) -> bool:
    """Whether labels are equal in value and type, and numbers and confidences close."""
    if isinstance(expected, RequestError) or list(map(type, answer.labels)) != list(map(type, expected.labels)):
        return False
    if exact or any(type(label) is not float for label in expected.labels):
        if answer.labels != expected.labels:
            return False
    elif not _close(answer.labels, expected.labels):
        return False
    if answer.confidence is None or expected.confidence is None:
        return answer.confidence is expected.confidence
    return _close(answer.confidence, expected.confidence)


def _close(values: list[float], expected: list[float]) -> bool:
    near_zero = TOLERANCE * 1e-2 * float(np.max(np.abs(expected), initial=0.0))
    return np.allclose(values, expected, rtol=TOLERANCE, atol=near_zero)


def _change(value: Any, change: Callable[[float], float]) -> Any:
    """A number changed; a whole number stays whole, as its column requires. Any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(np.clip(change(value), -(2**31) + 1, 2**31 - 1)) if isinstance(value, int) else float(change(value))


def _other_day(value: Any) -> Any:
    return "1990-05-17" + value[10:] if isinstance(value, str) and value[4:5] == value[7:8] == "-" else value


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
