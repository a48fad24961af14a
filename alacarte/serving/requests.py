"""Request bodies to rows: a fast reader for what it fully understands; reference.py has MLflow's for everything else.

The fast reader takes JSON whose every value means the same to it as to MLflow's parsing, schema enforcement and pandas.
In any doubt it gives up, and the body goes to MLflow's parser: what is accepted, refused and answered stays MLflow's.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType
from msgspec import UNSET, UnsetType

from alacarte.serving.matrix import MANY, read_numbers

# Characters that one column of a request may spread over in memory: numpy gives every text the room of the longest.
CHARACTERS = 100_000_000

# Numbers beyond this go MLflow's way: squares and scaled values stay finite below it, and whole numbers exact.
LARGE = 1e15

DATE = re.compile(r"(\d{4})-\d\d-\d\d(?:[T ]\d\d:\d\d:\d\d(?:\.\d{1,6})?)?", re.ASCII)
YEARS = range(1678, 2262)  # what datetime64[ns] can hold; MLflow refuses others

FAST_TYPES = {kind: kind.name for kind in (DataType.double, DataType.long, DataType.integer)}
MIXED_TYPES = FAST_TYPES | {kind: kind.name for kind in (DataType.boolean, DataType.string, DataType.datetime)}
RANGES = {"long": int(LARGE), "integer": 2**31}


class RequestError(Exception):
    """What is wrong with a request: an HTTP status, and one line that echoes nothing of the input."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Form:
    """A model's inputs as the reader sees them.

    `types`: "double", "long", "integer", "boolean", "string", "datetime", "any", or "" for what only MLflow reads.
    `tensor`: one array without a name, of which each row is flat in `names`. `readable`: the fast reader knows it all.
    """

    names: list[str]
    types: list[str]
    tensor: bool
    readable: bool

    @property
    def numeric(self) -> bool:
        return all(kind in FAST_TYPES.values() for kind in self.types)

    @classmethod
    def of(cls, schema: Schema) -> "Form":
        names = [str(name) for name in schema.input_names()] if schema.has_input_names() else []
        first = schema.inputs[0]
        if isinstance(first, TensorSpec):
            if names:
                return cls(names, [""] * len(names), False, False)
            width = int(np.prod(first.shape[1:])) if -1 not in first.shape[1:] else 1
            kind = "double" if np.issubdtype(first.type, np.number) else ""
            plain = len(first.shape) == 2 and first.shape[0] == -1 != first.shape[1] and first.type == np.float64
            return cls([str(i) for i in range(width)], [kind] * width, True, plain)
        types = [_type_name(kind) for kind in schema.input_types()]
        if not names:
            return cls([str(i) for i in range(len(types))], types, False, False)
        return cls(names, types, False, all(types) and len(set(names)) == len(names))


def _type_name(kind: Any) -> str:
    return MIXED_TYPES.get(kind, "") if isinstance(kind, DataType) else "any" if isinstance(kind, AnyType) else ""


@dataclass
class Rows:
    """The rows of one request, as the fast reader (`numbers` or `values`) or MLflow's (`data`, `params`) read them."""

    n: int
    form: Form
    numbers: np.ndarray | None = None  # (n, d) float64
    values: list[np.ndarray] | None = None  # d object arrays (n,): Python values, None where missing
    body: bytes = b""  # with `numbers` or `values`: what MLflow's parser gets when the fast path fails
    data: Any = None
    params: Any = None

    @property
    def fast(self) -> bool:
        return self.numbers is not None or self.values is not None

    def encode(self, redact: frozenset[str]) -> tuple[str, bytes]:
        """("f8", n x d float64, little-endian, C order) when all inputs are numeric, else ("json", n lists of d values).

        Columns as in the signature; what is in `redact` becomes NaN or null, and so does a column that is not there.
        """
        hidden = [i for i, name in enumerate(self.form.names) if name in redact]
        numbers, frame = self.numbers, None
        if not self.fast:
            frame = as_frame(self.data, self.form)
        if numbers is None and self.form.numeric and frame is not None:
            try:
                numbers = frame.to_numpy(dtype="float64", na_value=np.nan)
            except (TypeError, ValueError):
                numbers = None
        if numbers is not None:
            if hidden:
                numbers = numbers.copy()
                numbers[:, hidden] = np.nan
            return "f8", np.ascontiguousarray(numbers, dtype="<f8").tobytes()
        if frame is not None:
            columns = [to_python(frame.iloc[:, i]) for i in range(frame.shape[1])]
        else:
            columns = [column.tolist() for column in self.values or []]
        for i in hidden:
            columns[i] = [None] * self.n
        return "json", msgspec.json.encode(list(zip(*columns, strict=True)), enc_hook=str)


@dataclass
class Answer:
    """What one request is answered."""

    labels: list  # n plain values, as `mlflow models serve` gives them
    confidence: list[float] | None  # n: the probability of each label, where it costs nothing extra


def to_python(column: pd.Series) -> list:
    """A column as plain Python values, None where one is missing."""
    values = column.astype(object)
    return [_python(value) for value in values.where(values.notna(), None)]


def _python(value: Any) -> Any:
    if isinstance(value, pd.Timestamp):
        return value.to_pydatetime(warn=False)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def as_frame(data: Any, form: Form) -> pd.DataFrame:
    """What MLflow's parser gives (DataFrame, array, dict, list) as a table with the signature's columns, in order."""
    if isinstance(data, np.ndarray):
        data = data.reshape(len(data), -1) if data.ndim else data.reshape(1, 1)
    elif isinstance(data, dict):
        n = max((len(value) for value in data.values() if np.ndim(value)), default=1)
        data = {key: list(value) if np.ndim(value) else [value] * n for key, value in data.items()}
    frame = pd.DataFrame(data)
    if frame.shape[1] == len(form.names) and not set(form.names) & set(frame.columns):
        frame.columns = pd.Index(form.names)
    return frame.reindex(columns=form.names)


class Reader:
    """The fast reader of one model. `kinds` are the types of JSON value that each column of type "any" may hold.

    With missing=False, rows with a missing value go MLflow's way.
    """

    def __init__(self, form: Form, kinds: Sequence[frozenset[type]], missing: bool) -> None:
        assert form.readable
        self.form, self.missing = form, missing
        self._plain = form.tensor or set(form.types) == {"double"}
        self._index = {name: i for i, name in enumerate(form.names)}
        self._columns = [_column_reader(kind, allowed) for kind, allowed in zip(form.types, kinds, strict=True)]
        cell: Any = (
            float | None if self._plain else int | float | None if form.numeric else bool | int | float | str | None
        )
        table: Any = list[list[cell]]
        formats: dict[str, Any] = {"instances": table, "inputs": table} if form.tensor else {}
        if not form.tensor:
            formats["dataframe_split"] = _struct("Split", {"columns": list[str], "data": table})
            try:
                fields = {name: f"c{i}" for i, name in enumerate(form.names)}
                row: Any = list[_struct("Row", dict.fromkeys(fields.values(), cell), fields)]  # type: ignore[misc]
                formats["dataframe_records"] = row
                if form.numeric:  # as instances or inputs, text and missing values mean other things
                    columns = _struct("Columns", dict.fromkeys(fields.values(), list[cell]), fields)
                    formats |= {"instances": row, "inputs": row | columns}
            except ValueError:
                pass  # a name that JSON must escape; msgspec takes no such field
        optional = [(name, kind | UnsetType, UNSET) for name, kind in formats.items()]
        body = msgspec.defstruct("Body", optional, forbid_unknown_fields=True, gc=False)
        self._decode = msgspec.json.Decoder(body).decode

    def read(self, body: bytes, max_rows: int) -> Rows | None:
        """None where MLflow's parser has to read it. RequestError 413 for more than max_rows."""
        if len(body) > MANY and self._plain and not self.form.tensor:
            numbers = read_numbers(body, self.form.names)
            if numbers is not None:
                check_rows(len(numbers), max_rows)
                if (np.abs(numbers) < LARGE).all():
                    return Rows(len(numbers), self.form, numbers=numbers, body=body)
        try:
            decoded = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        given = [value for value in msgspec.structs.astuple(decoded) if value is not UNSET]
        if len(given) != 1:
            return None
        table, order = given[0], None
        if not isinstance(table, list):
            if not hasattr(table, "data"):  # one list a column
                return self._finish(msgspec.structs.astuple(table), True, None, body, max_rows)
            if table.columns != self.form.names:
                if len(table.columns) != len(self._index) or set(table.columns) != self._index.keys():
                    return None
                place = {name: i for i, name in enumerate(table.columns)}
                order = [place[name] for name in self.form.names]
            table = table.data
        elif table and isinstance(table[0], msgspec.Struct):
            table = list(map(msgspec.structs.astuple, table))
        return self._finish(table, False, order, body, max_rows)

    def _finish(
        self, table: Sequence, by_column: bool, order: list[int] | None, body: bytes, max_rows: int
    ) -> Rows | None:
        """Rows from a list of rows, or of columns; `order` is where each column of the signature stands in a row."""
        n = len(table[0]) if by_column else len(table)
        check_rows(n, max_rows)
        if n == 0:
            return None
        try:
            if self._plain:
                numbers = np.array(table, dtype="float64")
                if numbers.shape != ((len(self._index), n) if by_column else (n, len(self._index))):
                    return None
                numbers = np.ascontiguousarray(numbers.T) if by_column else numbers
                numbers = numbers if order is None else numbers[:, order]
                if not (np.abs(numbers) < LARGE).all() and (not self.missing or (np.abs(numbers) >= LARGE).any()):
                    return None
                return Rows(n, self.form, numbers=numbers, body=body)
            columns = list(table) if by_column else list(zip(*table, strict=True))
        except ValueError:  # rows of different lengths
            return None
        if len(columns) != len(self._index):
            return None
        columns = columns if order is None else [columns[place] for place in order]
        found = [
            values for read, column in zip(self._columns, columns, strict=True) if (values := read(column)) is not None
        ]
        if len(found) < len(columns) or (not self.missing and any(None in column for column in columns)):
            return None
        if self.form.numeric:
            return Rows(n, self.form, numbers=np.array(found, dtype="float64").T.copy(), body=body)
        if n * len(body) > CHARACTERS and longest(chain.from_iterable(found)) * n > CHARACTERS:
            return None
        values = []
        for column in found:
            array = np.empty(n, dtype=object)
            array[:] = column
            values.append(array)
        return Rows(n, self.form, values=values, body=body)


def _struct(name: str, fields: dict[str, Any], rename: dict[str, str] | None = None) -> type[msgspec.Struct]:
    names = {field: key for key, field in (rename or {}).items()} or None
    return msgspec.defstruct(name, list(fields.items()), rename=names, forbid_unknown_fields=True, gc=False)


def longest(values: Any) -> int:
    return max((len(value) for value in values if isinstance(value, str)), default=0)


# --- one column of JSON values as MLflow and pandas mean it, or None for "let them read it" ---

Values = Sequence[Any]


def _column_reader(kind: str, allowed: frozenset[type]) -> Callable[[Values], Values | None]:
    return {
        "double": _doubles,
        "long": lambda values: _whole(values, RANGES["long"]),
        "integer": lambda values: _whole(values, RANGES["integer"]),
        "boolean": lambda values: values if set(map(type, values)) == {bool} else None,
        "string": _texts,
        "datetime": _dates,
        "any": lambda values: _any(values, allowed),
    }[kind]


def _doubles(values: Values) -> Values | None:
    types = set(map(type, values))
    if not types <= {float, int, type(None)}:
        return None
    if any(value is not None and not -LARGE < value < LARGE for value in values):
        return None
    return [value if value is None else float(value) for value in values] if int in types else values


def _whole(values: Values, limit: int) -> Values | None:
    return values if set(map(type, values)) == {int} and all(-limit < value < limit for value in values) else None


def _texts(values: Values) -> Values | None:
    if not set(map(type, values)) <= {str, type(None)}:
        return None
    return None if any("\0" in value for value in values if value) else values  # numpy cuts text there


def _dates(values: Values) -> Values | None:
    """Naive datetimes. pandas takes the form of the first for that of all, so they must look alike."""
    if not set(map(type, values)) <= {str, type(None)}:
        return None
    found = [None if value is None else DATE.fullmatch(value) for value in values]
    looks = {(len(value), value[10:11]) for value in values if value is not None}
    if len(looks) > 1 or any(match is None and value is not None for match, value in zip(found, values, strict=True)):
        return None
    if any(match and int(match[1]) not in YEARS for match in found):
        return None
    try:
        return [value if value is None else datetime.fromisoformat(value) for value in values]
    except ValueError:
        return None


def _any(values: Values, allowed: frozenset[type]) -> Values | None:
    """pandas decides by the whole column: whole numbers beside a missing value or a fraction are floats."""
    types = set(map(type, values))
    present = types - {type(None)}
    if not present <= allowed:
        return None
    if present == {int} and len(types) == 1:
        return _whole(values, RANGES["long"])
    if present <= {int, float}:
        return _doubles(values)
    if present == {str}:
        return _texts(values)
    return values if present == {bool} else None


def check_rows(n: int, max_rows: int) -> None:
    if n > max_rows:
        raise RequestError(413, f"a request may have {max_rows} rows; send fewer at a time")
