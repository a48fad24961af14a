"""The input columns of a model, the rows of one request, and the answer to it."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType

NUMERIC_TYPES = ("double", "long", "integer")
READABLE_TYPES = (*NUMERIC_TYPES, "boolean", "string", "datetime")


class RequestError(Exception):
    """Why a request is refused: an HTTP status, and one line that repeats nothing of the request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def body(self, message: str | None = None) -> dict[str, str]:
        """The JSON of the answer, with another message if one is passed."""
        code = "BAD_REQUEST" if self.status < 500 else "TIMEOUT" if self.status == 504 else "UNAVAILABLE"
        return {"error_code": code, "message": message or self.message}


@dataclass(frozen=True)
class InputSchema:
    """The d inputs of a model.

    `types`: "double", "long", "integer", "boolean", "string", "datetime", "any", or "" for a type that only MLflow reads.
    `tensor`: the input is one array without a name, and `names` are the positions in a flat row. `readable`: the fast
    parser knows all types.
    """

    names: list[str]
    types: list[str]
    tensor: bool
    readable: bool

    @property
    def numeric(self) -> bool:
        return all(kind in NUMERIC_TYPES for kind in self.types)

    @classmethod
    def of(cls, schema: Schema) -> "InputSchema":
        names = [str(name) for name in schema.input_names()] if schema.has_input_names() else []
        first = schema.inputs[0]
        if isinstance(first, TensorSpec):
            if names:
                return cls(names, [""] * len(names), False, False)
            width = int(np.prod(first.shape[1:])) if -1 not in first.shape[1:] else 1
            kind = "double" if np.issubdtype(first.type, np.number) else ""
            matrix = len(first.shape) == 2 and first.shape[0] == -1 != first.shape[1] and first.type == np.float64
            return cls([str(i) for i in range(width)], [kind] * width, True, matrix)
        types = [_type_name(kind) for kind in schema.input_types()]
        readable = bool(names) and all(types) and len(set(names)) == len(names)
        return cls(names or [str(i) for i in range(len(types))], types, False, readable)


def _type_name(kind: Any) -> str:
    if isinstance(kind, DataType):
        return kind.name if kind.name in READABLE_TYPES else ""
    return "any" if isinstance(kind, AnyType) else ""


@dataclass
class Rows:
    """The n rows of one request, from the fast parser (`numbers` or `values`) or from MLflow's (`data` and `params`)."""

    n: int
    schema: InputSchema
    numbers: np.ndarray | None = None  # (n, d) float64
    values: list[np.ndarray] | None = None  # d object arrays (n,): Python values, None where missing
    body: bytes = b""  # of the fast parser's rows: MLflow's parser reads it when the fast path cannot answer
    data: Any = None
    params: Any = None
    size: int = 0  # bytes that `data` and `params` take in memory, roughly

    @property
    def fast(self) -> bool:
        return self.numbers is not None or self.values is not None

    def encode(self, redact: frozenset[str]) -> tuple[str, bytes]:
        """("f8", n x d float64, little-endian, C order) when all inputs are numeric, else ("json", n lists of d values).

        Columns are in the order of the signature, without the columns in `redact`. A column that was not sent is NaN or null.
        """
        kept = [i for i, name in enumerate(self.schema.names) if name not in redact]
        numbers, columns = self.numbers, [column.tolist() for column in self.values or []]
        if not self.fast:
            frame = as_frame(self.data, self.schema)
            numbers = as_numbers(frame) if self.schema.numeric else None
            columns = [to_python(frame.iloc[:, i]) for i in range(frame.shape[1])]
        if numbers is not None:
            numbers = numbers[:, kept] if redact else numbers
            return "f8", np.ascontiguousarray(numbers, dtype="<f8").tobytes()
        rows = list(zip(*[columns[i] for i in kept], strict=True)) or [()] * self.n
        return "json", msgspec.json.encode(rows, enc_hook=str)


@dataclass
class Answer:
    """The answer to one request of n rows."""

    labels: list  # n plain values, as `mlflow models serve` gives them
    confidence: list[float] | None  # n: the highest class probability; None where the model has no predict_proba


def to_python(column: pd.Series) -> list:
    """A column as plain Python values, None where one is missing."""
    values = column.astype(object)
    return [_plain(value) for value in values.where(values.notna(), None)]


def _plain(value: Any) -> Any:
    if isinstance(value, pd.Timestamp):
        return value.to_pydatetime(warn=False)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def as_frame(data: Any, schema: InputSchema) -> pd.DataFrame:
    """The output of MLflow's parser (DataFrame, array, dict, list) as a table with the signature's columns, in order."""
    if isinstance(data, np.ndarray):
        data = data.reshape(len(data), -1) if data.ndim else data.reshape(1, 1)
    elif isinstance(data, dict):
        n = count_rows(data)
        data = {key: list(value) if np.ndim(value) else [value] * n for key, value in data.items()}
    frame = pd.DataFrame(data)
    if frame.shape[1] == len(schema.names) and not set(schema.names) & set(frame.columns):
        frame.columns = pd.Index(schema.names)
    return frame.reindex(columns=schema.names)


def as_numbers(frame: pd.DataFrame) -> np.ndarray | None:
    """(n, d) float64, NaN where a value is missing; None for a table that holds anything but numbers."""
    try:
        return frame.to_numpy(dtype="float64", na_value=np.nan)
    except (TypeError, ValueError):
        return None


def count_rows(data: Any) -> int:
    """The number of rows in an output of MLflow's parser."""
    if isinstance(data, dict):
        return max((len(value) for value in data.values() if np.ndim(value)), default=1)
    return len(data) if isinstance(data, list | pd.DataFrame) or np.ndim(data) else 1
