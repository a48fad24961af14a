"""Limits on requests: the bytes of their bodies, the labels per minute, and the size of their tables.

A table is checked before pandas makes it, because a short body can ask for a table of any size. JSON and CSV can leave out
cells, which pandas fills in. The time and memory of pandas also grow with the number of columns, whether or not the model
takes them.
"""

import csv
import time
from collections.abc import Iterable, Mapping
from io import StringIO
from itertools import chain, islice
from typing import Any

from mlflow.pyfunc import scoring_server
from starlette.types import Receive

from alacarte.serving.rows import InputSchema, RequestError

LARGE_BODY = 1_000_000  # bytes; a larger body is parsed outside the event loop, and is refused when there are too many
ALL_BODIES = 256_000_000  # bytes of all bodies that are read or answered at the same time

# Characters that one column of a request may take in memory: numpy gives every text the length of the longest.
CHARACTERS = 100_000_000
SPARSE_CELLS = 1_000_000  # of a request with more cells than bytes
MORE_COLUMNS = 1_000  # columns beside the columns of the model

csv.field_size_limit(CHARACTERS)  # Python refuses a text of more than 131,072 characters otherwise


class Bodies:
    """Reads the bodies of requests, and limits the bytes of all bodies together."""

    def __init__(self, max_body: int) -> None:
        self._held, self._limit = 0, max(ALL_BODIES, 2 * max_body)

    async def read(self, headers: Mapping[str, str], receive: Receive, limit: int) -> bytes:
        """The body of a request. The caller must release a body that may be large.

        Raises RequestError 413 for more than `limit` bytes, 408 for a body that does not arrive completely, and 503 for a
        large body if there are too many.
        """
        too_large = RequestError(413, f"a body may have {limit} bytes; send less at a time")
        length = headers.get("content-length", "0")
        if len(length) > 15 or int(length) > limit:
            raise too_large
        pieces, size, more = [], 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(408, "the body did not arrive completely")
                piece, more = message["body"], message["more_body"]
                pieces.append(piece)
                size += len(piece)
                self._held += len(piece)
                if size > limit:
                    raise too_large
                if size > LARGE_BODY and self._held > self._limit:
                    raise RequestError(503, f"too many large bodies; try again, or send at most {LARGE_BODY} bytes")
        except BaseException:
            self._held -= size
            raise
        body = b"".join(pieces)
        if size <= LARGE_BODY:
            self._held -= size
        return body

    def release(self, body: bytes) -> None:
        if len(body) > LARGE_BODY:
            self._held -= len(body)


class LabelRate:
    """At most `per_minute` labels for each key, as a bucket that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> (labels left, time)

    def check(self, key: str, count: int = 1) -> float:
        """The labels that are left. RequestError 429 if these are fewer than `count`."""
        left, updated = self._buckets.get(key, (float(self._per_minute), time.monotonic()))
        left = min(self._per_minute, left + (time.monotonic() - updated) * self._per_minute / 60)
        if count > left:
            seconds = (count - left) * 60 / self._per_minute
            advice = "send fewer at a time" if count > self._per_minute else f"wait {seconds:.0f} s"
            raise RequestError(429, f"at most {self._per_minute} labels a minute are taken: {advice}; none was stored")
        return left

    def take(self, key: str, count: int) -> None:
        """Use up `count` labels. RequestError 429 if these are more than are left; then none is used up."""
        left, now = self.check(key, count), time.monotonic()
        if len(self._buckets) > 10_000:  # a bucket is full again after a minute
            self._buckets = {k: bucket for k, bucket in self._buckets.items() if now - bucket[1] < 60}
        self._buckets[key] = (left - count, now)


def check_rows(n: int, max_rows: int) -> None:
    if n > max_rows:
        raise RequestError(413, f"a request may have {max_rows} rows; send fewer at a time")


def check_text(longest: int, n: int) -> None:
    if longest * n > CHARACTERS:
        raise RequestError(413, f"{n} rows may have texts of {CHARACTERS // n} characters; send fewer rows at a time")


def check_json(decoded: Any, body: bytes, schema: InputSchema, max_rows: int) -> None:
    """RequestError 413 for a table that is too large. `decoded` is the object that `body` spells."""
    for table in (decoded.get(key) for key in scoring_server.SUPPORTED_FORMATS):
        n = width = 0
        if isinstance(table, dict) and "data" in table:
            n, width, table = _length(table.get("index")), _length(table.get("columns")), table["data"]
        if isinstance(table, dict):
            n, width = max([n, *map(_length, table.values())]), max(width, len(table))
        elif isinstance(table, list):
            n, width = max(n, len(table)), max([width, *map(_length, table)])
            width = max(width, len(set(chain.from_iterable(row for row in table if isinstance(row, dict)))))
        check_rows(n, max_rows)
        _check_columns(width, schema)
        _check_sparse(n * width, body)
        if n * len(body) > CHARACTERS:  # every second part between quotes is a text, once no quote is escaped
            parts = body.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')[1::2]
            check_text(max(map(len, parts), default=0), n)


def check_csv(text: str, schema: InputSchema) -> None:
    """RequestError 413 for a table that is too large. pandas takes the width of the first two rows for the width of all."""
    first = islice(filter(None, csv.reader(StringIO(text, newline=""))), 2)
    width = max(map(len, first), default=0)
    _check_columns(width, schema)
    _check_sparse(width * (text.count("\n") + text.count("\r")), text)


def longest(values: Iterable[Any]) -> int:
    """The number of characters of the longest text."""
    return max((len(value) for value in values if isinstance(value, str)), default=0)


def _check_columns(width: int, schema: InputSchema) -> None:
    most = len(schema.names) + MORE_COLUMNS
    if width > most and not schema.tensor:
        raise RequestError(413, f"a request may have {most} columns; send those of the model, see GET /model")


def _check_sparse(cells: int, body: bytes | str) -> None:
    if cells > max(SPARSE_CELLS, len(body)):
        raise RequestError(413, f"a request with more than {SPARSE_CELLS} cells may leave none out; send fewer rows")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0
