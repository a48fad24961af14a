"""The reader of many numbers reads tables of numbers, and leaves every other body to the other parsers."""

import json

import numpy as np
import pytest

from alacarte.serving.requests import read_numbers

NAMES = ["a", "b[0]", "c"]
ROWS = np.random.default_rng(0).normal(size=(500, 3))


def body(columns: object = NAMES, data: object = None, **more: object) -> bytes:
    table = ROWS.tolist() if data is None else data
    return json.dumps({"dataframe_split": {"columns": columns, "data": table, **more}}).encode()


def test_numbers_are_read_to_the_last_bit():
    read = read_numbers(body(), NAMES)
    assert read is not None and (read == ROWS).all()
    whole = read_numbers(body(data=[[1, 2, 3], [4, -5, 2**60]]), NAMES)
    assert whole is not None and whole.tolist() == [[1, 2, 3], [4, -5, 2**60]]
    turned = json.dumps({"dataframe_split": {"data": [[1, 2, 3.5]], "columns": NAMES}}).encode()
    assert read_numbers(turned, NAMES).tolist() == [[1, 2, 3.5]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "odd",
    [
        body(columns=["a", "c", "b[0]"]),
        body(columns=["a", "b[0]"]),
        body(index=[0]),
        body(data=[[1, 2], [3, 4, 5, 6]]),
        body(data=[[1, 2, [3]]]),
        body(data=[[1, [2, 3]]]),
        body(data=[[1, 2, None]]),
        body(data=[[1, 2, True]]),
        body(data=[[1, 2, "3"]]),
        body(data=[[1, 2, {"x": 3}]]),
        body(data=[{"a": 1, "b[0]": 2, "c": 3}]),
        body(data=[[1, 2, float("nan")]]),
        body(data=[[1, 2, 10**30]]),
        body(data=[1, 2, 3]),
        body(data=[]),
        body(data={}),
        body(data=[[1, 2, 3]]).replace(b"3]", b"1e999]"),
        body()[:-1],
        body() + b"x",
        b"\xef\xbb\xbf" + body(),
        body(columns=["a", "b[0]", "\xff"]).replace(b"\\u00ff", b"\xff"),
        b'{"dataframe_split": {"columns": ["a", "b[0]", "c"], "data": [[1, 2, 3]], "data": [[4, 5, 6]]}}',
        b'{"dataframe_split": 1, "dataframe_split": {"columns": ["a", "b[0]", "c"], "data": [[1, 2, 3]]}}',
        b'{"dataframe_split": {"columns": ["a", "b[0]", "c"], "data": [[1, 2, 3]]}, "params": {}}',
        b"[1, 2, 3]",
        b"",
        b"[" * 100_000,
    ],
)
def test_any_other_body_is_left_to_the_other_parsers(odd: bytes):
    assert read_numbers(odd, NAMES) is None
