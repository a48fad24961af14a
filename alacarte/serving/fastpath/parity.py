"""Whether a fast path answers as MLflow does, tried on the input example and on rows made from it; and a model as it did.

Every row is asked for through the bytes of a request, so that reading it is tried as well.
"""

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from alacarte.errors import UserError
from alacarte.serving.requests import Answer, Form, Reader, RequestError, Rows, as_frame, to_python

TOLERANCE = 1e-5  # relative, of numbers and confidences; labels must be equal

Table = list[list[Any]]


@dataclass
class Case:
    """A request and what MLflow makes of it; `best` is the probability of each label, where the model has any."""

    body: bytes
    expected: Answer | RequestError
    best: list[float] | None


def table_of(example: Any, form: Form) -> Table:
    """The rows of an input example as JSON has them, columns as in the signature."""
    frame = as_frame(example, form)
    columns = [[_json(value) for value in to_python(frame.iloc[:, i])] for i in range(frame.shape[1])]
    return [list(row) for row in zip(*columns, strict=True)]


def kinds_in(table: Table) -> list[frozenset[type]]:
    """The types of JSON value in each column; a whole number stands for any number."""
    kinds = []
    for column in zip(*table, strict=True):
        types = {type(value) for value in column if value is not None}
        kinds.append(frozenset(types | {int, float} if types & {int, float} else types))
    return kinds


def body_of(table: Table, form: Form) -> bytes:
    """A table as the body of a request."""
    whole = {"inputs": table} if form.tensor else {"dataframe_split": {"columns": form.names, "data": table}}
    return json.dumps(whole).encode()


def tables(base: Table, seed: int = 0) -> Iterator[Table]:
    """The example first, then it row by row, shuffled between rows, scaled, moved, unseen, at rest, missing."""
    rng = np.random.default_rng(seed)

    def every(change: Callable[[Any], Any], rows: Table) -> Table:
        return [[value if value is None else change(value) for value in row] for row in rows]

    def shuffled(n: int) -> Table:
        columns = [[column[i] for i in rng.integers(0, len(base), n)] for column in zip(*base, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def moved(value: Any) -> Any:
        scale = rng.choice([0.01, 0.3, 1, 10])
        return _number(value, lambda number: number * (1 + scale * rng.normal()) + scale * rng.normal())

    yield base
    yield from ([row] for row in base[:5])
    yield shuffled(50)
    for factor in (0.0, -1.0, 0.5, 1e3, 1e6, -1e9, 1e-6):
        yield every(partial(_number, change=partial(operator.mul, factor)), base[:5])
    many = every(moved, shuffled(300))
    yield many
    yield from ([row] for row in many[:5])
    for text in ("never seen \u00e9\U0001f600", "", "1", "nan", "x" * 300):
        for i in range(len(base[0])):
            rows = [list(row) for row in base[:2]]
            for row in rows:
                row[i] = text if isinstance(row[i], str) else row[i]
            if rows != base[:2]:
                yield rows
                yield rows[:1]
    flipped = every(lambda value: not value if isinstance(value, bool) else value, shuffled(20))
    yield flipped
    yield every(_other_day, shuffled(20))
    holes = [[None if rng.random() < 0.2 else value for value in row] for row in shuffled(60)]
    yield holes
    yield from ([row] for row in holes[:5])
    for i in range(len(base[0])):
        yield [[None if j == i else value for j, value in enumerate(base[0])]]
    yield [[None] * len(base[0])]
    yield [[None] * len(base[0])] * 3
    yield [base[0], [None] * len(base[0])]


def holds(reader: Reader, run: Callable[[list[Rows]], list[Answer | None]], cases: list[Case], exact: bool) -> bool:
    """Whether `run` answers every case that `reader` takes as MLflow does, one by one and all at once.

    None from `run` is "ask MLflow", so it never disagrees; but the first case must be answered.
    """
    taken: list[tuple[Rows, Case]] = []
    for case in cases:
        rows = reader.read(case.body, max_rows=10**9)
        found = run([rows])[0] if rows else None
        if found is None or rows is None:
            if case is cases[0]:
                return False
        elif not same(found, case, exact):
            return False
        else:
            taken.append((rows, case))
    answers = run([rows for rows, _ in taken])
    return all(found is None or same(found, case, exact) for found, (_, case) in zip(answers, taken, strict=True))


def same(found: Answer, case: Case, exact: bool) -> bool:
    """Whether an answer is MLflow's: labels equal in value and type, numbers and confidences close."""
    expected = case.expected
    if isinstance(expected, RequestError) or list(map(type, found.labels)) != list(map(type, expected.labels)):
        return False
    if exact or any(type(label) is not float for label in expected.labels):
        if found.labels != expected.labels:
            return False
    elif not _close(found.labels, expected.labels):
        return False
    return found.confidence is None or (case.best is not None and _close(found.confidence, case.best))


def _close(found: list[float], expected: list[float]) -> bool:
    near_zero = TOLERANCE * 1e-2 * float(np.max(np.abs(expected), initial=0.0))
    return np.allclose(found, expected, rtol=TOLERANCE, atol=near_zero)


def _number(value: Any, change: Callable[[float], float]) -> Any:
    """A number changed; whole ones stay whole, as a column of whole numbers needs. Anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(np.clip(change(value), -(2**31) + 1, 2**31 - 1)) if isinstance(value, int) else float(change(value))


def _other_day(value: Any) -> Any:
    return "1990-05-17" + value[10:] if isinstance(value, str) and value[4:5] == value[7:8] == "-" else value


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def check_answers(found: Sequence | None, expected: Sequence | None) -> None:
    """Compare a model's answers on its input example with those logged with it, where there are both.

    UserError where they differ.
    """
    if found is None or expected is None:
        return
    if len(found) != len(expected) or not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
        raise UserError("its answers on its input example are not those logged with it")


def _same(found: Any, expected: Any) -> bool:
    """Numbers nearly, since another processor rounds otherwise; labels exactly."""
    if np.asarray(expected).dtype.kind != "f":
        return bool(found == expected)
    try:
        return bool(np.allclose(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True))
    except (TypeError, ValueError):
        return False
