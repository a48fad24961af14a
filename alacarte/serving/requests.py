"""Request bodies to rows: a fast parser for bodies that it fully understands, and MLflow's parser for all others.

The fast parser takes JSON in which every value means the same to it as to MLflow's parsing, schema enforcement and pandas.
In any doubt it returns None, and MLflow's parser reads the body. So MLflow decides which requests are accepted and refused.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from io import StringIO
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import simdjson
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server
from msgspec import UNSET, UnsetType

from alacarte.serving.limits import CHARACTERS, check_csv, check_json, check_rows, check_text, longest, read_parquet
from alacarte.serving.rows import InputSchema, RequestError, Rows, count_rows

# Bytes of a body from which simdjson is faster: it makes no Python objects of the numbers.
MANY_BYTES = 20_000

# MLflow's parser reads larger numbers: below it, squares and scaled values stay finite, and whole numbers exact.
LARGE = 1e15
MAX_LONG, MAX_INTEGER = int(LARGE), 2**31

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
    "CSV": "the body is no CSV table that fits the model's signature",
    "Parquet": "the body is no Parquet file",
    "not the same": "every column must have as many values",
}
WRONG_TYPE = re.compile(r"(?:convert column|Incompatible input types for column) (.+?)(?: to type|\. Can)")
Values = Sequence[Any]


class FastParser:
    """The fast parser of one model: dataframe_split and dataframe_records, or instances and inputs of a tensor.

    `kinds` are the JSON types that each column of type "any" may hold. With missing=False, MLflow's parser reads rows
    with a missing value.
    """

    def __init__(self, schema: InputSchema, kinds: Sequence[frozenset[type]], missing: bool) -> None:
        assert schema.readable
        self.schema, self.missing = schema, missing
        self._doubles = schema.tensor or set(schema.types) == {"double"}
        self._readers = [_column_reader(kind, allowed) for kind, allowed in zip(schema.types, kinds, strict=True)]
        cell: Any = bool | int | float | str | None
        if schema.numeric:
            cell = float | None if self._doubles else int | float | None
        table: Any = list[list[cell]]
        formats: dict[str, Any] = {"instances": table, "inputs": table}
        if not schema.tensor:
            formats = {"dataframe_split": _struct("Split", {"columns": list[str], "data": table})}
            fields = {f"c{i}": name for i, name in enumerate(schema.names)}
            with suppress(ValueError):  # msgspec takes no field with a name that JSON must escape
                row = _struct("Row", dict.fromkeys(fields, cell), rename=fields)
                formats["dataframe_records"] = list[row]  # type: ignore[valid-type]
        optional = [(name, kind | UnsetType, UNSET) for name, kind in formats.items()]
        body = msgspec.defstruct("Body", optional, forbid_unknown_fields=True, gc=False)
        self._decode = msgspec.json.Decoder(body).decode

    def parse(self, body: bytes, max_rows: int) -> Rows | None:
        """None where MLflow's parser has to read the body. RequestError 413 for more than max_rows."""
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
        table, names = tables[0], self.schema.names
        order = None  # the position in a row of each column of the signature; None: the same
        if not isinstance(table, list):
            if table.columns != names:
                if sorted(table.columns) != sorted(names):
                    return None
                order = [table.columns.index(name) for name in names]
            table = table.data
        check_rows(len(table), max_rows)
        if not table:
            return None
        if isinstance(table[0], msgspec.Struct):
            table = [msgspec.structs.astuple(row) for row in table]
        try:
            return self._read_doubles(table, order, body) if self._doubles else self._read_columns(table, order, body)
        except ValueError:  # rows of different lengths
            return None

    def _read_doubles(self, table: Sequence[Values], order: list[int] | None, body: bytes) -> Rows | None:
        numbers = np.array(table, dtype="float64")
        if numbers.shape != (len(table), len(self.schema.names)):
            return None
        small = np.abs(numbers) < LARGE
        if not small.all() and not (self.missing and (small | np.isnan(numbers)).all()):
            return None
        return Rows(len(table), self.schema, numbers=numbers if order is None else numbers[:, order], body=body)

    def _read_columns(self, table: Sequence[Values], order: list[int] | None, body: bytes) -> Rows | None:
        n, columns = len(table), list(zip(*table, strict=True))
        if len(columns) != len(self.schema.names):
            return None
        columns = columns if order is None else [columns[place] for place in order]
        read = [values for reader, column in zip(self._readers, columns, strict=True) if (values := reader(column))]
        if len(read) < len(columns) or (not self.missing and any(None in column for column in columns)):
            return None
        if self.schema.numeric:
            return Rows(n, self.schema, numbers=np.array(read, dtype="float64").T.copy(), body=body)
        if n * len(body) > CHARACTERS and n * longest(chain.from_iterable(read)) > CHARACTERS:
            return None
        arrays = [np.fromiter(column, dtype=object, count=n) for column in read]
        return Rows(n, self.schema, values=arrays, body=body)


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


def _struct(name: str, fields: dict[str, Any], rename: dict[str, str] | None = None) -> type[msgspec.Struct]:
    return msgspec.defstruct(name, list(fields.items()), rename=rename, forbid_unknown_fields=True, gc=False)


# --- one column of JSON values as MLflow and pandas read it, or None where they have to read it ---


def _column_reader(kind: str, allowed: frozenset[type]) -> Callable[[Values], Values | None]:
    readers: dict[str, Callable[[Values], Values | None]] = {
        "double": _doubles,
        "long": partial(_whole_numbers, limit=MAX_LONG),
        "integer": partial(_whole_numbers, limit=MAX_INTEGER),
        "boolean": lambda values: values if set(map(type, values)) == {bool} else None,
        "string": _texts,
        "datetime": _dates,
        "any": partial(_any, allowed=allowed),
    }
    return readers[kind]


def _doubles(values: Values) -> Values | None:
    types = set(map(type, values))
    if not types <= {float, int, type(None)}:
        return None
    if any(value is not None and not -LARGE < value < LARGE for value in values):
        return None
    return [value if value is None else float(value) for value in values] if int in types else values


def _whole_numbers(values: Values, limit: int) -> Values | None:
    return values if set(map(type, values)) == {int} and all(-limit < value < limit for value in values) else None


def _texts(values: Values) -> Values | None:
    if not set(map(type, values)) <= {str, type(None)}:
        return None
    return None if any("\0" in value for value in values if value) else values  # numpy cuts a text there


def _dates(values: Values) -> Values | None:
    """Naive datetimes. pandas applies the format of the first value to all, so they must have the same format."""
    if not set(map(type, values)) <= {str, type(None)}:
        return None
    texts = [value for value in values if value is not None]
    matches = [DATE.fullmatch(text) for text in texts]
    formats = {(len(text), text[10:11]) for text in texts}
    if len(formats) > 1 or not all(match and int(match[1]) in YEARS for match in matches):
        return None
    try:
        return [value if value is None else datetime.fromisoformat(value) for value in values]
    except ValueError:
        return None


def _any(values: Values, allowed: frozenset[type]) -> Values | None:
    """pandas looks at the whole column: whole numbers beside a missing value or a fraction become floats."""
    types = set(map(type, values))
    present = types - {type(None)}
    if not present <= allowed:
        return None
    if present <= {int, float}:
        return _whole_numbers(values, MAX_LONG) if types == {int} else _doubles(values)
    if present == {str}:
        return _texts(values)
    return values if present == {bool} else None


# --- MLflow's parser ---


def parse_as_mlflow(body: bytes, content_type: str, meta: Model, schema: InputSchema, max_rows: int) -> Rows:
    """Read a body as the scoring server of `mlflow models serve` does. RequestError for a body that it refuses."""
    kind = check_type(content_type)
    params = None
    try:
        if kind == scoring_server.CONTENT_TYPE_JSON:
            decoded = _decode(body)
            if not isinstance(decoded, dict):
                raise RequestError(400, ONE_FORMAT)
            check_json(decoded, body, schema, max_rows)
            data, params, llm = scoring_server._parse_json_data(decoded, meta, meta.get_input_schema())
            if isinstance(params, dict):  # MLflow ignores unknown names too, but writes them to the log
                known = {spec.name for spec in meta.get_params_schema() or ()}
                params = {name: value for name, value in params.items() if name in known} or None
            if llm:
                raise RequestError(400, "messages, prompt and input are for language models, which are not served here")
        elif kind == scoring_server.CONTENT_TYPE_CSV:
            text = body.decode("utf-8")
            check_csv(text, schema)
            data = scoring_server.parse_csv_input(StringIO(text), meta.get_input_schema())
        else:
            data = read_parquet(body, schema, max_rows)
        rows = Rows(count_rows(data), schema, data=data, params=params)
        check_rows(rows.n, max_rows)
        if kind != scoring_server.CONTENT_TYPE_JSON:
            texts = data.select_dtypes(exclude=["number", "bool", "datetime"])
            check_text(max((longest(texts[name]) for name in texts), default=0), rows.n)
    except RequestError:
        raise
    except Exception as error:
        raise explain(error, schema) from None
    return rows


def check_type(content_type: str) -> str:
    """The media type of a Content-Type header that MLflow takes; RequestError 415 for any other."""
    kind, *parameters = [part.strip() for part in content_type.split(";")]
    if kind not in scoring_server.CONTENT_TYPES:
        raise RequestError(415, f"Content-Type must be one of {', '.join(scoring_server.CONTENT_TYPES)}")
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
