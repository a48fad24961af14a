"""Request bodies to rows: a fast parser for bodies that it fully understands, and MLflow's parser for all others.

The fast parser takes JSON in which every value means the same to it as to MLflow's parsing, schema enforcement and pandas.
In any doubt it returns None, and MLflow's parser reads the body. So MLflow decides which requests are accepted and refused.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from io import StringIO
from itertools import chain
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import pandas as pd
import simdjson
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server
from mlflow.types import Schema
from msgspec import UNSET, UnsetType

from alacarte.serving.limits import CHARACTERS, check_csv, check_json, check_rows, check_text, longest
from alacarte.serving.rows import InputSchema, RequestError, Rows, count_rows

# Bytes of a body from which simdjson is faster: it makes no Python objects of the numbers.
MANY_BYTES = 20_000

# MLflow's parser reads larger numbers: below it, squares and scaled values stay finite, and whole numbers exact.
LARGE = 1e15
LIMITS = {"long": int(LARGE), "integer": 2**31}  # of whole numbers

CONTENT_TYPES = (scoring_server.CONTENT_TYPE_JSON, scoring_server.CONTENT_TYPE_CSV)
DATE = re.compile(r"(\d{4})-\d\d-\d\d(?:[T ]\d\d:\d\d:\d\d(?:\.\d{1,6})?)?", re.ASCII)
YEARS = range(1678, 2262)  # the range of datetime64[ns]; MLflow refuses other years

ONE_FORMAT = "send a JSON object with one of dataframe_split, dataframe_records, instances, inputs"
# A part of a message of MLflow's -> the line that the client gets.
REFUSALS = {
    "exactly one of the input fields": ONE_FORMAT,
    "Ensure that input is a valid JSON": ONE_FORMAT,
    "split format must": "dataframe_split takes data, columns and index, and no other key",
    "dataframe_split field": "dataframe_split: data must be rows as long as columns",
    "records f": "dataframe_records must be a list of objects",  # "records format must", "dataframe_records field"
    "CSV": "the body is no CSV table that fits the model's signature; CSV holds no dates and no columns of type any: send JSON",
    "not the same": "every column must have as many values",
}
WRONG_TYPE = re.compile(r"(?:convert column|Incompatible input types for column) (.+?)(?: to type|\. Can)")

Values = Sequence[Any]
Cell = TypeVar("Cell")


class _Split(msgspec.Struct, Generic[Cell], forbid_unknown_fields=True, gc=False):
    columns: list[str]
    data: list[list[Cell]]


class _Table(msgspec.Struct, Generic[Cell], forbid_unknown_fields=True, gc=False):
    dataframe_split: _Split[Cell] | UnsetType = UNSET
    dataframe_records: list[dict[str, Cell]] | UnsetType = UNSET


class _Tensor(msgspec.Struct, Generic[Cell], forbid_unknown_fields=True, gc=False):
    instances: list[list[Cell]] | UnsetType = UNSET
    inputs: list[list[Cell]] | UnsetType = UNSET


class FastParser:
    """The fast parser of one model: dataframe_split and dataframe_records, or instances and inputs of a tensor.

    `kinds` are the JSON types that each column of type "any" may hold. With missing=False, MLflow's parser reads rows
    with a missing value.
    """

    def __init__(self, schema: InputSchema, kinds: Sequence[frozenset[type]], missing: bool) -> None:
        assert schema.readable
        self.schema, self._kinds, self._missing = schema, kinds, missing
        self._doubles = schema.tensor or set(schema.types) == {"double"}
        body: Any = _Tensor if schema.tensor else _Table
        cell: Any = float | None if self._doubles else bool | int | float | str | None
        self._decode = msgspec.json.Decoder(body[cell]).decode

    def parse(self, body: bytes, max_rows: int) -> Rows | None:
        """None if MLflow's parser has to read the body. Raises RequestError 413 for more than max_rows."""
        if len(body) > MANY_BYTES and self._doubles and not self.schema.tensor:
            numbers = read_numbers(body, self.schema.names)
            if numbers is not None and (np.abs(numbers) < LARGE).all():
                check_rows(len(numbers), max_rows)
                return Rows(len(numbers), self.schema, numbers=numbers, body=body)
        try:
            decoded = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        tables = [value for value in msgspec.structs.astuple(decoded) if value is not UNSET]
        if len(tables) != 1:
            return None
        try:
            table = _in_order(tables[0], self.schema.names)
        except (KeyError, ValueError):  # another column, or rows of different lengths
            return None
        check_rows(len(table), max_rows)
        if not table:
            return None
        return self._read_doubles(table, body) if self._doubles else self._read_columns(table, body)

    def _read_doubles(self, table: list[Values], body: bytes) -> Rows | None:
        numbers = np.array(table, dtype="float64")
        small = np.abs(numbers) < LARGE
        if not small.all() and not (self._missing and (small | np.isnan(numbers)).all()):
            return None
        return Rows(len(table), self.schema, numbers=numbers, body=body)

    def _read_columns(self, table: list[Values], body: bytes) -> Rows | None:
        n, columns = len(table), []
        for kind, allowed, values in zip(self.schema.types, self._kinds, zip(*table, strict=True), strict=True):
            column = _read_column(kind, allowed, values)
            if column is None or (not self._missing and None in column):
                return None
            columns.append(column)
        if self.schema.numeric:
            return Rows(n, self.schema, numbers=np.array(columns, dtype="float64").T.copy(), body=body)
        if n * len(body) > CHARACTERS and n * longest(chain.from_iterable(columns)) > CHARACTERS:
            return None
        arrays = [np.fromiter(column, dtype=object, count=n) for column in columns]
        return Rows(n, self.schema, values=arrays, body=body)


def _in_order(table: Any, names: list[str]) -> list[Values]:
    """The rows of a decoded table with the columns of the signature. Raises KeyError or ValueError for other columns."""
    if isinstance(table, _Split):
        columns, rows = table.columns, table.data
        if sorted(columns) != sorted(names):
            raise ValueError("other columns")
        if columns != names:
            positions = [columns.index(name) for name in names]
            _check_lengths(rows, len(names))
            return [[row[position] for position in positions] for row in rows]
        table = rows
    elif table and isinstance(table[0], dict):
        _check_lengths(table, len(names))
        return [[row[name] for name in names] for row in table]
    _check_lengths(table, len(names))
    return table


def _check_lengths(rows: Iterable[Any], length: int) -> None:
    if any(len(row) != length for row in rows):
        raise ValueError("rows of different lengths")


def read_numbers(body: bytes, names: list[str]) -> np.ndarray | None:
    """(n, d) float64 of a dataframe_split with exactly these columns and only numbers; None for any other body."""
    try:
        document: Any = simdjson.Parser().parse(body)
        split = document["dataframe_split"]
        # a key that comes twice is listed twice
        if list(document.keys()) != ["dataframe_split"] or sorted(split.keys()) != ["columns", "data"]:
            return None
        table = split["data"]
        # as_buffer takes any nesting: a bracket for each row, two for the lists around, and none within a row
        brackets = len(table) + 2 + sum(name.count("[") for name in names)
        if split["columns"].as_list() != names or body.count(b"[") != brackets:
            return None
        if not len(table) or any(len(row) != len(names) for row in table) or body[0] == 0xEF:  # a byte order mark
            return None
        return np.frombuffer(table.as_buffer(of_type="d")).reshape(len(table), len(names))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None


# --- one column of JSON values as MLflow and pandas read it, or None if they have to read it ---


def _read_column(kind: str, allowed: frozenset[type], values: Values) -> Values | None:
    types = set(map(type, values))
    present = types - {type(None)}
    if (
        kind == "any"
    ):  # pandas looks at the whole column: whole numbers beside a missing value or a fraction become floats
        if not present <= allowed:
            return None
        if present == {bool}:
            return values
        kind = "long" if types == {int} else "double" if present <= {int, float} else "string"
    if kind == "double" and present <= {int, float}:
        return _read_doubles(values)
    if kind in LIMITS and types == {int}:
        return values if all(-LIMITS[kind] < value < LIMITS[kind] for value in values) else None
    if kind == "boolean" and types == {bool}:
        return values
    if kind == "string" and present <= {str}:  # numpy cuts a text at a zero character
        return None if any("\0" in value for value in values if value) else values
    if kind == "datetime" and present <= {str}:
        return _read_dates(values)
    return None


def _read_doubles(values: Values) -> Values | None:
    if any(value is not None and not -LARGE < value < LARGE for value in values):
        return None
    return [value if value is None else float(value) for value in values]


def _read_dates(values: Values) -> Values | None:
    """Naive datetimes. pandas applies the format of the first value to all, so they must have the same format."""
    texts = [value for value in values if value is not None]
    matches = [DATE.fullmatch(text) for text in texts]
    formats = {(len(text), text[10:11]) for text in texts}
    if len(formats) > 1 or not all(match and int(match[1]) in YEARS for match in matches):
        return None
    try:
        return [value if value is None else datetime.fromisoformat(value) for value in values]
    except ValueError:
        return None


# --- MLflow's parser ---


def parse_as_mlflow(body: bytes, content_type: str, meta: Model, schema: InputSchema, max_rows: int) -> Rows:
    """Read a body as the scoring server of `mlflow models serve` does. RequestError for a body that it refuses."""
    kind = check_type(content_type)
    params, inputs = None, meta.get_input_schema()
    try:
        if kind == scoring_server.CONTENT_TYPE_JSON:
            decoded = _decode(body)
            if not isinstance(decoded, dict):
                raise RequestError(400, ONE_FORMAT)
            check_json(decoded, body, schema, max_rows)
            data, params, llm = scoring_server._parse_json_data(decoded, meta, inputs)
            if isinstance(params, dict):  # MLflow ignores unknown names too, but writes them to the log
                known = {spec.name for spec in meta.get_params_schema() or ()}
                params = {name: value for name, value in params.items() if name in known} or None
            if llm:
                raise RequestError(400, "messages, prompt and input are for language models, which are not served here")
        else:
            text = body.decode("utf-8")
            check_csv(text, schema)
            data = scoring_server.parse_csv_input(StringIO(text), inputs)
        data = _trim(data, inputs)
        arrays = data.values() if isinstance(data, dict) else [data]
        size = len(body) + sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        rows = Rows(count_rows(data), schema, data=data, params=params, size=size)
        check_rows(rows.n, max_rows)
        if kind != scoring_server.CONTENT_TYPE_JSON:
            texts = data.select_dtypes(exclude=["number", "bool", "datetime"])
            check_text(max((longest(texts[name]) for name in texts), default=0), rows.n)
    except RequestError:
        raise
    except Exception as error:
        raise explain(error, schema) from None
    return rows


def _trim(data: Any, inputs: Schema) -> Any:
    """The same rows in less memory: only the columns of the model, and each text with its own length. They may wait long."""
    if isinstance(data, pd.DataFrame) and inputs.has_input_names():
        return data.loc[:, data.columns.isin(inputs.input_names())]
    if isinstance(data, dict) and not inputs.is_tensor_spec():  # numpy gives every text the length of the longest
        is_text = lambda value: isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.ndim  # noqa: E731
        return {name: value.astype(object) if is_text(value) else value for name, value in data.items()}
    return data


def check_type(content_type: str) -> str:
    """The media type of a Content-Type header; RequestError 415 for any other than JSON and CSV."""
    kind, *parameters = [part.strip() for part in content_type.split(";")]
    if kind not in CONTENT_TYPES:  # MLflow reads Parquet too, but pyarrow does not survive every file
        raise RequestError(415, f"Content-Type must be {' or '.join(CONTENT_TYPES)}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name != "charset" or value.lower() != "utf-8":
            raise RequestError(415, "Content-Type takes no parameter but charset=utf-8")
    return kind


def explain(error: Exception, schema: InputSchema) -> RequestError:
    """A refusal by MLflow or by the model as one line that names the column, and repeats nothing of the request."""
    if isinstance(error, MlflowException) and str(error).startswith("Failed to enforce") and error.__context__:
        error = MlflowException(str(error.__context__))  # the reason, without the request around it
    text = str(error)[:10_000]
    if (wrong := WRONG_TYPE.search(text)) and wrong[1] in schema.names:
        kind = schema.types[schema.names.index(wrong[1])] or "of the type in the signature"
        return RequestError(400, f"column {wrong[1]!r} must be {kind}")
    if match := re.search(r"Model is missing inputs \[(.*?)\]\.", text):
        missing = [name for name in schema.names if repr(name) in match[1]]
        return RequestError(400, f"missing columns: {', '.join(missing[:10])}")
    reason = "the input does not fit the model's signature; GET /model shows it"
    if not isinstance(error, MlflowException):
        reason = f"the model does not take these rows ({type(error).__name__}); GET /model shows its inputs"
    return RequestError(400, next((line for part, line in REFUSALS.items() if part in text), reason))


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise RequestError(400, "the body nests too deep") from None
    except ValueError:  # no JSON, no UTF-8, or a number of thousands of digits
        raise RequestError(400, "the body is no JSON in UTF-8") from None
