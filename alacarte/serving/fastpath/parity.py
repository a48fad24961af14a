"""The parity check: does a fast path answer as MLflow does, on the input example and on rows made from it?

Every row is sent as the body of a request, so that the check covers the parser too.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows, as_frame, to_python

if TYPE_CHECKING:
    from alacarte.serving.fastpath import FastPath

TOLERANCE = 1e-5  # relative, of numbers and confidences; labels must be equal

SINGLE = 5  # rows of a table that are requests of their own: each costs MLflow's time
MISSING = 20  # columns for which a row with one missing value is a request of its own
TEXTS = ("never seen \u00e9\U0001f600", "", "1", "nan", "x" * 300)
FACTORS = (0.0, 0.5, 1e6, -1e9)
SCALES = (0.01, 0.3, 1, 10)

Table = list[list[Any]]


def table_of(example: Any, schema: InputSchema) -> Table:
    """The rows of an input example as JSON has them, columns as in the signature."""
    columns = [msgspec.to_builtins(to_python(column)) for _, column in as_frame(example, schema).items()]
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


def requests_from(base: Table, schema: InputSchema) -> Iterator[Rows]:
    """The cases, as rows that only MLflow's parser reads."""
    for table in _tables(base):
        yield Rows(len(table), schema, values=[], body=body_of(table, schema))


def _tables(base: Table) -> Iterator[Table]:
    """The example, shuffled columns, other numbers, unknown texts, other days and missing values; single rows too."""
    rng, width = np.random.default_rng(0), len(base[0])

    def shuffled(n: int) -> Table:
        columns = [[column[i] for i in rng.integers(0, len(base), n)] for column in zip(*base, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def vary(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, str):  # another day
            return "1990-05-17" + value[10:] if value[4:5] == value[7:8] == "-" else value
        scale = rng.choice(SCALES)
        return _map_number(value, lambda number: number * (1 + scale * rng.normal()) + scale * rng.normal())

    def with_cell(row: list, i: int, value: Any) -> list:
        return [*row[:i], value, *row[i + 1 :]]

    tables = [base, [list(map(vary, row)) for row in shuffled(300)]]
    tables += [[[_map_number(value, factor.__mul__) for value in row] for row in base[:5]] for factor in FACTORS]
    tables += [[[None if rng.random() < 0.2 else value for value in row] for row in shuffled(60)]]
    for i in range(width):
        if any(isinstance(row[i], str) for row in base[:2]):
            tables += [[with_cell(row, i, text) for row in base[:2]] for text in TEXTS]
    one_missing = [with_cell(base[0], i, None) for i in range(width)]
    all_missing = [None] * width
    tables += [one_missing, *([row] for row in one_missing[SINGLE:MISSING]), [base[0], all_missing], [all_missing] * 3]
    for table in tables:
        yield table
        yield from ([row] for row in table[:SINGLE])


def _map_number(value: Any, change: Callable[[float], float]) -> Any:
    """A number changed; a whole number stays whole, as its column requires. Any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(np.clip(change(value), -(2**31) + 1, 2**31 - 1)) if isinstance(value, int) else float(change(value))


def holds(path: FastPath, cases: Sequence[tuple[bytes, Answer | RequestError]]) -> bool:
    """Whether `path` answers every case that its parser takes as MLflow does, one by one and all in one call.

    A path that leaves a case to MLflow does not disagree; but it must answer the first case.
    """
    answered = []
    for number, (body, expected) in enumerate(cases):
        rows = path.parser.parse(body, max_rows=10**9)
        answer = rows and path.answer([rows])[0]
        if (answer and not _agree(answer, expected)) or (number == 0 and not answer):
            return False
        if rows and answer:
            answered.append((rows, expected))
    together = path.answer([rows for rows, _ in answered])
    return all(_agree(answer, expected) for answer, (_, expected) in zip(together, answered, strict=True) if answer)


def _agree(answer: Answer, expected: Answer | RequestError) -> bool:
    """Whether labels are equal in value and type, and floats and confidences close."""
    if isinstance(expected, RequestError) or list(map(type, answer.labels)) != list(map(type, expected.labels)):
        return False
    is_equal = _close if all(type(label) is float for label in expected.labels) else operator.eq
    if not is_equal(answer.labels, expected.labels):
        return False
    if answer.confidence is None or expected.confidence is None:
        return answer.confidence is expected.confidence
    return _close(answer.confidence, expected.confidence)


def _close(values: list[float], expected: list[float]) -> bool:
    near_zero = TOLERANCE * 1e-2 * float(np.max(np.abs(expected), initial=0.0))
    return np.allclose(values, expected, rtol=TOLERANCE, atol=near_zero)
