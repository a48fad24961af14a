"""The records that go into the store and come out of it, and the ids of predictions."""

import getpass
import json
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np

encode = msgspec.json.Encoder().encode
PREDICTION_ID = re.compile(r"([0-9a-f]{26})(?:\.(0|[1-9][0-9]{0,8}))?", re.ASCII)


class Prediction(NamedTuple):
    """One request and its answers, in the order of the table's columns."""

    id: str  # from `request_id`
    time: float  # Unix seconds, as in the id
    registered_model_name: str
    model_version: str
    n_rows: int
    columns: tuple[str, ...]  # d names
    format: str  # "f8" or "json"
    inputs: bytes  # "f8": n x d little-endian float64 in C order; "json": a list of n lists of d values
    outputs: list  # n
    confidence: list[float] | None  # n
    latency_ms: float
    audit: list[int] | None  # rows drawn for a label
    audit_share: float  # probability of that draw
    sample: float  # probability that such a request is stored


class Feedback(NamedTuple):
    """A label for one prediction. `source` and `comment` are comments of the client: nothing decides by them.

    `annotator` tells who gave the label, and a client cannot choose it: "token:NAME" for a named token, "token:" for one
    without a name, "address:IP" where the server has no feedback tokens, "local:USER" for a label stored from Python.
    """

    prediction_id: str
    label: Any  # text, number or boolean
    source: str | None = None
    comment: str | None = None
    annotator: str | None = None  # null: the user of this process


class Outcome(NamedTuple):
    """The state in which a label is stored, or "unknown" if its prediction is not stored."""

    prediction_id: str
    state: str  # new, accepted, rejected, used, unknown
    message: str
    is_wrong: bool = False  # the label is none of the classes, or of another type


def decode_inputs(encoding: str, inputs: bytes, n_rows: int) -> Any:
    """An array (n, d) of numbers, or n lists of d values."""
    return np.frombuffer(inputs, "<f8").reshape(n_rows, -1) if encoding == "f8" else json.loads(inputs)


class StoredRequest:
    """One row of `predictions`, decoded once."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored
        self.outputs: list = json.loads(stored.outputs)
        self.audit = frozenset(json.loads(stored.audit or "[]"))

    def index(self, row: int | None) -> int | None:
        """The index of the row that an id names: None if the request has no such row."""
        n = self.stored.n_rows
        if row is None:
            return 0 if n == 1 else None
        return row if 1 < n > row else None

    @cached_property
    def inputs(self) -> Any:
        return decode_inputs(self.stored.format, self.stored.inputs, self.stored.n_rows)

    def encode_row(self, index: int) -> bytes:
        """The inputs of one row, in the same format."""
        row = self.inputs[index]
        return row.tobytes() if self.stored.format == "f8" else as_json([row]).encode()


def request_id(time_ns: int, random_bits: int) -> str:
    """26 hexadecimal digits that sort by time. `random_bits` below 2**40."""
    return f"{time_ns:016x}{random_bits:010x}"


def request_time(request: str) -> float:
    """Unix seconds of a request."""
    return int(request[:16], 16) / 1e9


def prediction_id(request: str, row: int, n_rows: int) -> str:
    return request if n_rows == 1 else f"{request}.{row}"


def parse(prediction_id: str) -> tuple[str, int | None]:
    """The request, "" if the text is no id, and the row, None if the id names none."""
    match = PREDICTION_ID.fullmatch(prediction_id)
    return (match[1], None if match[2] is None else int(match[2])) if match else ("", None)


def as_json(value: Any) -> str:
    with suppress(UnicodeEncodeError, TypeError):
        return encode(value).decode()
    return json.dumps(value, default=str)


def local_annotator() -> str:
    """The annotator of labels that a process stores by itself: the user of the operating system."""
    try:
        return f"local:{getpass.getuser()}"
    except (OSError, KeyError, ImportError):  # a container may run under a number without a name
        return f"local:{os.getuid()}"


def clean(text: str | None) -> str | None:
    """The text without characters that a database cannot hold."""
    return None if text is None else text.replace("\0", "").encode("utf-8", "replace").decode()


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
