"""Many numbers from JSON straight into an array, by simdjson, without making Python objects of them."""

from typing import Any

import numpy as np
import simdjson

MANY = 20_000  # bytes of a body from which it pays


def read_numbers(body: bytes, names: list[str]) -> np.ndarray | None:
    """(n, d) float64 of a dataframe_split with these columns in this order and nothing but numbers; None for anything else.

    Twice as fast as making Python's numbers first.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        return None
    try:
        document: Any = simdjson.Parser().parse(body)
        if list(document.keys()) != ["dataframe_split"]:  # a key that comes twice is listed twice
            return None
        split = document["dataframe_split"]
        if sorted(split.keys()) != ["columns", "data"] or split["columns"].as_list() != names:
            return None
        table = split["data"]
        # as_buffer takes any nesting: a bracket for each row, two for the lists around, and none within a row
        if body.count(b"[") != len(table) + 2 + sum(name.count("[") for name in names):
            return None
        if any(len(row) != len(names) for row in table):
            return None
        return np.frombuffer(table.as_buffer(of_type="d")).reshape(len(table), len(names)) if len(table) else None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
